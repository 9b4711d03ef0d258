"""The command line: `harness plan | build | verify | ppl | bench | report …`, one subcommand a stage.

Arguments in, a table on stdout, progress on stderr. Nothing else in the package prints or exits.

Exit codes: 0 good, 1 findings, a failed gate or a stale report, 2 the user's error (one sentence and a remedy), 3 a
gate that cannot tell, 130 interrupted.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.allocator import keep_freed_memory
from harness.arguments import DEFAULT_SUITE, parser
from harness.errors import UserError
from harness.suite.load import load
from harness.suite.names import SOURCE
from harness.suite.schema import Suite

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.audit.findings import Finding
    from harness.progress import Progress
    from harness.quantize.artifact import Artifact
    from harness.record.store import Record, Skipped
    from harness.stages import Job, Model

_MOST_FINDINGS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    keep_freed_memory()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    try:
        code = _COMMANDS[options.command](options, tuple(given))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"harness: {error.problem}\n  {error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "harness: interrupted. The same command starts again; builds, perplexities and task evals continue where "
            "they were.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of the table has gone (`harness ppl | head`); what is left in the buffer must go nowhere too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"harness: {place}{error.strerror or error}.\n  Check the path, its rights and the disk.", file=sys.stderr
        )
        return 2


@contextmanager
def _progress() -> "Iterator[Progress]":
    """Draws one bar per description on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(done: int, total: int, description: str, note: str = "", /) -> None:
            if description not in tasks:
                for task in tasks.values():
                    bars.stop_task(task)
                tasks[description] = bars.add_task(description, total=total, note="")
            bars.update(tasks[description], completed=done, total=total, note=note)

        yield advance


def _load_suite(options: argparse.Namespace) -> Suite:
    return load(_suite_file(options))


def _suite_file(options: argparse.Namespace) -> Path:
    path = Path(options.suite or DEFAULT_SUITE)
    if options.suite is None and not path.exists():
        from harness import demo

        path = demo.SUITE
    return path


@contextmanager
def _job(options: argparse.Namespace, arguments: tuple[str, ...]) -> "Iterator[Job]":
    from harness.record.schema import new_id
    from harness.stages import Job

    suite = _load_suite(options)
    # Found out before a model is loaded, not after it was measured.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")
    with _progress() as progress:
        yield Job(suite, options.artifacts, options.results, progress, ("harness", *arguments), new_id())


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from tabulate import tabulate

    align = ("left", *("right" for _ in headers[1:]))
    return tabulate(rows, headers=headers, tablefmt="simple", colalign=align, disable_numparse=True)


