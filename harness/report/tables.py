"""Records to tables: one pandas frame per question; how it is printed is in `columns`.

Every frame takes the records of one measure by variant, with the unquantized model under `source`; perplexity takes
them by protocol and variant, since each protocol has a number of its own. A row is compared with the source only if
`results.incomparable` finds nothing; otherwise the cell says what differs.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import pandas as pd

from harness.record import stats
from harness.record.comparable import incomparable
from harness.record.stats import Estimate
from harness.record.store import Record
from harness.report import columns
from harness.report.numbers import format_bytes, format_percent
from harness.suite.names import SOURCE, row_parts

Records = Mapping[str, Record]  # variant -> the run that speaks for it, of one measure
ByProtocol = Mapping[str, Records]  # protocol -> those of its perplexities

AT_NOISE = "≤ noise"


def newest(
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
    found = {protocol: newest(records, suite, "ppl", variants, protocol) for protocol in protocols}
    return {protocol: chosen for protocol, chosen in found.items() if chosen}


# -- Frames ----------------------------------------------------------------------------------------------------


def perplexity(by_protocol: ByProtocol, floor: float | None = None) -> pd.DataFrame:
    """Perplexity = exp(sum of nll / scored tokens), and what each variant loses against the source.

    The loss is the paired difference of log-perplexities in nats, with its interval over blocks of neighbouring
    windows; the relative change of perplexity is exp(difference) - 1. A loss of at most `floor` nats per token, which
    is what the source differs from itself by, is no difference: the cell says so in place of a number.

    By a protocol whose `unit` is the word, the sum is divided by words, the loss is per word, and pairs and interval
    are over documents; of a run with a limit only the documents that it read to their end count.
    """
    rows = []
    for protocol, records in by_protocol.items():
        for variant, record in records.items():
            windows = record.kind("window")
            dataset = record.run.dataset or {}
            clusters = clusters_of(record)
            row = {
                "variant": variant,
                "protocol": protocol,
                "unit": dataset.get("unit", "token"),
                "dataset": dataset.get("name"),
                "num_tokens": dataset.get("num_tokens"),
                "num_windows": len(windows),
                "num_scored": sum(window["num_scored"] for window in windows),
                "ppl": _ppl(clusters),
                "delta_ppl": None,
                "relative_change_ratio": None,
                "delta_log_ppl": _refusal(records, variant),
                "standard_errors": None,
                "run": record,
                **served_as(record),
            }
            if "documents" in dataset:
                row |= {"num_words": sum(weight for _, weight in clusters), "num_documents": len(clusters)}
            if variant != SOURCE and clusters and row["delta_log_ppl"] is None:
                block = 1 if "documents" in dataset else stats.block_length(len(clusters))
                tokens_per_unit = row["num_scored"] / sum(weight for _, weight in clusters)
                least = None if floor is None else floor * tokens_per_unit
                row |= _lost(clusters, clusters_of(records[SOURCE]), block, least)
            rows.append(row)
    return columns.frame_of(rows)


def _lost(
    clusters: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]], block: int, floor: float | None
) -> dict[str, Any]:
    """The cells that compare a variant with the source over the same clusters, `block` neighbours together."""
    loss = stats.paired_mean_difference(
        [nll for nll, _ in base], [nll for nll, _ in clusters], [weight for _, weight in clusters], block
    )
    if floor is not None and abs(loss.value) <= floor:
        return {"delta_log_ppl": AT_NOISE}
    ppl, base_ppl = _ppl(clusters), _ppl(base)
    return {
        "delta_ppl": ppl - base_ppl if ppl is not None and base_ppl is not None else None,
        "relative_change_ratio": math.expm1(loss.value),
        "delta_log_ppl": loss,
        "standard_errors": loss.standard_errors_from_zero,
    }


def reused_windows(by_protocol: ByProtocol) -> Iterator[str]:
    """Which runs took log-probabilities from earlier ones, a sentence each."""
    for protocol, records in by_protocol.items():
        for variant, record in records.items():
            for told in record.kind("reused"):
                if told["num_reused"]:
                    yield (
                        f"{variant}, {protocol}: {told['num_reused']:,} of {told['num_windows']:,} windows are of "
                        "earlier runs."
                    )


def decode(records: Records, versus: str = SOURCE) -> pd.DataFrame:
    """Decode speed per variant, prompt length and batch size, beside the speed that memory allows, and how many times
    it is that of the row `versus`; of a row with a setup also how many times that of the same variant without it.

    One value per repetition: the tokens of all its steps over their time. The first new token belongs to the
    prefill and is in neither. At batch 1 the ceiling is memory bandwidth over the bytes of a step: the weights once,
    the DeltaNet states read and written, and the keys and values of the prompt. A model that does not fit
    into the processor's caches cannot exceed it.
    """
    rows = _speeds(records, "decode", versus)
    for row in rows:
        effective = (row["run"].run.engine or {}).get("effective", {})
        speed, batch = row["tokens_per_second"], row["batch"]
        samples = by_shape(row["run"], "decode")[batch, row["prompt_tokens"], row["new_tokens"]]
        drafted = "num_drafts" in samples[0]
        bandwidth = effective.get("bandwidth_bytes_per_second")
        weights, state, kv = (
            effective.get(key) or 0 for key in ("weight_bytes_per_token", "state_bytes", "kv_bytes_per_token")
        )
        step = weights + 2 * state + row["prompt_tokens"] * kv
        # A step that speculates gives more than one token: bytes over bandwidth bound the steps, not the tokens.
        ceiling = bandwidth / step if batch == 1 and bandwidth and weights and not drafted else None
        if drafted:
            drafts, proposed, accepted = (
                sum(sample[key] for sample in samples)
                for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
            )
            row["acceptance_share"] = accepted / proposed if proposed else None
            row["mean_accepted_length"] = 1 + accepted / drafts if drafts else None
        row["user_tokens_per_second"] = columns.scaled(speed, 1 / batch)
        row["ceiling_tokens_per_second"] = ceiling
        row["ceiling_share"] = speed.value / ceiling if ceiling else None
    return columns.frame_of(rows)


def prefill(records: Records, versus: str = SOURCE) -> pd.DataFrame:
    """Prefill speed: the prompt's tokens over the time until the first new token is known."""
    return columns.frame_of(_speeds(records, "prefill", versus))


