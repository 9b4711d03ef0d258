"""A model one decoder layer at a time: what calibration and scoring need when the model is larger than memory.

The layers are transformers' own modules, filled from the shards. A decoder layer is taken as its two halves, each
`hidden + body(norm(hidden))`, so that the second can be looked at with the first already changed. The body is attention
or DeltaNet in the first half, and an MLP or a mixture of experts in the second.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.engines.emulation import ExpertRounding, round_expert_inputs
from harness.errors import UserError
from harness.model.checkpoint import Checkpoint, TensorEntry, bytes_of, read_at, write_at, writing
from harness.model.family import ExpertNames, ModelConfig


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` …, or `auto`: the accelerator if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise UserError(f"torch does not know the device '{name}'.", "Use cpu, cuda or auto.")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(f"Device '{name}' was asked for, but torch {torch.__version__} sees none.", "Use cpu.")
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, the models' own, on an accelerator. float32 on a CPU: few CPUs multiply bfloat16, and the others
    emulate it ten times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def silence_transformers() -> None:
    """No more warnings of transformers on stderr, a line for each layer that computes DeltaNet by its reference: the
    record of a run says what computed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Batch:
    """Samples that go through a layer together, padded on the right: layers are causal and recurrent, so padding
    changes nothing before it. `ids [batch, time]`, `valid [batch, time]` False at the padding."""

    ids: Tensor
    valid: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]]) -> "Batch":
        """The samples, the longest first."""
        longest = len(samples[0])
        ids = torch.tensor([[*sample, *[0] * (longest - len(sample))] for sample in samples])
        lengths = torch.tensor([len(sample) for sample in samples])
        return cls(ids, torch.arange(longest) < lengths[:, None])

    @property
    def num_tokens(self) -> int:
        """The tokens that are not padding."""
        return int(self.valid.sum())


def unpadded(x: Tensor, valid: Tensor) -> Tensor:
    """The rows `[tokens, width]` of `x [batch, time, width]` (or already flat) that are not padding."""
    return x.reshape(-1, x.shape[-1])[valid.reshape(-1)]


def batches_of(samples: Sequence[Sequence[int]], max_tokens: int) -> list[Batch]:
    """The samples by falling length, as many together as fit into `max_tokens` with their padding, at least one."""
    order = sorted(range(len(samples)), key=lambda index: (-len(samples[index]), index))
    made: list[list[int]] = []
    for index in order:
        if made and len(samples[made[-1][0]]) * (len(made[-1]) + 1) <= max_tokens:
            made[-1].append(index)
        else:
            made.append([index])
    return [Batch.of([samples[index] for index in members]) for members in made]


@dataclass(frozen=True)
class RoutedExperts:
    """transformers' module of the routed experts of a layer, by the checkpoint's `name` of it, and the router in front
    of it, whose third answer is the experts that each token goes to."""

    name: str
    names: ExpertNames
    module: Any
    router: Any


@dataclass(frozen=True)
class Half:
    """Half a decoder layer. `linears` are its 2-D linear layers by checkpoint name (without `.weight`); `experts` are
    None where there are none."""

    norm: nn.Module
    body: nn.Module
    linears: Mapping[str, nn.Linear]
    experts: RoutedExperts | None
    forward: Callable[[Tensor], Tensor]
    """What the body adds to the hidden states, from `norm(hidden)`, both `[batch, time, width]`."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, time, width]` behind this half."""
        return hidden + self.forward(self.norm(hidden))


