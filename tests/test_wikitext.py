"""Word perplexity against lm-eval's own `wikitext` task: its documents, its detokenizer, its word counts, its sums."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import Engine, open_engine
from harness.errors import UserError
from harness.measure.lm import EngineLM, Settings, Texts, rolling_window
from harness.measure.perplexity import score, window_samples
from harness.measure.wikitext import Documents, pages, tokenize_pages
from harness.record import store

DENSE = checkpoint_path("dense")
TEXTS = Texts(DENSE)
LENGTH = 96


def made_pages(num: int) -> list[str]:
    """Pages as WikiText has them: a blank after every line, blank lines between, its signs for what it split."""
    found = []
    for number, document in zip(range(num), corpus.documents("heldout", num_documents=num), strict=True):
        sentences = re.sub(r"([.,;:!?])", r" \1", " ".join(document.text.split())).split(" . ")
        cut = max(1, len(sentences) // 3)
        lines = ["", f"= Page {number} =", "", " . ".join(sentences[:cut]) + " ."]
        lines += ["", "= = Figures @-@ and signs = =", "", f"It had 1 @,@ {number} 00 ( of 2 @.@ 5 ) ' s '"]
        lines += ["", "= = = Deep = = =", "", " . ".join(sentences[cut:]) + " ."]
        # The blank line in front of a title is the last one of the page before.
        found.append("\n".join(f" {line} " if line else " " for line in lines[1:]) + "\n ")
    return [*found[:-1], found[-1] + "\n"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = open_engine("torch", DENSE, dtype="float32", device="cpu")
    yield engine
    engine.close()


def by_lm_eval(folder: Path, documents: list[str]) -> tuple[dict[str, float], list[float]]:
    """Scores of lm-eval's `wikitext` with its own hf model, and the log-likelihood of each document."""
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in documents))
    (folder / "preprocess_wikitext.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import *\n")
    task = Path(lm_eval.__file__).parent / "tasks/wikitext/wikitext.yaml"
    text = task.read_text().replace("dataset_name: wikitext-2-raw-v1\n", "")
    text = re.sub(r"(training|validation)_split: .*\n", "", text).replace("task: wikitext", "task: local_wikitext")
    data = json.dumps({"data_files": {"test": str(folder / "pages.jsonl")}})
    text = re.sub("dataset_path: .*", f"dataset_path: json\ndataset_kwargs: {data}", text)
    (folder / "local_wikitext.yaml").write_text(text)
    model = {"pretrained": str(DENSE), "dtype": "float32", "max_length": LENGTH}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=[str(folder / "local_wikitext.yaml")],
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    metrics = {key.partition(",")[0]: value for key, value in found["results"]["local_wikitext"].items()}
    logged = sorted(found["samples"]["local_wikitext"], key=lambda one: int(one["doc_id"]))
    return metrics, [one["word_perplexity"][0] for one in logged]


def test_word_perplexity_is_that_of_lm_evals_wikitext(engine: Engine, tmp_path: Path) -> None:
    documents = made_pages(4)
    assert pages(" \n" + "\n".join(documents)) == documents
    read_pages = tokenize_pages(documents, TEXTS, rolling_window(LENGTH, "torch"))
    found = list(window_samples(read_pages.windows, score(engine, read_pages.ids, read_pages.windows, 4, name="x")))
    metrics, log_likelihoods = by_lm_eval(tmp_path, documents)
    by_document = [math.fsum(one["nll_nats"] for one in found if one["document"] == n) for n in range(4)]
    assert by_document == pytest.approx([-one for one in log_likelihoods], rel=1e-5)
    total = math.fsum(by_document)
    assert math.exp(total / sum(read_pages.num_words)) == pytest.approx(metrics["word_perplexity"], rel=1e-5)
    num_bytes = sum(len(page.encode()) for page in documents)
    assert math.exp(total / num_bytes) == pytest.approx(metrics["byte_perplexity"], rel=1e-5)
    assert len(found) > 2 * len(documents) and max(one["num_tokens"] for one in found) == LENGTH + 1


