"""Engines that tests share, and what these tests print at their end: the divergence between the engines, by variant.

Most of a test here is an engine's start: two processes that import vLLM, on one core. So every test that can live with
`OPTIONS` asks the fixture `engines` for its model, and finds it started if the test before asked for the same. Tests of
one model are a group (`group_of`), which xdist gives to one of its two workers, one test after the other.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch._dynamo.config
from xdist.scheduler import LoadScopeScheduling

from harness.engines import vllm_options
from harness.engines.protocol import open_engine
from harness.engines.vllm_engine import VllmEngine

assert torch._dynamo.config.disable, "read from what tests/__init__.py sets"
del os.environ["TORCH_COMPILE_DISABLE"]  # vLLM's processes compile what they compile for users

OPTIONS: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_gb": 0.5, "enforce_eager": True}

IN_ONE_PROCESS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
"""Lets the worker run in the process of the engine, as on one GPU. On a CPU vLLM itself starts another process for it,
and that imports everything a second time."""

sys.path.append(str(Path(__file__).parent))
ASKED_WORKER = "worker.AskedWorker"
"""The class of `worker.py` as vLLM's processes import it: not as a part of `tests`, which would forbid them to
compile."""


class Engines:
    """The engine that tests share: one at a time, because two take twice the memory."""

    def __init__(self) -> None:
        self._wanted: tuple[Path, dict[str, Any]] | None = None
        self._engine: VllmEngine | None = None

    def shared(self, folder: Path, **options: Any) -> VllmEngine:
        """vLLM on `folder` in bfloat16 with `OPTIONS` and `options`, to be left open: the one that runs if it is the
        same."""
        wanted = (folder, options)
        if self._engine is None or self._wanted != wanted:
            self.end()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(*IN_ONE_PROCESS)
                patch.setattr(vllm_options, "WORKER", ASKED_WORKER)
                engine = open_engine("vllm", folder, dtype="bfloat16", options={**OPTIONS, **options})
            assert isinstance(engine, VllmEngine)
            self._wanted, self._engine = wanted, engine
        return self._engine

    def end(self) -> None:
        """Kills the shared engine, for a test that starts its own. vLLM itself waits five seconds before it does so."""
        if self._engine is not None:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("VLLM::"):
                    process.kill()
            self._engine.close()
        self._engine = None


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The engine that tests share."""
    engines = Engines()
    yield engines
    engines.end()


@pytest.fixture
def alone(engines: Engines) -> None:
    """For a test that starts engines of its own, as users start them: the shared one does not run beside them."""
    engines.end()


@pytest.fixture
def in_one_process(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that starts engines of its own and does not look at their processes: one process each."""
    monkeypatch.setenv(*IN_ONE_PROCESS)


def group_of(test: str) -> str:
    """The group of a test's id: its parameter where that names a variant, `demo-…`; its file where the tests of a file
    share what they start; a group of its own for any other."""
    file, _, name = test.partition("::")
    parameter = name.partition("[")[2].removesuffix("]")
    if parameter.startswith("demo"):
        return parameter
    if file.endswith(("test_tasks.py", "test_server.py")):
        return file
    return f"{file} {parameter}" if parameter else test


class ByGroup(LoadScopeScheduling):
    """Gives the tests of a group to one worker. xdist 3.8 has marks for that, which do nothing with pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "divergence"
    ]
    if found:
        terminalreporter.write_sep(
            "-", "divergence in bfloat16, nats per token: the noise floor of comparisons across engines"
        )
    for node, value in found:
        terminalreporter.write_line(f"{node.rpartition('[')[2].rstrip(']'):<28} {value}")
