"""Tables of records: times and their ratios, divergences as shares of the baseline's, scores."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.record import stats
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report.numbers import format_bytes, format_estimate
from studies.peers.contest import (
    CALIBRATION_TOKENS,
    COPY,
    QUALITY,
    RACES_A16,
    RACES_TASKS,
    RACES_TASKS_VLLM,
    RACES_W4A4,
    SEPARATE,
    SPEED_SAMPLES,
    STREAMED,
    Ours,
    QualityGroup,
    Race,
    Theirs,
)

TEXTS = ("near", "far")
NONE = "–"


@dataclass(frozen=True)
class TextTable:
    """Rows of text under headers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(records: Sequence[Record]) -> list[TextTable]:
    """The tables of one part's records; their `suite` says which part it is."""
    about = records[0].run.suite
    if about["name"] == "speed-a16":
        return [*speed_tables(f"RTN A16, {about['layers']} layers of {about['source']} width", records, RACES_A16)]
    if about["name"] == "speed-w4a4":
        samples = f"{SPEED_SAMPLES} × {CALIBRATION_TOKENS} tokens"
        return [*speed_tables(f"W4A4, demo:{about['source']}, {samples}", records, RACES_W4A4)]
    if about["name"].startswith("speed-tasks"):
        engine, races = ("vLLM", RACES_TASKS_VLLM) if about["name"].endswith("vllm") else ("torch", RACES_TASKS)
        cut = "" if about["limit"] is None else f", {about['limit']} documents of each"
        return [*task_tables(f"Task evals in {engine}, demo:{about['source']}{cut}", records, races)]
    if about["name"].startswith("speed-scoring"):
        of = f"{about['layers']} layers of {about['source']} width" if "layers" in about else f"demo:{about['source']}"
        text = f"{about['num_windows']} × {about['num_window_tokens']} tokens"
        return [*scoring_tables(f"Perplexity of {len(about['models'])} models in float32, {of}, {text}", records)]
    if about["name"].startswith("agreement"):
        return [agreement_table(f"Rounding to nearest, demo:{about['source']}", records)]
    present = {record.run.variant["name"] for record in records}
    groups = [group for group in QUALITY if present & {one.name for one in group.contestants[1:]}]
    return [quality_table(f"demo:{about['source']}", records, group) for group in groups]


def by_name(records: Iterable[Record]) -> dict[str, Record]:
    """Records by the name of their variant."""
    return {str(record.run.variant["name"]): record for record in records}


def remarks(records: Sequence[Record]) -> list[str]:
    """Sentences on what failed, what the auditor found, and what llm-compressor warned of, each warning once with the
    number of runs that had it."""
    lines, warned = [], Counter[str]()
    for record in records:
        name = record.run.variant["name"]
        lines += [f"{name} failed: {sample['reason']}" for sample in record.kind("failure")]
        for sample in record.kind("verdict"):
            if not sample["passed"]:
                lines.append(f"{name}: verify finds {sample['num_errors']:,} errors, first: {sample['first_error']}")
        warned.update(dict.fromkeys((sample["text"].partition("\n")[0] for sample in record.kind("warning")), 1))
    return lines + [f"llm-compressor warned in {num} of {len(records)} runs: {text}" for text, num in warned.items()]


def speed_tables(title: str, records: Sequence[Record], races: Sequence[Race]) -> tuple[TextTable, TextTable]:
    """Two tables of quantizers: medians of times with their intervals, and the ratios of the races."""
    named = by_name(records)
    rows = []
    for name, record in named.items():
        takes = record.kind("repetition")
        rows.append(
            (
                name,
                str(len(takes)),
                _median(_column(record, "wall_seconds")) if name != COPY else NONE,
                _median(_column(record, "call_seconds")),
                _most_bytes(record, "peak_rss_bytes"),
                _most_bytes(record, "output_bytes"),
                _verdict(record),
            )
        )
    heads = ("quantizer", "times", "whole process, s", "call alone, s", "peak RSS", "size", "verify")
    times = TextTable(title, heads, tuple(rows))
    standings = []
    for race in races:
        if race.winner not in named or race.loser not in named:
            continue
        winner, loser = named[race.winner], named[race.loser]
        for key, what in (("wall_seconds", "whole process"), ("call_seconds", "call alone")):
            above, below = _column(loser, key), _column(winner, key)
            # A copy is a call; the start of a process is no part of it.
            if above and below and not (race.loser == COPY and key == "wall_seconds"):
                standings.append(_standing(race, what, above, below))
        above, below = _column(winner, "peak_rss_bytes"), _column(loser, "peak_rss_bytes")
        if race.memory_share is not None and above and below:
            share = stats.hodges_lehmann_ratio(above, below)
            standings.append(
                (
                    f"{race.winner} / {race.loser}",
                    "peak RSS",
                    format_estimate(share, ".3f"),
                    f"≤ {race.memory_share:.3g}",
                    _met(share, most=race.memory_share),
                )
            )
    return times, _ratios(title, standings)


