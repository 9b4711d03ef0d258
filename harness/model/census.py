"""The census of a model: its tensors and their bytes, the bytes read per decoded token, the sizes of its caches.

No weight is read: a configuration and the headers of files say it all. Decoding at batch 1 is bound by memory, since
every weight that a token touches is read once, so bandwidth over bytes per token is the ceiling of its speed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from harness.formats.format import Format, num_bytes
from harness.formats.names import KEPT
from harness.model.family import Family, Linear, ModelConfig, Role, expected_tensors


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source checkpoint with its role and the linear layers inside it."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    role: Role | None
    linears: tuple[Linear, ...]

    @property
    def num_params(self) -> int:
        """Its weights."""
        return prod(self.shape)


def source_tensors(family: Family, tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> tuple[SourceTensor, ...]:
    """The census of (name, shape, bytes) triples."""
    return tuple(
        SourceTensor(name, shape, size, family.role_of(name), family.linears_of(name, shape))
        for name, shape, size in tensors
    )


def expected_census(config: ModelConfig, *, with_mtp: bool) -> tuple[SourceTensor, ...]:
    """The census that the configuration calls for, of 16-bit tensors."""
    tensors = expected_tensors(config, with_mtp=with_mtp)
    return source_tensors(config.family, ((name, shape, num_bytes("BF16", shape)) for name, shape in tensors))


@dataclass(frozen=True)
class RoleCount:
    """One row of a plan: what a role weighs before and after. Per-tensor scales are counted."""

    role: str
    format: str
    num_tensors: int
    num_params: int
    source_bytes: int
    output_bytes: int


def output_bytes(tensor: SourceTensor, form: Format | None) -> int:
    """Bytes of `tensor` once stored in `form`; its own bytes where it is kept."""
    if form is None:
        return tensor.num_bytes
    return sum(form.num_bytes(linear.out_features, linear.in_features) for linear in tensor.linears)


def count_roles(tensors: Sequence[SourceTensor], formats: Mapping[str, Format]) -> tuple[RoleCount, ...]:
    """Totals by role, in the order in which the roles first occur. `formats` maps role names to formats."""
    grouped: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.role.name if tensor.role else "unknown", []).append(tensor)
    return tuple(
        RoleCount(
            role=role,
            format=formats[role].name if role in formats else KEPT,
            num_tensors=len(members),
            num_params=sum(member.num_params for member in members),
            source_bytes=sum(member.num_bytes for member in members),
            output_bytes=sum(output_bytes(member, formats.get(role)) for member in members),
        )
        for role, members in grouped.items()
    )


@dataclass(frozen=True)
class TokenTraffic:
    """Bytes that memory moves for one decoded token of one sequence, and what a sequence occupies."""

    weight_bytes: int
    """Every text weight once, one row of the embedding table, the routed experts' active share."""
    state_bytes: int
    """Recurrent and convolution states of all DeltaNet layers; each step reads and writes them."""
    kv_bytes_per_token: int
    """Keys and values that one token adds to the cache; a step at depth d reads d of them."""

    def bytes_per_step(self, depth: int = 0) -> int:
        """What one step moves when `depth` tokens are in the cache."""
        return self.weight_bytes + 2 * self.state_bytes + depth * self.kv_bytes_per_token

    def ceiling(self, bandwidth: float, depth: int = 0) -> float:
        """Tokens per second at batch 1 that `bandwidth` (bytes per second) allows."""
        return bandwidth / self.bytes_per_step(depth)


def token_traffic(config: ModelConfig, counts: Iterable[RoleCount]) -> TokenTraffic:
    """Decode traffic of a model whose roles weigh what `counts` says. The KV cache is taken as 16-bit."""
    roles = {role.name: role for role in config.family.roles}
    weights = 0
    for count in counts:
        role = roles.get(count.role)
        if role is None or role.part in ("visual", "mtp"):
            continue
        if role.part == "embedding":
            # Tied embeddings serve as the output matrix too, which is read whole.
            weights += count.output_bytes if config.tied_embeddings else count.output_bytes // config.vocab_size
        elif role.block == "experts":
            weights += count.output_bytes * config.num_experts_per_token // config.num_experts
        else:
            weights += count.output_bytes
    return TokenTraffic(weights, state_bytes(config), kv_bytes_per_token(config))


def state_bytes(config: ModelConfig) -> int:
    """Recurrent states (`mamba_ssm_dtype`) and 16-bit convolution states of all DeltaNet layers, for one sequence."""
    recurrent = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    convolution = (2 * config.linear_key_size + config.linear_value_size) * (config.conv_kernel - 1)
    num_layers = config.num_layers - len(config.full_attention_layers)
    return num_layers * (recurrent * config.state_bytes_per_element + convolution * 2)


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Keys and values that one token adds to a 16-bit cache."""
    return len(config.full_attention_layers) * 2 * config.num_kv_heads * config.head_dim * 2
