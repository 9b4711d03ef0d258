"""Records of speed to tables: decode, prefill, kernels, memory, and servers measured elsewhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from harness.record import stats
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import runs
from harness.report.tables import Table, scaled, table_of
from harness.suite.names import SOURCE, row_parts


def decode_table(records: runs.Records, versus: str = SOURCE) -> Table:
    """Decode speed per variant, prompt length and batch size, beside the speed that memory allows, and how many times
    it is that of the row `versus`; of a row with a setup also how many times that of the same variant without it.

    One value per repetition: the tokens of its steps after the first, which the prefill gives, over their time. At
    batch 1 the ceiling is memory bandwidth over the bytes of a step: the weights once, the DeltaNet states read and
    written, and the keys and values of the prompt. A model beyond the processor's caches cannot exceed it.
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
        row["user_tokens_per_second"] = scaled(speed, 1 / batch)
        row["ceiling_tokens_per_second"] = ceiling
        row["ceiling_share"] = speed.value / ceiling if ceiling else None
    return table_of(rows)


def prefill_table(records: runs.Records, versus: str = SOURCE) -> Table:
    """Prefill speed: the prompt's tokens over the time until the first new token is known."""
    return table_of(_speeds(records, "prefill", versus))


def bench_tables(records: runs.Records, versus: str = SOURCE) -> list[Table]:
    """Decode, prefill and memory of bench runs, tables without rows left out; speeds are divided by those of the row
    `versus`."""
    made = (decode_table(records, versus), prefill_table(records, versus), memory_table(records))
    return [table for table in made if table]


def kernel_table(records: runs.Records) -> Table:
    """What computed the layers, as the engine told it: one row a variant and kernel."""
    rows = []
    for variant, record in records.items():
        layers: dict[str, list[str]] = {}
        for layer, kernel in ((record.run.engine or {}).get("kernels") or {}).items():
            layers.setdefault(kernel, []).append(layer)
        for kernel, those in layers.items():
            if kernel:
                rows.append({"variant": variant, "kernel": kernel, "computes": ", ".join(those), "run": record})
    return table_of(rows)


def memory_table(records: runs.Records) -> Table:
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
    return table_of(rows)


def served_table(records: runs.Records) -> Table:
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
    return table_of(rows)


# -- What a card asks of a decode table: together these show every row. -------------------------------------------


def single_user(decoded: Table) -> Table:
    """Decode speed of one sequence, of variants as they are."""
    return _about([row for row in _as_they_are(decoded) if _is_curve(row) and row["batch"] == 1])


def by_depth(decoded: Table) -> Table:
    """Decode speed of one sequence after more and more tokens, of variants as they are, the shallowest first."""
    chosen = sorted(filter(_is_at_depth, _as_they_are(decoded)), key=lambda row: row["prompt_tokens"])
    return _about([_with_test(row) for row in chosen], without=_LENGTHS)


def batch_curve(decoded: Table) -> Table:
    """Decode speed in total and for each user, of variants as they are, the smallest batch first; empty where nothing
    but batch 1 was measured."""
    chosen = sorted(filter(_is_curve, _as_they_are(decoded)), key=lambda row: row["batch"])
    measured = chosen if any(row["batch"] > 1 for row in chosen) else []
    return _about(measured, without=("ceiling_tokens_per_second", "ceiling_share"))


def in_setups(decoded: Table) -> Table:
    """Decode speed of variants in setups, MTP among them, at every length and batch size: what drafts came to, and the
    speed over that of the same variant without the setup."""
    return _about([_with_test(row) for row in decoded.rows if _is_in_setup(row)], without=_LENGTHS)


_LENGTHS = ("prompt_tokens", "new_tokens")
_OPTIONAL = ("setup_ratio", "acceptance_share", "mean_accepted_length")  # columns of a table with something in them


def _about(rows: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> Table:
    """The frame of some rows of another one."""
    left_out = {*without, *(key for key in _OPTIONAL if all(row.get(key) is None for row in rows))}
    if all(row["batch"] == 1 for row in rows):
        left_out.add("user_tokens_per_second")
    return table_of([{key: value for key, value in row.items() if key not in left_out} for row in rows])


def _as_they_are(decoded: Table) -> list[dict[str, Any]]:
    return [row for row in decoded.rows if not _is_in_setup(row)]


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


def test_name(new_tokens: int, prompt_tokens: int) -> str:
    """llama-bench's name of a decode: `tg32` for 33 new tokens, whose first belongs to the prefill, and `tg32 @ d4096`
    after 4,096 tokens. There is no empty prompt, so a prompt of one token is depth 0
    (https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench)."""
    depth = prompt_tokens if prompt_tokens > 1 else 0
    return f"tg{new_tokens - 1}" + (f" @ d{depth}" if depth else "")


# -- Samples -----------------------------------------------------------------------------------------------------


def _speeds(records: runs.Records, kind: str, versus: str) -> list[dict[str, Any]]:
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
                **runs.served_as(record),
            }
            name, setup = row_parts(variant)
            if setup is not None:
                row["setup_ratio"] = _speed_over(records, variant, name, kind, shape)
            rows.append(row)
    return rows


def _speed_over(
    records: runs.Records, variant: str, versus: str, kind: str, shape: tuple[int, int, int]
) -> Estimate | str | None:
    """How many times as fast a row is as another one at one shape, or why that cannot be said; None of the other one
    itself, and where it has no such shape."""
    if variant == versus:
        return None
    if refusal := runs.refusal(records, variant, versus):
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
