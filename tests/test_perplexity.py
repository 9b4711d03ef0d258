"""Protocols counted by hand, samples from an engine whose answers are known, and texts."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from harness.demo import checkpoint_path
from harness.engines.protocol import Decoded, EngineInfo, Memory
from harness.errors import UserError
from harness.measure.perplexity import (
    PROTOCOLS,
    Window,
    get_protocol,
    token_ids_digest,
    tokenize,
    whole,
    windows,
    windows_digest,
)
from harness.resolve import dataset_text, file_text
from harness.suite.texts import DatasetText
from tests.perplexities import protocol_samples

CUTTING = {name: protocol for name, protocol in PROTOCOLS.items() if protocol.window is not None}
"""The protocols that cut one text."""


class PositionEngine:
    """Says that the log-probability of token `t` is -t/1000, so that a sum tells which tokens went into it."""

    info = EngineInfo(name="position", version="1", device="cpu", dtype="float32")

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.batch_size = 0

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
        self.batch_size = batch_size
        for window in windows:
            self.seen.append(list(window))
            yield -np.asarray(window[1:], dtype=np.float64) / 1000

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        raise NotImplementedError

    def memory(self) -> Memory:
        raise NotImplementedError

    def close(self) -> None:
        pass


def fill_cache(home: Path, dataset: str, config: str, rows: list[str]) -> None:
    """What `datasets.load_dataset` leaves behind of a dataset with one split, `test`, and one column, `text`."""
    owner, _, name = dataset.partition("/")
    folder = home / f"datasets/{owner}___{name}/{config}/0.0.0/{'0123456789' * 4}"
    folder.mkdir(parents=True)
    features = datasets.Features({"text": datasets.Value("string")})
    writer = ArrowWriter(path=str(folder / f"{name}-test.arrow"), features=features)
    for row in rows:
        writer.write({"text": row})
    num_examples, num_bytes = writer.finalize()
    info = datasets.DatasetInfo(
        features=features, builder_name="parquet", dataset_name=name, config_name=config, version="0.0.0"
    )
    info.splits = {"test": datasets.SplitInfo("test", num_bytes, num_examples, dataset_name=name)}
    info.write_to_directory(str(folder))


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_windows", "num_scored"),
    [
        # 580 × 512 = 296,960 and a tail of 93; each of the 581 windows leaves its first token out.
        ("wikitext2-512", 297_053, 581, 296_472),
        # 580 whole windows and a tail of 233 that is dropped; 580 × 255.
        ("llamacpp-512", 297_193, 580, 147_900),
        # 145 × 2048 = 296,960; 145 × 2047.
        ("gptq-2048", 297_053, 145, 296_815),
        # Starts 0, 512 … until a window reaches the end: ceil((297,053 − 1,024) / 512) = 579 more. All but token 0.
        ("hf-1024-s512", 297_053, 580, 297_052),
    ],
)
def test_protocol_counts_are_the_published_ones(name: str, num_tokens: int, num_windows: int, num_scored: int) -> None:
    cut = windows(get_protocol(name), num_tokens)
    assert len(cut) == num_windows
    assert sum(window.num_scored for window in cut) == num_scored


def test_windows_worked_out_by_hand() -> None:
    assert windows(PROTOCOLS["wikitext2-512"], 1100) == [Window(0, 512, 1), Window(512, 512, 1), Window(1024, 76, 1)]
    assert windows(PROTOCOLS["llamacpp-512"], 1100) == [Window(0, 512, 257), Window(512, 512, 257)]
    assert windows(PROTOCOLS["gptq-2048"], 4095) == [Window(0, 2048, 1)]
    # 1024 and then 512 new tokens at a time, and the last 464.
    assert windows(PROTOCOLS["hf-1024-s512"], 2000) == [
        Window(0, 1024, 1),
        Window(512, 1024, 512),
        Window(1024, 976, 512),
    ]


def test_a_sliding_window_that_reaches_the_end_is_the_last() -> None:
    assert windows(PROTOCOLS["hf-1024-s512"], 1024) == [Window(0, 1024, 1)]
    assert windows(PROTOCOLS["hf-1024-s512"], 1536) == [Window(0, 1024, 1), Window(512, 1024, 512)]


def test_a_tail_of_one_token_has_nothing_to_score() -> None:
    assert windows(PROTOCOLS["wikitext2-512"], 513) == [Window(0, 512, 1)]
    assert windows(PROTOCOLS["wikitext2-512"], 514)[1:] == [Window(512, 2, 1)]


def _scored(name: str, num_tokens: int) -> list[int]:
    """The positions in the text of all scored tokens, in order."""
    cut = windows(PROTOCOLS[name], num_tokens)
    return [w.first_token + i for w in cut for i in range(w.first_scored, w.num_tokens)]


@given(st.integers(512, 20_000))
def test_wikitext2_scores_every_token_once_but_the_first_of_each_window(num_tokens: int) -> None:
    assert _scored("wikitext2-512", num_tokens) == [p for p in range(num_tokens) if p % 512]


@given(st.integers(512, 20_000))
def test_llamacpp_scores_the_last_255_of_every_whole_window(num_tokens: int) -> None:
    whole = num_tokens - num_tokens % 512
    assert _scored("llamacpp-512", num_tokens) == [p for p in range(whole) if p % 512 > 256]


@given(st.integers(2048, 20_000))
def test_gptq_scores_every_token_of_whole_windows_but_their_first(num_tokens: int) -> None:
    whole = num_tokens - num_tokens % 2048
    assert _scored("gptq-2048", num_tokens) == [p for p in range(whole) if p % 2048]


@given(st.integers(1024, 20_000))
def test_the_sliding_protocol_scores_every_token_but_the_first_once(num_tokens: int) -> None:
    assert _scored("hf-1024-s512", num_tokens) == list(range(1, num_tokens))


@given(st.sampled_from(sorted(CUTTING)), st.integers(2048, 20_000))
def test_windows_lie_within_the_text_and_never_score_a_token_without_context(name: str, num_tokens: int) -> None:
    for window in windows(PROTOCOLS[name], num_tokens):
        longest = PROTOCOLS[name].window
        assert longest is not None and 0 < window.first_scored < window.num_tokens <= longest
        assert 0 <= window.first_token <= num_tokens - window.num_tokens


@pytest.mark.parametrize("protocol", CUTTING.values(), ids=CUTTING)
def test_a_text_shorter_than_one_window_is_the_users_error(protocol: Any) -> None:
    with pytest.raises(UserError, match="fewer than one window"):
        windows(protocol, protocol.window - 1)


@given(st.sampled_from(sorted(CUTTING)), st.integers(2048, 20_000))
def test_a_protocols_windows_are_the_first_of_those_that_leave_out_nothing(name: str, num_tokens: int) -> None:
    def spans(protocol: Any) -> list[tuple[int, int]]:
        return [(window.first_token, window.num_tokens) for window in windows(protocol, num_tokens)]

    mine, all_of_them = spans(PROTOCOLS[name]), spans(whole(PROTOCOLS[name]))
    assert all_of_them[: len(mine)] == mine
    assert len(all_of_them) - len(mine) <= 1
    assert sum(all_of_them[-1]) in (num_tokens, num_tokens - 1)


def test_protocols_that_read_the_same_windows_have_one_digest_of_them() -> None:
    def digest(name: str, num_tokens: int) -> str:
        return windows_digest(windows(whole(PROTOCOLS[name]), num_tokens))

    assert digest("wikitext2-512", 5000) == digest("llamacpp-512", 5000)
    others = {digest(name, num_tokens) for name in CUTTING for num_tokens in (5000, 5001)}
    assert len(others) == 6
    spans = (0).to_bytes(8, "little") + (512).to_bytes(8, "little")
    assert (
        windows_digest([Window(0, 512, 1)]) == windows_digest([Window(0, 512, 9)]) == hashlib.sha256(spans).hexdigest()
    )


def test_a_protocol_of_documents_cuts_no_text() -> None:
    with pytest.raises(ValueError, match="lmeval-word cuts documents"):
        windows(PROTOCOLS["lmeval-word"], 5000)


def test_an_unknown_protocol_is_the_users_error() -> None:
    with pytest.raises(UserError, match="Did you mean 'wikitext2-512'"):
        get_protocol("wikitext-512")


@pytest.mark.parametrize("protocol", CUTTING.values(), ids=CUTTING)
def test_every_sample_sums_just_the_scored_tokens(protocol: Any) -> None:
    ids = list(range(5000))
    engine = PositionEngine()
    samples = list(protocol_samples(engine, ids, protocol, batch_size=7))
    assert engine.batch_size == 7
    for index, (sample, window) in enumerate(zip(samples, windows(protocol, 5000), strict=True)):
        first, last = window.first_token + window.first_scored, window.first_token + window.num_tokens - 1
        assert sample == {
            "kind": "window",
            "index": index,
            "first_token": window.first_token,
            "num_tokens": window.num_tokens,
            "num_scored": window.num_scored,
            "nll_nats": pytest.approx((first + last) * (last - first + 1) / 2 / 1000),
        }
        assert engine.seen[index] == ids[window.first_token : window.first_token + window.num_tokens]


def test_a_limit_keeps_the_first_windows_and_their_samples() -> None:
    protocol = PROTOCOLS["wikitext2-512"]
    everything = list(protocol_samples(PositionEngine(), range(5000), protocol))
    engine = PositionEngine()
    assert list(protocol_samples(engine, range(5000), protocol, limit=3)) == everything[:3]
    assert len(engine.seen) == 3
    assert list(protocol_samples(PositionEngine(), range(5000), protocol, limit=100)) == everything


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int, str]] = []
    protocol = PROTOCOLS["wikitext2-512"]
    list(protocol_samples(PositionEngine(), range(1100), protocol, progress=lambda *step: seen.append(step)))
    assert seen == [(done, 3, "wikitext2-512") for done in range(4)]


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_log_probability_that_is_not_finite_is_named_by_window_and_position(value: float) -> None:
    class Engine(PositionEngine):
        def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
            for index, row in enumerate(super().score(windows, batch_size)):
                if index == 1:
                    row[100] = value
                yield row

    with pytest.raises(UserError, match=rf"Window 1 .* {value} at position 101 \(token 613 of the text\)"):
        list(protocol_samples(Engine(), range(1100), PROTOCOLS["wikitext2-512"]))


def test_an_engine_that_returns_too_little_is_found() -> None:
    class Few(PositionEngine):
        def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
            return itertools.islice(super().score(windows, batch_size), 2)

    class Short(PositionEngine):
        def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
            return (row[:-1] for row in super().score(windows, batch_size))

    with pytest.raises(UserError, match="scored 2 of 3 windows"):
        list(protocol_samples(Few(), range(1100), PROTOCOLS["wikitext2-512"]))
    with pytest.raises(UserError, match="Window 0 has 512 tokens, and the engine gave 510"):
        list(protocol_samples(Short(), range(1100), PROTOCOLS["wikitext2-512"]))


def test_the_digest_is_sha256_of_little_endian_32_bit_ids() -> None:
    raw = bytes([1, 0, 0, 0, 0, 2, 0, 0, 255, 255, 3, 0])
    assert token_ids_digest([1, 512, 262_143]) == hashlib.sha256(raw).hexdigest()
    assert token_ids_digest([1, 2]) != token_ids_digest([2, 1])


def test_tokenizing_adds_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a b").ids == [0, 1, 2]
    assert tokenize(tmp_path, "a b a") == [1, 2, 1]


def test_a_missing_or_broken_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenize(tmp_path, "a")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        tokenize(tmp_path, "a")


def test_a_file_is_read_byte_by_byte(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("naïve\r\nline\n".encode())
    assert file_text(file) == "naïve\r\nline\n"


def test_a_file_that_is_no_text_is_the_users_error(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    with pytest.raises(UserError, match="cannot be read"):
        file_text(file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 3\)"):
        file_text(file)
    file.write_bytes(b" \n")
    with pytest.raises(UserError, match="is empty"):
        file_text(file)


def test_dataset_rows_are_joined_with_nothing(tmp_path: Path) -> None:
    rows = [" = Title = \n", "", "A line .\n"]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"text": rows, "n": [1, 2, 3]}).to_parquet(str(tmp_path / "data/test-0.parquet"))
    assert dataset_text(DatasetText(str(tmp_path), split="test")) == " = Title = \nA line .\n"
    with pytest.raises(UserError, match=r"no column 'prose'\. Its columns: text, n"):
        dataset_text(DatasetText(str(tmp_path), split="test", column="prose"))
    with pytest.raises(UserError, match="cannot be loaded"):
        dataset_text(DatasetText(str(tmp_path), split="nope"))


def test_rows_as_lines_are_the_file_that_a_wikitext_dataset_was_made_of(tmp_path: Path) -> None:
    file = " \n = Title = \n \n A line . \n \n = = Part = = \n \n Another , with a blank at its end . \n \n"
    rows = [line if line.strip() else "" for line in file.splitlines(keepends=True)]
    pages = [file[: file.index(" = = Part")].removesuffix("\n"), file[file.index(" = = Part") :]]
    for name, texts_of in (("lines", rows), ("pages", pages)):
        folder = tmp_path / name
        folder.mkdir()
        datasets.Dataset.from_dict({"text": texts_of}).to_parquet(str(folder / "test-0.parquet"))
        assert dataset_text(DatasetText(str(folder)), as_lines=True) == file
    assert dataset_text(DatasetText(str(tmp_path / "lines"))) == file.replace(" \n \n", " \n").removeprefix(" \n")


def test_wikitext_comes_from_a_filled_cache_and_is_the_file_without_its_blank_lines(tmp_path: Path) -> None:
    """`datasets.load_dataset("Salesforce/wikitext", …)` offline, by the suite's own table, and its tokens counted."""
    lines = [" \n", " = Title = \n", " \n", *(f" Line {number} of it , naïve . \n" for number in range(300)), " \n"]
    rows = [line if line.strip() else "" for line in lines]
    fill_cache(tmp_path / "home", "Salesforce/wikitext", "wikitext-2-raw-v1", rows)
    program = (
        "import sys; from pathlib import Path; from harness.resolve import tokenized\n"
        "from harness.suite.load import load\n"
        "suite = load(Path(sys.argv[1])); ids, about = tokenized(suite, suite.ppl.text)\n"
        "print(len(ids), about['text_sha256'], about['token_ids_sha256'], about['name'])"
    )
    (tmp_path / "suite.toml").write_text(
        'name = "x"\ntitle = "x"\nsource.location = "demo:dense"\nvariants.a.recipe = "rtn-a16"\n[ppl]\n'
        'text = { dataset = "Salesforce/wikitext", config = "wikitext-2-raw-v1" }\nprotocols = ["wikitext2-512"]\n'
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "suite.toml")],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = "".join(line for line in lines if line.strip())
    ids = tokenize(checkpoint_path("dense"), text)
    assert done.stdout.split() == [
        str(len(ids)),
        hashlib.sha256(text.encode()).hexdigest(),
        token_ids_digest(ids),
        "Salesforce/wikitext/wikitext-2-raw-v1/test",
    ]


def test_a_dataset_that_does_not_load_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("Couldn't find cache.\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError) as caught:
        dataset_text(DatasetText("Salesforce/wikitext", config="wikitext-2-raw-v1"))
    assert caught.value.problem.endswith("cannot be loaded: Couldn't find cache.")
    assert "datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1')" in caught.value.remedy
