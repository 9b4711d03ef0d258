"""Which records may be compared: what must be equal in the headers of two runs of a measure."""

from harness.record.run import Record, Run


def _of(table: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{table}.{key}" for key in keys)


_SOURCE = ("measure_version", "variant.source_digest")
_RELEASE = _of("engine", "name", "version")
_ENGINE = (*_RELEASE, "engine.dtype", "engine.device")

# Speed belongs to one session on one machine; a loss in quality belongs to the same tokens through the same arithmetic.
COMPARABLE: dict[str, tuple[str, ...]] = {
    "ppl": (
        *_SOURCE,
        *_of("dataset", "protocol", "token_ids_sha256", "documents"),
        "suite.ppl.batch_size",
        *_ENGINE,
        *_of("engine.effective", "cpu_capability", "attention_implementation", "deltanet_implementation"),
    ),
    "fidelity": (
        *_SOURCE,
        *_of("dataset", "token_ids_sha256", "window", "distribution"),
        "suite.fidelity.batch_size",
        *_ENGINE,
        "engine.effective.cpu_capability",
    ),
    "bench": (
        *_SOURCE,
        "session_id",
        "machine.name",
        "dataset.token_ids_sha256",
        *_ENGINE,
        "engine.effective.threads",
    ),
    "tasks": (
        *_SOURCE,
        *_of("dataset", "name", "task_digest", "settings", "tokenizer_digest"),
        "packages.lm_eval",
        *_ENGINE,
        "engine.effective.end_tokens",
    ),
    "peers": ("measure_version", "session_id", "suite_digest", "machine.name", "variant.source_digest"),
    "sensitivity": (*_SOURCE, "dataset.token_ids_sha256", *_RELEASE, "engine.dtype"),
    "served": (*_SOURCE, "machine.name", *_RELEASE),
    "build": ("measure_version",),
    "verify": ("measure_version",),
}

# The keys among them that may differ between a run and an older run that it is watched against: a regression comes from
# a new release of the engine, a new driver or another machine, so these must not hide it.
WATCHED = ("session_id", "machine", "engine.version", "engine.device", "engine.effective")


def incomparable(a: Record, b: Record, *, over_time: bool = False) -> list[str]:
    """The header keys that forbid comparing two runs; empty if their numbers may stand side by side. `over_time`: one
    run is the baseline of the other, so that `WATCHED` keys may differ."""
    if a.run.measure != b.run.measure:
        return ["measure"]
    keys = [key for key in COMPARABLE[a.run.measure] if not (over_time and _is_watched(key))]
    return [key for key in keys if _lookup(a.run, key) != _lookup(b.run, key)]


def _is_watched(key: str) -> bool:
    return any(key == watched or key.startswith(f"{watched}.") for watched in WATCHED)


def _lookup(run: Run, dotted: str) -> object:
    """The header value at a dotted key; None where a table on the way is missing."""
    first, *rest = dotted.split(".")
    value = getattr(run, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value
