"""Records of builds and of their verification to tables, and what a server of a variant needs."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from harness import serve
from harness.errors import UserError
from harness.formats.names import FOUR_BIT_INPUTS, KEPT
from harness.model.families import role_is
from harness.record.run import Record
from harness.report import runs
from harness.report.tables import Table, table_of
from harness.suite.names import is_hub_id

GPUS_GIB = (16, 24, 32, 96)
"""Memory of the GPUs that sizes are given for: what Blackwell cards have."""


def total_table(records: runs.Records) -> Table:
    """One row a variant: how many of the source's tensors were quantized, and the bytes of all before and after."""
    rows = []
    for variant, record in records.items():
        roles = record.kind("role")
        source, output = (sum(role[key] for role in roles) for key in ("source_bytes", "output_bytes"))
        rows.append(
            {
                "variant": variant,
                "num_quantized": sum(role["num_tensors"] for role in roles if role["format"] != KEPT),
                "num_kept": sum(role["num_tensors"] for role in roles if role["format"] == KEPT),
                "source_bytes": source,
                "output_bytes": output,
                "bytes_share": output / source if source else None,
                "run": record,
            }
        )
    return table_of(rows)


def role_table(records: runs.Records) -> Table:
    """What was quantized and what was kept: per role the format, the tensors, and the bytes before and after."""
    rows = []
    for variant, record in records.items():
        roles = record.kind("role")
        counts = ("num_tensors", "num_params", "source_bytes", "output_bytes")
        total = {"role": "total", **{count: sum(role[count] for role in roles) for count in counts}}
        for role in (*roles, total):
            share = role["output_bytes"] / role["source_bytes"] if role["source_bytes"] else None
            rows.append({"variant": variant, **role, "bytes_share": share, "run": record})
    return table_of(rows)


def samples_table(records: runs.Records, kind: str) -> Table:
    """A row for every sample of a kind: of `roundtrip`, how far the decoded weights of a role are from the source's; of
    `finding`, what `harness verify` objects to."""
    return table_of(
        {"variant": variant, **one, "run": record} for variant, record in records.items() for one in record.kind(kind)
    )


def method_table(records: runs.Records) -> Table:
    """One row a variant: recipe, how scales and codes were chosen, the formats, and what identifies all that went in.
    Builds of before the method was recorded show a dash."""
    rows = []
    for variant, record in records.items():
        about = record.run.variant
        (chosen,) = record.kind("method") or [{}]
        (calibration,) = record.kind("calibration") or [{}]
        formats = dict.fromkeys(role["format"] for role in record.kind("role") if role["format"] != KEPT)
        rows.append(
            {
                "variant": variant,
                "recipe": about.get("recipe"),
                "scales": chosen.get("scales"),
                "codes": chosen.get("codes"),
                "formats": ", ".join(formats),
                "num_tokens": calibration.get("num_tokens"),
                "calibration_digest": _short(calibration.get("samples_sha256")),
                "artifact": _short(about.get("artifact_digest")),
                "source_digest": _short(about.get("source_digest")),
                "source_revision": about.get("source_revision"),
                "run": record,
            }
        )
    return table_of(rows)


def calibration_table(records: runs.Records) -> Table:
    """One row a source of calibration samples, as the suite of the builds names it; those of the first calibrated
    variant, since a suite has one set."""
    record = next((one for one in records.values() if one.kind("calibration")), None)
    if record is None:
        return table_of([])
    sources = (record.run.suite.get("calibration") or {}).get("sources", ())
    return table_of(
        [
            {
                "dataset": _named(source),
                "num_samples": source["samples"],
                "max_tokens": source["max_tokens"],
                "seed": source.get("seed"),
                "run": record,
            }
            for source in sources
        ]
    )


def calibration_datasets(records: runs.Records) -> list[str]:
    """The hub ids among the sources of calibration samples, for the front matter."""
    suites = [record.run.suite for record in records.values() if record.kind("calibration")]
    sources = [one for suite in suites for one in (suite.get("calibration") or {}).get("sources", ())]
    return list(dict.fromkeys(one["dataset"] for one in sources if is_hub_id(one.get("dataset"))))


def has_role(record: Record, kind: Literal["visual", "mtp", "experts"]) -> bool:
    """Whether a variant has a vision tower, an MTP head to speculate with, or a mixture of experts."""
    return any(role_is(role["role"], kind) for role in record.kind("role"))


def has_four_bit_activations(record: Record) -> bool:
    """Whether a variant computes in 4 bits, and does not only store its weights so."""
    return any(role["format"] in FOUR_BIT_INPUTS for role in record.kind("role"))


def server_footprint(record: Record) -> serve.Footprint | None:
    """What sizes a server of a variant; None of a build of before it was recorded."""
    names = [one.name for one in dataclasses.fields(serve.Footprint)]
    found = record.kind("footprint")
    return serve.Footprint(**{name: found[0][name] for name in names}) if found else None


def sizing_table(records: runs.Records) -> Table:
    """One row a variant and GPU: what `harness serve-command` finds to fit, images served and all else at its defaults;
    GPUs that a variant does not fit have no row."""
    keys = ("weight_bytes", "max_model_len", "users", "shared_tokens")
    rows = []
    for variant, record in records.items():
        if (needed := server_footprint(record)) is None:
            continue
        for gib in GPUS_GIB:
            with contextlib.suppress(UserError):
                sizing = serve.size(needed, gpu_gib=gib)
                cells = {name: getattr(sizing, name) for name in keys}
                rows.append({"variant": variant, "gpu_gib": gib, **cells, "run": record})
    return table_of(rows)


def _short(digest: str | None) -> str | None:
    return digest and digest[:12]


def _named(source: Mapping[str, Any]) -> str:
    """A source of samples: `openai/gsm8k/main/train`, `notes.jsonl`, `demo:train`."""
    if "demo" in source:
        return f"demo:{source['demo']}"
    if "path" in source:
        return str(source["path"])
    return "/".join(part for part in (source["dataset"], source.get("config"), source.get("split")) if part)
