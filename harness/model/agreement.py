"""Whether the tensors of a source are those that its `config.json` calls for.

An artifact copies that file, and an engine builds what it describes: a layer, a tower or a head that is described and
not there would be built of nothing. So a source is refused by the first of these that is true of it, the most telling
first, before anything is written.
"""

import re
from collections.abc import Iterator, Mapping

from harness.errors import UserError
from harness.formats.format import UNQUANTIZED_DTYPES
from harness.model.checkpoint import TensorEntry
from harness.model.family import Family, ModelConfig, expected_tensors

_ADAPTER = re.compile(r"\.lora_(A|B|magnitude_vector|embedding_[AB])\b|\.modules_to_save\.")
_SCALE = re.compile(
    r"(.*)\.(weight_scale(_inv|_2)?|weight_(packed|global_scale)|input(_global)?_scale|qweight|qzeros|scales|g_idx)"
)
_ANOTHER = "Give the checkpoint that config.json belongs to, or the config.json of this one."

Tensors = Mapping[str, TensorEntry]
Shapes = Mapping[str, tuple[int, ...]]
Faults = Iterator[tuple[str, str]]
"""Problems, to stand behind the name of what has them, and remedies."""


def check_source(config: ModelConfig, tensors: Tensors, where: str) -> tuple[str, ...]:
    """What the user of a source should know of it: sentences without a full stop. `UserError`, naming `where`, for one
    whose tensors are not those of `config`."""
    family = config.family
    layout = family.layout_of(tensors)
    expected = dict(expected_tensors(config, with_mtp=family.has_part(tensors, "mtp"), layout=layout))
    for check in (_another_state, _lost_parts, _other_numbers, _other_tensors):
        for problem, remedy in check(config, tensors, expected):
            raise UserError(f"{where} {problem}.", remedy)
    return tuple(_notes_on_mtp(config, tensors, expected))


def _notes_on_mtp(config: ModelConfig, tensors: Tensors, expected: Shapes) -> Iterator[str]:
    """The MTP head is counted and not there, or another than is described; vLLM loads it for speculation alone."""
    family = config.family
    if not config.num_mtp_layers or not config.states_mtp:
        return
    if not family.has_part(tensors, "mtp"):
        yield (
            f"config.json counts {_counted(config.num_mtp_layers, 'MTP layer')}, and the files hold none: "
            "speculative decoding with method mtp does not work with this model or what is built of it"
        )
        return
    head = {name: shape for name, shape in expected.items() if family.part_of(name) == "mtp"}
    if off := [name for name, shape in head.items() if name not in tensors or tensors[name].shape != shape]:
        yield (
            f"the MTP head is not the one that config.json describes ({_listed(off)}): vLLM serves the model, and "
            "stops while loading where it is to speculate with that head"
        )


def _another_state(config: ModelConfig, tensors: Tensors, expected: Shapes) -> Faults:
    """The files hold an adapter, the names of a trainer's wrapper, or weights that are quantized."""
    if adapters := [name for name in tensors if _ADAPTER.search(name)]:
        yield (
            f"holds an adapter beside the weights ({_listed(adapters)})",
            "Merge the adapter into the weights first, by PEFT's merge_and_unload, and save the model.",
        )
    if wrapped := {name: prefix for name in tensors if (prefix := _wrapper(config.family, name, expected))}:
        yield (
            f"has names with the prefix '{next(iter(wrapped.values()))}' of a wrapper ({_listed(list(wrapped))})",
            "Save the model itself and not the trainer's wrapper of it, by save_pretrained.",
        )
    scales = {name: found[1] for name in tensors if (found := _SCALE.fullmatch(name))}
    scaled = set(scales.values())
    for name, tensor in tensors.items():
        if tensor.dtype in UNQUANTIZED_DTYPES or name in scales:
            continue
        lost = "" if name.removesuffix(".weight") in scaled else ", and its scale is not there"
        yield f"stores {name} as {tensor.dtype}{lost}", "Start from its 16-bit source."
    if scales:
        yield f"holds scales of quantized weights ({_listed(list(scales))})", "Start from its 16-bit source."
    prefix = config.family.text_prefix(tensors)
    if not config.family.is_loaded(prefix):
        right = config.family.published.text_prefix
        yield (
            f"has its text part under '{prefix}', where {config.architecture} has it under '{right}'",
            f"Save the model by transformers' {config.architecture}, which writes those names.",
        )


