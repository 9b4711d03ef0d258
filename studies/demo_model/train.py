"""Training of an embedded model: tokenizer, trunk, then the MTP head on the frozen trunk; then the checkpoint.

The stages, the seed and the number of workers fix the weights, up to the rounding of a machine's matrix kernels. Three
stages make the trunk: drills, in which looking things up is all there is to learn; a mix of drills with the corpus; and
the corpus alone in longer windows, while the learning rate falls to zero. No text is seen twice. Muon (orthogonalized
momentum) trains the hidden matrices and AdamW everything else, over float32 weights, and in bfloat16 autocast where the
processor multiplies bfloat16. Several single-threaded workers each take a share of every batch and sum their gradients:
on a busy machine they wait less for each other than threads do.

The MoE model starts as the embedded dense model, cut up into experts, and takes one stage more; a loss on the balance
of its routers keeps all experts in use.

On two cores the dense model takes about 35 minutes, and the MoE model another 10. A finished stage is kept, and a
second run continues after it, so an interrupted training loses one stage at most.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from harness.demo import checkpoint_path, corpus
from studies.demo_model import drills, network, tokenizer

log = logging.getLogger("studies.demo_model")

TOKENIZER_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one shape of batch, one mix of documents and an optimizer of its own."""

    name: str
    num_steps: int
    batch: int
    """Windows per step, a multiple of the number of workers."""
    window: int
    first_document: int
    """Stages read different documents: no text is seen twice."""
    mix: corpus.Mix = corpus.STANDARD
    learning_rate: float = 3e-3
    decay: bool = False
    """Let the learning rate fall to zero over the stage; otherwise hold it."""


TRUNK_STAGES = {
    "dense": (
        Stage("drills", 400, batch=8, window=128, first_document=0, mix=drills.DRILLS),
        Stage("mixed", 1000, batch=8, window=256, first_document=1_000_000, mix=drills.WITH_DRILLS),
        Stage("standard", 900, batch=6, window=512, first_document=2_000_000, decay=True),
    ),
    "moe": (
        Stage(
            "upcycled",
            80,
            batch=4,
            window=512,
            first_document=4_000_000,
            mix=drills.WITH_CHAT,
            learning_rate=2e-3,
            decay=True,
        ),
    ),
}
MTP_STAGES = {
    "dense": Stage("mtp", 400, batch=8, window=512, first_document=3_000_000, learning_rate=2e-3, decay=True),
    "moe": Stage("mtp", 60, batch=4, window=512, first_document=5_000_000, learning_rate=2e-3, decay=True),
}
BALANCE_WEIGHT = 0.01
"""The weight of the routers' load-balancing loss (arXiv 2101.03961)."""
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Training:
    """What is trained: the options of the command line."""

    model: str
    """A name in `network.CONFIGS`."""
    out: Path
    """The folder of the checkpoint."""
    state: Path
    """The folder of finished stages."""
    seed: int
    workers: int
    steps: tuple[int, ...] | None
    """Steps of each stage of the trunk; None for the stages' own."""
    mtp_steps: int | None
    """Steps of the MTP head; None for the stage's own."""


def token_stream(encoder: Tokenizer, stage: Stage, chunk_documents: int = 4_000) -> Iterator[np.ndarray]:
    """Yields the token ids of the stage's text without end, each time those of a chunk of documents."""
    for first in count(stage.first_document, chunk_documents):
        chunk = corpus.documents(
            "train", num_documents=chunk_documents, first=first, mix=stage.mix, makers=drills.MAKERS
        )
        encodings = encoder.encode_batch([document.text + corpus.END_OF_TEXT for document in chunk])
        yield np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])


def batches(encoder: Tokenizer, stage: Stage) -> Iterator[torch.Tensor]:
    """Yields the ids [batch, window + 1] of every step; a window starts with the last token of the window before it."""
    stream, buffer = token_stream(encoder, stage), np.empty(0, dtype=np.int64)
    size = stage.batch * stage.window
    for _ in range(stage.num_steps):
        while len(buffer) <= size:
            buffer = np.concatenate([buffer, next(stream)])
        rows = np.lib.stride_tricks.sliding_window_view(buffer[: size + 1], stage.window + 1)[:: stage.window]
        yield torch.from_numpy(rows.copy())
        buffer = buffer[size:]


