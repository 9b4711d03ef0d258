"""`harness plan`: what a recipe makes of a model, by its configuration alone: tensors, bytes, memory traffic."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from harness.commands.shared import add_shared, format_table, positive_number, print_json, whole_number
from harness.errors import UserError
from harness.quantize.plan import COMPUTED_BYTES, CalibrationMemory, Plan, calibration_memory, check_memory
from harness.quantize.recipes import recipe_named
from harness.report.numbers import format_bytes
from harness.resolve import plan_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the recipe, and what calibration and the ceiling of speed depend on."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a checkpoint folder, a config.json, a hub id or demo:dense")
    add("--revision", metavar="REV", help="the branch, tag or commit of a hub id")
    add("--recipe", metavar="NAME", help="the recipe to plan (default: none, every tensor is kept)")
    add(
        "--batch-tokens",
        type=whole_number,
        default=8192,
        metavar="N",
        help="tokens in one forward pass of calibration (default: 8192)",
    )
    add(
        "--hidden-gb",
        type=positive_number,
        default=4.0,
        metavar="GB",
        help="memory for calibration's hidden states; the rest lies on disk (default: 4)",
    )
    add("--memory-gb", type=positive_number, metavar="GB", help="refuse a calibration that needs more memory than this")
    add(
        "--bandwidth-gbs",
        type=positive_number,
        metavar="GB/S",
        help="memory bandwidth in 10⁹ bytes per second; adds the ceiling of decode speed",
    )
    add_shared(parser, "--scales", "--codes", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints the plan: a row per role, what a decoded token reads, and how much memory calibration takes."""
    if not options.recipe and (options.scales or options.codes):
        raise UserError("--scales and --codes go with a --recipe.", "Name one.")

    recipe = recipe_named(options.recipe).with_method(options.scales, options.codes) if options.recipe else None
    needs_calibration = recipe is not None and recipe.needs_calibration
    if options.memory_gb and not needs_calibration:
        raise UserError("--memory-gb is about calibration, and nothing is calibrated.", "Name a calibrated recipe.")
    source, plan = plan_source(options.source, recipe, options.revision)
    config, memory = source.config, None
    if recipe is not None and needs_calibration:
        hidden = round(options.hidden_gb * 1e9)
        memory = calibration_memory(
            config, recipe, batch_tokens=options.batch_tokens, hidden_bytes=hidden, item_bytes=COMPUTED_BYTES
        )
        if options.memory_gb:
            check_memory(memory, round(options.memory_gb * 1e9))
    bandwidth = options.bandwidth_gbs and options.bandwidth_gbs * 1e9
    if options.json:
        document = {
            "architecture": config.architecture,
            "recipe": recipe.name if recipe else None,
            "notes": list(source.notes),
            "num_tensors": plan.num_tensors,
            "num_quantized": plan.num_quantized,
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "roles": [asdict(count) for count in plan.counts],
            "calibration_memory": asdict(memory) | {"total": memory.total} if memory else None,
            "traffic": {
                name: asdict(traffic) | {"ceiling_tokens_per_second": traffic.ceiling(bandwidth) if bandwidth else None}
                for name, traffic in (("source", plan.source_traffic), ("output", plan.output_traffic))
            },
        }
        print_json(document)
        return 0
    print(f"{config.architecture}, {config.num_layers} layers; recipe {recipe.name if recipe else 'none: all kept'}\n")
    _print_plan(plan, bandwidth)
    for note in source.notes:
        print(f"\nNote: {note}.")
    if memory is not None and recipe is not None:
        print(
            f"\nCalibration (scales {recipe.method.scales}, codes {recipe.method.codes}) holds one layer at a time: at "
            f"most {format_bytes(memory.total)} of memory with {options.batch_tokens:,} tokens in a forward pass."
        )
        print(format_table(("of it", ""), [(name, format_bytes(size)) for name, size in asdict(memory).items()]))
        _print_gpu_share(memory)
    return 0


def _print_gpu_share(memory: CalibrationMemory) -> None:
    """Prints how much of calibration's memory a GPU of this machine would hold, and whether it has that."""
    from harness.doctor.box import this_box

    for gpu in this_box().gpus[:1]:
        share = f"{gpu.name} holds {format_bytes(memory.on_accelerator)} of it at most"
        if gpu.free_bytes is None:
            print(f"\n{share}; its memory is the CPU's.")
        else:
            enough = "" if memory.on_accelerator <= gpu.free_bytes else ": lower --batch-tokens, or build on the CPU"
            print(f"\n{share}, and has {format_bytes(gpu.free_bytes)} free{enough}.")


def _print_plan(plan: Plan, bandwidth: float | None) -> None:
    """Prints a table of the roles and one of what decoding reads, before and after."""
    rows = [
        (
            count.role,
            count.format,
            f"{count.num_tensors:,}",
            f"{count.num_params:,}",
            format_bytes(count.source_bytes),
            format_bytes(count.output_bytes),
        )
        for count in plan.counts
    ]
    num_params = sum(count.num_params for count in plan.counts)
    sizes = (format_bytes(plan.source_bytes), format_bytes(plan.output_bytes))
    rows.append(("total", "", f"{plan.num_tensors:,}", f"{num_params:,}", *sizes))
    print(format_table(("role", "format", "tensors", "parameters", "source", "output"), rows))
    kept = plan.num_tensors - plan.num_quantized
    print(f"\n{plan.num_quantized:,} tensors quantized, {kept:,} kept; 1 GB = 10⁹ bytes.\n")
    both = (plan.source_traffic, plan.output_traffic)
    lines = [
        ("weights read per decoded token", *(format_bytes(traffic.weight_bytes) for traffic in both)),
        ("DeltaNet state per sequence", *(format_bytes(traffic.state_bytes) for traffic in both)),
        ("KV cache per token (16-bit)", *(format_bytes(traffic.kv_bytes_per_token) for traffic in both)),
    ]
    if bandwidth:
        name = f"decode ceiling at {bandwidth / 1e9:g} GB/s, batch 1"
        lines.append((name, *(f"{traffic.ceiling(bandwidth):,.2f} tok/s" for traffic in both)))
    print(format_table(("", "source", "output"), lines))
