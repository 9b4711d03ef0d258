"""Tasks by lm-eval: its tasks, its prompts, its metrics, on the engines of the harness, with every item kept.

`take_task` takes a task from lm-eval, and `ready_task` writes its prompts: together they find what can be wrong before
a model is loaded. `task_samples` runs the task. An item's sample says what was asked, how the answer was scored and how
it ended, so that models can be compared item by item. lm-eval's own figures are samples too.
"""

import contextlib
import difflib
import io
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import lm_eval
import lm_eval.api.task
import numpy as np
from jinja2 import TemplateError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from harness.engines.protocol import Engine
from harness.errors import UserError, first_line
from harness.measure.kept import Journal, digest
from harness.measure.lm import AnswerLog, Detail, EngineLM, Settings, Texts, rolling_window
from harness.progress import Progress, silent
from harness.sampling import PRESETS
from harness.suite.schema import Task

VERSION = 1
_NO_ANSWER = "[invalid]"  # what lm-eval's regex filters give where they find nothing
_PINNED = "pinned"  # a group of one task, through which lm-eval takes overrides of a registered task


@dataclass(frozen=True)
class TakenTask:
    """A task as lm-eval has it, configured as the suite wants it, with its dataset at hand."""

    label: str
    """The task's name in the suite."""
    wanted: Task
    tasks: Mapping[str, Any]
    """lm-eval's objects of all leaf tasks, by name."""
    groups: Mapping[str, Any]


@dataclass(frozen=True)
class ReadyTask(TakenTask):
    """A task that is ready to run, by a tokenizer, on any number of models."""

    texts: Texts
    settings: Settings
    num_docs: int
    """The documents of all leaf tasks, under the limit of the suite."""
    identity: dict[str, Any]
    """What an answer to this task depends on: the digest of the configuration, versions, datasets."""


def take_task(label: str, wanted: Task, source: str | Path) -> TakenTask:
    """Takes a task from lm-eval by name or from a file (`source`) and fetches its dataset. `UserError` for a task that
    is unknown, broken, of another version, without its dataset, or that cannot be put as `wanted`."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # says again what it raises
    datasets.disable_progress_bars()
    # It draws bars on stderr and takes no argument against them.
    lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
    found = _loaded_by_lm_eval(label, source, wanted.revision)
    for name, task in found["tasks"].items():
        _configure(label, name, task, wanted)
    groups = {name: group for name, group in found.get("groups", {}).items() if name != _PINNED}
    return TakenTask(label, wanted, found["tasks"], groups)


def ready_task(taken: TakenTask, texts: Texts, max_length: int, engine: str) -> ReadyTask:
    """Writes a task's prompts and checks them against the `max_length` tokens that `engine` takes; `UserError` for what
    would go wrong later."""
    label, wanted, tasks = taken.label, taken.wanted, taken.tasks
    if wanted.chat and texts.tokenizer.chat_template is None:
        raise UserError(
            f"Task '{label}' asks for a chat, and the tokenizer in {texts.folder} has no chat template.",
            "Copy the source's chat_template.jinja into that folder, or leave chat out.",
        )
    num_docs = sum(min(len(task.eval_docs), wanted.limit or len(task.eval_docs)) for task in tasks.values())
    configs = {name: _config(task) for name, task in tasks.items()}
    identity = {
        "lm_eval": lm_eval.__version__,
        "task_digest": digest([configs, {name: len(task.eval_docs) for name, task in tasks.items()}]),
        "tokenizer_digest": texts.digest,
        "tasks": {name: _about(task) for name, task in tasks.items()},
    }
    settings = Settings(wanted.thinking, wanted.seed, wanted.batch_size, rolling_window(max_length, engine))
    loaded = ReadyTask(label, wanted, tasks, taken.groups, texts, settings, num_docs, identity)
    # vLLM adds a token to every prompt that it scores.
    _check_requests(loaded, max_length, 1 if engine == "vllm" else 0)
    return loaded


def task_samples(
    loaded: ReadyTask,
    engine: Engine,
    journal: Journal,
    *,
    limit: int | None = None,
    progress: Progress = silent,
) -> Iterator[dict[str, Any]]:
    """Runs the task `repeats` times and yields samples: an `item` a document, a `result` a figure of lm-eval, and
    `reused`, last, which counts the answers that the journal had. `EngineDied` passes through; what was answered is in
    the journal."""
    wanted = loaded.wanted
    model = EngineLM(loaded.texts, loaded.settings, engine=engine, journal=journal, progress=progress)
    limits = [one for one in (wanted.limit, limit) if one is not None]
    num_answers = num_reused = 0
    for repetition in range(wanted.repeats):
        model.log = AnswerLog(repetition=repetition)
        found = _evaluated(loaded, model, min(limits) if limits else None)
        for task, samples in found["samples"].items():
            yield from _items(task, samples, model.log)
        yield from _results(found, repetition)
        num_answers += model.log.num_answers
        num_reused += model.log.num_reused
    yield {"kind": "reused", "num_answers": num_answers, "num_reused": num_reused}


# -- Taking a task from lm-eval


@cache
def _manager(folder: Path | None) -> TaskManager:
    """lm-eval's index of its own tasks, or of those in a folder."""
    return TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


