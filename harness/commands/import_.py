"""`harness import`: makes a record of what `vllm bench` measured on another machine."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.shared import JOB, add_shared, open_job, print_json, whole_number
from harness.errors import UserError
from harness.measure.vllm_bench import VERSION, BatchShape, read_vllm_bench
from harness.record.run import Record
from harness.resolve import chosen_variants

if TYPE_CHECKING:
    from harness.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and what it does not say: the variant, the machine, vLLM's release, the size of a batch."""
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the JSON that vllm bench serve, latency or throughput wrote")
    add("--variant", metavar="NAME", required=True, help="the variant that was measured")
    add("--machine", metavar="NAME", required=True, help="a name for the machine that measured it")
    add("--vllm-version", metavar="X", default="unknown", help="vLLM's release on that machine (default: unknown)")
    add(
        "--batch",
        type=whole_number,
        metavar="N",
        help="requests in a batch, for a file of vllm bench latency, which lacks it",
    )
    add(
        "--prompt-tokens",
        type=whole_number,
        metavar="N",
        help="tokens of a prompt, for a file of vllm bench latency, which lacks it",
    )
    add(
        "--new-tokens",
        type=whole_number,
        metavar="N",
        help="generated tokens of a request, for a file of vllm bench latency, which lacks it",
    )
    add_shared(parser, *JOB)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Makes a record of what `vllm bench` wrote, and prints its speeds."""
    sizes = (options.batch, options.prompt_tokens, options.new_tokens)
    if any(sizes) and not all(sizes):
        raise UserError("--batch, --prompt-tokens and --new-tokens go together.", "Give all of them.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.machine):
        raise UserError(f"--machine '{options.machine}' is no name.", "Use lower-case letters, digits, '.' and '-'.")

    shape = BatchShape(*sizes) if all(sizes) else None
    with open_job(options, given) as job:
        record = _imported(job, options.variant, options.file, shape, options.machine, options.vllm_version)

    from harness.report import speed_tables, tables

    frame = speed_tables.served_table({options.variant: record})
    if options.json:
        print_json({"record": str(record.path), "tables": [tables.json_rows(frame)]})
    else:
        print(f"{tables.terminal_table(frame)}\n\nRecord: {record.path}")
    return 0


def _imported(job: Job, variant: str, path: Path, shape: BatchShape | None, machine: str, version: str) -> Record:
    """The record of a run of `vllm bench` on another machine, which is named by the user's word."""
    from harness.engines.protocol import EngineInfo
    from harness.job import Model

    chosen_variants(job.suite, [variant], with_source=True)
    found = read_vllm_bench(path, shape)
    run = job.new_run("served", VERSION, Model(variant, job.source, None))
    engine = EngineInfo(
        name="vllm bench",
        version=version,
        device="unknown",
        dtype="unknown",
        requested={"benchmark": found.benchmark, "model": found.model, **found.settings},
    )
    elsewhere = {"name": machine, "cpu": "unknown", "cores": None, "gpu": None, "os": None}
    return job.store(replace(run, engine=engine.as_dict(), machine=elsewhere, packages={}), found.samples)
