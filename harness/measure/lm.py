"""An engine as a model of lm-eval: it answers lm-eval's requests, and keeps what lm-eval forgets about the answers.

Tokenization and the rules by which a text is cut at its stops are lm-eval's own. Two things differ: a prompt that is
too long is refused before a model is loaded instead of cut from the left, and every request has a seed of its own, so
that neither the batch nor an interruption changes an answer.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    _add_special_kwargs,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from harness.engines.protocol import Choice, Engine, Prompt
from harness.errors import UserError
from harness.measure.kept import Journal, digest
from harness.progress import Progress, silent
from harness.sampling import Sampling

_THINK_START, _THINK_END = "<think>", "</think>"
_DEFAULT_NEW_TOKENS = 256  # lm-eval's own where a task says nothing
_SAMPLING = {one.name for one in fields(Sampling)}

Request = tuple[str, int, int]
"""The task, the document and the number of a request among those of the document."""


@dataclass(frozen=True)
class Settings:
    """What all requests of a task have in common."""

    thinking: bool | None
    seed: int
    batch_size: int
    window: int
    """Tokens of a window of rolling log-likelihoods."""


@dataclass
class Detail:
    """What is known of the answer to a request beyond what lm-eval is told."""

    prompt_digest: str
    num_prompt_tokens: int
    num_tokens: int
    seconds: float
    log_prob: float | None = None
    """In nats, of a continuation; None for a generated answer."""
    finish_reason: str | None = None
    """`stop` or `length`; None for a continuation."""
    unclosed: bool = False
    empty: bool = False


@dataclass
class AnswerLog:
    """The details of one run of a task, and how many of its answers the journal had."""

    repetition: int = 0
    details: dict[Request, list[Detail]] = field(default_factory=dict)
    num_answers: int = 0
    num_reused: int = 0


def rolling_window(max_length: int, engine: str) -> int:
    """The tokens of a window of rolling log-likelihoods where a sequence may have `max_length`: lm-eval's vllm model
    leaves two of them free, its hf model none."""
    return max_length - 2 if engine == "vllm" else max_length


class Texts:
    """The tokenizer of a checkpoint folder; `UserError` where it has none."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        if not (folder / "tokenizer.json").is_file():  # transformers makes an empty tokenizer of nothing
            raise UserError(f"{folder} has no tokenizer.json.", "Copy the one of the source checkpoint into it.")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_fast=True
            )
        except Exception as error:  # transformers raises many types for a folder without a tokenizer
            raise UserError(
                f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}.",
                "Copy the source checkpoint's tokenizer files again.",
            ) from error
        self.folder = folder

    @property
    def digest(self) -> str:
        """The digest of what turns text into ids: vocabulary, rules and chat template."""
        return digest([json.loads(self.tokenizer.backend_tokenizer.to_str()), self.tokenizer.chat_template])


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests from the journal, or by the engine. Without an engine it only measures lengths."""

    def __init__(
        self,
        texts: Texts,
        settings: Settings,
        engine: Engine | None = None,
        journal: Journal | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        self.tokenizer = texts.tokenizer
        self._settings, self._engine, self._journal = settings, engine, journal
        self._progress = progress
        self._asked: list[Instance] = []
        self.log = AnswerLog()

    # -- What lm-eval asks of a tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context, as in `lm_eval --model hf`."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else cast(int, first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text."""
        special = _add_special_kwargs(add_special_tokens, None)
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        # Verbose, it warns of texts longer than the model takes, and those are cut into windows or refused here.
        return cast(list[int], self.tokenizer.encode(string, verbose=False, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it. The template decides about thinking where the suite does
        not."""
        thinking = {} if self._settings.thinking is None else {"enable_thinking": self._settings.thinking}
        written = self.tokenizer.apply_chat_template(
            [dict(message) for message in chat_history],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **thinking,
        )
        return cast(str, written)

    @property
    def tokenizer_name(self) -> str:
        """The name of lm-eval's cache of requests, which is not used."""
        return "harness"

    # -- Requests

    def lengths(self, instance: Instance) -> Iterator[tuple[int, int]]:
        """The number of tokens of a request's prompt, and of what follows it; none for a rolling request, which always
        fits."""
        if instance.request_type == "generate_until":
            prompt = self._prompt(instance, 0)
            yield len(prompt.token_ids), prompt.max_new_tokens
        elif instance.request_type == "loglikelihood":
            context, continuation = instance.args
            pair = self._encode_pair(context, continuation) if context else ([0], self.tok_encode(continuation))
            yield len(pair[0]), len(pair[1])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM`."""
        self._asked = requests
        return cast(list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        answers = self._choices(pairs, "choices")
        for instance, pair, answer in zip(self._asked, pairs, answers, strict=True):
            num_prompt_tokens, num_tokens = map(len, pair)
            detail = Detail(digest(pair), num_prompt_tokens, num_tokens, answer["seconds"], answer["log_prob"])
            self._note(instance, detail)
        return [(answer["log_prob"], answer["greedy"]) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See `lm_eval.api.model.LM`."""
        windows = [self.rolling(instance.args[0]) for instance in requests]
        answers = iter(self._choices([pair for pairs in windows for pair in pairs], "windows"))
        found = []
        for instance, pairs in zip(requests, windows, strict=True):
            mine = [next(answers) for _ in pairs]
            num_tokens = sum(len(after) for _, after in pairs)
            log_prob, seconds = (sum(answer[key] for answer in mine) for key in ("log_prob", "seconds"))
            self._note(instance, Detail(digest(pairs), 0, num_tokens, seconds, log_prob))
            found.append(log_prob)
        return found

    def rolling(self, text: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The windows of a text, cut by lm-eval's own functions: the tokens that are only read, and the tokens that are
        predicted. The first window reads `prefix_token_id`."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._settings.window,
            context_len=1,
        )
        return [(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        asked: dict[Request, int] = {}
        prompts = []
        for instance in requests:
            again = asked[_place(instance)] = asked.get(_place(instance), -1) + 1
            prompts.append(self._prompt(instance, again))
        answers = self._answered(
            [digest(["generate", asdict(prompt)]) for prompt in prompts],
            "answers",
            lambda open_: self._texts(prompts, open_),
        )
        found = []
        for instance, prompt, answer in zip(requests, prompts, answers, strict=True):
            text, detail = self._judged(instance, prompt, answer)
            self._note(instance, detail)
            found.append(text)
        return found

    def _prompt(self, instance: Instance, again: int) -> Prompt:
        """What a request asks of the engine. `again` counts how often the run has made the same request before."""
        context, wishes = instance.args
        wishes = normalize_gen_kwargs(wishes, default_max_gen_toks=_DEFAULT_NEW_TOKENS)
        # A thought may hold what ends an answer: then only the end of the text stops the engine (as in lm-eval's vllm).
        stop = () if self._settings.thinking else tuple(text for text in wishes["until"] if text)
        sampling = _sampling(instance, wishes)
        place = [self._settings.seed, self.log.repetition, again, *_place(instance)]
        return Prompt(
            token_ids=tuple(self.tok_encode(context)),
            max_new_tokens=wishes["max_gen_toks"],
            stop=stop,
            sampling=sampling,
            seed=int(digest(place)[:8], 16) if sampling.temperature else 0,
        )

    def _judged(self, instance: Instance, prompt: Prompt, answer: Mapping[str, Any]) -> tuple[str, Detail]:
        """The text that lm-eval scores, and what else there is to say of an answer."""
        until = list(normalize_gen_kwargs(instance.args[1])["until"])
        stops = handle_stop_sequences(until, eos=self.tokenizer.decode(self.eot_token_id))
        thinking, whole = self._settings.thinking, answer["text"]
        text = postprocess_generated_text(whole, stops, _THINK_END if thinking else None)
        open_thought = _THINK_END not in whole if thinking else _THINK_START in whole.rpartition(_THINK_END)[2]
        return text, Detail(
            prompt_digest=digest(prompt.token_ids),
            num_prompt_tokens=len(prompt.token_ids),
            num_tokens=len(answer["token_ids"]),
            seconds=answer["seconds"],
            finish_reason=answer["finish_reason"],
            unclosed=open_thought,
            empty=not text.strip() or (bool(thinking) and open_thought),
        )

    def _note(self, instance: Instance, detail: Detail) -> None:
        self.log.details.setdefault(_place(instance), []).append(detail)

    # -- Answers

    def _choices(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], name: str) -> list[dict[str, Any]]:
        keys = [digest(["choice", context, continuation]) for context, continuation in pairs]
        return self._answered(keys, name, lambda places: self._scores(pairs, places))

    def _scores(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], places: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The answers to the pairs at `places`. The engine gets the continuations of one context together."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            by_context.setdefault(pairs[place][0], []).append(place)
        groups = list(by_context.values())
        wanted = [Choice(context, tuple(pairs[place][1] for place in group)) for context, group in by_context.items()]
        before = time.perf_counter()
        assert self._engine is not None
        for number, scored in self._engine.choices(wanted, self._settings.batch_size):
            seconds = (time.perf_counter() - before) / len(scored)
            for place, one in zip(groups[number], scored, strict=True):
                yield place, {"log_prob": one.log_prob, "greedy": one.greedy, "seconds": seconds}
            before = time.perf_counter()

    def _texts(self, prompts: Sequence[Prompt], places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        wanted = [prompts[place] for place in places]
        assert self._engine is not None
        for number, answer in self._engine.generate(wanted, self._settings.batch_size):
            text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            yield places[number], {**asdict(answer), "text": text}

    def _answered(
        self,
        keys: Sequence[str],
        name: str,
        ask: Callable[[list[int]], Iterator[tuple[int, dict[str, Any]]]],
    ) -> list[dict[str, Any]]:
        """The answers to requests by their keys, from the journal or else from the engine, which is asked once for
        equal requests."""
        journal = self._journal
        assert journal is not None
        open_ = list(
            {key: place for place, key in reversed(list(enumerate(keys))) if journal.get(key) is None}.values()
        )
        open_.reverse()
        self.log.num_answers += len(keys)
        self.log.num_reused += sum(journal.get(key) is not None for key in keys)
        done, num_tokens, num_cut, seconds = len(keys) - len(open_), 0, 0, 0.0
        if keys:
            self._progress(done, len(keys), name)
        for place, answer in ask(open_) if open_ else ():
            journal.put(keys[place], answer)
            done += 1
            seconds += answer["seconds"]
            note = f"{done:,} of {len(keys):,}"
            if "token_ids" in answer:
                num_tokens += len(answer["token_ids"])
                num_cut += answer["finish_reason"] == "length"
                note += f", {num_tokens / max(seconds, 1e-9):,.0f} tok/s, {num_cut:,} cut off"
            self._progress(done, len(keys), name, note)
        return [cast(dict[str, Any], journal.get(key)) for key in keys]


def _place(instance: Instance) -> Request:
    return str(instance.task_name), int(instance.doc_id), int(instance.idx)


def _sampling(instance: Instance, wishes: Mapping[str, Any]) -> Sampling:
    """The sampling that a task's generation_kwargs ask for; `UserError` for a key that no engine knows."""
    known = {"until", "max_gen_toks", "do_sample"}
    if unknown := sorted(wishes.keys() - known - _SAMPLING):
        raise UserError(
            f"Task '{instance.task_name}' sets generation_kwargs.{unknown[0]}, which the engines do not know.",
            f"They know {', '.join(sorted(_SAMPLING))}, max_gen_toks and until.",
        )
    if not wishes.get("do_sample"):
        # Greedy whatever else a task says, but penalties still hold.
        return Sampling(
            presence_penalty=float(wishes.get("presence_penalty", 0.0)),
            repetition_penalty=float(wishes.get("repetition_penalty", 1.0)),
        )
    return Sampling(**{name: wishes[name] for name in sorted(_SAMPLING & wishes.keys())})