def test_the_command_gives_lm_evals_word_perplexity_from_a_file_and_from_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = made_pages(3)
    text = " \n" + "\n".join(documents)
    (tmp_path / "wiki.test.raw").write_text(text)
    (tmp_path / "rows").mkdir()
    rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / "rows/test-0.parquet"))
    suite = (
        'name = "words"\ntitle = "x"\nsource.location = "demo:dense"\nvariants.a16.recipe = "rtn-a16"\n'
        'engine = { dtype = "float32", device = "cpu" }\n[ppl]\nprotocols = ["lmeval-word"]\n'
        f"max_length = {LENGTH}\ntext = "
    )
    monkeypatch.chdir(tmp_path)
    tables = []
    for place in ('{ path = "wiki.test.raw" }', f'{{ dataset = "{tmp_path}/rows" }}'):
        (tmp_path / "suite.toml").write_text(suite + place)
        assert main(["ppl", "--suite", "suite.toml", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        tables.append(document["tables"][0])
    metrics, _ = by_lm_eval(tmp_path, documents)
    for source, variant in tables:
        assert source["ppl"] == pytest.approx(metrics["word_perplexity"], rel=1e-5)
        assert source["num_words"] == variant["num_words"] == sum(len(re.split(r"\s+", page)) for page in documents)
        assert (source["num_documents"], source["unit"], source["protocol"]) == (3, "word", "lmeval-word")
        assert source["num_tokens"] == source["num_scored"]
        assert variant["delta_log_ppl"]["num"] == 3
        assert variant["delta_log_ppl"]["value"] == pytest.approx(math.log(variant["ppl"] / source["ppl"]))
    (record,) = [store.read(Path(path)) for path in (document["records"]["lmeval-word"]["source"],)]
    (reused,) = record.kind("reused")
    assert reused["num_reused"] == reused["num_windows"] == len(record.kind("window")), "the tokens are the same"


# -- Pages and windows


def test_a_page_is_all_lines_from_one_title_to_the_next() -> None:
    one = " = One = \n \n x = y \n \n = = Part = = \n = = = Deep = = = \n = = = = Deeper = = = = \n"
    two = " = Two words = \nz"
    assert pages(f" \n{one}\n{two}") == [one, two]


def test_line_ends_of_windows_stay_in_the_page() -> None:
    assert pages(" = A = \r\n x \r\n = B = \r\n") == [" = A = \r\n x \r", " = B = \r\n"]


def test_what_stands_before_the_first_title_is_a_page_if_it_says_something() -> None:
    assert pages("said\n = A = \n") == ["said", " = A = \n"]


def test_a_text_without_titles_is_the_users_error() -> None:
    with pytest.raises(UserError, match="no page titles"):
        pages("A text.\n = = Only a part = = \n")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(2, 12))
def test_every_token_of_every_page_is_scored_once_after_as_many_as_fit(words: list[int], window: int) -> None:
    documents = [f" = T{number} = \n" + " word" * num for number, num in enumerate(words)]
    found = tokenize_pages(documents, TEXTS, window)
    scored: list[int] = []
    for one in found.windows:
        assert 2 <= one.num_tokens <= window + 1
        scored += range(one.first_token + one.first_scored, one.first_token + one.num_tokens)
    model = EngineLM(TEXTS, Settings(None, 0, 1, window))
    starts = [place for place, token in enumerate(found.ids) if token == model.prefix_token_id]
    assert scored == [place for place in range(len(found.ids)) if place not in starts]
    assert [one.document for one in found.windows] == sorted(one.document or 0 for one in found.windows)
    assert _ids_by_page(found, starts) == [model.tok_encode(page.replace(" \n ", "\n")) for page in documents]
    assert found.num_words == [len(page.split()) + 1 for page in documents], "the blank in front is one, as for lm-eval"


def _ids_by_page(found: Documents, starts: list[int]) -> list[list[int]]:
    ends = [*starts[1:], len(found.ids)]
    parts = [found.ids[start + 1 : end] for start, end in zip(starts, ends, strict=True)]
    assert [len(part) for part in parts] == found.num_tokens
    return parts


@pytest.mark.parametrize(("engine_name", "window"), [("torch", 4096), ("vllm", 4094)])
def test_a_window_leaves_free_what_lm_evals_model_of_that_engine_does(engine_name: str, window: int) -> None:
    assert rolling_window(4096, engine_name) == window


def test_a_whole_window_predicts_from_as_many_tokens_as_the_model_takes() -> None:
    found: Any = tokenize_pages([" = T = \n" + " word" * 50], TEXTS, 20)
    assert [one.num_tokens for one in found.windows] == [21] * len(found.windows)
    assert [one.first_scored for one in found.windows[:-1]] == [1] * (len(found.windows) - 1)
