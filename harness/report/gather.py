"""From records to evidence: every measure's newest whole run of each row, and every table of them."""

from collections.abc import Sequence
from dataclasses import replace

from harness.record.run import Record
from harness.report import build_tables, quality_tables, runs, speed_tables, task_tables
from harness.report.evidence import MEASURES, OTHERS, Evidence
from harness.report.figures import plotted_by_name
from harness.report.tables import Table, table_of
from harness.suite.names import NOISE, SOURCE
from harness.suite.schema import Suite


def gather(suite: Suite, records: Sequence[Record], results_dir: str, repo: str | None = None) -> Evidence:
    """The evidence of a suite among `records`, which lie under `results_dir` (a POSIX path from the project's root)."""
    variants = suite.rows()
    chosen = {
        measure: runs.newest_runs(records, suite.name, measure, (*variants, *NOISE))
        for measure in (*MEASURES, *OTHERS)
        if measure != "ppl"
    }
    protocols = suite.ppl.protocols if suite.ppl else ()
    perplexities = runs.newest_by_protocol(records, suite.name, protocols, variants)
    tasks = task_tables.newest_by_task(records, suite, variants)
    versus = suite.bench.versus if suite.bench else SOURCE
    tables = {
        "totals": build_tables.total_table(chosen["build"]),
        "size": build_tables.role_table(chosen["build"]),
        "method": build_tables.method_table(chosen["build"]),
        "calibration": build_tables.calibration_table(chosen["build"]),
        "sizes": build_tables.sizing_table(chosen["build"]),
        "roundtrip": build_tables.roundtrip_table(chosen["verify"]),
        "findings": build_tables.finding_table(chosen["verify"]),
        "sensitivity": quality_tables.sensitivity_table(chosen["sensitivity"]),
        "perplexity": quality_tables.perplexity_table(
            perplexities, quality_tables.log_ppl_floor(chosen["fidelity"], perplexities)
        ),
        "fidelity": quality_tables.divergence_table(chosen["fidelity"]),
        "bands": quality_tables.band_table(chosen["fidelity"]),
        "decode": speed_tables.decode_table(chosen["bench"], versus),
        "prefill": speed_tables.prefill_table(chosen["bench"], versus),
        "kernels": speed_tables.kernel_table(chosen["bench"]),
        "memory": speed_tables.memory_table(chosen["bench"]),
        "served": speed_tables.served_table(chosen["served"]),
        "tasks": task_tables.score_table(tasks),
        "answers": task_tables.answer_table(tasks),
    }
    evidence = Evidence(suite, results_dir, chosen, perplexities, tasks, tables, repo)
    evidence = replace(evidence, tables={**tables, "runs": run_table(evidence.chosen)})
    return replace(evidence, figures=plotted_by_name(evidence))


def run_table(records: Sequence[Record]) -> Table:
    """Where every number comes from: the run, its engine, machine, versions and commit."""
    rows = []
    for record in records:
        run = record.run
        engine, machine, git = run.engine, run.machine, run.git
        gpu = machine.get("gpu")
        hardware = f"{gpu['count']} × {gpu['name']}, driver {gpu['driver']}" if gpu else machine.get("cpu")
        digest = run.variant.get("artifact_digest")
        rows.append(
            {
                "variant": run.variant["name"],
                "measure": run.measure,
                "recipe": run.variant.get("recipe"),
                "artifact": digest and digest[:12],
                "engine": f"{engine['name']} ({engine['version']}), {engine['dtype']} on {engine['device']}"
                if engine
                else None,
                "machine": f"{machine['name']}: {hardware}, {machine.get('cores')} cores, {machine.get('os')}",
                "packages": ", ".join(f"{name} {version}" for name, version in sorted(run.packages.items())),
                "commit": git["commit"][:12] + (" with changes" if git["dirty"] else "") if git else None,
                "started_utc": run.started_utc,
                "run": record,
            }
        )
    return table_of(rows)
