"""What the harness knows of a family of models, as data: the names, roles and shapes of its tensors.

Everything outside of `families/` asks a `Family` and tests no part of a tensor's name itself. There are the names of
the checkpoint (`model.language_model.layers.0.mlp.up_proj.weight`), of the linear layers in it (`Linear.module`), of
vLLM's modules (`Family.engine_name`), and of transformers', which are the checkpoint's but for routed experts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

Part = Literal["trunk", "embedding", "head", "mtp", "visual"]
"""A part of a model. The trunk is the stack of decoder layers and the norm behind it."""

Block = Literal["norm", "attention", "deltanet", "mlp", "router", "experts", "shared-expert", "head"]
"""A block of a decoder layer, or the head behind them. `mlp` is the one of a layer without experts."""

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Names and shapes."""

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Role:
    """What a tensor does."""

    name: str
    pattern: str
    """A regular expression of the tensor's name without the text part's prefix."""
    part: Part = "trunk"
    block: Block | None = None
    target: str | None = None
    """Of a linear layer: the pattern that names its modules in a `quantization_config` (see `formats.config`)."""
    fused: str | None = None
    """The matrix that vLLM makes of several shards, which must share one format and one global scale."""
    quantizable: bool = False
    """Whether a recipe that names the role's block quantizes it."""
    reads_hidden: bool = True
    """Of a linear layer: whether it reads the normed hidden states, and not what another layer of its block made."""
    always_16_bit: bool = False
    """Whether vLLM builds the layer without quantization, whatever the configuration says."""

    @property
    def group(self) -> str:
        """The name of what vLLM fuses the role into, or the role's own: `self_attn.qkv_proj` of `self_attn.q_proj`."""
        return f"{self.name.rpartition('.')[0]}.{self.fused}" if self.fused else self.name


class ExpertPlace(NamedTuple):
    """Which expert a module belongs to: the name of the module of all experts of its layer, and the expert's number."""

    experts: str
    number: int


@dataclass(frozen=True)
class Linear:
    """One linear layer inside a source tensor.

    `module` is its name in the checkpoint. Its weight `[out_features, in_features]` is rows `first_row` to
    `first_row + out_features` of the source tensor seen as a matrix of rows of `in_features`; a 3-D tensor of experts
    holds many. `fused_into` names the matrix that vLLM fuses it into, the module itself where it stands alone.
    """

    module: str
    role: Role
    first_row: int
    out_features: int
    in_features: int
    fused_into: str
    expert: ExpertPlace | None = None


@dataclass(frozen=True)
class Layout:
    """How a checkpoint writes what can be written in several ways: the prefix of the text part, and routed experts in
    3-D tensors of a whole layer or one by one, in the trunk and in the MTP head independently of each other."""

    text_prefix: str
    fused_experts: bool
    fused_mtp_experts: bool


@dataclass(frozen=True)
class ExpertNames:
    """The names around the routed experts of a layer: `module` holds them, and `router` stands beside it. Of the 3-D
    parameters, `gate_up [E, 2I, H]` has the rows of `gate` and `up`, and `down` is `[E, H, I]`. Stored one by one, an
    expert has the matrices `gate`, `up` and `down`. `fused` is what vLLM makes of gate and up."""

    module: str
    router: str
    gate_up: str
    gate: str
    up: str
    down: str
    fused: str

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """Of each 3-D parameter, the projections whose rows it has."""
        return {self.gate_up: (self.gate, self.up), self.down: (self.down,)}


@dataclass(frozen=True)
class LayerNames:
    """How transformers' decoder layer calls its parts. `mixers` has the module of each kind of layer that `layer_types`
    of the configuration names."""

    input_norm: str
    post_norm: str
    mixers: Mapping[str, str]
    mlp: str


