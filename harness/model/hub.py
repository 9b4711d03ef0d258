"""The model hub: how much a download takes, whether it fits, and what it means that the hub does not give something."""

import errno
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from harness.errors import UserError, first_line
from harness.model.checkpoint import free_disk

_WORTH_A_BAR = 10**7
"""Bytes from which a download is shown."""


def fetch(location: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with those files of a model that fit one of `patterns`, fetched where needed;
    `UserError` as in `bytes_to_fetch`, before anything is fetched."""
    missing = bytes_to_fetch(location, revision, patterns)
    import huggingface_hub

    class Bar(huggingface_hub.utils.tqdm):  # type: ignore[misc]
        """None for a few small files; in a log, where nothing can be overwritten, a line a minute."""

        def __init__(self, *args: object, **named: object) -> None:
            quiet = {"disable": True} if missing < _WORTH_A_BAR else {}
            super().__init__(*args, **{**named, **quiet, "mininterval": 0.1 if sys.stderr.isatty() else 60.0})

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


def hub_refusal(error: Exception, name: str, revision: str | None = None, kind: str = "model") -> UserError:
    """What it means for the user that the hub did not give `name`, a model or a dataset: no network, switched off, a
    wrong name or revision, a gate, no token, a full disk."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    causes = list(_causes(error))
    status = next((found for one in causes if (found := _status(one)) is not None), None)
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
    if status in (401, 404) or any(isinstance(one, hub.RepositoryNotFoundError) for one in causes):
        private = "" if get_token() else "; for a private one set HF_TOKEN"
        return UserError(f"The hub has no {kind} {name}.", f"Check the name{private}.")
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes):
        return UserError(
            f"The disk was full before {name} was fetched.",
            "Make room and run the same command again, which goes on where it was; or set HF_HOME to another disk.",
        )
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"HF_HUB_OFFLINE is set, and the hub's cache lacks the {kind} {name}.",
            "Unset it, or download the files on a machine that is online and give their folder.",
        )
    if status is not None and status >= 500:
        return UserError(f"The hub answers with error {status} for {name}.", "Try again later.")
    said = first_line(causes[-1])
    return UserError(
        f"The hub at {constants.ENDPOINT} cannot be reached for {name}: {said}.",
        "Check the network and the proxy, or give the folder of a downloaded copy. The same command goes on where it "
        "was.",
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
