"""The grammar of the command line: every subcommand with its options. What they do is in `cli`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from harness import __version__
from harness.serve import OVERHEAD_GB, USERS, UTILIZATION

DEFAULT_SUITE = "suites/demo.toml"


def parser() -> argparse.ArgumentParser:
    """Of `harness`; what it reads has the name of the subcommand as `command`."""
    top = argparse.ArgumentParser(
        prog="harness", description="Build, verify, measure and report NVFP4 variants of hybrid DeltaNet models."
    )
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=name)
        return sub

    _checkpoints(command)
    _measures(command)
    _serving(command)
    _records(command)
    _publishing(command)
    _demo(commands.add_parser("demo", help="The embedded models and synthetic checkpoints."))
    return top


_Command = Callable[[str, str], argparse.ArgumentParser]  # name and description -> the parser of its options


def _checkpoints(command: _Command) -> None:
    """What makes checkpoints, or looks into them."""
    plan = command("plan", "What a recipe makes of a model, in bytes, without reading weights.")
    plan.add_argument("source", metavar="SOURCE", help="a checkpoint folder, a config.json, a hub id or demo:dense")
    plan.add_argument("--revision", help="of a hub id")
    plan.add_argument("--recipe", help="without one, every tensor is kept")
    _method_options(plan)
    plan.add_argument("--batch-tokens", type=whole_number, default=8192, metavar="N", help="of calibration (8192)")
    plan.add_argument("--hidden-gb", type=positive_number, default=4.0, metavar="G", help="hidden states in memory (4)")
    plan.add_argument("--memory-gb", type=positive_number, metavar="G", help="refuse a calibration that needs more")
    plan.add_argument(
        "--bandwidth-gbs", type=positive_number, metavar="B", help="memory bandwidth in 10⁹ bytes per second"
    )
    _json_option(plan)

    build = command("build", "Build variants as compressed-tensors checkpoints.")
    build.add_argument("source", metavar="SOURCE", nargs="?", help="build this checkpoint instead of a suite's")
    build.add_argument("--recipe", help="with SOURCE")
    build.add_argument("--out", type=Path, metavar="DIR", help="with SOURCE: the new folder")
    build.add_argument("--calibration", type=Path, metavar="F", help="with SOURCE: a TOML file of samples")
    _method_options(build)
    _suite_options(build)

    verify = command("verify", "Check a compressed-tensors checkpoint, ours or not.")
    verify.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="without one, the suite's variants")
    verify.add_argument("--source", metavar="SOURCE", help="with DIR: the checkpoint that it was made from")
    _suite_options(verify)

    repair = command("repair", "Mend in a quantized checkpoint what needs no quantizing anew.")
    repair.add_argument("folder", metavar="DIR", type=Path, help="is only read")
    repair.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    repair.add_argument("--source", metavar="SOURCE", help="gives missing 16-bit tensors and tokenizer files")
    repair.add_argument(
        "--max-error", type=positive_number, metavar="X", help="most that a layer may lose of its norm (0.05)"
    )
    _json_option(repair)


def _measures(command: _Command) -> None:
    """What writes records."""
    sensitivity = command("sensitivity", "What each format would cost each projection of each layer.")
    _place_options(sensitivity)

    for name, text in (
        ("tasks", "Task evals by lm-eval of the source and its variants, item by item."),
        ("ppl", "Perplexity of the source and its variants on the same tokens."),
        ("fidelity", "How far every variant predicts from its source, token by token, and what is noise."),
        ("bench", "Decode and prefill speed of the source and its variants."),
    ):
        measure = command(name, text)
        _suite_options(measure)
        measure.add_argument("--engine", metavar="NAME", help="instead of the suite's")
        measure.add_argument("--dtype", metavar="TYPE", help="instead of the suite's")
        measure.add_argument(
            "--limit", type=whole_number, metavar="N", help="only the first N windows, repetitions or documents"
        )
        if name == "tasks":
            measure.add_argument("--task", action="append", metavar="T", help="only this task (may be repeated)")
        if name in ("tasks", "ppl"):
            measure.add_argument("--fresh", action="store_true", help="forget what earlier runs have computed")
        if name == "bench":
            measure.add_argument(
                "--server", metavar="URL", help="measure a running OpenAI-compatible server of the one --variant"
            )

    imported = command("import", "Take what `vllm bench` wrote on another machine into the records.")
    imported.add_argument("file", metavar="FILE", type=Path, help="JSON of vllm bench serve, latency or throughput")
    imported.add_argument("--variant", metavar="V", required=True, help="that it was run on")
    imported.add_argument("--machine", metavar="NAME", required=True, help="a name for the machine that ran it")
    imported.add_argument("--vllm-version", metavar="X", default="unknown", help="that ran it")
    for name in ("--batch", "--prompt-tokens", "--new-tokens"):
        imported.add_argument(name, type=whole_number, metavar="N", help="of vllm bench latency, whose file has it not")
    _place_options(imported)


def _serving(command: _Command) -> None:
    serve = command("serve-command", "How to serve a variant: commands for vLLM and Docker, with sizes.")
    serve.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    serve.add_argument("--variant", metavar="V", required=True)
    serve.add_argument("--gpu-memory", type=positive_number, metavar="GIB", required=True, help="of one GPU")
    serve.add_argument("--gpus", type=whole_number, default=1, metavar="N", help="that share every layer (1)")
    serve.add_argument(
        "--utilization",
        type=positive_number,
        default=UTILIZATION,
        metavar="U",
        help=f"of the GPU's memory ({UTILIZATION:g})",
    )
    serve.add_argument(
        "--users", type=whole_number, default=USERS, metavar="N", help=f"requests at the same time ({USERS})"
    )
    serve.add_argument(
        "--overhead-gb",
        type=positive_number,
        metavar="G",
        help=f"what vLLM keeps for itself ({OVERHEAD_GB[True]:g}, without images {OVERHEAD_GB[False]:g})",
    )
    serve.add_argument("--mtp", type=whole_number, default=0, metavar="K", help="speculate K tokens by the MTP head")
    serve.add_argument("--no-images", action="store_true", help="without the vision tower")
    serve.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR", help="(artifacts)")
    _json_option(serve)


def _records(command: _Command) -> None:
    """What reads records, and needs no torch."""
    report = command("report", "Write the card, figures and marked tables, if the records support its claims.")
    report.add_argument("pages", nargs="*", metavar="PAGE", help="Markdown files with marked tables (README.md)")
    report.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    report.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is stale")
    report.add_argument("--overwrite", action="store_true", help="replace marked tables that were edited by hand too")
    _json_option(report)

    trace = command("trace", "Follow every number of a card to its record, and compute it again.")
    trace.add_argument("card", metavar="CARD", type=Path, help="a Markdown file, for example reports/demo/README.md")
    trace.add_argument(
        "--suite", metavar="F", help="that the card was written for (what its newest record was made with)"
    )
    _json_option(trace)

    export = command("export", "Write what the records say in the formats that other tools read.")
    export.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    export.add_argument("--variant", action="append", metavar="V", help="only this variant (may be repeated)")
    export.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")
    export.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder; other files in it stay")
    _json_option(export)

    gate = command("gate", "Judge the suite's rules by the records: pass, fail, inconclusive or incomparable.")
    gate.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    gate.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="the new records (results)")
    gate.add_argument(
        "--baselines", type=Path, metavar="DIR", help="records with baselines/, to compare with (results)"
    )
    gate.add_argument("--junit", type=_path_or_none, metavar="FILE", help="write JUnit XML, a test case for each rule")
    gate.add_argument(
        "--step-summary",
        type=_path_or_none,
        metavar="FILE",
        help='append Markdown, for example to "$GITHUB_STEP_SUMMARY"',
    )
    gate.add_argument("--update-baseline", action="store_true", help="make the newest records the baseline")
    gate.add_argument("--reason", metavar="TEXT", help="with --update-baseline: why; it is kept")
    _json_option(gate)


def _publishing(command: _Command) -> None:
    publish = command("publish", "Assemble the upload folder of a variant, check it, and upload it to the model hub.")
    publish.add_argument("--variant", metavar="V", required=True)
    publish.add_argument("--repo", metavar="ID", required=True, help="owner/name; made private where there is none")
    publish.add_argument("--out", type=Path, metavar="DIR", help="the folder (publish/SUITE/VARIANT)")
    publish.add_argument("--dry-run", action="store_true", help="upload nothing; without it HF_TOKEN must be set")
    publish.add_argument("--public", action="store_true", help="make a new repository public, or upload to one that is")
    publish.add_argument(
        "--allow-inconclusive", action="store_true", help="go on where the gate cannot tell, or has nothing to compare"
    )
    _place_options(publish)


def _demo(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    text = "Write a checkpoint of random weights in a configuration's true shapes."
    synthesize = kinds.add_parser("synthesize", help=text, description=text)
    synthesize.set_defaults(command="synthesize")
    synthesize.add_argument("config", type=Path, metavar="CONFIG", help="a config.json")
    synthesize.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    synthesize.add_argument("--layers", type=whole_number, metavar="N", help="instead of the configuration's")
    synthesize.add_argument("--vocabulary", type=whole_number, metavar="N", help="instead of the configuration's")
    synthesize.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")


def _method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scales", metavar="METHOD", help="absmax, search or weighted-search instead of the recipe's")
    parser.add_argument("--codes", metavar="METHOD", help="rtn or gptq instead of the recipe's")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")


def _suite_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", action="append", metavar="V", help="only this variant (may be repeated)")
    _place_options(parser)


def _place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE}, or the embedded one where there is none)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR", help="(artifacts)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")
    _json_option(parser)


def _path_or_none(text: str) -> Path | None:
    """None where a shell variable that holds no path was given."""
    return Path(text) if text else None


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value
