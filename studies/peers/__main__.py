"""`python -m studies.peers [PART ...]`: tables on stdout, progress on stderr, records under results/."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from harness.commands.options import whole_number
from harness.errors import UserError, did_you_mean

QUANTIZING = ("speed-a16", "speed-w4a4", "quality", "agreement")
MEASURED = (*QUANTIZING, "speed-tasks", "speed-scoring")
IN_VLLM = "speed-tasks-vllm"
PARTS = (*MEASURED, IN_VLLM, "report")
PAGE = "reports/peers/README.md"
PYTHON = Path(".nox/peers-llmcompressor/bin/python")
EVALS_PYTHON = Path(".nox/peers-lmeval/bin/python")
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
    """A polite kill ends a session like Ctrl-C: the scratch folder in memory must not stay behind."""
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
        help=f"{', '.join(MEASURED)} (all of them); {IN_VLLM}, which is left out unless named; or report, which writes "
        "the page of the records that are there",
    )
    parser.add_argument(
        *("--repetitions", "-n"),
        type=whole_number,
        default=REPETITIONS,
        metavar="N",
        help=f"of every time ({REPETITIONS}: fewer have no 95 %% interval)",
    )
    parser.add_argument("--model", action="append", metavar="M", help="for quality: an embedded model (dense, moe)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="GROUP",
        type=str.lower,
        help="for quality: only this group (may be repeated)",
    )
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help="for quality: only N windows of each text; for speed-scoring: only N windows; for speed-tasks: only N "
        "documents of each task",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="F", help=f"for speed: true widths ({CONFIG})")
    parser.add_argument("--peers-python", type=Path, default=PYTHON, metavar="P", help=f"({PYTHON})")
    parser.add_argument(
        "--evals-python", type=Path, default=EVALS_PYTHON, metavar="P", help=f"for speed-tasks ({EVALS_PYTHON})"
    )
    parser.add_argument(
        "--vllm-python", type=Path, default=VLLM_PYTHON, metavar="P", help=f"for {IN_VLLM} ({VLLM_PYTHON})"
    )
    parser.add_argument(
        "--artifacts", type=Path, default=Path("artifacts/peers"), metavar="DIR", help="(artifacts/peers)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")
    parser.add_argument("--check", action="store_true", help=f"for report: only tell whether {PAGE} is up to date")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")
    return parser


def _run(options: argparse.Namespace, given: tuple[str, ...]) -> int:
    from harness.demo import checkpoint_path
    from harness.record.schema import new_id
    from harness.record.store import Record
    from studies.peers import bench, contest, evals, scoring, tables

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
    # Found out before an hour of work, not after it.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")
    wanted = options.parts or MEASURED
    # Not by resolve(), which would leave an environment.
    python, evals_python, vllm_python = (
        Path(os.path.abspath(one))  # noqa: PTH100
        for one in (options.peers_python, options.evals_python, options.vllm_python)
    )
    if "speed-tasks" in wanted:
        evals.check_environment(evals_python, "--evals-python", ("lm_eval", "accelerate"))
    if IN_VLLM in wanted:
        evals.check_environment(vllm_python, "--vllm-python", ("lm_eval", "vllm"))
    session = bench.Bench(
        their_python=python,
        their_packages=bench.their_packages(python) if set(wanted) & set(QUANTIZING) else {},
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
    shown: list[tables.Table] = []

    def show(*new: tables.Table) -> None:
        shown.extend(new)
        if not options.json:
            for table in new:
                print(f"\n{table.title}\n\n{_text(table)}", flush=True)

    dense = checkpoint_path("dense")
    runs: list[tuple[str, Callable[[], list[Record]]]] = [
        ("speed-a16", lambda: bench.speed_a16(session, options.config)),
        ("speed-w4a4", lambda: bench.speed_w4a4(session, dense)),
        *(("quality", partial(bench.quality, session, model, groups)) for model in models),
        ("agreement", lambda: bench.agreement(session, dense)),
        ("speed-tasks", lambda: evals.speed_tasks(session, dense, evals_python)),
        (IN_VLLM, lambda: evals.speed_tasks_vllm(session, dense, vllm_python)),
        ("speed-scoring", lambda: scoring.synthetic(session, options.config)),
        ("speed-scoring", lambda: scoring.embedded(session, dense)),
    ]
    for part, run in runs:
        if part in wanted:
            measured = run()
            records += measured
            show(*tables.of_part(measured))
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
    rendered = {PAGE: page.render(records, options.results.as_posix(), PAGE, text)}
    changed = card.stale_files(rendered, Path.cwd()) if options.check else card.write_files(rendered, Path.cwd())
    print(f"{'stale' if options.check else 'written'}: {PAGE}" if changed else f"up to date: {PAGE}")
    return 1 if options.check and changed else 0


def _text(table: "tables.Table") -> str:  # type: ignore[name-defined]  # noqa: F821
    from tabulate import tabulate

    align = ("left", *("right" for _ in table.headers[1:]))
    return tabulate(table.rows, headers=table.headers, tablefmt="simple", colalign=align, disable_numparse=True)


class _Lines:
    """One line on stderr when something begins and one when it is done; no bars, since a session takes long and
    is read in a log."""

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