def datasets_of(member: str | Mapping[str, Any]) -> set[str]:
    """The hub datasets of one of lm-eval's own tasks, or of all members of a group or tag, as their configurations name
    them: those that only a task's code names are missing. `member`: a name, or a table of a group's list."""
    table: Mapping[str, Any] = {"task": member} if isinstance(member, str) else member
    entry = _manager(None).task_index.get(table.get("group", table.get("task", "")))
    config = dict(table)
    if entry is not None:  # a tag has no configuration, and its tags are its tasks
        config |= {"task": sorted(entry.tags)} if entry.cfg is None else entry.cfg
    if isinstance(config.get("task"), list):
        return {path for one in config["task"] for path in datasets_of(one)}
    path = config.get("dataset_path")
    return {path} if isinstance(path, str) and "/" in path else set()


def _loaded_by_lm_eval(label: str, source: str | Path, revision: str | None) -> Any:
    """What lm-eval's TaskManager loads: {tasks, groups}."""
    name = source if isinstance(source, str) else source.name
    what = f"Task '{label}' ({name})"
    if isinstance(source, Path):
        if not source.is_file():
            raise UserError(f"{what}: there is no file {source}.", "Correct the path in the suite.")
        if revision is not None:
            raise UserError(f"{what} is a file, and revision is set.", "Write dataset_kwargs.revision into the file.")
        manager = _manager(source.parent)
    else:
        manager = _manager(None)
        if source not in manager.task_index:
            near = difflib.get_close_matches(source, manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise UserError(f"lm-eval has no task '{source}'.", f"{hint}`lm_eval ls tasks` lists what it has.")
    spec: Any = str(source)
    if revision is not None:  # a group that holds only the task or group, with its dataset pinned
        given = (manager.task_index[name].cfg or {}).get("dataset_kwargs") or {}
        kind = "group" if name in manager.all_groups else "task"
        spec = {"group": _PINNED, "task": [{kind: name, "dataset_kwargs": {**given, "revision": revision}}]}
    said: list[str] = []
    try:
        with contextlib.redirect_stdout(io.StringIO()), _logged(said):
            return manager.load([spec])
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the Python module '{error.name}', which is not installed.",
            f"Run `pip install {error.name}`.",
        ) from error
    except Exception as error:  # a task is code and templates of anyone
        from_library = type(error).__module__.startswith(("datasets", "huggingface_hub", "httpx", "requests"))
        if from_library or isinstance(error, ConnectionError | FileNotFoundError):
            raise _no_dataset(what, manager.task_index.get(name), revision, error) from error
        part = "template" if isinstance(error, TemplateError) else "configuration"
        why = f"{first_line(error)} ({said[-1]})" if said else first_line(error)
        raise UserError(
            f"{what} cannot be loaded: its {part} fails with {type(error).__name__}: {why}.",
            "Correct the task file." if isinstance(source, Path) else "Look at the task in lm-eval.",
        ) from error


@contextlib.contextmanager
def _logged(said: list[str]) -> Iterator[None]:
    """Keeps lm-eval's log off the terminal, and collects its errors in `said`: some say what an exception hides."""

    class Errors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().splitlines()[0].strip().rstrip("."))

    logger, handler = logging.getLogger("lm_eval"), Errors(logging.ERROR)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _no_dataset(what: str, entry: Any, revision: str | None, error: Exception) -> UserError:
    config: dict[str, Any] = (entry and entry.cfg) or {}
    named = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))  # a group's dataset is known to its members only
    path = named.group(1) if named else config.get("dataset_path", "of the task")
    arguments = [repr(path)] + ([repr(config["dataset_name"])] if config.get("dataset_name") else [])
    arguments += [f"revision={revision!r}"] if revision else []
    return UserError(
        f"{what} needs the dataset {path}, which is not in the cache and cannot be fetched: {first_line(error)}.",
        "On a machine with the network, fetch it once into the cache (HF_HOME) with "
        f'`python -c "import datasets; datasets.load_dataset({", ".join(arguments)})"`.',
    )


