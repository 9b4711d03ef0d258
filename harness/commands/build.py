"""`harness build`: builds the variants of a suite, or one checkpoint by one recipe."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.commands.shared import JOB, add_shared, check_machine, open_job, print_json, progress_bars
from harness.errors import UserError
from harness.quantize.artifact import Artifact
from harness.quantize.recipes import recipe_named
from harness.report.numbers import format_bytes
from harness.resolve import chosen_variants, find_source, read_calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the source and its recipe, or a suite and its variants."""
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="build from this checkpoint: a folder, a hub id or demo:dense")
    add("--recipe", metavar="NAME", help="with SOURCE: the recipe to build by")
    add("--out", type=Path, metavar="DIR", help="with SOURCE: the new folder")
    add("--calibration", type=Path, metavar="FILE", help="with SOURCE: a TOML file that names calibration samples")
    add("--device", metavar="NAME", default="auto", help="what calibrates: cpu, cuda or auto (default: auto)")
    add_shared(parser, "--scales", "--codes", "--variant", *JOB)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Builds what is missing, and prints a line an artifact."""
    built = _built_variants(options, given) if options.source is None else [_built_source(options)]
    if options.json:
        from harness.record.provenance import peak_rss_bytes

        told = [
            {
                "folder": str(artifact.folder),
                "digest": artifact.digest,
                "reused": artifact.reused,
                "notes": list(artifact.notes),
                "output_bytes": sum(count.output_bytes for count in artifact.counts),
                "stage_seconds": dict(artifact.stage_seconds),
                "num_calibration_tokens": artifact.num_calibration_tokens,
                "planned_memory_bytes": artifact.planned_memory_bytes,
                "peak_rss_bytes": peak_rss_bytes(),
                "peak_vram_bytes": artifact.peak_vram_bytes,
                "layers": list(artifact.layers),
            }
            for artifact in built
        ]
        print_json(told)
        return 0

    for artifact in built:
        total = sum(count.output_bytes for count in artifact.counts)
        seconds = sum(seconds for _, seconds in artifact.stage_seconds)
        how = "reused" if artifact.reused else f"built in {seconds:.1f} s"
        print(f"{artifact.folder}  {format_bytes(total)}  {how}  digest {artifact.digest[:12]}")
        for note in artifact.notes:
            print(f"  note: {note}.")
        for line in _calibration_lines(artifact):
            print(f"  {line}")
    return 0


def _built_variants(options: argparse.Namespace, given: Sequence[str]) -> list[Artifact]:
    """The artifacts of the suite's variants, or of the named ones."""
    if options.recipe or options.out or options.calibration or options.scales or options.codes:
        raise UserError(
            "--recipe, --scales, --codes, --calibration and --out go with a SOURCE.",
            "Name one, or build a suite's variants without them.",
        )

    with open_job(options, given) as job:
        job = replace(job, device=options.device)
        check_machine(job, ("build",), options.variant)
        return [job.build(name) for name in chosen_variants(job.suite, options.variant, with_source=False)]


def _built_source(options: argparse.Namespace) -> Artifact:
    """The artifact of one checkpoint by one recipe, without a suite."""
    if options.suite or options.variant:
        raise UserError("--suite and --variant do not go with a SOURCE.", "Leave them out, or leave SOURCE out.")
    if not (options.recipe and options.out):
        raise UserError("SOURCE needs --recipe and --out.", "For example: --recipe rtn-a16 --out my-model-nvfp4.")

    from harness.suite.load import load_calibration

    recipe = recipe_named(options.recipe).with_method(options.scales, options.codes)
    with progress_bars() as progress:
        source, calibration = find_source(options.source), None
        if options.calibration and not recipe.needs_calibration:
            raise UserError(f"Recipe '{recipe.name}' looks at no data.", "Leave --calibration out.")
        if options.calibration:
            calibration = read_calibration(*load_calibration(options.calibration), source, progress, options.device)

        from harness.quantize.build import build

        return build(source, recipe, options.out, progress, calibration)


def _calibration_lines(artifact: Artifact) -> Iterator[str]:
    """Sentences about the calibration of a new artifact: speed, memory, error, damping, experts without tokens."""
    from harness.record.provenance import peak_rss_bytes

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
