"""vLLM's log: kept in a file, and read for the kernels that run and for the reason why it ended."""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.errors import first_line

_LOG_LINES = 40
_LOGGING = "VLLM_LOGGING_CONFIG_PATH"
KERNEL_LINES = re.compile(
    r"Using .* for NVFP4 GEMM|Using '.*' \w* ?MoE backend|Selected \S+ for \S+|Using \S+ GDN .* kernel"
)
MEMORY_LINES = re.compile(r"Model loading took .*|Available KV cache memory: .*|\S+ KV cache size: .*")
_ERROR_LINES = re.compile(r"error|exception|traceback|killed|out of memory|refus", re.IGNORECASE)


class Log:
    """vLLM's log in a file of its own: its processes write there, and nothing of it reaches the terminal."""

    def __init__(self) -> None:
        self._handle, name = tempfile.mkstemp(prefix="harness-vllm-", suffix=".log")
        self.path = Path(name)
        handler = {"class": "logging.FileHandler", "filename": name, "mode": "a", "formatter": "plain"}
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
            "handlers": {"file": handler},
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        self._config = self.path.with_suffix(".json")
        self._config.write_text(json.dumps(config), encoding="utf-8")
        self._environment = os.environ.get(_LOGGING)
        os.environ[_LOGGING] = str(self._config)  # read by every process as it imports vLLM
        if "vllm" in sys.modules:  # this process has done so already
            import logging.config

            logging.config.dictConfig(config)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Everything that is written to stdout and stderr meanwhile goes to the file, and from the processes that are
        started meanwhile for all of their lives."""
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(self._handle, number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)

    def text(self) -> str:
        """All that was written so far."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def relevant(self) -> tuple[str, ...]:
        """The last lines that speak of an error; the last lines at all where none does."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return tuple([line for line in lines if _ERROR_LINES.search(line)][-_LOG_LINES:] or lines[-_LOG_LINES:])

    def close(self) -> None:
        """Removes the files, and what told other programs of them."""
        if os.environ.get(_LOGGING) == str(self._config):
            if self._environment is None:
                del os.environ[_LOGGING]
            else:
                os.environ[_LOGGING] = self._environment
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self.path.unlink(missing_ok=True)
        self._config.unlink(missing_ok=True)


def kv_tokens(log: str) -> int | None:
    """The tokens that vLLM's KV cache holds, as its log says; None where it does not say."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    return int(found[-1].replace(",", "")) if found else None


def reason(error: BaseException, lines: Sequence[str]) -> str:
    """The most telling line: the last error that vLLM's processes logged and that does not only point to another, else
    what reached this one."""
    found = [match.group(0) for line in lines if (match := re.search(r"(?:\w+\.)*\w*(?:Error|Exception): .+", line))]
    telling = [line for line in found if not re.search("root cause|initialization failed|EngineDeadError", line)]
    return (telling or [first_line(error)])[-1].strip().rstrip(".")[:300]
