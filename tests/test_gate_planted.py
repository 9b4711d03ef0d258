"""Regressions planted into the embedded model are caught by the gate, and the model against itself raises no alarm.

Artifacts are written from the formats' equations (tests/artifacts.py), measured by the torch engine on a short piece
of the held-out text, checked by the auditor. compressed-tensors compiles its packing and rounding when it first runs
them; here it runs uncompiled.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.audit.verify import verify
from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import Engine, open_engine
from harness.measure import decode, fidelity, perplexity
from harness.quantize.recipes import recipe_named
from harness.record.run import Record
from harness.record.store import read
from harness.report import gate
from harness.report.gate import Judgement
from harness.suite.rules import Rule
from harness.suite.schema import Bench, Fidelity, Perplexity, Source, Suite, Task, Variant
from harness.suite.texts import DemoText
from studies.peers.chunks import chunks_of
from studies.simulation import planning
from tests.artifacts import change, quiet, write_artifact
from tests.perplexities import protocol_samples
from tests.records import DATASET, fidelity_record, make_record, mean_results, tasks_record

RESULTS = Path(__file__).parent.parent / "results"
GATE_PROJ = "model.language_model.layers.0.mlp.gate_proj"
DOWN_PROJ = "model.language_model.layers.1.mlp.down_proj"
RTN = recipe_named("rtn-a16")
TEXT = DemoText("heldout")
SHORT = perplexity.Protocol("short", 128, 128, "all but the first", keep_tail=False)
NUM_WINDOWS = 40
SUITE = Suite(
    name="demo",
    title="The embedded model",
    source=Source("demo:dense"),
    variants={"nvfp4a16": Variant("rtn-a16"), "w4a4": Variant("w4a4")},
    ppl=Perplexity(("short",), TEXT),
    fidelity=Fidelity(TEXT),
    bench=Bench(TEXT, prompt_tokens=8, new_tokens=5),
    tasks={"arithmetic": Task(task="demo:arithmetic")},
)
LOSS = Rule(metric="log_ppl", variant="nvfp4a16", versus="source", protocol="short", margin=0.01)
KL = Rule(metric="kl", variant="nvfp4a16", versus="source", margin=0.01)
VERIFY = Rule(metric="verify", variant="nvfp4a16")


@pytest.fixture(scope="module")
def source() -> Path:
    return checkpoint_path("dense")


@pytest.fixture(scope="module")
def ids(source: Path) -> list[int]:
    return perplexity.tokenize(source, corpus.heldout_text())


@pytest.fixture(scope="module")
def sound(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4A16 of the embedded model with nothing wrong. Shared: read it only."""
    return write_artifact(source, tmp_path_factory.mktemp("planted") / "sound", RTN)


@pytest.fixture(scope="module")
def source_run(source: Path, ids: list[int]) -> Record:
    return scored("source", source, ids)


@pytest.fixture(scope="module")
def sound_run(sound: Path, ids: list[int]) -> Record:
    return scored("nvfp4a16", sound, ids)


def engine_of(folder: Path, dtype: str = "float32") -> Engine:
    return open_engine("torch", folder, dtype=dtype, device="cpu")


def scored(variant: str, folder: Path, ids: Sequence[int]) -> Record:
    """A run of perplexity as `harness ppl` makes it, over a short text."""
    engine = engine_of(folder)
    return run_of(variant, engine, protocol_samples(engine, ids, SHORT, batch_size=8, limit=NUM_WINDOWS))


def run_of(variant: str, engine: Engine, samples: Iterator[dict[str, Any]], **header: Any) -> Record:
    dataset = {**DATASET, "protocol": "short"}
    return make_record("ppl", variant, list(samples), engine=engine.info.as_dict(), dataset=dataset, **header)


def verified(folder: Path, source: Path) -> Record:
    """A run of the auditor as `harness verify` makes it."""
    found = verify(folder, source, quiet)
    samples = [{"kind": "roundtrip", **vars(trip)} for trip in found.round_trips]
    return make_record("verify", "nvfp4a16", [*samples, *({"kind": "finding", **vars(one)} for one in found.findings)])


