"""Uploading a folder to the model hub, as one commit."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]

from harness.errors import UserError

TOKEN = "HF_TOKEN"
"""The variable that holds the token; it is read from the environment and kept nowhere."""
_PATIENCE_SECONDS = 120.0  # for an answer of the Hub, which by itself would be waited for without end
_LONGEST_REASON = 400


@dataclass(frozen=True)
class Uploaded:
    """A commit on the Hub. `others` are files that the repository held besides, which stay there."""

    url: str
    private: bool
    others: tuple[str, ...]


def check_repo(repo: str) -> None:
    """`UserError` where `repo` is not owner/name of a repository."""
    try:
        validate_repo_id(repo)
        reason = None if repo.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        reason = str(error).rstrip(".")
    if reason:
        raise UserError(f"'{repo}' is no repository of the Hub: {reason}.", "Write --repo owner/name.")


def token_of(environment: Mapping[str, str]) -> str:
    """The token to upload with, from the environment; `UserError` where it is missing or the Hub is switched off."""
    if huggingface_hub.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, and an upload needs the Hub.", "Unset it, or give --dry-run.")
    token = environment.get(TOKEN, "").strip()
    if not token:
        raise UserError(
            f"An upload needs a token, and {TOKEN} is not set.",
            f"Put a token with write access into the environment as {TOKEN}, or give --dry-run.",
        )
    if not re.fullmatch("[!-~]+", token):
        raise UserError(f"{TOKEN} holds characters that no token has.", "Copy the token again.")
    return token


def upload_folder(
    folder: Path, files: Mapping[str, int], repo: str, message: str, token: str, *, public: bool, bars: bool
) -> Uploaded:
    """Uploads the `files` of a folder (bytes by path) as one commit to the repository `repo`, which is made where there
    is none, private unless it is to be `public`. What was uploaded before a failure is not sent again. `bars`: the
    Hub's client may draw on stderr.

    `UserError` for everything that goes wrong, in one sentence without the token; also for a repository that is public
    while `public` is not set.
    """
    # The library logs its retries and the Hub's headers; what counts is raised.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not bars:
        disable_progress_bars()
    client = huggingface_hub.get_session()
    make, hooks = type(client), client.event_hooks
    huggingface_hub.set_client_factory(
        lambda: make(event_hooks=hooks, follow_redirects=True, timeout=_PATIENCE_SECONDS)
    )
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.repo_info(repo).private)
        if not private and not public:
            raise UserError(f"The repository '{repo}' is public.", "Give --public to publish there, or another --repo.")
        operations = [huggingface_hub.CommitOperationAdd(name, folder / name) for name in files]
        commit = api.create_commit(repo, operations, commit_message=message)
        entries = api.list_repo_tree(repo, recursive=True, revision=commit.oid)
        sizes = {one.path: one.size for one in entries if isinstance(one, huggingface_hub.RepoFile)}
    except UserError:
        raise
    except Exception as error:
        # The library raises its own, its HTTP client's and the operating system's errors; all mean: not done.
        raise UserError(
            f"{api.endpoint} did not take the upload to '{repo}': {_reason(error, token)}.", _remedy(error)
        ) from None
    if missing := [name for name, size in files.items() if sizes.get(name) != size]:
        raise UserError(
            f"{commit.commit_url} lacks {len(missing)} of the files, such as {missing[0]}.",
            "Look for a .gitignore in the repository, and run the same command again.",
        )
    others = sorted(sizes.keys() - files.keys() - {".gitattributes"})
    return Uploaded(str(commit.commit_url), private, tuple(others))


def _reason(error: BaseException | None, token: str) -> str:
    """What an error of the library says, on one line and without the token, which a server may have sent back."""
    told: list[str] = []
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            status = error.response
            told.append(f"{status.status_code} {error.server_message or status.reason_phrase}")
            break
        told.append(str(error) or type(error).__name__)
        error = error.__cause__
    words = ": ".join(dict.fromkeys(" ".join(one.split()) for one in told))
    return words.replace(token, "…")[:_LONGEST_REASON].rstrip(".")


def _remedy(error: BaseException) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return f"Put a token into {TOKEN} that may write to that repository."
    return "Run the same command again: what is there is not sent again."
