"""`python -m studies.peers [PART ...]`: tables on stdout, progress on stderr, records in results/."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from harness.commands.shared import whole_number
from harness.errors import UserError, did_you_mean

QUANTIZING = ("speed-a16", "speed-w4a4", "quality", "agreement")
MEASURED = (*QUANTIZING, "speed-tasks", "speed-scoring")
IN_VLLM = "speed-tasks-vllm"
PARTS = (*MEASURED, IN_VLLM, "report")
PAGE = "reports/peers/README.md"
PYTHON = Path(".nox/peers-llmcompressor/bin/python")
TASKS_PYTHON = Path(".nox/peers-lmeval/bin/python")
VLLM_PYTHON = Path(".nox/vllm/bin/python")
CONFIG = Path("tests/data/qwen3.5-9b.json")
REPETITIONS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that are asked for and returns the exit code: 1 if one of our own contestants failed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(_parser().parse_args(given), tuple(given))
    except UserError as error:
        print(f"studies.peers: {error.problem}\n  {error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studies.peers: interrupted. The same command reuses every finished artifact.", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: object) -> None:
    """Ends a session on SIGTERM as on Ctrl-C: the scratch folder in memory must not stay behind."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m studies.peers",
        description="llm-compressor, lm-eval and the harness, side by side on the same inputs.",
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(MEASURED)} (default: all of these); {IN_VLLM}; or report, which writes the page from the "
        "records",
    )
    parser.add_argument(
        *("--repetitions", "-n"),
        type=whole_number,
        default=REPETITIONS,
        metavar="N",
        help=f"repetitions of every time ({REPETITIONS}: fewer have no 95 %% interval)",
    )
    parser.add_argument(
        "--model", action="append", metavar="M", help="for quality: measure this embedded model (dense and moe)"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="GROUP",
        type=str.lower,
        help="for quality: measure only this group (may be repeated)",
    )
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help="use only N windows of each text (quality, speed-scoring) or N documents of each task (speed-tasks)",
    )
    parser.add_argument(
        "--config", type=Path, default=CONFIG, metavar="F", help=f"for speed: configuration with true widths ({CONFIG})"
    )
    parser.add_argument(
        "--peers-python", type=Path, default=PYTHON, metavar="P", help=f"interpreter with llm-compressor ({PYTHON})"
    )
    parser.add_argument(
        "--tasks-python",
        type=Path,
        default=TASKS_PYTHON,
        metavar="P",
        help=f"interpreter with lm-eval's model classes, for speed-tasks ({TASKS_PYTHON})",
    )
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=VLLM_PYTHON,
        metavar="P",
        help=f"interpreter with vLLM, for {IN_VLLM} ({VLLM_PYTHON})",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("artifacts/peers"),
        metavar="DIR",
        help="folder of artifacts (artifacts/peers)",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of records (results)"
    )
    parser.add_argument("--check", action="store_true", help=f"for report: write nothing, and fail if {PAGE} is stale")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    return parser


