"""Which run speaks for a variant, what forbids comparing two runs, and where every number comes from."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.record import stats
from harness.record.run import Record
from harness.record.schema import incomparable
from harness.suite.names import SOURCE

Records = Mapping[str, Record]  # variant -> the run that speaks for it, of one measure
ByProtocol = Mapping[str, Records]  # protocol -> those of its perplexities
ByTask = Mapping[str, Records]  # the task's name in the suite -> its runs, by row


def newest_runs(
    records: Sequence[Record], suite: str, measure: str, variants: Sequence[str], protocol: str | None = None
) -> dict[str, Record]:
    """The latest whole run of each variant of a suite, in the order of `variants`; of perplexities those by `protocol`.

    Whole: complete and without `--limit`. Variants without such a run are left out.
    """
    latest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: (record.run.started_utc, record.run.run_id)):
        if (
            record.whole
            and record.run.measure == measure
            and record.run.suite["name"] == suite
            and protocol in (None, (record.run.dataset or {}).get("protocol"))
        ):
            latest[record.run.variant["name"]] = record
    return {variant: latest[variant] for variant in variants if variant in latest}


def newest_by_protocol(
    records: Sequence[Record], suite: str, protocols: Sequence[str], variants: Sequence[str]
) -> dict[str, dict[str, Record]]:
    """The latest whole perplexity of each variant by each protocol; protocols without one are left out."""
    found = {protocol: newest_runs(records, suite, "ppl", variants, protocol) for protocol in protocols}
    return {protocol: chosen for protocol, chosen in found.items() if chosen}


def differences(record: Record, other: Record, *, over_time: bool = False) -> list[str]:
    """What forbids comparing two runs that are not of tasks: keys of their headers that differ (`over_time` as for
    `schema.incomparable`), windows that are not the same, a window that is there twice; empty if nothing does."""
    found = incomparable(other, record, over_time=over_time)
    spans = _spans(other)
    if spans != _spans(record):
        found.append("windows")
    elif len(set(spans)) < len(spans):
        found.append("a window twice")
    return found


def _spans(record: Record) -> list[tuple[int, ...]]:
    """What each window of a run covers, in order; none for other measures."""
    keys = ("first_token", "num_tokens", "num_scored")
    return [tuple(window[key] for key in keys) for window in record.kind("window")]


def refusal(records: Records, variant: str, versus: str = SOURCE) -> str | None:
    """Why a variant cannot be compared with another row; None if it can, or is that row."""
    if versus not in records:
        return f"no record of {'the source' if versus == SOURCE else versus}"
    found = differences(records[variant], records[versus])
    return f"incomparable: {', '.join(found)}" if found else None


def served_as(record: Record) -> dict[str, str]:
    """The cell that says what an engine made of a checkpoint whose arithmetic it did not run; none where it did."""
    found = (record.run.engine or {}).get("served_as")
    return {"served_as": found} if found else {}


def clusters_of(record: Record) -> list[tuple[float, int]]:
    """(Negative log-likelihood in nats, the tokens or words that it is of) of every piece of a text that belongs
    together: its windows, or the documents that were read to their end."""
    windows = record.kind("window")
    documents = (record.run.dataset or {}).get("documents")
    if documents is None:
        return [(window["nll_nats"], window["num_scored"]) for window in windows]
    by_document: dict[int, list[dict[str, Any]]] = {}
    for window in windows:
        by_document.setdefault(window["document"], []).append(window)
    return [
        (math.fsum(one["nll_nats"] for one in pieces), documents["num_words"][document])
        for document, pieces in by_document.items()
        if sum(one["num_scored"] for one in pieces) == documents["num_tokens"][document]
    ]


def clustering(record: Record) -> tuple[str, int]:
    """What a run's pieces of text are, and how many neighbours count as one: windows of running text share what their
    article makes hard, and as single ones they would give evidence that is not there; documents share nothing."""
    if "documents" in (record.run.dataset or {}):
        return "documents", 1
    return "windows", stats.block_length(len(record.kind("window")))


def reused(by_label: Mapping[str, Records], units: str) -> Iterator[str]:
    """Which runs took `units` (answers, or windows) from earlier ones, a sentence each."""
    for label, records in by_label.items():
        for row, record in records.items():
            for told in record.kind("reused"):
                if told["num_reused"]:
                    of_all = f"{told['num_reused']:,} of {told[f'num_{units}']:,} {units}"
                    yield f"{row}, {label}: {of_all} are of earlier runs."


def engine_warnings(records: Iterable[Record]) -> list[str]:
    """What the engines said of their settings, each sentence once."""
    said = (line for record in records for line in (record.run.engine or {}).get("warnings", ()))
    return list(dict.fromkeys(said))
