"""What the names in a suite mean: its source, its texts, its calibration samples, its variants and setups.

A name that means nothing is a `UserError`, before a model is loaded or anything is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness import demo
from harness.demo import corpus
from harness.errors import UserError, did_you_mean
from harness.model.census import RoleCount, kv_bytes_per_token, state_bytes
from harness.model.checkpoint import read_json
from harness.model.families import parse_config, role_is
from harness.model.family import ModelConfig
from harness.model.hub import load_rows
from harness.model.sources import SourceCensus, census_at, locate
from harness.progress import Progress
from harness.quantize.plan import Plan, plan
from harness.quantize.recipes import Recipe
from harness.serve import Footprint
from harness.suite.names import SOURCE

if TYPE_CHECKING:
    from harness.quantize.layerwise import CalibrationInput
    from harness.suite import texts
    from harness.suite.schema import Suite

T = TypeVar("T")

DEMO = "demo:"
"""How the name of something embedded begins: `demo:dense`."""
_NUM_CALIBRATION_DOCUMENTS = 1000


# -- The source ----------------------------------------------------------------------------------------------------


def find_source(location: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder of a source: an embedded model (`demo:dense`), a folder or a hub id."""
    if location.startswith(DEMO):
        return demo.checkpoint_path(location.removeprefix(DEMO))

    return locate(location, revision, config_only=config_only)


def suite_source(suite: Suite) -> Path:
    """The folder of the suite's source, downloaded first where it is on the Hub."""
    return find_source(suite.source_location(), suite.source.revision)


def source_config(source: Path) -> ModelConfig:
    """The configuration of the model in a source folder."""
    return parse_config(read_json(source / "config.json"), str(source))


def plan_source(location: str, recipe: Recipe | None, revision: str | None = None) -> tuple[SourceCensus, Plan]:
    """The plan of a recipe for a `config.json`, a folder or a hub id. Weights are not read: where shards lie
    beside the configuration their headers say what there is, else the configuration does, without an MTP head."""
    path = Path(location)
    source = census_at(path if path.is_file() else find_source(location, revision, config_only=True))
    return source, plan(source.config, source.tensors, recipe)


def serving_footprint(config: ModelConfig, counts: Sequence[RoleCount]) -> Footprint:
    """What a variant of these roles takes of a GPU that serves it."""
    return Footprint(
        weight_bytes=sum(count.output_bytes for count in counts),
        visual_bytes=sum(count.output_bytes for count in counts if role_is(count.role, "visual")),
        state_bytes=state_bytes(config),
        kv_bytes_per_token=kv_bytes_per_token(config),
        max_positions=config.max_position_embeddings,
    )


# -- Texts and calibration samples ---------------------------------------------------------------------------------


def read_text(suite: Suite, text: texts.Text, *, as_lines: bool = False) -> tuple[dict[str, Any], str]:
    """What identifies a text of the suite, and the text. `as_lines`: as in `dataset_text`."""
    from harness.suite.texts import DatasetText, DemoText, FileText

    match text:
        case DemoText(split):
            known = {"heldout": corpus.heldout_text}
            if split not in known:
                raise UserError(f"The embedded corpus has no text '{split}'.", did_you_mean(split, known))
            name, content = f"{DEMO}{split}", known[split]()
        case FileText(path):
            name, content = Path(path).name, file_text(suite.path(path))
        case DatasetText():
            name = "/".join(part for part in (text.dataset, text.config, text.split) if part)
            content = dataset_text(text, as_lines=as_lines)
    return {"name": name, "text_sha256": hashlib.sha256(content.encode()).hexdigest()}, content


def file_text(path: Path) -> str:
    """The text of a UTF-8 file; `UserError` for one that cannot be read or is empty."""
    try:
        # Bytes, not text mode: that would turn the line ends of a Windows file into other tokens.
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}).", "Convert it, for example with iconv.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path in the suite.") from None
    return _not_empty(text, path)


def dataset_text(wanted: texts.DatasetText, *, as_lines: bool = False) -> str:
    """The rows of a dataset on the hub, joined with nothing in between: WikiText's carry their own line ends.

    `as_lines`: every row ends with a line feed, and an empty row becomes a line of one blank. This turns a WikiText
    dataset back into the file that it was made from. `UserError` as in `load_rows`, and for a text that is empty.
    """
    dataset, column = wanted.dataset, wanted.column
    rows = load_rows(dataset, wanted.config, wanted.split, wanted.revision)
    if column not in rows.column_names:
        raise UserError(
            f"The dataset {dataset} has no column '{column}'.", f"Its columns: {', '.join(rows.column_names)}."
        )
    found = list(rows[column])
    if as_lines:
        found = [(row.removesuffix("\n") or " ") + "\n" for row in found]
    return _not_empty("".join(found), dataset)