def _run(options: argparse.Namespace, given: tuple[str, ...]) -> int:
    from harness.demo import checkpoint_path
    from harness.record.run import Record, new_id
    from studies.peers import contest, scoring, tables, tasks
    from studies.peers.agreement import measure_agreement
    from studies.peers.quality import measure_quality
    from studies.peers.quantizers import their_packages
    from studies.peers.session import Session
    from studies.peers.speed import speed_a16, speed_w4a4

    for part in options.parts:
        if part not in PARTS:
            raise UserError(f"There is no part '{part}'.", did_you_mean(part, PARTS))
    if "report" in options.parts:
        if len(options.parts) > 1:
            raise UserError("'report' goes alone.", "Measure first, then report.")
        return _report(options)
    groups = [group for group in contest.QUALITY if not options.only or group.name.lower() in options.only]
    if not groups:
        raise UserError(
            f"No group is called '{options.only[0]}'.", did_you_mean(options.only[0], [g.name for g in contest.QUALITY])
        )
    # Checked before an hour of work, not after it.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")
    wanted = options.parts or MEASURED
    # Not by resolve(), which would follow the link out of an environment.
    python, tasks_python, vllm_python = (
        Path(os.path.abspath(one))  # noqa: PTH100
        for one in (options.peers_python, options.tasks_python, options.vllm_python)
    )
    if "speed-tasks" in wanted:
        tasks.check_environment(tasks_python, "--tasks-python", ("lm_eval", "accelerate"))
    if IN_VLLM in wanted:
        tasks.check_environment(vllm_python, "--vllm-python", ("lm_eval", "vllm"))
    session = Session(
        their_python=python,
        their_packages=their_packages(python) if set(wanted) & set(QUANTIZING) else {},
        artifacts=options.artifacts.resolve(),
        results=options.results,
        repetitions=options.repetitions,
        limit=options.limit,
        progress=_Lines(),
        command=("python", "-m", "studies.peers", *given),
        session_id=new_id(),
    )
    models = [checkpoint_path(name) for name in options.model or ("dense", "moe")]
    records: list[Record] = []
    shown: list[tables.TextTable] = []

    def show(*new: tables.TextTable) -> None:
        shown.extend(new)
        if not options.json:
            for table in new:
                print(f"\n{table.title}\n\n{_text(table)}", flush=True)

    dense = checkpoint_path("dense")
    runs: list[tuple[str, Callable[[], list[Record]]]] = [
        ("speed-a16", lambda: speed_a16(session, options.config)),
        ("speed-w4a4", lambda: speed_w4a4(session, dense)),
        *(("quality", partial(measure_quality, session, model, groups)) for model in models),
        ("agreement", lambda: measure_agreement(session, dense)),
        ("speed-tasks", lambda: tasks.speed_tasks(session, dense, tasks_python)),
        (IN_VLLM, lambda: tasks.speed_tasks_vllm(session, dense, vllm_python)),
        ("speed-scoring", lambda: scoring.synthetic(session, options.config)),
        ("speed-scoring", lambda: scoring.embedded(session, dense)),
    ]
    for part, run in runs:
        if part in wanted:
            measured = run()
            records += measured
            show(*tables.tables_of(measured))
    remarks = tables.remarks(records)
    if options.json:
        document = {
            "records": [str(record.path) for record in records],
            "tables": [asdict(table) for table in shown],
            "remarks": remarks,
        }
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\nRemarks:", *(f"  {line}" for line in remarks or ["none"]), sep="\n")
        print("\nRecords:", *(f"  {record.path}" for record in records), sep="\n")
    theirs = ("llmcompressor", "lm-eval")
    failed = [r for r in records if r.kind("failure") and not str(r.run.variant["name"]).startswith(theirs)]
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    from harness.record import store
    from harness.report import card
    from studies.peers import page

    records, skipped = store.read_all(options.results)
    for one in skipped:
        print(f"studies.peers: {one.path} is not used: {one.reason}", file=sys.stderr)
    try:
        text = Path(PAGE).read_bytes()
    except OSError as error:
        raise UserError(
            f"{PAGE} cannot be read ({error.strerror}).", "Run this in the project's own folder."
        ) from error
    rendered = {PAGE: page.peers_page(records, options.results.as_posix(), PAGE, text)}
    changed = card.stale_files(rendered, Path.cwd()) if options.check else card.write_files(rendered, Path.cwd())
    print(f"{'stale' if options.check else 'written'}: {PAGE}" if changed else f"up to date: {PAGE}")
    return 1 if options.check and changed else 0


def _text(table: "tables.TextTable") -> str:  # type: ignore[name-defined]  # noqa: F821
    from tabulate import tabulate

    align = ("left", *("right" for _ in table.headers[1:]))
    return tabulate(table.rows, headers=table.headers, tablefmt="simple", colalign=align, disable_numparse=True)


class _Lines:
    """Progress as lines on stderr, when something begins and when it is done: a session takes long and is read in a
    log, so there are no bars."""

    def __init__(self) -> None:
        self._running = ""

    def __call__(self, done: int, total: int, description: str, note: str = "", /) -> None:
        if done >= total:
            print(f"{description}: done", file=sys.stderr, flush=True)
            self._running = ""
        elif description != self._running:
            print(f"{description} …", file=sys.stderr, flush=True)
            self._running = description


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    raise SystemExit(main())