def task_tables(title: str, records: Sequence[Record], races: Sequence[Race]) -> tuple[TextTable, TextTable]:
    """Two tables of answerers: medians of times with their intervals and the scores, so that no side wins by
    answering something else; and the ratios of the races."""
    named = by_name(records)
    standings = []
    for race in races:
        if race.winner in named and race.loser in named:
            above, below = (_column(named[name], "call_seconds", "evaluation") for name in (race.loser, race.winner))
            if above and below:
                standings.append(_standing(race, "call alone", above, below))
    return _answers(title, ("evaluator", "items/s"), named, "num_items", "{:.4f}".format), _ratios(title, standings)


def scoring_tables(title: str, records: Sequence[Record]) -> tuple[TextTable, TextTable]:
    """Two tables of scorers: medians of times with their intervals and the scores in nats with all digits, so that
    equal text means equal bits; and one pass as a share of separate runs."""
    named = by_name(records)
    standings = []
    if STREAMED.name in named and SEPARATE.name in named:
        for key, what in (
            ("wall_seconds", "whole process"),
            ("call_seconds", "call alone"),
            ("peak_rss_bytes", "peak RSS"),
        ):
            above, below = (_column(named[one.name], key, "evaluation") for one in (STREAMED, SEPARATE))
            if above and below:
                share = format_estimate(stats.hodges_lehmann_ratio(above, below), ".3f")
                standings.append((f"{STREAMED.name} / {SEPARATE.name}", what, share))
    ratios = TextTable(f"{title}: ratios", ("", "of", "ratio"), tuple(standings))
    return _answers(title, ("scorer", "tokens/s"), named, "num_requests", repr), ratios


def _answers(
    title: str, heads: tuple[str, str], named: Mapping[str, Record], counted: str, text: Callable[[float], str]
) -> TextTable:
    """Times, memory and scores of contestants. `heads` head the columns of their names and of `counted` per second."""
    takes = {name: record.kind("evaluation") for name, record in named.items()}
    scores = list(dict.fromkeys(score for samples in takes.values() for one in samples for score in one["scores"]))
    rows = []
    for name, record in named.items():
        rates = [one[counted] / one["call_seconds"] for one in takes[name]]
        rows.append(
            (
                name,
                str(len(takes[name])),
                _median(_column(record, "wall_seconds", "evaluation")),
                _median(_column(record, "call_seconds", "evaluation")),
                _median(rates),
                _most_bytes(record, "peak_rss_bytes", "evaluation"),
                *(_range([one["scores"][score] for one in takes[name]], text) for score in scores),
            )
        )
    who, rate = heads
    return TextTable(title, (who, "times", "whole process, s", "call alone, s", rate, "peak RSS", *scores), tuple(rows))


def quality_table(title: str, records: Sequence[Record], group: QualityGroup) -> TextTable:
    """Divergence per token in nats, as a share of the baseline's and of llm-compressor's best."""
    named = by_name(records)
    measured = {one.name: one for one in group.contestants if one.name in named and _windows(named[one.name], "near")}
    best = {
        text: _best(named, [name for name, one in measured.items() if isinstance(one, Theirs)], text) for text in TEXTS
    }
    rows = []
    for one in group.contestants:
        if one.name not in named:
            continue
        record = named[one.name]
        cells = [one.name, _verdict(record), _median(_column(record, "wall_seconds"))]
        cells += [_most_bytes(record, "peak_rss_bytes"), _most_bytes(record, "output_bytes")]
        for index, text in enumerate(TEXTS):
            if one.name not in measured:
                cells += [NONE] * 4
                continue
            totals = _windows(record, text)
            scored = [sample["num_scored"] for sample in _samples(record, text)]
            agreed = sum(sample["num_agreed"] for sample in _samples(record, text)) / sum(scored)
            divergence = stats.weighted_mean(totals, scored)
            cells += [format_estimate(divergence, ".5f"), f"{agreed:.4f}"]
            share = _share(named, one.name, group.baseline.name, text)
            target = group.targets[index] if group.targets and isinstance(one, Ours) else None
            met = "" if target is None or share is None or one == group.baseline else f" {_met(share, most=target)}"
            cells.append(NONE if share is None else format_estimate(share, ".3f") + met)
            peer = best[text]
            against = _share(named, one.name, peer, text) if peer and isinstance(one, Ours) else None
            cells.append(NONE if against is None else format_estimate(against, ".3f"))
        rows.append(tuple(cells))
    wanted = (
        "" if group.targets is None else f" (ours wanted at ≤ {group.targets[0]:g} near, ≤ {group.targets[1]:g} far)"
    )
    heads = ["quantizer", "verify", "s", "peak RSS", "size"]
    for text in TEXTS:
        heads += [f"KLD {text}, nats/token", "top-1", "/ RTN", "/ best peer"]
    return TextTable(f"{title}: {group.name}{wanted}", tuple(heads), tuple(rows))