def judged(rule: Rule, *records: Record, baseline: Record | None = None) -> Judgement:
    slots = {"ppl/short": {"nvfp4a16": baseline}} if baseline else {}
    (judgement,) = gate.judge(replace(SUITE, gate=(rule,)), records, slots)
    return judgement


def test_a_sound_variant_passes(source: Path, sound: Path, source_run: Record, sound_run: Record) -> None:
    judgement = judged(LOSS, source_run, sound_run)
    assert judgement.verdict == "pass" and judgement.loss is not None and judgement.loss.value < 0.006
    assert judged(VERIFY, verified(sound, source)).verdict == "pass"


def test_a_loss_of_two_percent_of_log_perplexity_is_caught(
    sound: Path, source_run: Record, sound_run: Record, ids: list[int], tmp_path: Path
) -> None:
    overconfident = Path(shutil.copytree(sound, tmp_path / "overconfident"))
    change(overconfident, lambda tensors: tensors["lm_head.weight"].mul_(1.32))
    record = scored("nvfp4a16", overconfident, ids)
    judgement = judged(LOSS, source_run, record)
    windows = source_run.kind("window")
    log_ppl = sum(one["nll_nats"] for one in windows) / sum(one["num_scored"] for one in windows)
    assert judgement.loss is not None and judgement.loss.value / log_ppl == pytest.approx(0.02, abs=0.004)
    assert judgement.verdict == "fail"
    assert judged(replace(LOSS, versus="baseline"), record, baseline=sound_run).verdict == "fail"
    assert judged(replace(LOSS, versus="baseline"), sound_run, baseline=sound_run).verdict == "pass"


def test_a_fused_layer_of_two_scales_is_caught(source: Path, tmp_path: Path) -> None:
    fused = write_artifact(source, tmp_path / "fused", RTN, own={GATE_PROJ})
    judgement = judged(VERIFY, verified(fused, source))
    assert judgement.verdict == "fail"
    assert "layers.0.mlp.gate_up_proj.weight_global_scale differs between the shards" in judgement.reason


def test_one_corrupted_layer_is_caught_by_what_it_predicts_and_by_the_auditor(
    source: Path, sound: Path, source_run: Record, ids: list[int], tmp_path: Path
) -> None:
    corrupted = Path(shutil.copytree(sound, tmp_path / "corrupted"))
    generator = torch.Generator().manual_seed(0)
    change(corrupted, lambda tensors: tensors[f"{DOWN_PROJ}.weight_packed"].random_(256, generator=generator))
    assert judged(LOSS, source_run, scored("nvfp4a16", corrupted, ids)).verdict == "fail"
    windows = [ids[first : first + 64] for first in range(0, 64 * 32, 64)]
    chunks = chunks_of([engine_of(one) for one in (source, sound, corrupted)], windows, 8)
    samples: dict[str, list[dict[str, Any]]] = {"sound": [], "corrupted": []}
    for name, sample in fidelity.fidelity_samples(chunks, windows, list(samples)):
        samples[name].append({**sample, "first_token": 64 * sample["index"]})
    verdicts = {name: judged(KL, fidelity_record("nvfp4a16", ones)).verdict for name, ones in samples.items()}
    assert verdicts == {"sound": "pass", "corrupted": "fail"}
    broken = judged(VERIFY, verified(corrupted, source))
    assert broken.verdict == "fail" and DOWN_PROJ in broken.reason