@dataclass(frozen=True)
class Modeling:
    """transformers' module and classes for one architecture. `position_axes` is the number of rows of positions that
    its rotary embedding wants: 3 where an image's height and width count too, 0 for plain positions."""

    module: str
    layer_class: str
    rotary_class: str
    position_axes: int


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a `config.json` that decide shapes and sizes. Fields of experts are 0 in dense models."""

    family: "Family" = field(repr=False)
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    full_attention_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_output_gate: bool
    conv_kernel: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    state_bytes_per_element: int
    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_mtp_layers: int
    tied_embeddings: bool
    max_position_embeddings: int | None
    vision: Mapping[str, int] | None
    dense_layers: frozenset[int] = frozenset()
    """Layers with an MLP in a model whose other layers have experts."""
    states_mtp: bool = True
    """Whether `config.json` itself says how many MTP layers there are."""

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts."""
        return self.num_experts > 0

    def has_experts(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts in place of an MLP."""
        return self.is_moe and layer not in self.dense_layers

    @property
    def linear_key_size(self) -> int:
        """The width of all keys of a DeltaNet layer."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_size(self) -> int:
        """The width of all values of a DeltaNet layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One family of models: what `families/<family>.py` writes down."""

    name: str
    modeling: Mapping[str, Modeling]
    """By architecture. A checkpoint of one of these can be planned, built and verified."""
    roles: tuple[Role, ...]
    """The first role whose pattern matches a name is the tensor's."""
    published: Layout
    other_prefixes: tuple[str, ...] = ()
    """Prefixes of the text part in checkpoints that were saved in another way."""
    loads_other_prefixes: bool = False
    """Whether engines load those checkpoints too."""
    parts: Mapping[Part, str]
    """The prefixes of the parts that a checkpoint may lack."""
    embedding: str
    head: str
    not_linear: tuple[str, ...] = ()
    """Ends of the names of matrices that are no linear layers though their role is one."""
    experts: ExpertNames
    layer: LayerNames
    engine_prefixes: tuple[tuple[str, str], ...] = ()
    """Prefixes of a checkpoint's names, with those of the same modules inside vLLM."""
    engine_attention: tuple[str, ...]
    """vLLM's layers that compute full attention, by the last two parts of their names."""
    optional_modules: tuple[str, ...] = ()
    """Linear layers of parts that some models of the family have and others have not."""
    read_config: Callable[[Mapping[str, Any], str], ModelConfig] = field(repr=False)
    """Reads a `config.json` of this family; `UserError`, naming the second argument, for one that is not complete."""
    tensors: Callable[[ModelConfig, Layout, bool], Tensors] = field(repr=False)
    """The tensors of a source checkpoint in a layout, with or without the MTP head."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Those that the text part may have; the published one first."""
        return (self.published.text_prefix, *self.other_prefixes)

    @cached_property
    def _compiled(self) -> tuple[tuple[re.Pattern[str], Role], ...]:
        prefix = f"(?:{'|'.join(map(re.escape, self.prefixes))})?"
        return tuple((re.compile(f"{prefix}(?:{role.pattern})"), role) for role in self.roles)

    @cached_property
    def _in_layer(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{'|'.join(map(re.escape, self.prefixes))})layers\.(\d+)\.")

    @cached_property
    def _of_expert(self) -> re.Pattern[str]:
        return re.compile(rf"(.*\.{self.experts.module})\.(\d+)\.")

    @cached_property
    def _known(self) -> dict[str, Role | None]:
        return {}

    def role_of(self, tensor: str) -> Role | None:
        """The role of a source tensor by its full name; None for a name that the family does not have."""
        name = _NUMBER.sub(".0.", tensor)  # a hundred thousand names differ in numbers only, which patterns ignore
        if name not in self._known:
            self._known[name] = next((role for pattern, role in self._compiled if pattern.fullmatch(name)), None)
        return self._known[name]

    def part_of(self, name: str) -> Part:
        """The part of the model that a tensor or module belongs to, by the name that a checkpoint or an engine gives
        it: the trunk, unless a piece of the name says otherwise."""
        pieces = set(name.split("."))
        for part, prefix in self.parts.items():
            if prefix.split(".")[-2] in pieces:
                return part
        return "embedding" if self.embedding in pieces else "head" if self.head in pieces else "trunk"

    def has_part(self, names: Iterable[str], part: Part) -> bool:
        """Whether any of a checkpoint's tensors `names` is of `part`, one that may be lacking."""
        return any(name.startswith(self.parts[part]) for name in names) if part in self.parts else False

    def layer_of(self, tensor: str) -> int | None:
        """The number of the decoder layer that a source tensor is part of; None outside of them (MTP has its own)."""
        found = self._in_layer.match(tensor)
        return int(found[1]) if found else None

    def expert_of(self, name: str) -> ExpertPlace | None:
        """The routed expert that a tensor or module stored for one expert belongs to; None for any other."""
        found = self._of_expert.match(name)
        return ExpertPlace(found[1], int(found[2])) if found else None

    def is_routed(self, name: str) -> bool:
        """Whether a tensor or module belongs to routed experts, by the name that a checkpoint or an engine gives it."""
        return self.experts.module in name.split(".")

    def linears_of(self, tensor: str, shape: tuple[int, ...]) -> tuple[Linear, ...]:
        """The linear layers in source tensor `tensor` of `shape`: one for a 2-D weight, 2E for the experts' gate and up
        projections `[E, 2I, H]` and E for their down projections `[E, H, I]`, none for anything else."""
        role = self.role_of(tensor)
        if role is None or role.target is None or not 2 <= len(shape) <= 3 or 0 in shape:
            return ()
        if len(shape) == 3:
            parameter = tensor.rpartition(".")[2]
            return tuple(self._experts_in(tensor, shape, role)) if parameter in self.experts.shards else ()
        if tensor.endswith(self.not_linear):
            return ()
        module = tensor.removesuffix(".weight")
        parent = module.rpartition(".")[0]
        fused = f"{parent}.{role.fused}" if role.fused else module
        return (Linear(module, role, 0, shape[0], shape[1], fused, self.expert_of(tensor)),)

    def _experts_in(self, tensor: str, shape: tuple[int, ...], role: Role) -> Iterator[Linear]:
        parent, _, last = tensor.rpartition(".")
        shards = self.experts.shards[last]
        rows = shape[1] // len(shards)
        for expert in range(shape[0]):
            for index, shard in enumerate(shards):
                yield Linear(
                    module=f"{parent}.{expert}.{shard}",
                    role=role,
                    first_row=expert * shape[1] + index * rows,
                    out_features=rows,
                    in_features=shape[2],
                    fused_into=f"{parent}.{expert}.{role.fused or shard}",
                    expert=ExpertPlace(parent, expert),
                )

    def engine_name(self, module: str) -> str:
        """vLLM's name of a module of the checkpoint."""
        name = f"{module}."
        found = (theirs + name[len(ours) :] for ours, theirs in self.engine_prefixes if name.startswith(ours))
        return next(found, name).removesuffix(".")

    def layout_of(self, names: Iterable[str]) -> Layout:
        """How a checkpoint of tensors `names` is written. Where a part has experts in both ways, or none, they count as
        fused, or as published."""
        names = list(names)
        routed = [name for name in names if self.is_routed(name)]
        apart = {self.part_of(name) for name in routed if self.expert_of(name)}
        apart -= {self.part_of(name) for name in routed if not self.expert_of(name)}
        return Layout(
            text_prefix=self.text_prefix(names),
            fused_experts=self.published.fused_experts and "trunk" not in apart,
            fused_mtp_experts=self.published.fused_mtp_experts and "mtp" not in apart,
        )

    def is_loaded(self, prefix: str) -> bool:
        """Whether engines load a checkpoint whose text part has `prefix`."""
        return self.loads_other_prefixes or prefix == self.published.text_prefix

    def text_prefix(self, names: Iterable[str]) -> str:
        """The prefix of the text part in a checkpoint of tensors `names`: the published one unless another is used."""
        used = {prefix for name in names for prefix in self.other_prefixes if name.startswith(f"{prefix}layers.")}
        return next((prefix for prefix in self.other_prefixes if prefix in used), self.published.text_prefix)


def expected_tensors(config: ModelConfig, *, with_mtp: bool, layout: Layout | None = None) -> Tensors:
    """Every tensor of a source checkpoint of `config` as (name, shape); in the published layout unless another is
    given."""
    return config.family.tensors(config, layout or config.family.published, with_mtp)
