"""Where a checkpoint is: a folder as it stands, or a hub id that is fetched into the hub's own cache."""

import os
import re
from pathlib import Path

from harness.errors import UserError
from harness.model.checkpoint import INDEX

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_FILES = ("config.json", INDEX)
# Safetensors only: pickled weights and code of a repository are never fetched.
_ALL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")


def fetched_revision(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def locate(location: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder of a checkpoint, fetched first if `location` is a hub id; `config_only` fetches no weights.
    `UserError` for what is neither, and for a hub that cannot be reached while the model is not in its cache."""
    path = Path(os.path.expanduser(location))  # noqa: PTH111 - pathlib raises where the user is unknown
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(location):
        raise UserError(
            f"'{location}' is neither a folder nor a model id of the hub.",
            "Give the folder of a checkpoint, or an id such as Qwen/Qwen3.5-9B.",
        )
    import huggingface_hub

    patterns = list(_CONFIG_FILES if config_only else _ALL_FILES)
    try:
        return Path(huggingface_hub.snapshot_download(location, revision=revision, allow_patterns=patterns))
    except Exception as error:
        # The library raises its own, requests' and the operating system's errors; all mean: not to be had.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"There is no folder '{location}', and the hub does not give it: {reason}.",
            "Check the name, go online (unset HF_HUB_OFFLINE), log in for a gated model, or download it to a folder.",
        ) from error