def test_three_points_of_a_task_are_caught_at_the_n_that_they_need() -> None:
    paths = sorted(RESULTS.glob("*/*-tasks-demo-source-*.jsonl"))
    measured = next(run for run in map(read, paths) if (run.run.dataset or {})["name"] == "arithmetic")
    real, (metric,) = measured.kind("item"), measured.kind("item")[0]["outcomes"]
    flip_share, loss, margin = 0.05, 0.03, 0.01

    def verdict(num: int, lost: float) -> str:
        """Of as many of the real items as that, over and over, 5 % of them flipped and `lost` more lost than won."""
        before = [{**real[place % len(real)], "doc_id": place} for place in range(num)]
        flips = {1.0: round(num * (flip_share + lost) / 2), 0.0: round(num * (flip_share - lost) / 2)}
        after = []
        for item in before:
            score = item["outcomes"][metric]
            flips[score] -= 1
            after.append({**item, "outcomes": {metric: 1 - score if flips[score] >= 0 else score}})
        records = []
        for variant, items in (("source", before), ("nvfp4a16", after)):
            results = [{**one, "task": items[0]["task"]} for one in mean_results(items)]
            audit, dataset = measured.run.suite["audit"], measured.run.dataset
            records.append(tasks_record(variant, items, results, audit=audit, dataset=dataset))
        rule = Rule(metric="score", variant="nvfp4a16", versus="source", task="arithmetic", margin=margin)
        judgement = judged(rule, *records)
        assert judgement.loss is not None and judgement.loss.value == pytest.approx(lost, abs=2 / num)
        return judgement.verdict

    enough = planning.num_for_margin(flip_share, loss - margin)
    assert verdict(enough, loss) == "fail"
    assert verdict(enough // 4, loss) == "inconclusive"
    assert verdict(4 * enough, 0.0) == "pass"


def test_a_weight_only_kernel_in_place_of_w4a4_is_caught(source_run: Record, sound_run: Record) -> None:
    measured = make_record("ppl", "w4a4", sound_run.samples, engine=sound_run.run.engine, dataset=sound_run.run.dataset)
    served_as = {**(measured.run.engine or {}), "served_as": "W4A16: weights only"}
    served = replace(measured, run=replace(measured.run, engine=served_as))
    assert judged(Rule(metric="arithmetic", variant="w4a4"), served).verdict == "fail"
    loss = replace(LOSS, variant="w4a4")
    assert judged(loss, source_run, served).verdict == "incomparable"
    assert judged(loss, source_run, measured).verdict == "pass"  # by its numbers alone nobody would know


def test_twenty_reruns_in_bf16_raise_at_most_one_alarm(source: Path, ids: list[int]) -> None:
    """Other batches give the same numbers to the last bit here, so what a rerun may differ in is forced: other kernels
    for matrix products and for attention, which round otherwise, on twenty pieces of the text."""
    engine = engine_of(source, "bfloat16")
    shorter = replace(SHORT, window=64, stride=64)

    def run(variant: str, piece: int, batch_size: int) -> Record:
        text = ids[640 * piece : 640 * (piece + 1)]
        return run_of(variant, engine, protocol_samples(engine, text, shorter, batch_size=batch_size))

    judgements = []
    for piece in range(20):
        first = run("source", piece, 1)
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=piece % 4 > 0):
            again = run("nvfp4a16", piece, 1 + piece % 6)
        judgements.append(judged(replace(LOSS, margin=0.0005), first, again))
    assert sum(one.loss is not None and one.loss.value != 0 for one in judgements) >= 15
    verdicts = [one.verdict for one in judgements]
    assert verdicts.count("fail") <= 1 and verdicts.count("pass") >= 10


def test_twenty_sessions_of_a_model_against_itself_raise_at_most_one_alarm(dense_source: Path) -> None:
    """By the margin that the embedded suite has for its speed. Steps of a millisecond vary by half and more on a busy
    machine; where the margin is small beside the noise, one session in 40 raises an alarm, which is what a 95 %
    interval promises. A margin of a tenth is for machines that are quiet."""
    engine = engine_of(dense_source)
    shapes = [decode.Shape("decode", 1, 8, 5)]
    rule = Rule(metric="decode_speed", variant="nvfp4a16", versus="source", batch=1, margin=0.5)
    verdicts = []
    for session in range(20):
        sides: dict[str, list[dict[str, Any]]] = {"source": [], "nvfp4a16": []}
        for start in range(4):  # A B, B A, …, as the harness does
            for side in list(sides)[:: 1 if start % 2 == 0 else -1]:
                sides[side] += decode.speed_samples(engine, range(64), shapes, start=start, repetitions=1, warmups=1)
        header = {"session_id": f"{session:08x}", "engine": engine.info.as_dict()}
        verdicts.append(judged(rule, *(make_record("bench", *side, **header) for side in sides.items())).verdict)
    assert "incomparable" not in verdicts and verdicts.count("fail") <= 1