class TextModel:
    """The text part of a checkpoint of `config`, whose layers are loaded on request. `check` looks at every tensor that
    is read, as it is stored, and raises for one that is not to be used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        check: Callable[[TensorEntry, Tensor], object] = lambda _entry, _values: None,
    ) -> None:
        # Here, since they take seconds to import, and most of what imports this module builds no layer.
        import transformers

        self.family = config.family
        self._checkpoint, self.device, self.dtype, self._check = checkpoint, device, dtype, check
        silence_transformers()
        found = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True).get_text_config()
        found._attn_implementation = "sdpa"
        self._config: Any = found
        self.num_layers, self.width = int(found.num_hidden_layers), int(found.hidden_size)
        self._modeling = self.family.modeling[config.architecture]
        classes = importlib.import_module(self._modeling.module)
        self._layer_class: Any = getattr(classes, self._modeling.layer_class)
        self._rotary = getattr(classes, self._modeling.rotary_class)(found).to(device)
        self._prefix = self.family.text_prefix(checkpoint.tensors)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[batch, time, width]` of `ids [batch, time]`; only their rows are read."""
        name = f"{self._prefix}{self.family.embedding}.weight"
        rows, places = embedding_rows(self._checkpoint, name, ids)
        self._check(self._checkpoint.tensors[name], rows)
        return rows.to(self.device, self.dtype)[places.to(self.device)]

    def layer(self, index: int) -> tuple[Half, Half]:
        """Decoder layer `index` as halves, in the model's compute dtype; but fused experts stay as they are stored,
        since they are most of a layer, and are widened one at a time."""
        prefix, names = f"{self._prefix}layers.{index}.", self.family.layer
        with torch.device("meta"):
            layer = self._layer_class(self._config, index)
        weights = {name: self._weight(prefix + name, wanted) for name, wanted in layer.state_dict().items()}
        layer.load_state_dict(weights, assign=True)
        layer.requires_grad_(False).eval()
        kind = self._config.layer_types[index]
        mixer = getattr(layer, names.mixers[kind])

        def attend(normed: Tensor) -> Tensor:
            output: Tensor = mixer(
                hidden_states=normed, attention_mask=None, position_embeddings=self._positions(normed)
            )[0]
            return output

        def mix(normed: Tensor) -> Tensor:
            output: Tensor = mixer(hidden_states=normed)
            return output

        mlp, name = getattr(layer, names.mlp), prefix + names.mlp
        linears, run = _linears(mixer, prefix + names.mixers[kind]), attend if kind == "full_attention" else mix
        return (
            Half(getattr(layer, names.input_norm), mixer, linears, None, run),
            Half(getattr(layer, names.post_norm), mlp, _linears(mlp, name), self._experts(mlp, name), mlp),
        )

    def _weight(self, name: str, wanted: Tensor) -> Tensor:
        """The stored tensor that transformers calls `name`, in the dtype that the layer computes with."""
        is_routed = self.family.is_routed(name)
        if is_routed and name not in self._checkpoint.tensors and self._apart(name)[0] in self._checkpoint.tensors:
            return self._stacked_experts(name, tuple(wanted.shape))
        return self._stored(name, tuple(wanted.shape)).to(self.device, None if is_routed else self.dtype)

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        entry = self._checkpoint.tensors.get(name)
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has shape {list(entry.shape)}"
            raise UserError(f"{name} {found}; config.json calls for {list(shape)}.", "Download the source again.")
        stored = self._checkpoint.tensor(name)
        self._check(entry, stored)
        return stored

    def _apart(self, name: str, expert: int = 0) -> list[str]:
        """The tensors that an expert has instead of a slice of the 3-D parameter `name`."""
        module, _, parameter = name.rpartition(".")
        return [f"{module}.{expert}.{shard}.weight" for shard in self.family.experts.shards[parameter]]

    def _stacked_experts(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The 3-D parameter `name` of all experts of a layer that are stored one by one."""
        one = (shape[1] // len(self._apart(name)), shape[2])
        stacked: Tensor | None = None
        for expert in range(shape[0]):
            rows = torch.cat([self._stored(part, one) for part in self._apart(name, expert)])
            if stacked is None:
                stacked = torch.empty(shape, dtype=rows.dtype, device=self.device)
            stacked[expert] = rows
        assert stacked is not None
        return stacked

    def _experts(self, mlp: Any, name: str) -> RoutedExperts | None:
        names = self.family.experts
        module = getattr(mlp, names.module, None)
        if module is None:
            return None
        # transformers' own forward takes no weights of another dtype.
        round_expert_inputs(module, [ExpertRounding(None, None)] * self._config.num_experts)
        return RoutedExperts(f"{name}.{names.module}", names, module, getattr(mlp, names.router))

    def _positions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        axes = (self._modeling.position_axes,) if self._modeling.position_axes else ()
        places = torch.arange(hidden.shape[1], device=hidden.device).expand(*axes, hidden.shape[0], -1)
        cos_sin: tuple[Tensor, Tensor] = self._rotary(hidden, places)
        return cos_sin


def embedding_rows(checkpoint: Checkpoint, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the embedding table `name` that `ids` [...] ask for, as they are stored, each read once, and the row
    of each id: `rows[places]` are the embeddings [..., width]."""
    distinct, places = torch.unique(ids, return_inverse=True)
    return torch.cat([checkpoint.rows(name, int(index), 1) for index in distinct]), places


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    return {f"{prefix}.{name}": part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


class HiddenStates:
    """The hidden states of every batch at one layer boundary: a file, and as much of it in memory as fits. Not a mapped
    file, whose pages would count as resident. It is written batch by batch, and complete once `sync` returned."""

    def __init__(
        self, path: Path, batches: Sequence[Batch], width: int, dtype: torch.dtype, device: torch.device, memory: int
    ) -> None:
        self._path, self._dtype, self._device = path, dtype, device
        self._shapes = [(*batch.ids.shape, width) for batch in batches]
        sizes = [batch.ids.numel() * width * dtype.itemsize for batch in batches]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._kept: dict[int, Tensor] = {}
        self._memory = memory  # left, in bytes
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index].to(self._device)
        shape = self._shapes[index]
        flat = torch.empty(shape, dtype=self._dtype)
        view = bytes_of(flat)
        if read_at(self._file, view, self._offsets[index]) < len(view):
            raise UserError(
                f"{self._path} is cut.", "Remove the folder that it is in, which is unfinished work, and start again."
            )
        return flat.to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        host = hidden.detach().to("cpu", self._dtype).contiguous()
        view = bytes_of(host)
        with writing(self._path):
            write_at(self._file, view, self._offsets[index])
        if index in self._kept or self._memory >= len(view):
            self._memory -= 0 if index in self._kept else len(view)
            self._kept[index] = host

    def sync(self) -> None:
        """Returns once everything written is on the disk."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Closes the file, and frees what is in memory."""
        self._kept.clear()
        os.close(self._file)


@contextlib.contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the first argument of each module's next call, by name, while the block runs."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _module, arguments: inputs.__setitem__(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