class Optimizer:
    """Muon for hidden matrices and AdamW for the rest; the learning rate warms up, then holds or falls to zero."""

    def __init__(self, module: nn.Module, stage: Stage) -> None:
        hidden: list[nn.Parameter] = []
        other: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            is_hidden = parameter.dim() == 2 and not name.endswith(
                ("embed_tokens.weight", "lm_head.weight", "in_proj_a.weight", "in_proj_b.weight")
            )
            (hidden if is_hidden else other).append(parameter)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(other, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._parameters = hidden + other
        self._stage = stage

    def step(self, step: int) -> None:
        """Applies the gradients of step number `step`, averaged over the workers."""
        if dist.is_initialized():
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        left_share = 1 - step / self._stage.num_steps if self._stage.decay else 1.0
        factor = min((step + 1) / WARMUP_STEPS, left_share)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._stage.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()


def _keep_delta_rule_in_float32() -> None:
    """Takes the delta rule out of autocast, which would make it less accurate and, on a CPU, slower."""
    reference = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def in_float32(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return reference(*args, **kwargs)

    modeling_qwen3_5.torch_chunk_gated_delta_rule = in_float32
    modeling_qwen3_5_moe.torch_chunk_gated_delta_rule = in_float32


def _autocast() -> torch.autocast:
    """Autocast to bfloat16 where the processor has instructions for it; torch emulates them ten times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu._is_avx512_bf16_supported()))


def _share(rows: torch.Tensor) -> torch.Tensor:
    """This worker's rows of a batch."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def train_trunk(net: network.Network, encoder: Tokenizer, stage: Stage, save: Path) -> None:
    """Trains the text model and `lm_head` to predict the next token; the vision tower keeps its initial weights."""
    trunk = nn.ModuleDict({"text": net.model.language_model, "lm_head": net.lm_head})
    optimizer = Optimizer(trunk, stage)
    meter = _Meter(stage)
    routers = _RouterLogits(net)
    for step, batch in enumerate(batches(encoder, stage)):
        rows = _share(batch)
        with _autocast():
            hidden = net.model.language_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            logits = net.lm_head(hidden)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss + BALANCE_WEIGHT * routers.imbalance())
        optimizer.step(step)
        meter.update(step, batch.numel(), loss)
        if _is_first() and ((step + 1) % 50 == 0 or step + 1 == stage.num_steps):
            torch.save(net.state_dict(), save / f"{stage.name}.pt")


class _RouterLogits:
    """Collects the routers' logits of a forward pass; a dense model has no routers."""

    def __init__(self, net: network.Network) -> None:
        config: Any = net.config.text_config
        self._num_experts, self._num_chosen = (
            getattr(config, "num_experts", 0),
            getattr(config, "num_experts_per_tok", 0),
        )
        self._logits: list[torch.Tensor] = []
        for module in net.model.language_model.modules():
            if isinstance(module, modeling_qwen3_5_moe.Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _module, _inputs, output: self._logits.append(output[0]))

    def imbalance(self) -> torch.Tensor:
        """The load-balancing loss of the last pass: the number of experts per token if all experts are used evenly."""
        if not self._logits:
            return torch.zeros(())
        logits: Any = tuple(self._logits)
        loss = modeling_qwen3_5_moe.load_balancing_loss_func(logits, self._num_experts, self._num_chosen)
        self._logits.clear()
        return torch.as_tensor(loss)


def train_mtp(net: network.Network, mtp: network.MtpHead, encoder: Tokenizer, stage: Stage) -> None:
    """Trains the head to predict the frozen trunk's own distribution: a draft is accepted when the two agree."""
    net.requires_grad_(False)
    optimizer = Optimizer(mtp, stage)
    meter = _Meter(stage)
    for step, batch in enumerate(batches(encoder, stage)):
        rows = _share(batch)[:, :-1]
        with _autocast():
            with torch.no_grad():
                hidden = net.model.language_model(input_ids=rows, use_cache=False).last_hidden_state
                target = net.lm_head(hidden[:, 1:]).float().softmax(-1)
            logits = net.lm_head(network.draft(net, mtp, rows, hidden))
        loss = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(0, 1))
        torch.autograd.backward(loss)
        optimizer.step(step)
        meter.update(step, rows.numel(), loss)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class _Meter:
    """Logs the mean loss and the pace every few steps."""

    def __init__(self, stage: Stage, every: int = 20) -> None:
        self.name, self.num_steps, self.every = stage.name, stage.num_steps, every
        self.losses: list[float] = []
        self.num_tokens, self.start = 0, time.perf_counter()

    def update(self, step: int, num_tokens: int, loss: torch.Tensor) -> None:
        """Counts a step, and logs if it is the last of its group."""
        self.losses.append(loss.item())
        self.num_tokens += num_tokens
        if (step + 1) % self.every == 0 and _is_first():
            seconds = time.perf_counter() - self.start
            log.info(
                "%s step %d/%d loss %.4f nats, %.2f s/step, %.0f tokens/s, %.0f s",
                self.name,
                step + 1,
                self.num_steps,
                sum(self.losses[-self.every :]) / self.every,
                seconds / len(self.losses),
                self.num_tokens / seconds,
                seconds,
            )