def _wrapper(family: Family, name: str, expected: Shapes) -> str | None:
    """What stands before a name that the model, or else its family, would know without it."""
    if family.role_of(name) is not None:
        return None
    pieces = name.split(".")
    rests = {".".join(pieces[start:]): ".".join(pieces[:start]) + "." for start in range(1, len(pieces))}
    known = [rest for rest in rests if rest in expected] or [rest for rest in rests if family.role_of(rest)]
    return rests[known[0]] if known else None


def _lost_parts(config: ModelConfig, tensors: Tensors, expected: Shapes) -> Faults:
    """A vision tower or a head that is described and not there."""
    family = config.family
    if config.vision is not None and not family.has_part(tensors, "visual"):
        yield (
            "describes a vision tower in config.json, and its files hold none",
            "Copy the tower's tensors from the model that this one was made from, or take vision_config out.",
        )
    heads = [name for name in expected if family.part_of(name) == "head"]
    if heads and not any(name in tensors for name in heads):
        yield (
            f"has no {heads[0]}, and config.json does not tie it to the embeddings",
            "Set tie_word_embeddings to true if the model was trained so, or save the model with its head.",
        )


def _other_numbers(config: ModelConfig, tensors: Tensors, expected: Shapes) -> Faults:
    """Other numbers of layers or of experts."""
    family = config.family
    layers = {layer for name in tensors if (layer := family.layer_of(name)) is not None}
    if layers and (wanted := set(range(config.num_layers))) != layers:
        lost, more = sorted(wanted - layers), sorted(layers - wanted)
        what = f"layer {lost[0]} is not there" if lost else f"there is a layer {more[0]}"
        yield (
            f"has {_counted(len(layers), 'decoder layer')}, and config.json counts {config.num_layers}: {what}",
            "Set num_hidden_layers and layer_types of config.json to what a pruned model has, or save it whole.",
        )
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None or not family.is_routed(name) or not len(shape) == len(found.shape) == 3:
            continue
        if found.shape[0] != shape[0] and family.part_of(name) == "trunk":
            yield _other_experts(config, name, found.shape[0])
    apart: dict[str, set[int]] = {}
    for name in tensors:
        if family.part_of(name) == "trunk" and (expert := family.expert_of(name)):
            apart.setdefault(expert.experts, set()).add(expert.number)
    for module, numbers in apart.items():
        if numbers != set(range(config.num_experts)):
            yield _other_experts(config, module, len(numbers))


def _other_experts(config: ModelConfig, name: str, number: int) -> tuple[str, str]:
    return (
        f"has {_counted(number, 'expert')} in {name}, and config.json counts {config.num_experts}",
        "Set num_experts to what every layer of a pruned model has; engines load no model whose layers differ in it.",
    )


def _other_tensors(config: ModelConfig, tensors: Tensors, expected: Shapes) -> Faults:
    """Names that the family does not have, tensors that are missing, other shapes."""
    family = config.family
    if unknown := [name for name in tensors if family.role_of(name) is None]:
        yield f"holds tensors that {config.architecture} has not ({_listed(unknown)})", _ANOTHER
    text = {name: shape for name, shape in expected.items() if family.part_of(name) != "mtp"}
    if missing := [name for name in text if name not in tensors]:
        yield f"lacks tensors that config.json calls for ({_listed(missing)})", "Download or save the model again."
    for name, shape in text.items():
        if tensors[name].shape != shape:
            yield f"has {name} in shape {list(tensors[name].shape)}, and config.json makes it {list(shape)}", _ANOTHER


def _listed(names: list[str]) -> str:
    return f"{len(names):,}, such as {names[0]}" if len(names) > 1 else names[0]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