def _plan(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.quantize.plan import COMPUTED_BYTES, calibration_memory, check_memory
    from harness.quantize.recipes import recipe_named
    from harness.report.numbers import format_bytes
    from harness.stages import plan_source

    if not options.recipe and (options.scales or options.codes):
        raise UserError("--scales and --codes go with a --recipe.", "Name one.")
    recipe = recipe_named(options.recipe).with_method(options.scales, options.codes) if options.recipe else None
    needs_calibration = recipe is not None and recipe.needs_calibration
    if options.memory_gb and not needs_calibration:
        raise UserError("--memory-gb is about calibration, and nothing is calibrated.", "Name a calibrated recipe.")
    config, plan = plan_source(options.source, recipe, options.revision)
    memory = None
    if recipe is not None and needs_calibration:
        hidden = round(options.hidden_gb * 1e9)
        memory = calibration_memory(
            config, recipe, batch_tokens=options.batch_tokens, hidden_bytes=hidden, item_bytes=COMPUTED_BYTES
        )
        if options.memory_gb:
            check_memory(memory, round(options.memory_gb * 1e9))
    bandwidth = options.bandwidth_gbs and options.bandwidth_gbs * 1e9
    traffic = {"source": plan.source_traffic, "output": plan.output_traffic}
    if options.json:
        _print_json(
            {
                "architecture": config.architecture,
                "recipe": recipe.name if recipe else None,
                "num_tensors": plan.num_tensors,
                "num_quantized": plan.num_quantized,
                "source_bytes": plan.source_bytes,
                "output_bytes": plan.output_bytes,
                "roles": [asdict(count) for count in plan.counts],
                "calibration_memory": asdict(memory) | {"total": memory.total} if memory else None,
                "traffic": {
                    name: asdict(one) | {"ceiling_tokens_per_second": one.ceiling(bandwidth) if bandwidth else None}
                    for name, one in traffic.items()
                },
            }
        )
        return 0
    print(f"{config.architecture}, {config.num_layers} layers; recipe {recipe.name if recipe else 'none: all kept'}\n")
    rows = [
        (
            c.role,
            c.format,
            f"{c.num_tensors:,}",
            f"{c.num_params:,}",
            format_bytes(c.source_bytes),
            format_bytes(c.output_bytes),
        )
        for c in plan.counts
    ]
    params = sum(count.num_params for count in plan.counts)
    rows.append(
        (
            "total",
            "",
            f"{plan.num_tensors:,}",
            f"{params:,}",
            format_bytes(plan.source_bytes),
            format_bytes(plan.output_bytes),
        )
    )
    print(_table(("role", "format", "tensors", "parameters", "source", "output"), rows))
    kept = plan.num_tensors - plan.num_quantized
    print(f"\n{plan.num_quantized:,} tensors quantized, {kept:,} kept; 1 GB = 10⁹ bytes.\n")
    lines = [
        ("weights read per decoded token", *(format_bytes(one.weight_bytes) for one in traffic.values())),
        ("DeltaNet state per sequence", *(format_bytes(one.state_bytes) for one in traffic.values())),
        ("KV cache per token (16-bit)", *(format_bytes(one.kv_bytes_per_token) for one in traffic.values())),
    ]
    if bandwidth:
        name = f"decode ceiling at {options.bandwidth_gbs:g} GB/s, batch 1"
        lines.append((name, *(f"{one.ceiling(bandwidth):,.2f} tok/s" for one in traffic.values())))
    print(_table(("", "source", "output"), lines))
    if memory is not None and recipe is not None:
        print(
            f"\nCalibration (scales {recipe.method.scales}, codes {recipe.method.codes}) holds one layer at a time: at "
            f"most {format_bytes(memory.total)} of memory with {options.batch_tokens:,} tokens in a forward pass."
        )
        print(_table(("of it", ""), [(name, format_bytes(size)) for name, size in asdict(memory).items()]))
    return 0


def _build(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.quantize.build import build
    from harness.quantize.recipes import recipe_named
    from harness.report.numbers import format_bytes
    from harness.stages import build_variant, chosen_variants, find_source, read_calibration
    from harness.suite.load import load_calibration

    if options.source is None:
        if options.recipe or options.out or options.calibration or options.scales or options.codes:
            raise UserError(
                "--recipe, --scales, --codes, --calibration and --out go with a SOURCE.",
                "Name one, or build a suite's variants without them.",
            )
        with _job(options, arguments) as job:
            built = [
                build_variant(job, name) for name in chosen_variants(job.suite, options.variant, with_source=False)
            ]
    else:
        if options.suite or options.variant:
            raise UserError("--suite and --variant do not go with a SOURCE.", "Leave them out, or leave SOURCE out.")
        if not (options.recipe and options.out):
            raise UserError("SOURCE needs --recipe and --out.", "For example: --recipe rtn-a16 --out my-model-nvfp4.")
        recipe = recipe_named(options.recipe).with_method(options.scales, options.codes)
        with _progress() as progress:
            source, calibration = find_source(options.source), None
            if options.calibration and not recipe.needs_calibration:
                raise UserError(f"Recipe '{recipe.name}' looks at no data.", "Leave --calibration out.")
            if options.calibration:
                calibration = read_calibration(*load_calibration(options.calibration), source, progress)
            built = [build(source, recipe, options.out, progress, calibration)]
    if options.json:
        _print_json([_built_as_json(one) for one in built])
        return 0
    for one in built:
        total = sum(count.output_bytes for count in one.counts)
        how = "reused" if one.reused else f"built in {sum(seconds for _, seconds in one.stage_seconds):.1f} s"
        print(f"{one.folder}  {format_bytes(total)}  {how}  digest {one.digest[:12]}")
        for line in _calibration_lines(one):
            print(f"  {line}")
    return 0


def _built_as_json(artifact: "Artifact") -> dict[str, Any]:
    from harness.record.provenance import peak_rss_bytes

    return {
        "folder": str(artifact.folder),
        "digest": artifact.digest,
        "reused": artifact.reused,
        "output_bytes": sum(count.output_bytes for count in artifact.counts),
        "stage_seconds": dict(artifact.stage_seconds),
        "num_calibration_tokens": artifact.num_calibration_tokens,
        "planned_memory_bytes": artifact.planned_memory_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_vram_bytes": artifact.peak_vram_bytes,
        "layers": list(artifact.layers),
    }


def _calibration_lines(artifact: "Artifact") -> Iterator[str]:
    """What calibration has to say of a new artifact."""
    from harness.record.provenance import peak_rss_bytes
    from harness.report.numbers import format_bytes

    if not artifact.layers or artifact.planned_memory_bytes is None:
        return
    seconds = sum(layer["seconds"]["total"] for layer in artifact.layers)
    tokens = artifact.num_calibration_tokens
    yield (
        f"{tokens:,} calibration tokens through {len(artifact.layers)} layers: "
        f"{seconds / len(artifact.layers):.1f} s and {tokens * len(artifact.layers) / seconds:,.0f} tokens/s a layer"
    )
    if (peak := peak_rss_bytes()) is not None:
        yield f"peak memory {format_bytes(peak)} of {format_bytes(artifact.planned_memory_bytes)} planned"
    groups = [group for layer in artifact.layers for group in layer["groups"] if group["rtn_error"]]
    if groups:
        share = sum(group["error"] for group in groups) / sum(group["rtn_error"] for group in groups)
        yield f"output error of the layers on their calibration inputs: {share:.2f} of round-to-nearest's"
        if damped := [group for group in groups if group["damping"] > min(g["damping"] for g in groups)]:
            yield f"more damping was needed in {len(damped)} groups, such as {damped[0]['group']}"
    for layer in artifact.layers:
        if unreached := [str(expert) for expert, count in enumerate(layer["routed"] or ()) if count == 0]:
            yield f"layer {layer['index']}: no token was routed to experts {', '.join(unreached)}"


def _verify(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.audit.verify import verify
    from harness.stages import chosen_variants, find_source, verify_variant

    if options.folder is None:
        if options.source:
            raise UserError("--source goes with a DIR.", "Name the folder; a suite knows its own source.")
        with _job(options, arguments) as job:
            names = chosen_variants(job.suite, options.variant, with_source=False)
            outcomes = {str(job.artifact(name)): verify_variant(job, name) for name in names}
    else:
        if options.suite or options.variant:
            raise UserError("--suite and --variant do not go with a DIR.", "Leave them out, or leave DIR out.")
        source = find_source(options.source) if options.source else None
        with _progress() as progress:
            outcomes = {str(options.folder): verify(options.folder, source, progress)}
    passed = all(outcome.passed for outcome in outcomes.values())
    if options.json:
        _print_json({folder: {"passed": one.passed, **asdict(one)} for folder, one in outcomes.items()})
        return 0 if passed else 1
    for folder, outcome in outcomes.items():
        print(f"{folder}: {outcome.num_tensors:,} tensors, {outcome.num_quantized_modules:,} quantized layers")
        _print_findings(outcome.findings)
        if outcome.round_trips:
            rows = [
                (
                    trip.role,
                    trip.format,
                    f"{trip.num_tensors:,}",
                    f"{trip.max_abs_error:.3g}",
                    f"{trip.mean_abs_error:.3g}",
                    f"{trip.relative_l2_error:.4f}",
                    f"{trip.snr_db:.2f}",
                )
                for trip in outcome.round_trips
            ]
            heads = ("role", "format", "tensors", "max |error|", "mean |error|", "relative L2", "SNR dB")
            print(f"\n{_table(heads, rows)}\n")
        unsure = "" if outcome.compared_with_source else " (not compared with a source: give --source)"
        print(f"{'passed' if outcome.passed else 'FAILED'}{unsure}")
    return 0 if passed else 1


def _print_findings(findings: "Sequence[Finding]") -> None:
    for finding in findings[:_MOST_FINDINGS]:
        print(f"  {finding.severity}: {finding.tensor} {finding.problem}.\n    In vLLM: {finding.consequence}.")
    if (more := len(findings) - _MOST_FINDINGS) > 0:
        print(f"  … and {more:,} more findings (--json lists them all)")


def _repair(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.audit.repair import MAX_RELATIVE_ERROR, repair
    from harness.stages import find_source

    source = find_source(options.source) if options.source else None
    largest = options.max_error or MAX_RELATIVE_ERROR
    with _progress() as progress:
        outcome = repair(options.folder, options.out, source, max_relative_error=largest, progress=progress)
    if options.json:
        _print_json({"passed": outcome.passed, **asdict(outcome), "out": str(outcome.out)})
        return 0 if outcome.passed else 1
    if outcome.scales:
        rows = [
            (one.fused, one.suffix, " ".join(f"{g:.5g}" for g in one.before), f"{one.shared:.5g}", error)
            for one in outcome.scales
            for error in [f"{one.relative_error:.4f}" + (" refused" if one in outcome.refused else "")]
        ]
        print(f"{_table(('layer that vLLM fuses', 'scale', 'before', 'shared', 'error added'), rows)}\n")
    for kind, names in (("tensors", outcome.tensors), ("files", outcome.files)):
        if names:
            print(f"{len(names):,} {kind} from the source: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    if outcome.refused:
        print(f"{len(outcome.refused):,} layers would lose more than {largest:g} of their norm: nothing is written.")
    else:
        print(f"{outcome.out}: written" if outcome.written else "There is nothing to mend, and nothing is written.")
    _print_findings(outcome.verification.findings)
    print("passed" if outcome.passed else "FAILED")
    return 0 if outcome.passed else 1


def _sensitivity(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.report import columns, sensitivity_tables
    from harness.stages import measure_sensitivity

    with _job(options, arguments) as job:
        measured = {SOURCE: measure_sensitivity(job)}
    frame = sensitivity_tables.sensitivity_table(measured)
    words = sensitivity_tables.sensitivity_words(frame)
    if options.json:
        files = {variant: str(record.path) for variant, record in measured.items()}
        _print_json({"records": files, "tables": [columns.json_rows(frame)], "summary": words})
        return 0
    print(f"\n{columns.terminal_table(frame)}\n", *words, sep="\n")
    print("\nRecords:", *(f"  {record.path}" for record in measured.values()), sep="\n")
    return 0


def _ppl(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.perplexity import measure, prepare, with_stored_source
    from harness.report import fidelity_tables, perplexity_tables

    with _measuring_job(options, arguments) as job:
        work = prepare(job, options.variant)
        _print_models(options, work.models)
        found = measure(job, work, options.limit, fresh=options.fresh)
        shown = with_stored_source(job, found.records)
        frame = perplexity_tables.perplexity_table(shown, fidelity_tables.log_ppl_floor(_stored_noise(job), shown))
    frames = [frame] if found.records else []
    return _print_measured(
        options, found.records, frames, found.failures, notes=perplexity_tables.reused_windows(found.records)
    )


def _bench(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.report import speed_tables
    from harness.stages import measure_decode, prepare, prepare_server, required, with_stored_source

    with _measuring_job(options, arguments) as job:
        if options.server:
            if options.engine or options.dtype or len(options.variant or ()) != 1:
                raise UserError("--server takes one --variant, the one it serves, no --engine, no --dtype.", "Name it.")
            job, work = prepare_server(replace(job, server=options.server), options.variant[0])
        else:
            work = prepare(job, options.variant)
        _print_models(options, work.models)
        measured = measure_decode(job, work, options.limit)
        records = measured.records
        versus = required(job.suite, "bench", job.suite.bench).versus
        frames = speed_tables.bench_tables(with_stored_source(job, "bench", records), versus) if records else []
    return _print_measured(options, records, frames, measured.failures)


def _tasks(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.evaluation import evaluate, prepare, with_stored_source
    from harness.report import task_tables

    with _measuring_job(options, arguments) as job:
        work = prepare(job, options.variant, options.task)
        _print_models(options, work.models)
        found = evaluate(job, work, limit=options.limit, fresh=options.fresh)
        shown = with_stored_source(job, found)
    invalid = [
        f"{row}, {label} is invalid: {reason}."
        for label, rows in found.records.items()
        for row, record in rows.items()
        for reason in task_tables.invalid(record, shown[label].get(SOURCE))
    ]
    frames = (task_tables.score_table(shown), task_tables.answer_table(shown))
    notes = task_tables.reused_answers(found.records)
    return _print_measured(options, found.records, frames, found.failures, notes=notes, invalid=invalid)


def _fidelity(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.fidelity import compare, prepare
    from harness.report import fidelity_tables

    with _measuring_job(options, arguments) as job:
        work = prepare(job, options.variant)
        _print_models(options, work.models)
        measured = compare(job, work, options.limit)
        stored = _stored_noise(job)
    records = measured.records
    shown = {**records, **{row: one for row, one in stored.items() if row not in records}}
    frames = [fidelity_tables.divergence_table(shown), fidelity_tables.band_table(shown)] if records else []
    return _print_measured(options, records, frames, measured.failures)


@contextmanager
def _measuring_job(options: argparse.Namespace, arguments: tuple[str, ...]) -> "Iterator[Job]":
    """The job of a measure, on the engine that the command names."""
    from harness.stages import with_engine

    with _job(options, arguments) as job:
        yield replace(job, suite=with_engine(job.suite, options.engine, options.dtype))


def _print_measured(
    options: argparse.Namespace,
    records: "Mapping[str, Record] | Mapping[str, Mapping[str, Record]]",
    frames: "Sequence[DataFrame]",
    failures: Mapping[str, str],
    *,
    notes: Iterable[str] = (),
    invalid: Sequence[str] | None = None,
) -> int:
    """The tables of a measure, where its records lie (by row, or by protocol or task and row), what must be said of
    them, and what failed; the exit code. `invalid` is None for a measure that has no audit."""
    from harness.report import columns, runs

    by_name = {name: one if isinstance(one, Mapping) else {name: one} for name, one in records.items()}
    flat = [(row, record) for rows in by_name.values() for row, record in rows.items()]
    filled = [frame for frame in frames if not frame.empty]
    warnings = runs.engine_warnings([record for _, record in flat])
    code = 1 if failures or invalid else 0
    if options.json:
        files = {
            name: {row: str(record.path) for row, record in one.items()} if isinstance(one, Mapping) else str(one.path)
            for name, one in records.items()
        }
        shown = [columns.json_rows(frame) for frame in filled]
        found = {"records": files, "tables": shown, "warnings": warnings, "failures": dict(failures)}
        _print_json(found if invalid is None else {**found, "invalid": list(invalid)})
        return code
    for frame in filled:
        print(f"\n{columns.terminal_table(frame)}")
    for line in notes:
        print(line)
    if flat:
        print("\nRecords:", *(f"  {record.path}" for _, record in flat), sep="\n")
    for line in (*warnings, *(invalid or ()), *(f"{row} failed: {reason}" for row, reason in failures.items())):
        print(f"harness: {line}", file=sys.stderr)
    return code


def _print_models(options: argparse.Namespace, models: "Sequence[Model]") -> None:
    if not options.json:
        for model in models:
            if model.reused is not None and model.digest and model.setup is None:
                print(f"{model.folder}: {'reused' if model.reused else 'built'}, digest {model.digest[:12]}")


def _stored_noise(job: "Job") -> "dict[str, Record]":
    """The newest stored runs of the source beside itself."""
    from harness.record import store
    from harness.report import runs
    from harness.suite.names import NOISE

    stored, _ = store.read_all(job.results)
    return runs.newest_runs(stored, job.suite.name, "fidelity", NOISE)


def _import(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness.measure.vllm_bench import BatchShape
    from harness.report import columns, speed_tables
    from harness.stages import import_benchmark

    given = (options.batch, options.prompt_tokens, options.new_tokens)
    if any(given) and not all(given):
        raise UserError("--batch, --prompt-tokens and --new-tokens go together.", "Give all of them.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.machine):
        raise UserError(f"--machine '{options.machine}' is no name.", "Use lower-case letters, digits, '.' and '-'.")
    shape = BatchShape(*given) if all(given) else None
    with _job(options, arguments) as job:
        record = import_benchmark(job, options.variant, options.file, shape, options.machine, options.vllm_version)
    frame = speed_tables.served_table({options.variant: record})
    if options.json:
        _print_json({"record": str(record.path), "tables": [columns.json_rows(frame)]})
    else:
        print(f"{columns.terminal_table(frame)}\n\nRecord: {record.path}")
    return 0


def _serve_command(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness import serve
    from harness.quantize.recipes import recipe_named
    from harness.report.numbers import format_bytes
    from harness.stages import chosen_variants, footprint, plan_source

    suite = _load_suite(options)
    (variant,) = chosen_variants(suite, [options.variant], with_source=False)
    recipe = recipe_named(suite.variants[variant].recipe)
    config, plan = plan_source(suite.source_location(), recipe, suite.source.revision)
    if options.mtp and not any(count.role == "mtp" for count in plan.counts):
        raise UserError(
            f"The source of suite '{suite.name}' shows no MTP head.", "Leave --mtp out, or download the source first."
        )
    common = {"utilization": options.utilization, "images": not options.no_images, "num_gpus": options.gpus}
    sizing = serve.size(
        footprint(config, plan.counts),
        gpu_gib=options.gpu_memory,
        overhead_gb=options.overhead_gb,
        users=options.users,
        **common,
    )
    model = (options.artifacts / suite.name / variant).as_posix()
    model = model if model.startswith("/") else f"./{model}"
    given = serve.arguments(sizing, name=f"{suite.name}-{variant}", speculative_tokens=options.mtp, **common)
    commands = {
        "vllm": serve.vllm_line(model, given),
        "docker, bash": serve.docker_bash(model, given),
        "docker, PowerShell": serve.docker_powershell(model, given),
        "compose.yaml": serve.compose(model, given),
    }
    if options.json:
        _print_json({"sizing": asdict(sizing), "commands": commands})
        return 0
    rows = [
        ("GPU memory that vLLM may take", format_bytes(sizing.gpu_bytes)),
        ("weights", format_bytes(sizing.weight_bytes)),
        ("overhead, assumed", format_bytes(sizing.overhead_bytes)),
        ("left to sequences", format_bytes(sizing.cache_bytes)),
        ("DeltaNet state of a sequence", format_bytes(sizing.state_bytes)),
        ("keys and values of a token", format_bytes(sizing.kv_bytes_per_token)),
        ("longest single sequence, tokens", f"{sizing.max_model_len:,}"),
        (f"tokens of {sizing.users} sequences together", f"{sizing.shared_tokens:,}"),
    ]
    print(_table(("", ""), rows))
    for title, text in commands.items():
        print(f"\n# {title}\n{text}")
    return 0


def _report(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.report import blocks, card, claims

    suite = _load_suite(options)
    records, skipped = _stored_records(options.results)
    named = [Path(page) for page in options.pages] or [page for page in (Path("README.md"),) if page.exists()]
    pages = {}
    for page in named:
        try:
            pages[page.as_posix()] = page.read_bytes()
        except OSError as error:
            raise UserError(f"{page} cannot be read ({error.strerror}).", "Name a Markdown file.") from error
    edits = [
        f"{page}, line {block.line}: the block '{block.name}' was edited by hand."
        for page, data in pages.items()
        for block in blocks.edited(page, data, suite.name)
    ]
    if edits and not options.check and not options.overwrite:
        raise UserError(" ".join(edits), "Move your words out of it, or lose them by --overwrite.")
    word = "stale" if options.check else "written"
    said = claims.claims_of(suite, records, skipped)
    if unsupported := [claim for claim in said if not claim.supported]:
        print(*(f"harness: {claim.reason}." for claim in unsupported), f"  {claims.REMEDY}", sep="\n", file=sys.stderr)
        if options.json:
            _print_json({"files": [], word: [], "edited": edits, "claims": claims.rows(said)})
        return 1
    rendered = card.generated_files(suite, records, results_dir=options.results.as_posix(), pages=pages)
    root = Path.cwd()
    changed = card.stale_files(rendered, root) if options.check else card.write_files(rendered, root)
    if options.json:
        _print_json({"files": sorted(rendered), word: changed, "edited": edits, "claims": claims.rows(said)})
    else:
        if options.check:
            print(*edits, sep="\n", end="\n" if edits else "")
        print("\n".join(f"{word}: {path}" for path in changed) or f"up to date: {', '.join(sorted(rendered))}")
    if options.check and changed and not options.json:
        print("Run `nox -s report` and commit what it writes.")
    return 1 if options.check and (changed or edits) else 0


def _trace(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.report.trace import trace

    found = trace(options.card, load(Path(options.suite)) if options.suite else None)
    if options.json:
        _print_json(asdict(found))
    else:
        print(f"{found.num_references} references to {found.num_records} records.")
        print(*found.findings or (f"All {found.num_lines} lines come out of them again.",), sep="\n")
    return 1 if found.findings else 0


def _stored_records(folder: Path) -> "tuple[list[Record], list[Skipped]]":
    """Every complete run of a results folder, and what is not used, which is named."""
    from harness.record import store

    if not folder.is_dir() and (folder.exists() or folder != Path("results")):
        raise UserError(f"{folder} is not a folder.", "Give the folder of the records as --results.")
    records, skipped = store.read_all(folder)
    for one in skipped:
        print(f"harness: {one.path} is not used: {one.reason}", file=sys.stderr)
    return records, skipped


def _export(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.report import card
    from harness.report.evidence import gather
    from harness.report.export import export

    suite = _load_suite(options)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out} is not a folder.", "Give another --out.")
    evidence = gather(suite, _stored_records(options.results)[0], options.results.as_posix())
    files = export(evidence, options.variant or list(suite.variants))
    written = card.write_files(files, options.out)
    if options.json:
        _print_json({"out": options.out.as_posix(), "files": sorted(files), "written": sorted(written)})
    else:
        lines = [f"written: {(options.out / path).as_posix()}" for path in sorted(written)]
        print("\n".join(lines) or f"up to date: {len(files):,} files in {options.out.as_posix()}")
    return 0


def _gate(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.record import baselines
    from harness.report import columns, gate, gate_output

    if options.update_baseline != (options.reason is not None):
        raise UserError("--update-baseline and --reason go together.", "A baseline is changed for a reason: give both.")
    suite = _load_suite(options)
    folder = options.baselines or Path("results")
    if options.baselines is not None and not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Give the folder that baselines/ lies in as --baselines.")
    for place in (options.junit, options.step_summary):
        if place is not None and (place.is_dir() or not place.absolute().parent.is_dir()):
            raise UserError(f"{place} cannot be written.", "Name a file in a folder that exists.")
    records, skipped = _stored_records(options.results)
    if options.update_baseline:
        from harness.record.provenance import git

        checkout = git(Path(__file__).parent)
        chosen = gate.for_baseline(suite, records)
        commit = checkout["commit"] if checkout else None
        path = baselines.update(folder, suite.name, chosen, reason=options.reason, commit=commit)
        named = {where: {row: str(one.path) for row, one in rows.items()} for where, rows in chosen.items()}
        if options.json:
            _print_json({"baseline": str(path), "records": named})
        else:
            print(f"{path}: updated", *(f"  {file}" for rows in named.values() for file in rows.values()), sep="\n")
        return 0
    judgements = gate.judge(suite, records, baselines.read(folder, suite.name), skipped)
    if options.json:
        _print_json({"suite": suite.name, "judgements": gate_output.verdict_rows(judgements)})
    else:
        print(
            f"{columns.terminal_table(gate_output.verdict_table(judgements))}\n\n{gate_output.verdict_counts(judgements)}"
        )
    if options.junit:
        options.junit.write_text(gate_output.junit(suite.name, judgements), encoding="utf-8")
    if options.step_summary:
        with options.step_summary.open("a", encoding="utf-8") as page:
            page.write(gate_output.step_summary(suite.name, judgements))
    return gate.exit_code(judgements)


def _publish(options: argparse.Namespace, arguments: tuple[str, ...]) -> int:
    from harness import publish
    from harness.report.numbers import format_bytes

    publish.check_repo(options.repo)
    token = None if options.dry_run else publish.token_of(os.environ)
    with _job(options, arguments) as job:
        suite, variant = job.suite.name, options.variant
        out = options.out or Path("publish") / suite / variant
        made = publish.assemble(
            job,
            _suite_file(options),
            variant,
            options.repo,
            out,
            *_stored_records(options.results),
            allow_undecided=options.allow_inconclusive,
        )
    told = (*made.findings, *made.undecided)
    if not options.json:
        rows = [(name, format_bytes(size)) for name, size in made.files.items()]
        if rows:
            print(_table(("file", "size"), [*rows, ("total", format_bytes(sum(made.files.values())))]))
        print(*(f"  {one}" for one in told), f"{out}: {'assembled' if rows else 'REFUSED'}", sep="\n")
        if made.exit_code == 3:
            print("Measure what the gate asks for, or give --allow-inconclusive.")
    uploaded = None
    if token is not None and made.exit_code == 0:
        message = f"{suite} {variant}, artifact {made.artifact_digest[:12]}"
        uploaded = publish.upload(
            made, options.repo, message, token, public=options.public, bars=sys.stderr.isatty() and not options.json
        )
    if options.json:
        about = {"suite": suite, "variant": variant, "repo": options.repo}
        _print_json({**about, **asdict(made), "folder": str(out), "uploaded": uploaded and asdict(uploaded)})
    elif uploaded:
        print(f"{uploaded.url}  {'private' if uploaded.private else 'public'}")
        if uploaded.others:
            print(f"  not of this upload, and left there: {', '.join(uploaded.others)}")
    return made.exit_code


def _synthesize(options: argparse.Namespace, _: tuple[str, ...]) -> int:
    from harness.demo.synthesize import synthesize
    from harness.model.checkpoint import read_json
    from harness.report.numbers import format_bytes

    with _progress() as progress:
        total = synthesize(
            read_json(options.config),
            options.out,
            num_layers=options.layers,
            vocab_size=options.vocabulary,
            seed=options.seed,
            progress=progress,
        )
    print(f"{options.out}  {format_bytes(total)} of random weights")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace, tuple[str, ...]], int]] = {
    "plan": _plan,
    "build": _build,
    "verify": _verify,
    "repair": _repair,
    "sensitivity": _sensitivity,
    "tasks": _tasks,
    "ppl": _ppl,
    "fidelity": _fidelity,
    "bench": _bench,
    "import": _import,
    "serve-command": _serve_command,
    "report": _report,
    "trace": _trace,
    "export": _export,
    "gate": _gate,
    "publish": _publish,
    "synthesize": _synthesize,
}
