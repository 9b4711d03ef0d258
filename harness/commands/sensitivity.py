"""`harness sensitivity`: what each format would cost each projection of each layer."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.commands.shared import JOB, add_shared, open_job, print_json
from harness.resolve import required
from harness.suite.names import SOURCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite and the folders."""
    add_shared(parser, *JOB)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measures the source's layers on the suite's calibration samples, and prints a table of where bytes pay."""
    with open_job(options, given) as job:
        required(job.suite, "calibration", job.suite.calibration)

        from harness.job import Model, fingerprint
        from harness.model.checkpoint import open_checkpoint
        from harness.quantize import sensitivity
        from harness.report import quality_tables, tables

        source, calibration = job.source, job.calibration
        assert calibration is not None
        dataset = {
            "name": ", ".join(one["name"] for one in calibration.samples.manifest["sources"]),
            "token_ids_sha256": calibration.samples.digest,
            "num_samples": len(calibration.samples.samples),
            "num_tokens": calibration.samples.num_tokens,
        }
        model = Model(SOURCE, source, fingerprint(source))
        run = job.new_run("sensitivity", sensitivity.VERSION, model, dataset=dataset)
        run = replace(run, engine=sensitivity.computed_by(calibration).as_dict())
        job.artifacts.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=job.artifacts) as scratch:
            checkpoint = open_checkpoint(source)
            samples = sensitivity.measure_sensitivity(checkpoint, calibration, Path(scratch), job.progress)
            record = job.store(run, samples)
    frame = quality_tables.sensitivity_table({SOURCE: record})
    words = quality_tables.sensitivity_words(frame)
    if options.json:
        print_json({"records": {SOURCE: str(record.path)}, "tables": [tables.json_rows(frame)], "summary": words})
        return 0
    print(f"\n{tables.terminal_table(frame)}\n", *words, sep="\n")
    print(f"\nRecords:\n  {record.path}")
    return 0