def agreement_table(title: str, records: Sequence[Record]) -> TextTable:
    """Shares of equal bytes and scales, and ratios of global scales, under rounding to nearest."""
    rows = []
    for record in records:
        for sample in record.kind("agreement"):
            cells = [str(record.run.variant["name"]), sample["against"]]
            for key in ("bytes", "scales"):
                cells.append(f"{sample[f'num_{key}_equal']:,} of {sample[f'num_{key}']:,}")
            for key in ("weight_global_scale", "input_global_scale"):
                low, high = sample[f"{key}_low"], sample[f"{key}_high"]
                cells.append(NONE if low is None else f"{low:.4f} … {high:.4f}")
            rows.append(tuple(cells))
    heads = (
        "theirs",
        "ours",
        "equal bytes of codes",
        "equal block scales",
        "global scales / ours",
        "input scales / ours",
    )
    return TextTable(title, heads, tuple(rows))


def _standing(race: Race, what: str, above: Sequence[float], below: Sequence[float]) -> tuple[str, ...]:
    """A row of ratios: the loser's times over the winner's, the goal, and whether it is met."""
    ratio = stats.hodges_lehmann_ratio(above, below)
    wanted = (NONE, NONE) if race.times is None else (f"≥ {race.times:.3g}", _met(ratio, least=race.times))
    return (f"{race.loser} / {race.winner}", what, format_estimate(ratio, ".2f"), *wanted)


def _ratios(title: str, standings: Sequence[tuple[str, ...]]) -> TextTable:
    return TextTable(f"{title}: ratios", ("", "of", "ratio", "wanted", "met"), tuple(standings))


def _range(scores: Sequence[float], text: Callable[[float], str]) -> str:
    """The score, if it is the same in all repetitions; otherwise the least and the greatest."""
    return " … ".join(text(score) for score in sorted({min(scores), max(scores)})) if scores else NONE


def _samples(record: Record, text: str) -> list[dict[str, Any]]:
    return [sample for sample in record.kind("window") if sample["text"] == text]


def _windows(record: Record, text: str) -> list[float]:
    """The divergence of every window, in nats."""
    return [max(0.0, float(sample["kl_nats"])) for sample in record.kind("window") if sample["text"] == text]


def _best(named: Mapping[str, Record], names: Sequence[str], text: str) -> str | None:
    """The variant that diverges least."""
    return min(names, key=lambda name: sum(_windows(named[name], text)), default=None)


def _share(named: Mapping[str, Record], variant: str, baseline: str, text: str) -> Estimate | None:
    if baseline not in named:
        return None
    above, below = _windows(named[variant], text), _windows(named[baseline], text)
    if len(above) != len(below) or not any(below):
        return None
    return stats.paired_sum_ratio(above, below)


def _column(record: Record, key: str, kind: str = "repetition") -> list[float]:
    return [float(sample[key]) for sample in record.kind(kind) if sample[key] is not None]


def _median(values: Sequence[float]) -> str:
    if not values:
        return NONE
    return f"{values[0]:.2f}" if len(values) == 1 else format_estimate(stats.median(values), ".2f")


def _most_bytes(record: Record, key: str, kind: str = "repetition") -> str:
    values = _column(record, key, kind)
    return format_bytes(int(max(values))) if values else NONE


def _verdict(record: Record) -> str:
    if record.kind("failure"):
        return "failed"
    verdicts = record.kind("verdict")
    return NONE if not verdicts else "passed" if verdicts[-1]["passed"] else f"{verdicts[-1]['num_errors']:,} errors"


def _met(ratio: Estimate, *, least: float | None = None, most: float | None = None) -> str:
    """Whether the whole interval keeps the bound: yes, no, or unsure where the bound is inside."""
    low = ratio.value if ratio.low is None else ratio.low
    high = ratio.value if ratio.high is None else ratio.high
    kept = [low >= least, high >= least] if least is not None else [high <= (most or 0.0), low <= (most or 0.0)]
    return "yes" if all(kept) else "unsure" if any(kept) else "no"
