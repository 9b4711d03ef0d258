"""A running OpenAI-compatible server as an engine: what a user of it waits for, over loopback or a network.

Times are this process's own clock. Prompts are token ids, and tokens are counted by the server's `usage`, since a chunk
may carry several. The text of a server that does not say which tokens it wrote is timed and not judged.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import numpy as np
from numpy.typing import NDArray

from harness.engines.protocol import Decoded, Engine, EngineDied, EngineInfo, Memory, Start
from harness.errors import UserError

TIMEOUT_SECONDS = 300.0
"""Without a byte from the server it counts as hanging."""
UNKNOWN_TOKEN = -1
"""Stands for a token whose id the server does not tell."""


@dataclass(frozen=True)
class _Answer:
    """One generation: tokens, the first chunk's and the last chunk's time."""

    token_ids: tuple[int, ...]
    started: float
    first: float
    last: float


class ServerEngine(Engine):
    """The model that a server at option `url` serves; `folder` and everything else are the server's own business."""

    def __init__(self, folder: Path, start: Start) -> None:
        self._url = str(start.options["url"]).rstrip("/").removesuffix("/v1")
        self._client = httpx2.Client(timeout=start.options.get("timeout_seconds", TIMEOUT_SECONDS))
        models = self._json("GET", "/v1/models", None).get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise UserError(
                f"The server at {self._url} lists no model.", "Give the URL of an OpenAI-compatible server."
            )
        self._model = str(models[0]["id"])
        self.info = EngineInfo(
            name="server",
            version=self._version(),
            device="unknown",
            dtype="unknown",
            requested={"model": self._model},
            effective={
                "max_model_len": models[0].get("max_model_len"),
                "weight_bytes_resident": 0,
                "weight_bytes_per_token": 0,
            },
            can_score=self._tells_probabilities(),
        )

    def _version(self) -> str:
        with contextlib.suppress(UserError):
            return f"vllm {self._json('GET', '/version', None)['version']}"
        return "unknown"

    def _tells_probabilities(self) -> bool:
        try:
            list(self.score([[1, 2]], 1))
        except (UserError, KeyError, IndexError):
            return False
        return True

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities of a prompt's tokens 1 … n - 1, which vLLM gives for `prompt_logprobs`."""
        for window in windows:
            body = {"model": self._model, "prompt": list(window), "max_tokens": 1, "prompt_logprobs": 0}
            choice = self._json("POST", "/v1/completions", body)["choices"][0]
            places = choice.get("prompt_logprobs")
            if not places:
                raise UserError(
                    f"The server at {self._url} does not tell how probable a prompt is.", "Only vLLM's does."
                )
            rows = [places[at][str(window[at])]["logprob"] for at in range(1, len(window))]
            yield np.array(rows, dtype=np.float64)

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        """No command asks a server for this."""
        raise UserError("Only speeds are measured on a server.", "Use the torch or the vLLM engine.")

    log_probs = top_log_probs = choices = generate = _refused

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Greedy continuations, all requests at once; the steps come as one time."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self._generate(prompt, num_tokens), prompts))
        first = max(answer.first for answer in answers)
        return Decoded(
            token_ids=tuple(answer.token_ids for answer in answers),
            prefill_seconds=first - min(answer.started for answer in answers),
            step_seconds=(max(answer.last for answer in answers) - first,) if num_tokens > 1 else (),
        )

    def _generate(self, prompt: Sequence[int], num_tokens: int) -> _Answer:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        ids: list[int] = []
        count, first, last = None, None, 0.0
        started = time.perf_counter()
        with self._complaining(), self._client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            if response.status_code != httpx2.codes.OK:
                response.read()
                raise self._refusal(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ").strip()
                if not data or data == "[DONE]":
                    continue
                chunk = self._parsed(data)
                if chunk.get("choices"):
                    last = time.perf_counter()
                    first = last if first is None else first
                    ids += chunk["choices"][0].get("token_ids") or []
                if chunk.get("usage"):
                    count = chunk["usage"].get("completion_tokens")
        if count is None or first is None:
            raise EngineDied(
                f"The server at {self._url} ended a stream without its usage.", "Check that it supports stream_options."
            )
        return _Answer(tuple(ids) if len(ids) == count else (UNKNOWN_TOKEN,) * count, started, first, last)

    def memory(self) -> Memory:
        """Nothing is known of a server's memory."""
        return Memory(None, None)

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        with self._complaining():
            response = self._client.request(method, f"{self._url}{path}", json=body)
        if response.status_code != httpx2.codes.OK:
            raise self._refusal(response)
        return self._parsed(response.text)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EngineDied(
                f"The server at {self._url} answers with something else than JSON: {text[:80]!r}.",
                "Give the URL of an OpenAI-compatible server.",
            )
        if "error" in found:
            raise EngineDied(
                f"The server at {self._url} says: {str(found['error'])[:200]}.", "Look at the server's own log."
            )
        return found

    def _refusal(self, response: httpx2.Response) -> EngineDied:
        return EngineDied(
            f"The server at {self._url} answers {response.status_code} to {response.request.url.path}: "
            f"{' '.join(response.text.split())[:200]}.",
            "Check the URL, and the server's own log.",
        )

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        """Every way in which a connection fails, as a sentence."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise EngineDied(
                f"The server at {self._url} sent nothing for {self._client.timeout.read:g} s.",
                "Look at the server's own log; a long prompt may need a longer --timeout.",
            ) from error
        except httpx2.HTTPError as error:
            raise EngineDied(
                f"The server at {self._url} cannot be reached: {error or type(error).__name__}.",
                "Check the URL and whether the server runs.",
            ) from error