def _configure(label: str, name: str, task: Any, wanted: Task) -> None:
    """Configures a task as `lm_eval.simple_evaluate` does for the same arguments; `UserError` where it cannot be."""
    if wanted.version is not None and wanted.version != task.VERSION:
        raise UserError(
            f"Task '{label}' is pinned to version {wanted.version:g}, and lm-eval {lm_eval.__version__} has "
            f"version {task.VERSION} of {name}.",
            "Install the lm-eval that has it, or change the pin: their scores cannot be compared.",
        )
    if getattr(task, "UNSAFE_CODE", False) and not wanted.unsafe_code:
        raise UserError(
            f"Task '{label}' runs code that the model writes.",
            "Set unsafe_code = true for it, on a machine where that can do no harm.",
        )
    if wanted.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Task '{label}' shows the model images or sound.", "Use a task of text.")
    generates = task.OUTPUT_TYPE == "generate_until"
    if generates:
        changes = {} if wanted.preset is None else {"do_sample": True, **vars(PRESETS[wanted.preset])}
        if wanted.max_new_tokens is not None:
            changes["max_gen_toks"] = wanted.max_new_tokens
        if changes:
            task.set_config(key="generation_kwargs", value=changes, update=True)
        if wanted.repeats > 1 and not (task.config.generation_kwargs or {}).get("do_sample"):
            raise UserError(
                f"Task '{label}' is to be repeated {wanted.repeats} times and decodes greedily: every "
                "repetition would be the same.",
                "Name a preset, or leave repeats out.",
            )
    elif wanted.thinking:
        raise UserError(
            f"Task '{label}' asks for thinking, and {name} only compares the probabilities of given answers.",
            "Leave thinking out, or take a task that generates.",
        )
    elif wanted.repeats > 1:
        raise UserError(f"Task '{label}' draws nothing, and repeats is {wanted.repeats}.", "Leave repeats out.")
    if wanted.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=wanted.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def _config(task: Any) -> Any:
    """A task's configuration without what says where its file lies."""
    config = task.dump_config()
    metadata = dict(config.get("metadata") or {})
    metadata.pop("config_source", None)
    return json.loads(json.dumps({**config, "metadata": metadata}, default=_source, sort_keys=True))


def _source(value: object) -> str:
    """The name of a function or of a value's type. Their `repr` holds an address, which differs in every process."""
    return getattr(value, "__qualname__", type(value).__name__)


def _about(task: Any) -> dict[str, Any]:
    """Version, dataset and sizes of a task, and the dataset's commit on the hub, after which its cache is named."""
    config = task.config
    files = [file["filename"] for split in task.dataset.values() for file in getattr(split, "cache_files", ())]
    commits = {found.group(1) for file in files if (found := re.search(r"/([0-9a-f]{40})/[^/]*$", file))}
    return {
        "version": task.VERSION,
        "dataset": config.dataset_path,
        "dataset_config": config.dataset_name,
        "dataset_revision": " ".join(sorted(commits)) or None,
        "num_fewshot": config.num_fewshot,
        "num_docs": len(task.eval_docs),
    }


def _check_requests(loaded: ReadyTask, max_length: int, scored_extra: int) -> None:
    """Writes all prompts once. `UserError` for a template that fails, and for a prompt that is too long."""
    wanted = loaded.wanted
    model = EngineLM(loaded.texts, loaded.settings)
    for name, task in loaded.tasks.items():
        try:
            _build(task, wanted, model, wanted.limit)
        except UserError:
            raise
        except Exception as error:  # templates and functions of anyone
            raise UserError(
                f"Task '{loaded.label}' cannot write its prompts: {name} fails with {type(error).__name__}: "
                f"{first_line(error)}.",
                "Correct the task, or leave chat and system out if it cannot be put that way.",
            ) from error
        for instance in task.instances:
            for before, after in model.lengths(instance):
                extra = scored_extra if instance.request_type == "loglikelihood" else 0
                if before + after + extra > max_length:
                    raise UserError(
                        f"Task '{loaded.label}' asks for {before:,} + {after:,} tokens in document "
                        f"{instance.doc_id} of {name}, and the model takes {max_length:,}.",
                        "Lower max_new_tokens or num_fewshot, or raise max_model_len.",
                    )


