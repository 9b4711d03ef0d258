"""Where the text of a measurement comes from: a local file, or a column of a dataset on the model hub.

A text is one string: the rows of a dataset joined with nothing in between (WikiText's rows carry their own line ends).
"""

from pathlib import Path

from harness.errors import UserError

_LINE_FEED = "\n"


def load_text(
    *,
    path: Path | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    revision: str | None = None,
    as_lines: bool = False,
) -> str:
    """The text of a UTF-8 file (`path`) or of a `dataset` on the hub; exactly one of them must be given.

    `as_lines`: every row of the dataset ends with a line feed, and an empty row becomes a line of one blank. This turns
    a WikiText dataset back into the file that it was made from. `UserError` for a text that cannot be read or is empty.
    """
    if (path is None) == (dataset is None):
        raise UserError("A text needs either a path or a dataset.", "Name exactly one of them in the suite.")
    if path is not None:
        text = _read_file(path)
    else:
        rows = _read_dataset(str(dataset), config, split, column, revision)
        text = "".join(f"{row.removesuffix(_LINE_FEED) or ' '}{_LINE_FEED}" if as_lines else row for row in rows)
    if not text.strip():
        raise UserError(f"The text of {path or dataset} is empty.", "Check its path, split and column.")
    return text


def _read_file(path: Path) -> str:
    try:
        # Bytes, not text mode: that would turn the line ends of a Windows file into other tokens.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}).", "Convert it, for example with iconv.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path in the suite.") from None


def _read_dataset(dataset: str, config: str | None, split: str, column: str, revision: str | None) -> list[str]:
    import datasets  # type: ignore[import-untyped]

    try:
        rows = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:
        # Its errors for "no network", "no such name" and "no such split" have no base class of their own.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        arguments = ", ".join(repr(a) for a in (dataset, config) if a is not None)
        raise UserError(
            f"The dataset {dataset} ({config or 'default'}, {split}) cannot be loaded: {reason}.",
            "On a machine with the network, fetch it once into the cache with "
            f'`python -c "import datasets; datasets.load_dataset({arguments})"`, or give a local file as path.',
        ) from error
    if column not in rows.column_names:
        raise UserError(
            f"The dataset {dataset} has no column '{column}'.", f"Its columns: {', '.join(rows.column_names)}."
        )
    return list(rows[column])
