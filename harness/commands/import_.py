"""`harness import`: makes a record of what `vllm bench` measured on another machine."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.commands.shared import JOB, add_shared, open_job, print_json, whole_number
from harness.errors import UserError
from harness.measure.vllm_bench import VERSION, BatchShape, read_vllm_bench
from harness.resolve import chosen_variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and what it does not say: the variant, the machine, vLLM's release, the size of a batch."""
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the JSON that vllm bench serve, latency or throughput wrote")
    add("--variant", metavar="NAME", required=True, help="the variant that was measured")
    add("--machine", metavar="NAME", required=True, help="a name for the machine that measured it")
    add("--vllm-version", metavar="X", default="unknown", help="vLLM's release on that machine (default: unknown)")
    for name, what in (
        ("--batch", "requests in a batch"),
        ("--prompt-tokens", "tokens of a prompt"),
        ("--new-tokens", "generated tokens of a request"),
    ):
        add(name, type=whole_number, metavar="N", help=f"{what}, for a file of vllm bench latency, which lacks it")
    add("--suite", metavar="FILE", required=True, help="the suite's TOML file")
    add_shared(parser, *JOB[1:])


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Makes a record of what `vllm bench` wrote, and prints its speeds."""
    sizes = (options.batch, options.prompt_tokens, options.new_tokens)
    if any(sizes) and not all(sizes):
        raise UserError("--batch, --prompt-tokens and --new-tokens go together.", "Give all of them.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.machine):
        raise UserError(f"--machine '{options.machine}' is no name.", "Use lower-case letters, digits, '.' and '-'.")

    from harness.engines.protocol import EngineInfo
    from harness.job import Model
    from harness.report import speed_tables, tables

    with open_job(options, given) as job:
        chosen_variants(job.suite, [options.variant], with_source=True)
        found = read_vllm_bench(options.file, BatchShape(*sizes) if all(sizes) else None)
        run = job.new_run("served", VERSION, Model(options.variant, job.source, None))
        engine = EngineInfo(
            name="vllm bench",
            version=options.vllm_version,
            device="unknown",
            dtype="unknown",
            requested={"benchmark": found.benchmark, "model": found.model, **found.settings},
        )
        elsewhere = {"name": options.machine, "cpu": "unknown", "cores": None, "gpu": None, "os": None}
        record = job.store(replace(run, engine=engine.as_dict(), machine=elsewhere, packages={}), found.samples)

    frame = speed_tables.served_table({options.variant: record})
    if options.json:
        print_json({"record": str(record.path), "tables": [tables.json_rows(frame)]})
    else:
        print(f"{tables.terminal_table(frame)}\n\nRecord: {record.path}")
    return 0
