"""Servers that hang, refuse, or answer garbage, and one that streams as vLLM does. A real vLLM server: tests/vllm."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness.cli import main
from harness.engines.protocol import EngineDied, open_engine
from harness.engines.server_engine import UNKNOWN_TOKEN, ServerEngine
from harness.record import store


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM 0.32 does; `trouble` says where it does not."""

    trouble: ClassVar[str] = ""
    step_seconds: ClassVar[float] = 0.02

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.trouble == "garbage":
            self.reply("<html>It works!</html>")
        elif self.path == "/version":
            self.reply({"version": "0.32.0"})
        else:
            self.reply({"data": [{"id": "model", "max_model_len": 1024}]} if self.trouble != "empty" else {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body.get("stream"):
            if self.trouble == "silent":
                self.reply({"choices": [{"text": "x"}]})
                return
            places = [None, *({str(token): {"logprob": -0.5}} for token in body["prompt"][1:])]
            self.reply({"choices": [{"prompt_logprobs": places}]})
            return
        if self.trouble == "refuses":
            self.reply({"error": {"message": "too long"}}, 400)
            return
        self.send_response(200)
        self.end_headers()
        ids = self.trouble != "silent"
        for token in range(body["max_tokens"]):
            if self.trouble == "hangs" and token == 2:
                time.sleep(3)
            if self.trouble == "breaks" and token == 2:
                self.event("{not json")
                return
            time.sleep(self.step_seconds)
            self.event(json.dumps({"choices": [{"text": "a", **({"token_ids": [token]} if ids else {})}]}))
        if self.trouble != "uncounted":
            self.event(json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}))
        self.event("[DONE]")

    def event(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(f"data: {text}\n\n".encode())
            self.wfile.flush()


@contextlib.contextmanager
def serving(trouble: str = "") -> Iterator[str]:
    handler = type("Troubled", (Handler,), {"trouble": trouble})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def opened(url: str) -> ServerEngine:
    engine = open_engine("server", Path(), options={"url": url, "timeout_seconds": 1.0})
    assert isinstance(engine, ServerEngine)
    return engine


def test_tokens_and_times_are_those_of_the_stream() -> None:
    with serving() as url:
        engine = opened(url)
        assert engine.info.version == "vllm 0.32.0" and engine.info.can_score
        decoded = engine.decode([[1, 2, 3], [4, 5, 6]], 11)
        assert decoded.token_ids == (tuple(range(11)),) * 2
        assert len(decoded.step_seconds) == 1
        assert 0.2 <= decoded.step_seconds[0] < 1.0  # ten steps of 20 ms
        assert 0.02 <= decoded.prefill_seconds < 0.5
        (scores,) = engine.score([[7, 8, 9]], 1)
        assert scores.tolist() == [-0.5, -0.5]
        engine.close()


def test_a_server_that_does_not_tell_its_tokens_is_timed_and_not_judged() -> None:
    with serving("silent") as url:
        engine = opened(url)
        assert not engine.info.can_score
        assert engine.decode([[1]], 3).token_ids == ((UNKNOWN_TOKEN,) * 3,)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("garbage", "answers with something else than JSON: '<html>It works!"),
        ("empty", "lists no model"),
    ],
)
def test_what_is_no_such_server_is_told_at_once(trouble: str, says: str) -> None:
    from harness.errors import UserError

    with serving(trouble) as url, pytest.raises(UserError, match=says):
        opened(url)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("refuses", "answers 400 to /v1/completions: .*too long"),
        ("hangs", "sent nothing for 1 s"),
        ("breaks", "something else than JSON: '{not json'"),
        ("uncounted", "ended a stream without its usage"),
    ],
)
def test_a_server_that_fails_in_the_middle_is_one_sentence(trouble: str, says: str) -> None:
    with serving(trouble) as url:
        engine = opened(url)
        with pytest.raises(EngineDied, match=says):
            engine.decode([[1, 2]], 5)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EngineDied, match=r"http://127.0.0.1:9 cannot be reached"):
        opened("http://127.0.0.1:9/v1")


SUITE = """
name = "served"
title = "A server"
[source]
location = "demo:dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
[bench]
text = { demo = "heldout" }
prompt_tokens = 16
new_tokens = 5
batch_sizes = [1, 2]
prefill_tokens = 32
repetitions = 2
starts = 2
"""


def test_bench_measures_a_server_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.toml").write_text(SUITE)
    with serving("silent") as url:  # the stand-in's text would be judged gibberish
        asked = ["bench", "--suite", "suite.toml", "--variant", "nvfp4a16", "--server", url]
        assert main(asked) == 0
        assert "tok/s" in capsys.readouterr().out
        assert main([*asked[:3], "--server", url]) == 2
    assert main(["ppl", "--suite", "suite.toml", "--engine", "server"]) == 2
    assert "bench --server URL" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()
    (record,) = [store.read(path) for path in (tmp_path / "results").rglob("*.jsonl")]
    assert record.run.engine is not None
    assert (record.run.engine["name"], record.run.variant["artifact_digest"]) == ("server", None)
    assert len(record.kind("decode")) == 6 and record.whole
