"""The folder in which a streamed pass keeps its hidden states, so that a pass that was killed goes on where it was."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import IO, Any

from harness.errors import UserError
from harness.model.checkpoint import check_disk, write_file

_LOCK, _STATE, _HIDDEN = "streamed.lock", "streamed.json", "streamed-hidden-"


class Scratch:
    """A folder for the hidden states of one pass, with how many of its steps are finished."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        self._lock: IO[bytes] | None = None

    def open(self, num_bytes: int) -> int:
        """The finished steps of the pass that this one continues, or 0 in a folder that `num_bytes` will fit into. The
        folder is this process's alone until `close`; `UserError` where another process uses it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.folder} is used by another run.", "Wait for its end, or stop it.") from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}).", "Give a folder on another disk."
            ) from error
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
            if state["identity"] == self._identity:
                return int(state["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no pass was here, or it left nothing that can be continued
        self._forget()
        try:
            check_disk(self.folder, num_bytes)
        except BaseException:
            self.close()
            raise
        return 0

    def states(self, name: str) -> Path:
        """The file of the hidden states called `name`."""
        return self.folder / f"{_HIDDEN}{name}"

    def save(self, finished: int) -> None:
        """Says that so many steps are finished; their hidden states are on the disk."""
        state = {"identity": self._identity, "finished": finished}
        write_file(self.folder / _STATE, json.dumps(state).encode())

    def _forget(self) -> None:
        """Removes what passes left here. The state goes first: without it nothing is continued."""
        for path in (self.folder / _STATE, *self.folder.glob(f"{_HIDDEN}*")):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes what passes left here, and the folder if nothing else is in it."""
        self._forget()
        (self.folder / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
