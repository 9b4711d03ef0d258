"""The streamed scorer: predictions of models that are larger than memory, of a source and its variants in one pass.

One decoder layer of one model is in memory at a time, and all batches go through it before the next is read. What goes
in and comes out lies in two files a model (`layers.HiddenStates`), so a pass that was killed goes on at the layer it
was in. Memory holds the largest layer (or the heads in float32), `hidden_bytes` of hidden states, one batch's
activations and `torch_answers.LOGITS_BYTES` a model.

The log-probabilities are those of the torch engine to the last bit, since transformers' own class, the batches and the
rows of a product are the same. The exception are dense variants that round activations, in bfloat16: compressed-tensors
computes the scale of an activation in bfloat16 and `loading` in float32, which moves predictions about as far as
bfloat16 itself does (on the embedded W4A4 model either is 0.0014 nats a token from the torch engine in bfloat16).
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.engines.describing import describe, weight_bytes
from harness.engines.emulation import formats_of
from harness.engines.layers import Batch, HiddenStates, embedding_rows
from harness.engines.loading import load_empty
from harness.engines.protocol import ENGINES, Chunk, EngineInfo, Memory, Start
from harness.engines.torch_common import (
    DTYPES,
    ChunkedEngine,
    Head,
    batches_of_equals,
    out_of_memory,
    peak_memory,
    predictions,
    prepare_process,
    scoring,
)
from harness.errors import UserError
from harness.model.checkpoint import check_disk, write_file
from harness.progress import Progress, silent

HIDDEN_BYTES = 4 * 10**9
"""Hidden states in memory, unless a caller says otherwise; the others are read from the disk."""
_LOCK, _STATE, _HIDDEN = "streamed.lock", "streamed.json", "streamed-hidden-"


class Streamed:
    """Checkpoint folders, the source's first, whose layers are loaded on request. `UserError` for a folder that the
    torch engine would not load, and for a model whose layers or tokens are not as many as the first's."""

    def __init__(self, folders: Sequence[Path], *, dtype: str, device: str) -> None:
        self._device = prepare_process(dtype, device)
        self._models = [_Model(folder, dtype, device, self._device) for folder in folders]
        self.infos: tuple[EngineInfo, ...] = tuple(model.info for model in self._models)
        """What runs, and how, by model. `weight_bytes_resident` are the bytes of the largest decoder layer, or of the
        head, whichever is more."""
        source, *variants = self._models
        self.vocabulary = source.vocabulary
        for variant in variants:
            for what, of_source, of_variant in (
                ("decoder layers", source.num_layers, variant.num_layers),
                ("tokens in its vocabulary", source.vocabulary, variant.vocabulary),
            ):
                if of_source != of_variant:
                    raise UserError(
                        f"{source.folder} has {of_source:,} {what} and {variant.folder} {of_variant:,}.",
                        "Compare a variant with the source that it was made from.",
                    )

    def log_probs(
        self,
        windows: Sequence[Sequence[int]],
        batch_size: int,
        *,
        scratch: Path,
        hidden_bytes: int = HIDDEN_BYTES,
        progress: Progress = silent,
    ) -> Iterator[Chunk]:
        """The predictions of all models, window by window and in order of position: n - 1 for a window of n tokens, and
        one chunk of no rows where n is 1.

        Batches are made of neighbouring windows of one length. `scratch` is a folder for the hidden states: a pass over
        the same windows and models that did not end there is continued, and what any other pass left is removed. It is
        gone at the end, unless something else is in it. `progress` counts layers × models × batches. `UserError` for a
        token that the models do not know, and for a full disk.
        """
        for index, window in enumerate(windows):
            if unknown := [token for token in window if not 0 <= token < self.vocabulary]:
                raise UserError(
                    f"Window {index} has the token {unknown[0]}, and {self._models[0].folder} knows "
                    f"{self.vocabulary:,} tokens.",
                    "Tokenize with the model's own tokenizer.",
                )
        batches = [Batch.of(batch) for batch in batches_of_equals(windows, batch_size)]
        identity = {
            "models": [model.identity for model in self._models],
            "windows": hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest(),
            "batch_size": batch_size,
            "engine_version": ENGINES["streamed"].version,
        }
        return self._pass(batches, _Scratch(scratch, identity), hidden_bytes, progress)

    def memory(self) -> Memory:
        """The peaks of this process since the models were opened."""
        return peak_memory(self._device)

    @torch.inference_mode()
    def _pass(
        self, batches: Sequence[Batch], scratch: "_Scratch", hidden_bytes: int, progress: Progress
    ) -> Iterator[Chunk]:
        num, num_layers = len(self._models), self._models[0].num_layers
        # Of each model the states in front of its next layer are open, and of one those behind it too.
        memory = hidden_bytes // (num + 1)

        def states_of(number: int, boundary: int) -> HiddenStates:
            model, path = self._models[number], scratch.states(f"{number}-{boundary % 2}")
            return HiddenStates(path, batches, model.width, model.dtype, self._device, memory)

        # One step: the states of one model at one boundary, first those of all models in front of layer 0.
        steps = [(boundary, number) for boundary in range(num_layers + 1) for number in range(num)]
        finished = scratch.open(2 * sum(model.state_bytes(batches) for model in self._models))
        done, total = max(0, finished - num) * len(batches), num_layers * num * len(batches)
        progress(done, total, "score layers")
        before: dict[int, HiddenStates] = {}
        after: dict[int, HiddenStates] = {}
        try:
            for boundary, number in steps[max(0, finished - num) : finished]:
                before[number] = states_of(number, boundary)
            for step, (boundary, number) in enumerate(steps[finished:], finished + 1):
                after[number] = states_of(number, boundary)
                if boundary == 0:
                    self._models[number].embed(batches, after[number])
                else:
                    for _ in self._models[number].advance(boundary - 1, batches, before[number], after[number]):
                        done += 1
                        progress(done, total, "score layers")
                after[number].sync()
                scratch.save(step)
                if number in before:
                    before[number].close()
                before[number] = after.pop(number)
            heads = self._heads()
            first_window = 0
            for place, batch in enumerate(batches):
                hidden = [model.normed(before[number][place]) for number, model in enumerate(self._models)]
                for window, first, tables in predictions(hidden, heads):
                    yield Chunk(first_window + window, first, tables)
                first_window += len(batch.ids)
            scratch.remove()
        finally:
            for states in (*before.values(), *after.values()):
                states.close()
            scratch.close()

    def _heads(self) -> list[Head]:
        """The head of each model; models that store the same head share it in memory."""
        found: list[Head] = []
        for number, model in enumerate(self._models):
            same = (found[other] for other in range(number) if model.stores_the_head_of(self._models[other]))
            found.append(next(same, None) or model.head())
        return found


