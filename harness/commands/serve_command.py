"""`harness serve-command`: how to serve a variant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.commands.options import DEFAULT_SUITE, add_json, load_suite, positive_number, whole_number
from harness.commands.output import print_json, table
from harness.errors import UserError

HELP = "How to serve a variant: commands for vLLM and Docker, with sizes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the subcommand is asked."""
    from harness.serve import OVERHEAD_GB, USERS, UTILIZATION

    parser.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    parser.add_argument("--variant", metavar="V", required=True)
    parser.add_argument("--gpu-memory", type=positive_number, metavar="GIB", required=True, help="of one GPU")
    parser.add_argument("--gpus", type=whole_number, default=1, metavar="N", help="that share every layer (1)")
    parser.add_argument(
        "--utilization",
        type=positive_number,
        default=UTILIZATION,
        metavar="U",
        help=f"of the GPU's memory ({UTILIZATION:g})",
    )
    parser.add_argument(
        "--users", type=whole_number, default=USERS, metavar="N", help=f"requests at the same time ({USERS})"
    )
    parser.add_argument(
        "--overhead-gb",
        type=positive_number,
        metavar="G",
        help=f"what vLLM keeps for itself ({OVERHEAD_GB[True]:g}, without images {OVERHEAD_GB[False]:g})",
    )
    parser.add_argument("--mtp", type=whole_number, default=0, metavar="K", help="speculate K tokens by the MTP head")
    parser.add_argument("--no-images", action="store_true", help="without the vision tower")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR", help="(artifacts)")
    add_json(parser)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    from harness import serve
    from harness.model.families import part_of_role
    from harness.quantize.recipes import recipe_named
    from harness.report.numbers import format_bytes
    from harness.resolve import chosen_variants, plan_source, serving_footprint

    suite = load_suite(options)
    (variant,) = chosen_variants(suite, [options.variant], with_source=False)
    recipe = recipe_named(suite.variants[variant].recipe)
    config, plan = plan_source(suite.source_location(), recipe, suite.source.revision)
    if options.mtp and not any(part_of_role(count.role) == "mtp" for count in plan.counts):
        raise UserError(
            f"The source of suite '{suite.name}' shows no MTP head.", "Leave --mtp out, or download the source first."
        )
    common = {"utilization": options.utilization, "images": not options.no_images, "num_gpus": options.gpus}
    sizing = serve.size(
        serving_footprint(config, plan.counts),
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
        print_json({"sizing": asdict(sizing), "commands": commands})
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
    print(table(("", ""), rows))
    for title, text in commands.items():
        print(f"\n# {title}\n{text}")
    return 0