def _build(task: Any, wanted: Task, model: EngineLM, limit: int | None) -> None:
    """Builds the requests of a task, in `task.instances`, as `lm_eval.evaluate` does."""
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _logged([]):
        task.build_all_requests(
            limit=limit,
            rank=0,
            world_size=1,
            system_instruction=wanted.system,
            apply_chat_template=wanted.chat,
            fewshot_as_multiturn=wanted.chat,
            chat_template=model.apply_chat_template if wanted.chat else None,
            tokenizer_name=model.tokenizer_name if wanted.chat else "",
        )


# -- Running it


def _evaluated(loaded: ReadyTask, model: EngineLM, limit: int | None) -> Any:
    """The results of `lm_eval.evaluate`, with the seeds that `lm_eval.simple_evaluate` sets."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    wanted = loaded.wanted
    with _logged([]):
        return lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": dict(loaded.tasks), "groups": dict(loaded.groups)},
            limit=limit,
            log_samples=True,
            system_instruction=wanted.system,
            apply_chat_template=wanted.chat,
            fewshot_as_multiturn=wanted.chat,
            confirm_run_unsafe_code=wanted.unsafe_code,
        )


def _items(task: str, samples: Sequence[Mapping[str, Any]], log: AnswerLog) -> Iterator[dict[str, Any]]:
    """A sample for each document. lm-eval logs a document once for every filter."""
    by_doc: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_doc.setdefault(int(sample["doc_id"]), []).append(sample)
    requests: dict[int, list[Detail]] = {}
    for (name, doc_id, _), details in sorted(log.details.items()):
        if name == task:
            requests.setdefault(doc_id, []).extend(details)
    for doc_id, logged in by_doc.items():
        details = requests[doc_id]
        item = {
            "kind": "item",
            "task": task,
            "repetition": log.repetition,
            "doc_id": doc_id,
            "doc_sha256": logged[0]["doc_hash"],
            "prompt_sha256": digest([detail.prompt_digest for detail in details]),
            "target_sha256": logged[0]["target_hash"],
            "outcomes": {
                f"{metric},{sample['filter']}": score
                for sample in logged
                for metric in sample["metrics"]
                if (score := _score(sample[metric])) is not None
            },
            "num_prompt_tokens": sum(detail.num_prompt_tokens for detail in details),
            "num_tokens": sum(detail.num_tokens for detail in details),
            "seconds": sum(detail.seconds for detail in details),
        }
        if details[0].finish_reason is None:
            item["log_probs"] = [detail.log_prob for detail in details]
        else:
            item["finish_reasons"] = [detail.finish_reason for detail in details]
            item["unclosed"] = any(detail.unclosed for detail in details)
            item["empty"] = any(detail.empty for detail in details)
            filtered = [sample["filtered_resps"] for sample in logged]
            item["extracted"] = any(
                all(one not in (None, _NO_ANSWER, "", []) for one in answers) for answers in filtered
            )
        yield item


def _score(value: Any) -> float | list[float] | None:
    """A metric of an item as JSON: a number, or the list of numbers that lm-eval aggregates; None for anything else."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value) if math.isfinite(value) else None
    numbers = [_score(one) for one in value] if isinstance(value, list | tuple) else []
    floats = [one for one in numbers if isinstance(one, float)]
    return floats if floats and len(floats) == len(numbers) else None


def _results(found: Mapping[str, Any], repetition: int) -> Iterator[dict[str, Any]]:
    """A sample for each of lm-eval's own figures, of every task and group."""
    for name, metrics in {**found["results"], **found.get("groups", {})}.items():
        higher = found["higher_is_better"].get(name, {})
        for key, value in metrics.items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            error = metrics.get(f"{metric}_stderr,{rest}")
            yield {
                "kind": "result",
                "task": name,
                "repetition": repetition,
                "metric": key,
                "value": float(value),
                "standard_error": float(error) if isinstance(error, int | float | np.number) else None,
                "higher_is_better": higher.get(metric),
                "num_items": int(found["n-samples"].get(name, {}).get("effective", metrics.get("sample_len", 0))),
            }
