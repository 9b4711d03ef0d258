"""The model hub: how much a download takes, whether it fits, and what it means that the hub does not give something."""

import errno
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.errors import UserError, first_line
from harness.model.checkpoint import free_disk

_WORTH_A_BAR = 10**7
"""Bytes from which a download is shown."""


def fetch(location: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with those files of a model that fit one of `patterns`, fetched where needed;
    `UserError` as in `bytes_to_fetch`, before anything is fetched."""
    missing = bytes_to_fetch(location, revision, patterns)
    import huggingface_hub
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        """None for a few small files; in a log, where nothing can be overwritten, a line a minute."""

        def __init__(self, *args: object, **named: object) -> None:
            quiet = {"disable": True} if missing < _WORTH_A_BAR else {}
            seconds = 0.1 if sys.stderr.isatty() else 60.0
            super().__init__(*args, **{**named, **quiet, "mininterval": seconds})  # type: ignore[no-untyped-call]

    try:
        return Path(
            huggingface_hub.snapshot_download(
                location, revision=revision, allow_patterns=list(patterns), tqdm_class=Bar
            )
        )
    except Exception as error:  # the library raises its own, httpx2's and the operating system's errors
        raise hub_refusal(error, location, revision) from error


def bytes_to_fetch(location: str, revision: str | None, patterns: Sequence[str]) -> int:
    """How much `fetch` would fetch: 0 also where the hub cannot be asked and its cache has all of it. `UserError` for
    what neither has, and for a disk that is too small."""
    try:
        missing = _missing_bytes(location, revision, patterns)
    except Exception as error:  # as above
        if _is_cached(location, revision, patterns):
            return 0
        raise hub_refusal(error, location, revision) from error
    from huggingface_hub import constants

    free = free_disk(Path(constants.HF_HUB_CACHE))[1]
    if missing > free:
        raise UserError(
            f"{location} takes {missing / 1e9:.1f} GB to download, and the disk of the hub's cache has "
            f"{free / 1e9:.1f} GB free.",
            "Make room, or set HF_HOME to a folder on a larger disk.",
        )
    return missing


def _missing_bytes(location: str, revision: str | None, patterns: Sequence[str]) -> int:
    from huggingface_hub import HfApi, RepoFile, try_to_load_from_cache

    api = HfApi()
    commit = api.repo_info(location, revision=revision).sha
    sizes = {
        entry.path: entry.size
        for entry in api.list_repo_tree(location, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    }
    wanted = [path for path in sizes if any(fnmatch(path, pattern) for pattern in patterns)]
    missing = [path for path in wanted if try_to_load_from_cache(location, path, revision=commit) is None]
    if missing:
        api.auth_check(location)  # a gated repository is listed to everybody
    return sum(sizes[path] for path in missing)


def _is_cached(location: str, revision: str | None, patterns: Sequence[str]) -> bool:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        huggingface_hub.snapshot_download(
            location, revision=revision, allow_patterns=list(patterns), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return False
    return True


# -- Datasets, and what a refusal means

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = "download the files on a machine that is online and give their folder"


def load_rows(dataset: str, config: str | None, split: str, revision: str | None) -> Any:
    """The rows of a split of a dataset of the hub, fetched where the cache lacks it, or of a folder. `UserError` where
    they cannot be loaded: as in `hub_refusal`, or a split or configuration that is not there, a broken file."""
    import datasets  # type: ignore[import-untyped]

    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the library raises its own, Arrow's and all that `fetch` may meet
        arguments = ", ".join(repr(part) for part in (dataset, config) if part is not None)
        arguments += f", revision={revision!r}" if revision is not None else ""
        elsewhere = (
            "on a machine with the network, fetch it once into the cache with "
            f'`python -c "import datasets; datasets.load_dataset({arguments})"`, or give a local file as path'
        )
        raise _not_loaded(error, dataset, revision, elsewhere) or UserError(
            f"The dataset {dataset} ({config or 'default'}, {split}) cannot be loaded: {first_line(error)}.",
            f"{elsewhere[0].upper()}{elsewhere[1:]}.",
        ) from error


def _not_loaded(error: Exception, name: str, revision: str | None, elsewhere: str) -> UserError | None:
    """Why a dataset was not loaded, if the hub or the disk is the cause. `datasets` mostly drops what the hub said
    (`raise ... from None`): the hub is asked again."""
    from datasets.exceptions import DatasetNotFoundError  # type: ignore[import-untyped]

    causes = list(_causes(error))
    if any(isinstance(one, OSError) and one.errno in _FULL for one in causes):
        return hub_refusal(error, name, revision, "dataset")
    is_unknown = isinstance(error, DatasetNotFoundError)
    libraries = {type(one).__module__.partition(".")[0] for one in causes} & {"huggingface_hub", "httpx", "httpx2"}
    if not (is_unknown or libraries or any(isinstance(one, ConnectionError) for one in causes)):
        return None
    if (refusal := dataset_refusal(name, revision, elsewhere)) is not None:
        return refusal
    is_answer = is_unknown or any(400 <= (_status(one) or 0) < 500 for one in causes)  # such as: no such file
    return None if is_answer else hub_refusal(error, name, revision, "dataset", elsewhere)


def dataset_refusal(name: str, revision: str | None, elsewhere: str = _ELSEWHERE) -> UserError | None:
    """Why the hub does not give a dataset, as in `hub_refusal`, by asking without a download; None where it does."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        if config.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        api = HfApi()
        api.auth_check(name, repo_type="dataset")
        api.dataset_info(name, revision=revision, timeout=30)
    except Exception as error:  # as in `fetch`
        return hub_refusal(error, name, revision, "dataset", elsewhere)
    return None


def hub_refusal(
    error: Exception, name: str, revision: str | None = None, kind: str = "model", elsewhere: str = _ELSEWHERE
) -> UserError:
    """What it means for the user that the hub did not give `name`, a model or a dataset: no network, switched off, a
    wrong name or revision, a gate, no token, a full disk. `elsewhere`: what to do where there is no network."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    causes = list(_causes(error))
    status = next((found for one in causes if (found := _status(one)) is not None), None)
    if any(isinstance(one, OSError) and one.errno in _FULL for one in causes):
        return UserError(
            f"The disk was full before {name} was fetched.",
            "Make room and run the same command again, which goes on where it was; or set HF_HOME to another disk.",
        )
    if any(isinstance(one, hub.GatedRepoError) for one in causes):
        who = "the account of this token has not been let in" if get_token() else "no token is set"
        return UserError(
            f"The {kind} {name} is gated, and {who}.",
            f"Accept its terms at {page}, then set HF_TOKEN to a token of that account (or run `hf auth login`).",
        )
    if any(isinstance(one, hub.RevisionNotFoundError) for one in causes):
        return UserError(f"The {kind} {name} has no revision '{revision}'.", f"Look at {page}/tree/main.")
    if status == 401 and get_token():
        return UserError(
            f"The hub does not know the {kind} {name}, or refuses the token for it.",
            "Check the name, and that HF_TOKEN is valid (`hf auth whoami`).",
        )
    if status in (401, 404) or any(
        isinstance(one, hub.RepositoryNotFoundError | hub.HFValidationError) for one in causes
    ):
        private = "" if get_token() else "; for a private one set HF_TOKEN"
        return UserError(f"The hub has no {kind} {name}.", f"Check the name{private}.")
    if constants.HF_HUB_OFFLINE or any(isinstance(one, hub.OfflineModeIsEnabled) for one in causes):
        switch = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "HF_DATASETS_OFFLINE"
        return UserError(f"{switch} is set, and the hub's cache lacks the {kind} {name}.", f"Unset it, or {elsewhere}.")
    if status is not None and status >= 500:
        return UserError(f"The hub answers with error {status} for {name}.", "Try again later.")
    said = first_line(causes[-1])
    return UserError(
        f"The hub at {constants.ENDPOINT} cannot be reached for {name}: {said}.",
        f"Check the network and the proxy, or {elsewhere}. The same command goes on where it was.",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