class StreamedEngine(ChunkedEngine):
    """One checkpoint that only scores, larger than memory if need be. Its hidden states lie in the system's folder for
    temporary files (`TMPDIR` names another) and are gone after each call."""

    def __init__(self, folder: Path, start: Start) -> None:
        if start.options:
            raise UserError(f"The streamed engine has no option '{next(iter(start.options))}'.", "Leave it out.")
        self._streamed = Streamed([folder], dtype=start.dtype, device=start.device)
        self.info = self._streamed.infos[0]

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order; the first after all
        windows went through all layers."""
        found: list[NDArray[np.float32]] = []
        for chunk in self._chunks(windows, batch_size):
            (table,), first = chunk.log_probs, chunk.first + 1
            found.append(table[np.arange(len(table)), windows[chunk.window][first : first + len(table)]])
            if chunk.first + len(table) == len(windows[chunk.window]) - 1:
                yield np.concatenate(found).astype(np.float64)
                found.clear()

    def _chunks(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Chunk]:
        with tempfile.TemporaryDirectory(prefix="harness-streamed-", ignore_cleanup_errors=True) as scratch:
            yield from self._streamed.log_probs(windows, batch_size, scratch=Path(scratch) / "states")

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        """Each new token would read the whole checkpoint."""
        raise UserError("The streamed engine only scores texts.", "Use the torch or the vLLM engine.")

    decode = choices = generate = _refused

    def memory(self) -> Memory:
        """The peaks since this engine began to load."""
        return self._streamed.memory()

    def close(self) -> None:
        """Nothing is in memory, or on the disk, but during a call."""


class _Scratch:
    """The folder in which a pass keeps its hidden states, with how many of its steps are finished, so that a pass that
    was killed goes on where it was."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        self._lock: IO[bytes] | None = None

    def open(self, num_bytes: int) -> int:
        """The finished steps of the pass that this one continues, or 0 in a folder that `num_bytes` will fit into. The
        folder is this process's alone until `close`; `UserError` where another process uses it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.folder} is used by another run.", "Wait for its end, or stop it.") from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}).", "Give a folder on another disk."
            ) from error
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
            if state["identity"] == self._identity:
                return int(state["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no pass was here, or it left nothing that can be continued
        self._forget()
        try:
            check_disk(self.folder, num_bytes)
        except BaseException:
            self.close()
            raise
        return 0

    def states(self, name: str) -> Path:
        """The file of the hidden states called `name`."""
        return self.folder / f"{_HIDDEN}{name}"

    def save(self, finished: int) -> None:
        """Says that so many steps are finished; their hidden states are on the disk."""
        state = {"identity": self._identity, "finished": finished}
        write_file(self.folder / _STATE, json.dumps(state).encode())

    def _forget(self) -> None:
        """Removes what passes left here. The state goes first: without it nothing is continued."""
        for path in (self.folder / _STATE, *self.folder.glob(f"{_HIDDEN}*")):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes what passes left here, and the folder if nothing else is in it."""
        self._forget()
        (self.folder / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class _Absent(nn.Module):
    """In the place of a module that is not in memory: what goes in comes out."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class _Model:
    """A checkpoint as transformers' model without weights, of which one layer at a time is filled."""

    def __init__(self, folder: Path, dtype: str, requested: str, device: torch.device) -> None:
        model, self._stored = load_empty(folder, dtype)
        self.folder, self.dtype, self._device = folder, DTYPES[dtype], device
        trunk, head = model.get_decoder(), model.get_output_embeddings()
        self._names = {module: name for name, module in model.named_modules()}
        self._trunk, self._head, self._layers, self._norm = trunk, head, list(trunk.layers), trunk.norm
        self.num_layers = len(self._layers)
        self.vocabulary, self.width = (int(size) for size in head.weight.shape)
        info = describe("streamed", model, folder, dtype, requested, device)
        head_bytes = weight_bytes(head) if formats_of(head) else 4 * head.weight.numel()
        own = {
            "use_cache": {"score": False},
            "weight_bytes_resident": max(head_bytes, *(weight_bytes(layer) for layer in self._layers)),
        }
        self.info = replace(info, effective={**info.effective, **own})
        trunk.rotary_emb = type(trunk.rotary_emb)(config=trunk.config).to(device)  # computed, not stored
        trunk.layers = nn.ModuleList(_Absent() for _ in self._layers)
        trunk.norm = _Absent()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as JSON."""
        info = self.info
        return {
            "checkpoint": self._stored.checkpoint.fingerprint(),
            "computed_by": [info.version, info.device, info.effective["cpu_capability"], info.dtype],
            "kernels": dict(info.kernels),
        }

    def state_bytes(self, batches: Sequence[Batch]) -> int:
        """The size of the hidden states of all batches."""
        return sum(batch.ids.numel() for batch in batches) * self.width * self.dtype.itemsize

    def embed(self, batches: Sequence[Batch], after: HiddenStates) -> None:
        """Writes the embeddings of all batches; only their rows are read."""
        name = self._stored.stored_name(f"{self._names[self._trunk.embed_tokens]}.weight")
        for place, batch in enumerate(batches):
            rows, places = embedding_rows(self._stored.checkpoint, name, batch.ids)
            after[place] = rows.to(self.dtype)[places]

    def advance(
        self, index: int, batches: Sequence[Batch], before: HiddenStates, after: HiddenStates
    ) -> Iterator[None]:
        """Takes all batches through decoder layer `index`, which is in memory for that long; a step a batch."""
        with out_of_memory(f"Loading a layer of {self.folder}", "Use a machine with more memory."):
            self._trunk.layers[index] = self._filled(self._layers[index])
        try:
            for place, batch in enumerate(batches):
                with scoring(*batch.ids.shape):
                    after[place] = self._forward(before[place])
                yield
        finally:
            self._trunk.layers[index] = _Absent()

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head reads, from what the last layer wrote, both [batch, time, width]."""
        self._trunk.norm = self._filled(self._norm)
        try:
            return self._forward(hidden)
        finally:
            self._trunk.norm = _Absent()

    def head(self) -> Head:
        """The head, with its weights."""
        if self._head_is_tied:
            head = copy.deepcopy(self._head)
            head.weight = self._filled(self._trunk.embed_tokens).weight
        else:
            head = self._filled(self._head)
        if not formats_of(head):
            head = head.float()  # so that `Head` makes no second copy
        return Head(head)

    def stores_the_head_of(self, other: "_Model") -> bool:
        """Whether the heads of both are not quantized and have the same bytes on the disk."""
        if formats_of(self._head) or formats_of(other._head):
            return False
        one, two = self._stored.checkpoint, other._stored.checkpoint
        names = self._head_name, other._head_name
        entries = one.tensors[names[0]], two.tensors[names[1]]
        return (entries[0].dtype, entries[0].shape) == (entries[1].dtype, entries[1].shape) and all(
            a == b for a, b in zip(one.pieces(names[0]), two.pieces(names[1]), strict=True)
        )

    @property
    def _head_is_tied(self) -> bool:
        return self._head.weight is self._trunk.embed_tokens.weight

    @property
    def _head_name(self) -> str:
        name = self._names[self._trunk.embed_tokens if self._head_is_tied else self._head]
        return self._stored.stored_name(f"{name}.weight")

    def _forward(self, hidden: Tensor) -> Tensor:
        """The trunk's own forward, as far as its modules are in memory."""
        found: Tensor = self._trunk(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return found

    def _filled(self, module: nn.Module) -> Any:
        """A copy of a module with its weights."""
        copied = copy.deepcopy(module).to_empty(device="cpu")
        self._stored.fill(copied, f"{self._names[module]}.")
        return copied.to(self._device)
