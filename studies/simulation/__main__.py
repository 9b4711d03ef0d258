"""`python -m studies.simulation`: tables on stdout, progress on stderr, counts and page in reports/statistics."""

import argparse
import json
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.commands.shared import whole_number
from harness.errors import UserError, did_you_mean
from harness.record import stats, store
from harness.report import card
from studies.simulation import page, populations, scenarios

FOLDER = Path("reports/statistics")
COUNTS = FOLDER / "simulation.json"
PAGE = FOLDER / "README.md"
SCHEMA = 1
DRAWS = 2500


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates, or writes the page from stored counts, and returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(_parser().parse_args(given), tuple(given))
    except UserError as error:
        print(f"studies.simulation: {error.problem}\n  {error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studies.simulation: interrupted. Nothing was written.", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: object) -> None:
    """Ends the program on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m studies.simulation",
        description="How often the statistics of the harness are right, on data sets with a known truth.",
    )
    parser.add_argument(
        *("--draws", "-n"),
        type=whole_number,
        default=DRAWS,
        metavar="N",
        help=f"data sets of each scenario ({DRAWS}: a coverage of 95 %% is known to ±0.4 %%)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of all draws (0)")
    parser.add_argument(
        "--group",
        action="append",
        metavar="G",
        help=f"simulate and show only this group (may be repeated), and write nothing: {', '.join(page.BLOCKS)}",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of records (results)"
    )
    parser.add_argument(
        "--page", action="store_true", help=f"simulate nothing: write {PAGE} and its figure from {COUNTS}"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if page or figure do not follow from the counts"
    )
    return parser


def _run(options: argparse.Namespace, given: tuple[str, ...]) -> int:
    if options.page or options.check:
        return _page(_stored(), check=options.check)
    for group in options.group or ():
        if group not in page.BLOCKS:
            raise UserError(f"There is no group '{group}'.", did_you_mean(group, page.BLOCKS))
    records, skipped = store.read_all(options.results)
    for one in skipped:
        print(f"studies.simulation: {one.path} is not used: {one.reason}", file=sys.stderr)
    drawn_from = populations.populations_in(records)
    wanted = {page.BLOCKS[group] for group in options.group or page.BLOCKS}
    chosen = [one for one in scenarios.all_scenarios(drawn_from) if one.group in wanted]
    found = scenarios.simulate(chosen, options.draws, options.seed, _tell)
    for group in dict.fromkeys(one.group for one in found):
        cells = page.cells_of([one for one in found if one.group == group])
        print(f"\n{group}\n\n{page.table_text(cells, 'simple')}", flush=True)
    if options.group:
        return 0
    document = _document(options, given, drawn_from, found)
    card.write_files({COUNTS.as_posix(): _json(document)}, Path.cwd())
    return _page(document, check=False)


def _document(
    options: argparse.Namespace,
    given: tuple[str, ...],
    drawn_from: populations.Populations,
    found: Sequence[scenarios.Result],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": ["python", "-m", "studies.simulation", *given],
        "num_draws": options.draws,
        "seed": options.seed,
        "num_resamples": stats.RESAMPLES,
        "packages": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy")},
        },
        "records": list(drawn_from.files),
        "populations": [
            one.facts() for one in (*drawn_from.losses, *drawn_from.divergences, drawn_from.divergence_ratio)
        ],
        "speeds": {"within": drawn_from.speeds.within, "between": drawn_from.speeds.between},
        "results": page.as_document(found),
    }


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _stored() -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(COUNTS.read_bytes())
    except OSError as error:
        raise UserError(
            f"{COUNTS} cannot be read ({error.strerror}).", "Run this in the project's own folder, or simulate first."
        ) from error
    except ValueError as error:
        raise UserError(f"{COUNTS} is not JSON ({error}).", "Simulate again.") from error
    return document


def _page(document: dict[str, Any], *, check: bool) -> int:
    try:
        text = PAGE.read_bytes()
    except OSError as error:
        raise UserError(
            f"{PAGE} cannot be read ({error.strerror}).", "Run this in the project's own folder."
        ) from error
    rendered = {
        PAGE.as_posix(): page.statistics_page(document, PAGE.as_posix(), text),
        **{(FOLDER / name).as_posix(): data for name, data in page.coverage_figure(document).items()},
    }
    changed = card.stale_files(rendered, Path.cwd()) if check else card.write_files(rendered, Path.cwd())
    for path in rendered:
        print(f"{('stale' if check else 'written') if path in changed else 'up to date'}: {path}")
    return 1 if check and changed else 0


def _tell(done: int, total: int, description: str, note: str = "", /) -> None:
    print(f"{description} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    raise SystemExit(main())