def _not_empty(text: str, name: object) -> str:
    if not text.strip():
        raise UserError(f"The text of {name} is empty.", "Check its path, split and column.")
    return text


def tokenized(suite: Suite, text: texts.Text) -> tuple[list[int], dict[str, Any]]:
    """The token ids of a text by the source's tokenizer, and what identifies them."""
    from harness.measure import perplexity

    about, content = read_text(suite, text)
    ids = perplexity.tokenize(suite_source(suite), content)
    return ids, {**about, "token_ids_sha256": perplexity.token_ids_digest(ids), "num_tokens": len(ids)}


def read_calibration(
    wanted: texts.Calibration, folder: Path, source: Path, progress: Progress, device: str = "auto"
) -> CalibrationInput:
    """The token ids of a calibration table whose relative paths start at `folder`, by the tokenizer of `source`, to go
    through the model on `device`."""
    from harness.quantize import samples
    from harness.quantize.layerwise import CalibrationInput

    embedded = {
        "train": partial(corpus.split_text, "train", num_documents=_NUM_CALIBRATION_DOCUMENTS),
        "validation": partial(corpus.split_text, "validation", num_documents=_NUM_CALIBRATION_DOCUMENTS),
    }
    read = samples.read_samples(wanted, source, folder, embedded, progress)
    return CalibrationInput(read, wanted.batch_tokens, round(wanted.hidden_memory_gb * 1e9), device)


# -- Rows: variants and setups -------------------------------------------------------------------------------------


def required(suite: Suite, table: str, value: T | None) -> T:
    """A table of the suite that a command cannot do without; `UserError` where the suite has none."""
    if value is None:
        raise UserError(f"Suite '{suite.name}' has no [{table}] table.", "Add it, or measure another suite.")
    return value


def chosen_variants(suite: Suite, names: Sequence[str] | None, *, with_source: bool) -> list[str]:
    """The variants that a command is about: the named ones, or all of the suite, the source first."""
    known = [SOURCE, *suite.variants] if with_source else list(suite.variants)
    for name in names or ():
        if name not in known:
            raise UserError(f"Suite '{suite.name}' has no variant '{name}'.", did_you_mean(name, known))
    return [name for name in known if not names or name in names]


def chosen_setups(suite: Suite, setups: Sequence[str] | None) -> list[str | None]:
    """The setups to measure in; None, the suite's own options, comes first. Setups are options of vLLM: another engine
    measures the variants as they are."""
    return [None, *(setups or ())] if suite.engine.name == "vllm" else [None]


def check_engine(suite: Suite) -> None:
    """`UserError` where the harness cannot start the suite's engine."""
    from harness.engines.protocol import ENGINES

    engine = suite.engine.name
    if engine not in ENGINES:
        raise UserError(f"There is no engine '{engine}'.", did_you_mean(engine, ENGINES))
    if engine == "server":
        raise UserError("A server is no engine that a suite starts.", "Measure it by `harness bench --server URL`.")


def max_length(suite: Suite, asked: int | None, setups: Sequence[str] | None) -> int:
    """The most tokens of a sequence: the least of what the model, the engine in each setup and the suite say."""
    said = [source_config(suite_source(suite)).max_position_embeddings, asked]
    if suite.engine.name == "vllm":
        said += [suite.vllm_options(setup).get("max_model_len") for setup in chosen_setups(suite, setups)]
    known = [length for length in said if isinstance(length, int)]  # it may be "auto"
    if not known:
        raise UserError(
            f"The configuration of suite '{suite.name}'s source does not say how many tokens it takes.",
            "Set max_length.",
        )
    return min(known)


def check_lengths(suite: Suite, measure: str, setups: Sequence[str | None], longest: int) -> None:
    """`UserError` where the model was made for fewer tokens of a sequence than the measure gives it, or vLLM is set to
    take fewer."""
    folder = find_source(suite.source_location(), suite.source.revision, config_only=True)
    made_for = source_config(folder).max_position_embeddings
    if made_for is not None and made_for < longest:
        raise UserError(
            f"{suite.source_location()} takes {made_for:,} tokens of a sequence, and {measure} needs {longest:,}.",
            f"Measure shorter pieces: lower the lengths in [{measure}].",
        )
    for setup in setups if suite.engine.name == "vllm" else ():
        most = suite.vllm_options(setup).get("max_model_len")
        if isinstance(most, int) and most < longest:
            where = "[engine.vllm]" if setup is None else f"[setups.{setup}]"
            raise UserError(
                f"Suite '{suite.name}' has max_model_len = {most:,} in {where}, and {measure} needs {longest:,}.",
                "Raise it, or measure shorter pieces.",
            )