# What a card asks of a decode frame, each with the rows and columns that answer it. Together they show every row.


def single(decoded: pd.DataFrame) -> pd.DataFrame:
    """Decode speed of one sequence, of variants as they are."""
    chosen = [row for row in _as_they_are(decoded) if _is_curve(row) and row["batch"] == 1]
    return _about(chosen)


def by_depth(decoded: pd.DataFrame) -> pd.DataFrame:
    """Decode speed of one sequence after more and more tokens, of variants as they are, the shallowest first."""
    chosen = sorted(filter(_is_at_depth, _as_they_are(decoded)), key=lambda row: row["prompt_tokens"])
    return _about([_with_test(row) for row in chosen], without=_LENGTHS)


def batch_curve(decoded: pd.DataFrame) -> pd.DataFrame:
    """Decode speed in total and for each user, of variants as they are, the smallest batch first; empty where nothing
    but batch 1 was measured."""
    chosen = sorted(filter(_is_curve, _as_they_are(decoded)), key=lambda row: row["batch"])
    measured = chosen if any(row["batch"] > 1 for row in chosen) else []
    return _about(measured, without=("ceiling_tokens_per_second", "ceiling_share"))


def in_setups(decoded: pd.DataFrame) -> pd.DataFrame:
    """Decode speed of variants in setups, MTP among them, at every length and batch size: what drafts came to, and the
    speed over that of the same variant without the setup."""
    return _about([_with_test(row) for row in columns.rows_of(decoded) if _is_in_setup(row)], without=_LENGTHS)


_LENGTHS = ("prompt_tokens", "new_tokens")
_OPTIONAL = ("setup_ratio", "acceptance_share", "mean_accepted_length")  # columns of a table with something in them