def _worker(rank: int, training: Training, rendezvous: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if training.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=training.workers)
    _keep_delta_rule_in_float32()
    torch.manual_seed(training.seed)
    config = network.CONFIGS[training.model]
    net = network.new_network(config)
    torch.manual_seed(training.seed + 1)
    mtp = network.MtpHead(net.model.language_model.config)
    if training.model == "dense":
        encoder = tokenizer.learn(d.text for d in corpus.documents("train", num_documents=TOKENIZER_DOCUMENTS))
    else:
        dense = checkpoint_path("dense")
        encoder = Tokenizer.from_file(str(dense / "tokenizer.json"))
        _start_from_dense(net, mtp, network.read_weights(dense), config, training.seed)
    stages = TRUNK_STAGES[training.model]
    if training.steps:
        stages = tuple(replace(stage, num_steps=n) for stage, n in zip(stages, training.steps, strict=True))
    for stage in stages:
        if (finished := training.state / f"{stage.name}.finished.pt").exists():
            net.load_state_dict(torch.load(finished, weights_only=True))
            continue
        train_trunk(net, encoder, stage, training.state)
        if _is_first():
            (training.state / f"{stage.name}.pt").replace(finished)
    with torch.no_grad():
        for parameter in net.parameters():  # the head learns to follow the trunk that will be written
            parameter.copy_(parameter.to(torch.bfloat16))
        network.spread_channels(_text_weights(net), config, training.seed)
    stage = MTP_STAGES[training.model]
    train_mtp(net, mtp, encoder, replace(stage, num_steps=training.mtp_steps or stage.num_steps))
    if _is_first():
        network.write_checkpoint(training.out, net, mtp, config, encoder)


def _text_weights(net: network.Network) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in net.state_dict().items() if ".language_model." in name}


def _start_from_dense(
    net: network.Network, mtp: network.MtpHead, dense: dict[str, torch.Tensor], config: dict[str, Any], seed: int
) -> None:
    """Loads the embedded dense model into `net` and `mtp` as a mixture of experts, with its channels equal again."""
    weights = {name: tensor.float() for name, tensor in dense.items()}
    text = {name: tensor for name, tensor in weights.items() if ".language_model." in name}
    network.spread_channels(text, network.DENSE, seed, undo=True)
    cut = network.upcycle(weights, config, seed)
    net.load_state_dict({name: tensor for name, tensor in cut.items() if not name.startswith("mtp.")})
    mtp.load_state_dict({name.removeprefix("mtp."): tensor for name, tensor in cut.items() if name.startswith("mtp.")})


def train(training: Training) -> None:
    """Trains in `workers` processes and writes the checkpoint."""
    training.state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (training, f"{folder}/rendezvous")
        if training.workers > 1:
            spawn(_worker, arguments, nprocs=training.workers)  # type: ignore[no-untyped-call]
        else:
            _worker(0, *arguments)
