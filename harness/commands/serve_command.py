"""`harness serve-command`: the commands that serve a variant, and the memory that serving takes."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from harness import serve
from harness.commands.shared import add_shared, format_table, load_suite, positive_number, print_json, whole_number
from harness.errors import UserError
from harness.model.families import role_is
from harness.quantize.recipes import recipe_named
from harness.report.numbers import format_bytes
from harness.resolve import chosen_variants, plan_source, serving_footprint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the variant and the GPUs that serve it."""
    add = parser.add_argument
    with_images, without = serve.OVERHEAD_GB[True], serve.OVERHEAD_GB[False]
    add("--suite", metavar="FILE", required=True, help="the suite's TOML file")
    add("--variant", metavar="NAME", required=True, help="the variant to serve")
    add("--gpu-memory", type=positive_number, metavar="GIB", required=True, help="the memory of one GPU, in GiB")
    add("--gpus", type=whole_number, default=1, metavar="N", help="how many GPUs share every layer (default: 1)")
    add(
        "--utilization",
        type=positive_number,
        default=serve.UTILIZATION,
        metavar="SHARE",
        help=f"the share of the GPU's memory that vLLM may take (default: {serve.UTILIZATION:g})",
    )
    add(
        "--users",
        type=whole_number,
        default=serve.USERS,
        metavar="N",
        help=f"how many requests run at the same time (default: {serve.USERS})",
    )
    add(
        "--overhead-gb",
        type=positive_number,
        metavar="GB",
        help=f"the memory that vLLM keeps for itself (default: {with_images:g}, without images {without:g})",
    )
    add("--mtp", type=whole_number, default=0, metavar="K", help="speculate K tokens with the MTP head (default: none)")
    add("--no-images", action="store_true", help="serve text only, without the vision tower")
    add_shared(parser, "--artifacts", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints the sizing as a table and a command for each way to serve."""
    suite = load_suite(options)
    (variant,) = chosen_variants(suite, [options.variant], with_source=False)
    recipe = recipe_named(suite.variants[variant].recipe)
    source, plan = plan_source(suite.source_location(), recipe, suite.source.revision)
    if options.mtp and not any(role_is(count.role, "mtp") for count in plan.counts):
        raise UserError(
            f"The source of suite '{suite.name}' shows no MTP head.", "Leave --mtp out, or download the source first."
        )
    common = {"utilization": options.utilization, "images": not options.no_images, "num_gpus": options.gpus}
    sizing = serve.size(
        serving_footprint(source.config, plan.counts),
        gpu_gib=options.gpu_memory,
        overhead_gb=options.overhead_gb,
        users=options.users,
        **common,
    )
    model = (options.artifacts / suite.name / variant).as_posix()
    model = model if model.startswith("/") else f"./{model}"
    arguments = serve.vllm_arguments(sizing, name=f"{suite.name}-{variant}", speculative_tokens=options.mtp, **common)
    commands = {
        "vllm": serve.vllm_line(model, arguments),
        "docker, bash": serve.docker_bash(model, arguments),
        "docker, PowerShell": serve.docker_powershell(model, arguments),
        "compose.yaml": serve.compose(model, arguments),
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
    print(format_table(("", ""), rows))
    for title, text in commands.items():
        print(f"\n# {title}\n{text}")
    return 0
