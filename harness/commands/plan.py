"""`harness plan`: what a recipe makes of a model, in bytes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from harness.commands.options import add_json, add_method, positive_number, whole_number
from harness.commands.output import print_json, table
from harness.errors import UserError

HELP = "What a recipe makes of a model, in bytes, without reading weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the subcommand is asked."""
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint folder, a config.json, a hub id or demo:dense")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--recipe", help="without one, every tensor is kept")
    add_method(parser)
    parser.add_argument("--batch-tokens", type=whole_number, default=8192, metavar="N", help="of calibration (8192)")
    parser.add_argument(
        "--hidden-gb", type=positive_number, default=4.0, metavar="G", help="hidden states in memory (4)"
    )
    parser.add_argument("--memory-gb", type=positive_number, metavar="G", help="refuse a calibration that needs more")
    parser.add_argument(
        "--bandwidth-gbs", type=positive_number, metavar="B", help="memory bandwidth in 10⁹ bytes per second"
    )
    add_json(parser)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    if not options.recipe and (options.scales or options.codes):
        raise UserError("--scales and --codes go with a --recipe.", "Name one.")

    from harness.quantize.plan import COMPUTED_BYTES, calibration_memory, check_memory
    from harness.quantize.recipes import recipe_named
    from harness.report.numbers import format_bytes
    from harness.resolve import plan_source

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
        print_json(
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
    print(table(("role", "format", "tensors", "parameters", "source", "output"), rows))
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
    print(table(("", "source", "output"), lines))
    if memory is not None and recipe is not None:
        print(
            f"\nCalibration (scales {recipe.method.scales}, codes {recipe.method.codes}) holds one layer at a time: at "
            f"most {format_bytes(memory.total)} of memory with {options.batch_tokens:,} tokens in a forward pass."
        )
        print(table(("of it", ""), [(name, format_bytes(size)) for name, size in asdict(memory).items()]))
    return 0