def _about(rows: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> pd.DataFrame:
    """The frame of some rows of another one."""
    left_out = {*without, *(key for key in _OPTIONAL if all(row.get(key) is None for row in rows))}
    if all(row["batch"] == 1 for row in rows):
        left_out.add("user_tokens_per_second")
    return columns.frame_of([{key: value for key, value in row.items() if key not in left_out} for row in rows])


def _as_they_are(decoded: pd.DataFrame) -> list[dict[str, Any]]:
    return [row for row in columns.rows_of(decoded) if not _is_in_setup(row)]


def _is_in_setup(row: Mapping[str, Any]) -> bool:
    return row_parts(row["variant"])[1] is not None


def _is_at_depth(row: Mapping[str, Any]) -> bool:
    """Whether the suite that a run was made with asks for a row among its depths."""
    bench = row["run"].run.suite.get("bench") or {}
    depths = {max(depth, 1) for depth in bench.get("depths") or ()}
    return row["batch"] == 1 and row["prompt_tokens"] in depths and row["new_tokens"] == bench["depth_tokens"]


def _is_curve(row: Mapping[str, Any]) -> bool:
    """Whether it asks for it among its batch sizes; what it does not ask for counts as such."""
    bench = row["run"].run.suite.get("bench") or {}
    return not _is_at_depth(row) or [row[key] for key in _LENGTHS] == [bench[key] for key in _LENGTHS]


def _with_test(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "test": test_name(row["new_tokens"], row["prompt_tokens"])}


def test_depth(prompt_tokens: int) -> int:
    """What llama-bench calls the depth of a decode: the tokens before it. There is no empty prompt, so one token is
    depth 0."""
    return prompt_tokens if prompt_tokens > 1 else 0


def test_name(new_tokens: int, prompt_tokens: int) -> str:
    """llama-bench's name of a decode: `tg32` of 33 new tokens, whose first belongs to the prefill, and `tg32 @ d4096`
    after 4,096 tokens (https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench)."""
    depth = test_depth(prompt_tokens)
    return f"tg{new_tokens - 1}" + (f" @ d{depth}" if depth else "")


def kernels(records: Records) -> pd.DataFrame:
    """What computed the layers, as the engine told it: one row a variant and kernel."""
    rows = []
    for variant, record in records.items():
        layers: dict[str, list[str]] = {}
        for layer, kernel in ((record.run.engine or {}).get("kernels") or {}).items():
            layers.setdefault(kernel, []).append(layer)
        for kernel, those in layers.items():
            if kernel:
                rows.append({"variant": variant, "kernel": kernel, "computes": ", ".join(those), "run": record})
    return columns.frame_of(rows)


def memory(records: Records) -> pd.DataFrame:
    """What the engine held: the weights, and the most memory that any of its starts came to."""
    rows = []
    for variant, record in records.items():
        starts = record.kind("memory")
        most = {
            key: max((start[key] for start in starts if start.get(key) is not None), default=None)
            for key in ("weight_bytes", "kv_cache_tokens", "peak_rss_bytes", "peak_vram_bytes")
        }
        if most["kv_cache_tokens"] is None:  # only engines that allot it beforehand tell
            del most["kv_cache_tokens"]
        if starts:
            rows.append({"variant": variant, **most, "run": record})
    return columns.frame_of(rows)


def served(records: Records) -> pd.DataFrame:
    """What `vllm bench` measured elsewhere. Per request: the median time to the first token, and the median speed after
    it; of a batch and of everything: tokens over time, the prompt's with them where the tool counts them."""
    rows = []
    for variant, record in records.items():
        engine = record.run.engine or {}
        settings = engine.get("requested", {})
        common = {"variant": variant, "benchmark": settings.get("benchmark"), "run": record}
        requests = [one for one in record.kind("request") if one["new_tokens"] > 1 and one["decode_seconds"] > 0]
        if requests:
            speeds = [(one["new_tokens"] - 1) / one["decode_seconds"] for one in requests]
            rows.append(
                {
                    **common,
                    "concurrency": settings.get("max_concurrency"),
                    "num_requests": len(requests),
                    "num_failed": len(record.kind("failed_request")),
                    "first_token_seconds": stats.median([one["first_token_seconds"] for one in requests]),
                    "user_tokens_per_second": stats.median(speeds),
                }
            )
        for kind in ("generation", "throughput"):
            if found := record.kind(kind):
                tokens = [one.get("num_tokens") or one["batch"] * one["new_tokens"] for one in found]
                rates = [count / one["seconds"] for count, one in zip(tokens, found, strict=True)]
                shape = {key: found[0].get(key) for key in ("batch", "prompt_tokens", "new_tokens", "num_requests")}
                rows.append({**common, **shape, "tokens_per_second": stats.median(rates)})
    return columns.frame_of(rows)


def size(records: Records) -> pd.DataFrame:
    """What was quantized and what was kept: per role the format, the tensors, and the bytes before and after."""
    rows = []
    for variant, record in records.items():
        roles = record.kind("role")
        counts = ("num_tensors", "num_params", "source_bytes", "output_bytes")
        total = {"role": "total", **{count: sum(role[count] for role in roles) for count in counts}}
        for role in (*roles, total):
            share = role["output_bytes"] / role["source_bytes"] if role["source_bytes"] else None
            rows.append({"variant": variant, **role, "bytes_share": share, "run": record})
    return columns.frame_of(rows)


def roundtrip(records: Records) -> pd.DataFrame:
    """How far the decoded weights are from the source's, per role."""
    return columns.frame_of(
        [
            {"variant": variant, **role, "run": record}
            for variant, record in records.items()
            for role in record.kind("roundtrip")
        ]
    )


def findings(records: Records) -> pd.DataFrame:
    """What `harness verify` objects to; empty is good."""
    return columns.frame_of(
        [
            {"variant": variant, **finding, "run": record}
            for variant, record in records.items()
            for finding in record.kind("finding")
        ]
    )


def sensitivity(records: Records) -> pd.DataFrame:
    """What storing a group of linear layers in each format does to the output of its half of a layer.

    One row a group, the one that NVFP4 hurts most first: the layer errors of each format over the layers, the bytes
    that FP8 takes more than NVFP4 in all of them, and the error that a gigabyte of those would take away.
    """
    rows = []
    for variant, record in records.items():
        by_role: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for sample in record.kind("sensitivity"):
            by_role.setdefault(sample["role"], {}).setdefault(sample["format"], []).append(sample)
        found = []
        for role, formats in by_role.items():
            spreads = {form: _spread(samples) for form, samples in formats.items()}
            row: dict[str, Any] = {"variant": variant, "role": role, "num_layers": len(formats["NVFP4"]), **spreads}
            row["run"] = record
            row["fp8_extra_bytes"] = sum(one["extra_bytes"] for one in formats["FP8_DYNAMIC"])
            saved = sum(
                nvfp4["layer_error"] - fp8["layer_error"]
                for nvfp4, fp8 in zip(formats["NVFP4"], formats["FP8_DYNAMIC"], strict=True)
                if nvfp4["layer_error"] is not None
            )
            row["fp8_gain_per_gb"] = saved / row["fp8_extra_bytes"] * 1e9
            row["num_tokens"] = (record.run.dataset or {}).get("num_tokens")
            row["dataset"] = (record.run.dataset or {}).get("name")
            found.append(row)
        rows += sorted(found, key=_rank)
    return columns.frame_of(rows)


def _rank(row: Mapping[str, Any]) -> float:
    """Falls with the median error in NVFP4; last where there is none."""
    return -row["NVFP4"].median if row["NVFP4"] else math.inf


def _spread(samples: Sequence[Mapping[str, Any]]) -> columns.Spread | None:
    known = [(one["layer_error"], one["index"]) for one in samples if one["layer_error"] is not None]
    if not known:
        return None
    largest, layer = max(known, key=lambda pair: pair[0])
    return columns.Spread(statistics.median(error for error, _ in known), largest, layer)


def sensitivity_words(frame: pd.DataFrame) -> list[str]:
    """What the table of sensitivities says, in sentences: where FP8 pays, and how DeltaNet compares with the rest."""
    rows = [row for row in frame.to_dict("records") if row["NVFP4"] is not None]
    if not rows:
        return []

    def median(row: Mapping[Any, Any], form: str = "NVFP4") -> str:
        return format_percent(row[form].median, ".2g")

    best = max(rows, key=lambda row: row["fp8_gain_per_gb"])
    words = [
        f"FP8 gains most for its bytes in {best['role']}: median layer error {median(best)} in NVFP4 and "
        f"{median(best, 'FP8_DYNAMIC')} in FP8, for {format_bytes(best['fp8_extra_bytes'])} more in "
        f"{best['num_layers']} {'layer' if best['num_layers'] == 1 else 'layers'}."
    ]
    worst = f"NVFP4 costs most in {rows[0]['role']} (median layer error {median(rows[0])})"
    is_deltanet = [row["role"].startswith("linear_attn.") for row in rows]
    if len(set(is_deltanet)) == 2:
        other = rows[is_deltanet.index(not is_deltanet[0])]
        place = "outside of DeltaNet" if is_deltanet[0] else "in DeltaNet"
        worst += f", and {place} in {other['role']} ({median(other)})"
    return [*words, f"{worst}."]


def runs(records: Sequence[Record]) -> pd.DataFrame:
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
    return columns.frame_of(rows)


def of_measure(measure: str, records: Records, versus: str = SOURCE) -> list[pd.DataFrame]:
    """The frames that answer one measure's questions, those without rows left out; speeds are divided by those of the
    row `versus`."""
    frames: tuple[Callable[[Records], pd.DataFrame], ...] = {
        "build": (size,),
        "verify": (roundtrip, findings),
        "sensitivity": (sensitivity,),
        "bench": (partial(decode, versus=versus), partial(prefill, versus=versus), memory),
        "served": (served,),
    }[measure]
    return [frame for make in frames if not (frame := make(records)).empty]


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


def _ppl(clusters: Sequence[tuple[float, int]]) -> float | None:
    if not clusters:
        return None
    return math.exp(math.fsum(nll for nll, _ in clusters) / sum(weight for _, weight in clusters))


def _refusal(records: Records, variant: str, versus: str = SOURCE) -> str | None:
    """Why a variant cannot be compared with another row; None if it can, or is that row."""
    if versus not in records:
        return f"no record of {'the source' if versus == SOURCE else versus}"
    found = differing(records[variant], records[versus])
    return f"incomparable: {', '.join(found)}" if found else None


def differing(record: Record, other: Record, *, over_time: bool = False) -> list[str]:
    """What forbids comparing two runs, `over_time` as for `results.incomparable`, windows that are not the same or are
    there twice among it; empty if nothing does."""
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


def _speeds(records: Records, kind: str, versus: str) -> list[dict[str, Any]]:
    """Rows of speed, one per variant and shape (batch size, prompt length)."""
    rows, rate = [], RATES[kind]
    for variant, record in records.items():
        for shape, samples in by_shape(record, kind).items():
            rates = [rate(sample) for sample in samples]
            ratio = _speed_over(records, variant, versus, kind, shape)
            row = {
                "variant": variant,
                "batch": shape[0],
                "prompt_tokens": shape[1],
                **({"new_tokens": shape[2]} if kind == "decode" else {}),
                "num_starts": len({sample["start"] for sample in samples}),
                "num_repetitions": len(rates),
                "tokens_per_second": stats.median(rates),
                "versus": versus,
                "speed_ratio": ratio,
                "speed_change_ratio": ratio.value - 1 if isinstance(ratio, Estimate) else None,
                "run": record,
                **served_as(record),
            }
            name, setup = row_parts(variant)
            if setup is not None:
                row["setup_ratio"] = _speed_over(records, variant, name, kind, shape)
            rows.append(row)
    return rows


def _speed_over(
    records: Records, variant: str, versus: str, kind: str, shape: tuple[int, int, int]
) -> Estimate | str | None:
    """How many times as fast a row is as another one at one shape, or why that cannot be said; None of the other one
    itself, and where it has no such shape."""
    if variant == versus:
        return None
    if refusal := _refusal(records, variant, versus):
        return refusal
    base = by_shape(records[versus], kind).get(shape)
    return speed_ratio(kind, by_shape(records[variant], kind)[shape], base)[0] if base else None


def speed_ratio(
    kind: str, samples: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> tuple[Estimate, str]:
    """How many times as fast a run is as another one of its session, of samples of one kind and shape, and what its
    interval is over: the starts of the engine, which differ more than the repetitions within them, or the repetitions
    where there was only one start."""
    sides: list[list[list[float]]] = []
    for side in (samples, base):
        starts: dict[int, list[float]] = {}
        for sample in side:
            starts.setdefault(sample["start"], []).append(RATES[kind](sample))
        sides.append(list(starts.values()))
    if all(len(side) > 1 for side in sides):
        return stats.ratio_of_groups(*sides), "starts"
    return stats.hodges_lehmann_ratio(*(list(chain(*side)) for side in sides)), "repetitions"


def by_shape(record: Record, kind: str) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    """A bench run's samples of one kind by (batch size, prompt length, new tokens); warm-ups are left out."""
    shapes: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for sample in record.kind(kind):
        if not sample["warmup"]:
            shapes.setdefault((sample["batch"], sample["prompt_tokens"], _new_tokens(sample)), []).append(sample)
    return dict(sorted(shapes.items()))


def _new_tokens(sample: Mapping[str, Any]) -> int:
    """Version 1 of the measure had a time for each step and no count."""
    count: int = sample.get("new_tokens", len(sample.get("step_seconds", ())) + 1)
    return count


def token_seconds(sample: Mapping[str, Any]) -> list[float]:
    """A decode sample's time of each token: those of its steps, or the mean where the engine gave one for all."""
    steps, num_tokens = sample["step_seconds"], _new_tokens(sample) - 1
    return list(steps) if len(steps) == num_tokens else [math.fsum(steps) / num_tokens] * num_tokens


def _decode_rate(sample: Mapping[str, Any]) -> float:
    """Tokens per second of one repetition, over the whole batch."""
    tokens = sample["batch"] * (_new_tokens(sample) - 1)
    return float(tokens / math.fsum(sample["step_seconds"]))


def _prefill_rate(sample: Mapping[str, Any]) -> float:
    """The same of a prefill: the tokens of its prompts."""
    return float(sample["batch"] * sample["prompt_tokens"] / sample["prefill_seconds"])


RATES: dict[str, Callable[[Mapping[str, Any]], float]] = {"decode": _decode_rate, "prefill": _prefill_rate}


def warnings(records: Iterable[Record]) -> list[str]:
    """What the engines said of their settings, each sentence once."""
    said = (line for record in records for line in (record.run.engine or {}).get("warnings", ()))
    return list(dict.fromkeys(said))
