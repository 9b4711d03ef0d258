"""The world of the rehearsal: a hub with the model and the datasets of a published card, cut to what a CPU can do.

The layers keep the widths of the 9B model. What is cut is the number of layers and of tokens, and nothing else of the
suite (`CUTS`).
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from harness.demo import corpus
from harness.demo.synthesize import synthesize
from harness.measure.perplexity import tokenize
from harness.model.checkpoint import read_json
from harness.record import store
from harness.record.run import Record
from tests.conftest import published_config
from tests.hub import Hub, Repository, hub

ROOT = Path(__file__).parent.parent.parent
SUITE = Path("suites/qwen3.5-9b-w4a4.toml")
MODEL = "Qwen/Qwen3.5-9B"
VARIANT = "w4a4"
TOKEN = "hf_thisIsNobodysToken0123456789"
NUM_LAYERS = 4
LOUDNESS = 4.0
"""The embeddings' size beside what a layer of random weights adds to them, which is below 1."""
VOCABULARY = 1024
"""That of the embedded models' tokenizer, which was trained on the corpus that the datasets are made of."""

ONE_VARIANT = (
    ('[variants.w4a4-rtn]\nrecipe = "w4a4"\n', '[variants.w4a4]\nrecipe = "w4a4"\n'),
    (
        '# The same format and data with the recipe\'s own scales and codes.\n[variants.w4a4]\nrecipe = "w4a4"\n',
        "",
    ),
)
"""The card's own variant, rounded to nearest, under the name that the gate's rules have. The other one is rounded by
GPTQ, which takes three minutes a layer on two cores."""

CUTS = (
    ("samples = 256", "samples = 4"),
    ("max_tokens = 8192", "max_tokens = 64"),
    ("window = 8192", "window = 512"),
    ("expected.wikitext2-512 = { num_tokens = 297_053, num_windows = 581, num_scored = 296_472 }\n", ""),
    ('device = "auto"\n', 'device = "auto"\n[engine.vllm]\nenforce_eager = true\ntext_only = true\n'),
    ("[ppl] ", "[setups.mtp1]\nspeculative_tokens = 1\n\n[ppl] "),
    (
        'setups = ["headless", "desktop"]',
        'setups = ["mtp1"]\nprompt_tokens = 32\nnew_tokens = 5\nbatch_sizes = [1]\nprefill_tokens = 64\n'
        "repetitions = 1\nstarts = 1\ndepths = [128]\ndepth_tokens = 5\n",
    ),
)
"""What the suite says, and what it says here. Expected counts are those of the real tokenizer and text."""


IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""On a CPU vLLM would start a process for its worker beside that of its engine, and import everything once more."""


@dataclass(frozen=True)
class Ran:
    """What became of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """A hub, and a user's folder with the suite in it."""

    hub: Hub
    folder: Path

    @property
    def suite(self) -> Path:
        """The suite's file, relative to the folder."""
        return SUITE

    def environment(self, home: str, token: str | None) -> dict[str, str]:
        """The variables of a user whose cache is the folder `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TORCH_COMPILE"))}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **own, "PYTHONPATH": str(ROOT), **IN_ONE_PROCESS, **({"HF_TOKEN": token} if token else {})}

    def start(
        self,
        *words: str,
        home: str = "home",
        injected: Mapping[str, object] | None = None,
        token: str | None = None,
    ) -> subprocess.Popen[str]:
        """Starts `harness` with these words in the user's folder, on a machine with what is `injected`."""
        program = ["harness"] if injected is None else ["tests.rehearsal.injected", json.dumps(injected)]
        return subprocess.Popen(
            [sys.executable, "-m", *program, *words],
            cwd=self.folder,
            env=self.environment(home, token),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def harness(
        self, *words: str, home: str = "home", injected: Mapping[str, object] | None = None, token: str | None = None
    ) -> Ran:
        """Runs a command on the suite to its end, and prints how long it took."""
        began = time.monotonic()
        with self.start(*words, home=home, injected=injected, token=token) as process:
            out, err = process.communicate(timeout=1800)
        print(f"{time.monotonic() - began:6.0f} s  harness {' '.join(words)}  ({process.returncode})")
        return Ran(process.returncode, out, err)

    def measured(self, measure: str) -> dict[str, Record]:
        """The newest complete record of each row that a measure wrote."""
        found, _ = store.read_all(self.folder / "results")
        return {one.run.variant["name"]: one for one in found if one.run.measure == measure}

    def other_suite(self, *edits: tuple[str, str]) -> Path:
        """Another suite with the same name, in which the pieces of text are replaced."""
        path = self.folder / "suites" / "other.toml"
        path.write_text(edited((self.folder / SUITE).read_text(), edits))
        return path.relative_to(self.folder)


def edited(text: str, edits: tuple[tuple[str, str], ...]) -> str:
    """The text with the first of each pair replaced by the second; it must be there."""
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


@contextmanager
def world(folder: Path, *, whole: bool) -> Iterator[World]:
    """The hub and the folder. `whole`: both variants as the suite has them."""
    (folder / "suites").mkdir()
    (folder / SUITE).write_text(edited((ROOT / SUITE).read_text(), CUTS if whole else (*CUTS, *ONE_VARIANT)))
    config = published_config("qwen3.5-9b")
    config["vision_config"]["depth"] = 2
    synthesize(config, folder / "model", num_layers=NUM_LAYERS, vocab_size=VOCABULARY, seed=0, progress=lambda *_: None)
    assert read_json(folder / "model/config.json")["text_config"]["hidden_size"] == 4096
    teach_bigrams(folder / "model")
    with hub(TOKEN) as running:
        files = {path.name: path for path in (folder / "model").iterdir()}
        running.repositories[MODEL] = Repository(private=False, files=dict(files))
        running.repositories |= {f"datasets/{name}": one for name, one in datasets().items()}
        yield World(running, folder)


# -- The model -----------------------------------------------------------------------------------------------------


def teach_bigrams(model: Path) -> None:
    """Makes of random weights a model that knows which token follows which in the corpus: `bench` times no model that
    writes gibberish.

    Embeddings are so large that the layers only disturb them, and the output matrix takes an embedding to the logarithm
    of the bigrams' frequencies. The MTP head hands the embedding of its token on, and so guesses as the model does.
    """
    text = "".join(one.text for one in corpus.documents("train", num_documents=400))
    ids = torch.tensor(tokenize(model, text))
    counts = torch.full((VOCABULARY, VOCABULARY), 0.02)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    logits = (counts / counts.sum(1, keepdim=True)).log()

    (shard,) = model.glob("*.safetensors")
    tensors = load_file(shard)
    embedding = tensors["model.language_model.embed_tokens.weight"].float()
    normed = embedding / embedding.square().mean(1, keepdim=True).sqrt()
    size = normed.shape[1]
    tensors["model.language_model.embed_tokens.weight"] = (LOUDNESS * normed).bfloat16()
    tensors["lm_head.weight"] = (torch.linalg.pinv(normed) @ logits).T.contiguous().bfloat16()
    tensors["mtp.fc.weight"] = torch.cat([LOUDNESS * torch.eye(size), torch.zeros(size, size)], 1).bfloat16()
    save_file(tensors, shard, metadata={"format": "pt"})


# -- Datasets ------------------------------------------------------------------------------------------------------


def datasets() -> dict[str, Repository]:
    """The datasets that the suite names: questions and answers of the embedded corpus, and its held-out text."""
    items = list(corpus.arithmetic_questions(0, 40))
    questions, answers = [item.prompt for item in items], [item.answer for item in items]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    lines = corpus.heldout_text().splitlines(keepends=True)[:400]
    found = {
        "HuggingFaceH4/ultrachat_200k": dataset("default", "train_sft", {"messages": chats}),
        "openai/gsm8k": dataset("main", "train", {"question": questions, "answer": answers}),
        "sahil2801/CodeAlpaca-20k": dataset(
            "default", "train", {"instruction": questions, "input": [""] * len(items), "output": answers}
        ),
        "CohereLabs/aya_dataset": dataset("default", "train", {"inputs": questions, "targets": answers}),
        "Salesforce/wikitext": dataset("wikitext-2-raw-v1", "test", {"text": [" = Held out = \n", "", *lines]}),
    }
    # Of the tasks only the doctor asks, whether they are there.
    for name in ("allenai/ai2_arc", "Rowan/hellaswag", "google/IFEval", "Idavidrein/gpqa"):
        found[name] = dataset("default", "test", {"text": ["nothing"]})
    return found


def dataset(config: str, split: str, columns: Mapping[str, list[object]] | Mapping[str, list[str]]) -> Repository:
    """A dataset of one table."""
    table = io.BytesIO()
    parquet.write_table(pa.table(dict(columns)), table)
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: table.parquet\n---\n"
    return Repository(private=False, files={"README.md": card.encode(), "table.parquet": table.getvalue()})
