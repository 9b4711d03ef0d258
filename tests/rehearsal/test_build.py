"""From an empty cache to an artifact, and what goes wrong on the way: each is told with its remedy.

The tests stand in the order of a user's commands, and each needs what those before it left.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest

from tests.hub import Hub
from tests.rehearsal.world import MODEL, NUM_LAYERS, VARIANT, World

SMALL_GPU = ["NVIDIA GeForce GTX 1630", "580.95.05", 10**9, 10**9, [7, 5]]
OLD_DRIVER = ["NVIDIA GeForce RTX 5090", "535.104.05", 32 * 10**9, 32 * 10**9, [12, 0]]
ON_CUDA = {"torch": "2.13.0", "torch_cuda": "13.0", "vllm": "0.32.0", "vllm_on_cpu": False}
"""vLLM's release and torch as a GPU box has them."""


# -- What goes wrong before anything is there ----------------------------------------------------------------------


@dataclass(frozen=True)
class Sabotage:
    """Something that goes wrong, and what a command says of it. `hub` breaks it; `injected` is a worse machine; `edits`
    are other words in the suite."""

    command: str
    problem: str
    remedy: str
    hub: Callable[[Hub], None] = lambda _: None
    injected: Mapping[str, object] | None = None
    edits: tuple[tuple[str, str], ...] = ()


def gated(running: Hub) -> None:
    """The model's terms are to be accepted."""
    running.repositories[MODEL] = replace(running.repositories[MODEL], gated=True)


def private(running: Hub) -> None:
    """The model is shown to who has a token."""
    running.repositories[MODEL] = replace(running.repositories[MODEL], private=True)


def without_a_dataset(running: Hub) -> None:
    """A dataset of the calibration is not there."""
    del running.repositories["datasets/openai/gsm8k"]


SABOTAGES = {
    "no vLLM": Sabotage("ppl", "vLLM, which is not installed", "nox -s ppl bench", injected={"vllm": None}),
    "no disk": Sabotage("build", "takes 2.4 GB to download", "HF_HOME", injected={"free_disk": 10**9}),
    "gated": Sabotage("doctor", "is gated, and no token is set", f"/{MODEL}", hub=gated),
    "token missing": Sabotage("build", f"The hub has no model {MODEL}", "HF_TOKEN", hub=private),
    "dataset missing": Sabotage("build", "no dataset openai/gsm8k", "Check the name", hub=without_a_dataset),
    "too long a context": Sabotage(
        "bench", "takes 262,144 tokens of a sequence", "[bench]", edits=(("depths = [128]", "depths = [128, 300_000]"),)
    ),
    "VRAM too small": Sabotage("ppl", "does not fit", "GPU", injected={**ON_CUDA, "gpus": [SMALL_GPU]}),
    "driver missing": Sabotage("bench", "no GPU answers", "nvidia-smi", injected={**ON_CUDA, "gpus": []}),
    "driver too old": Sabotage(
        "fidelity", "driver 535.104.05 is too old", "driver 580", injected={**ON_CUDA, "gpus": [OLD_DRIVER]}
    ),
}
"""What is found before anything is fetched or built. The others, a hub that dies, a kill, vLLM's refusal and a server
that is none, stand where they happen."""


@pytest.mark.parametrize("name", SABOTAGES)
def test_what_a_user_would_run_into_is_told_before_anything_is_fetched_or_built(here: World, name: str) -> None:
    sabotage, sound = SABOTAGES[name], dict(here.hub.repositories)
    suite = here.other_suite(*sabotage.edits)
    sabotage.hub(here.hub)
    here.hub.requests.clear()
    ran = here.harness(sabotage.command, "--suite", str(suite), home="sabotaged", injected=sabotage.injected)
    here.hub.repositories = sound
    said = ran.out + ran.err
    assert ran.code == 2, said
    assert sabotage.problem in said and sabotage.remedy in said, said
    assert "Traceback" not in said
    assert not [one for one in here.hub.requests if one.startswith("GET") and one.endswith(".safetensors")]
    assert not (here.folder / "artifacts").exists() and not (here.folder / "results").exists()


# -- The way -------------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_the_suite_takes_and_that_it_can_run(here: World) -> None:
    ran = here.harness("doctor", "--suite", str(here.suite))
    assert ran.code == 0, ran.out
    assert f"{MODEL} will be downloaded: 2.4 GB." in ran.out
    assert "openai/gsm8k will be downloaded." in ran.out
    assert "Suite 'qwen3.5-9b-w4a4' can run here." in ran.out


def test_a_hub_that_dies_in_the_download_is_told_and_the_next_command_goes_on(here: World) -> None:
    here.hub.cut, here.hub.cut_for_good = 10**9, True
    ran = here.harness("build", "--suite", str(here.suite))
    assert ran.code == 2, ran.err
    assert f"The hub at {here.hub.url} cannot be reached for {MODEL}" in ran.err
    assert "goes on where it was" in ran.err and "Traceback" not in ran.err
    here.hub.cut = None
    here.hub.trouble.clear()


def test_a_build_that_is_killed_while_it_calibrates_goes_on_after_the_layers_that_it_had(here: World) -> None:
    build = ("build", "--suite", str(here.suite))
    partial = here.folder / f"artifacts/qwen3.5-9b-w4a4/{VARIANT}.partial"
    with here.start(*build) as process:
        while not (partial / "layer-00000.safetensors").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ran = here.harness(*build)
    assert ran.code == 0, ran.err
    assert (partial.parent / VARIANT).is_dir() and not partial.exists()
    continued = here.measured("build")[VARIANT]
    assert 0 < len(continued.kind("layer")) <= NUM_LAYERS


def test_the_artifact_is_what_the_recipe_says(here: World) -> None:
    ran = here.harness("verify", "--suite", str(here.suite))
    assert ran.code == 0 and "passed" in ran.out, ran.out + ran.err
