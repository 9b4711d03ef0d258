"""Safetensors shards as a stream: read rows, write tensors, never hold a shard.

The safetensors library maps whole files, and mapped pages count as resident memory; here they are read and written in
pieces. A file (https://huggingface.co/docs/safetensors) has 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, and then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from harness.errors import UserError
from harness.formats.format import DTYPES, num_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 16 << 20
"""Bytes read or written at a time: large enough to be sequential, small enough to be nothing."""

_MAX_HEADER_BYTES = 100 << 20
_MAX_PENDING = 4
_COUNTED = re.compile(r"(.*?)(\d+)-of-(\d{1,5})\.safetensors")


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors dtype."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name][0])
    return dtype


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: a name, a safetensors dtype and a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class TensorEntry(NewTensor):
    """A tensor in a file: `offset` is absolute in file `shard`."""

    shard: str
    offset: int

    @property
    def num_elements(self) -> int:
        """Its values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: its configuration and every tensor, in the order of the files."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows `first` to `first + count` of a tensor seen as a matrix with rows of its last dimension; read anew."""
        import torch

        entry = self.tensors[name]
        width = entry.shape[-1] if entry.shape else 1
        total = entry.num_elements // max(width, 1)
        count = total - first if count is None else count
        row_bytes = num_bytes(entry.dtype, (width,))
        read = torch.empty((count, width), dtype=torch_dtype(entry.dtype))
        with (self.folder / entry.shard).open("rb") as file:
            _read_into(file, bytes_of(read), entry.offset + first * row_bytes, self.folder / entry.shard)
        return read

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its own shape."""
        return self.rows(name).view(self.tensors[name].shape)

    def pieces(self, name: str) -> Iterator[bytearray]:
        """The tensor's bytes, at most `PIECE_BYTES` at a time."""
        entry = self.tensors[name]
        with (self.folder / entry.shard).open("rb") as file:
            for start in range(0, entry.num_bytes, PIECE_BYTES):
                piece = bytearray(min(PIECE_BYTES, entry.num_bytes - start))
                _read_into(file, memoryview(piece), entry.offset + start, self.folder / entry.shard)
                yield piece

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """A digest that tells this checkpoint from another without reading all of it: `config.json`, every
        shard's size and header, and 64 KiB from 256 evenly spaced places of each (a shard under 16 MiB whole)."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            path = self.folder / shard
            size, sample = path.stat().st_size, 64 << 10
            digest.update(f"{shard}:{size}".encode())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                digest.update(file.read(length))
                for place in range(256):
                    file.seek(max(place * sample, place * (size - sample) // 255))
                    digest.update(file.read(sample))
        return digest.hexdigest()


def row_pieces(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows of `row_bytes` in pieces of at most `PIECE_BYTES`, or of one row: the first row and the number of each."""
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, num_rows, step):
        yield first, min(step, num_rows - first)


def _read_into(file: BinaryIO, view: memoryview, offset: int, path: Path) -> None:
    done = read_at(file.fileno(), view, offset)
    if done < len(view):
        raise UserError(f"{path} ends at byte {offset + done}, before its tensor does.", "Download it again.")


def read_at(file: int, view: memoryview, offset: int) -> int:
    """Fills `view` from byte `offset` of an open file; returns the bytes read, which are fewer where the file ends."""
    done = 0
    while done < len(view) and (read := os.preadv(file, [view[done:]], offset + done)):
        done += read
    return done


def write_at(file: int, view: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `view` at byte `offset` of an open file."""
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures to write (a full disk, a folder that may not be written) are the user's errors, which name `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}).", "Make room, or give a folder on another disk."
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint folder; `UserError` for the first thing that is wrong with it."""
    checkpoint, problems = inspect_checkpoint(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}.", "Download the checkpoint again, or give another folder.")
    return checkpoint


def inspect_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Opens a checkpoint folder as far as that goes, with every disagreement between its index and its shards.
    `UserError` without a folder, a `config.json`, an index that is one, or safetensors: loading a pickle runs code."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Give the folder of a checkpoint.")
    config = read_json(folder / "config.json")
    index_path = folder / INDEX
    problems: list[str] = []
    weight_map = read_index(folder)
    shards = shards_of(folder, weight_map)
    if not shards:
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded.",
                "Convert them to safetensors, or take the model's safetensors revision.",
            )
        raise UserError(f"{folder} holds no {SINGLE} and no other shards.", "Give the folder of a checkpoint.")
    tensors: dict[str, TensorEntry] = {}
    opened = []
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            problems.append(f"{index_path} names a file outside its folder: {shard!r}")
            continue
        if not (folder / shard).is_file():
            by = "the others count it" if weight_map is None else f"{INDEX} names it"
            problems.append(f"{folder / shard} is missing, though {by}")
            continue
        opened.append(shard)
        try:
            entries = read_header(folder / shard)
        except UserError as error:
            problems.append(error.problem.removesuffix("."))
            continue
        for entry in entries:
            if weight_map is not None and weight_map.get(entry.name) != shard:
                problems.append(f"{folder / shard} holds {entry.name}, which {INDEX} does not place there")
            elif entry.name in tensors:
                problems.append(f"{folder / shard} holds {entry.name}, and {tensors[entry.name].shard} holds it too")
            tensors[entry.name] = entry
    for name, shard in (weight_map or {}).items():
        if name not in tensors and shard in opened:
            problems.append(f"{folder / shard} lacks {name}, which {INDEX} places there")
    return Checkpoint(folder, config, tuple(opened), tensors), problems


def shards_of(folder: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    """The names of a folder's files of weights, which may be missing: those of its index, if it has one; else the
    single file, or all that there are, and those that the names of these count (`model-00001-of-00004.safetensors`)."""
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    found = {path.name for path in folder.glob("*.safetensors")}
    for name in list(found):
        if counted := _COUNTED.fullmatch(name):
            stem, number, last = counted.groups()
            found |= {f"{stem}{one:0{len(number)}}-of-{last}.safetensors" for one in range(1, int(last) + 1)}
    return sorted(found)


def read_index(folder: Path) -> dict[str, str] | None:
    """File by tensor name, from the folder's index; None where it has none."""
    path = folder / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path} has no weight_map from tensor names to files.", "Download it again.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.", "Give the folder of a checkpoint.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).", "Give a file that can be.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).", "Download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.", "Download it again.")
    return value


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file in the order of their bytes; `UserError` if it is cut or malformed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > size:
            raise UserError(f"{path} is not a safetensors file, or is cut in its header.", "Download it again.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a malformed safetensors header ({error!r}).", "Download it again.") from None
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise UserError(f"{path} leaves a gap or overlap before {entry.name}.", "Download it again.")
        end += entry.num_bytes
    if end != size:
        raise UserError(f"{path} is {size} bytes long, and its header describes {end}.", "Download it again.")
    return entries


def _entry(path: Path, name: str, fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = (_whole(value) for value in fields["data_offsets"])
    shape = tuple(_whole(size) for size in fields["shape"])
    entry = TensorEntry(name, str(fields["dtype"]), shape, path.name, data_start + begin)
    if entry.dtype not in DTYPES or entry.num_bytes != end - begin:
        raise ValueError(f"{name}: {entry.dtype} {list(shape)} does not fill bytes {begin} to {end}")
    return entry


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def header_bytes(tensors: Sequence[NewTensor]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file of `tensors` and each tensor's absolute offset. Tensors lie by dtype in the order
    of `DTYPES` and then by name, as the library writes them: each is then aligned to its items."""
    rank = {dtype: place for place, dtype in enumerate(DTYPES)}
    ordered = sorted(tensors, key=lambda tensor: (rank[tensor.dtype], tensor.name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {tensor.name: start + table[tensor.name]["data_offsets"][0] for tensor in ordered}
    return struct.pack("<Q", len(text)) + text, offsets


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order and in pieces. One thread writes and
    one hashes while the caller computes. A file of the final name is a whole one, since only `close` renames it."""

    def __init__(self, path: Path, tensors: Sequence[NewTensor]) -> None:
        head, self._offsets = header_bytes(tensors)
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._left = {tensor.name: tensor.num_bytes for tensor in tensors}
        self._sizes = dict(self._left)
        self._hashes = {tensor.name: blake3() for tensor in tensors}
        self._head_hash = blake3(head).hexdigest()
        self._file = self._partial.open("wb")
        total = len(head) + sum(self._sizes.values())
        # One each: the pieces of a tensor are hashed in their order.
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="shard-hasher")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        # Claims the space first, so that a full disk is found at the beginning of the work and not at its end.
        claim = self._writer.submit(os.posix_fallocate, self._file.fileno(), 0, total)
        self._pending: deque[Future[Any]] = deque([claim, self._writer.submit(write_at, self._file.fileno(), head, 0)])

    def write(self, name: str, data: Tensor | bytearray) -> None:
        """Appends the next piece of tensor `name`: its elements in order, of its dtype."""
        from torch import Tensor

        view = bytes_of(data) if isinstance(data, Tensor) else data
        size = len(view)
        if size > self._left[name]:
            raise ValueError(f"{name}: {size} bytes to write, {self._left[name]} left")
        offset = self._offsets[name] + self._sizes[name] - self._left[name]
        self._left[name] -= size
        while len(self._pending) >= 2 * _MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._hasher.submit(self._hashes[name].update, view))
        self._pending.append(self._writer.submit(write_at, self._file.fileno(), view, offset))

    def close(self) -> dict[str, str]:
        """Finishes the file; returns the BLAKE3 digest of the head (under the empty name) and of every tensor."""
        for future in self._pending:
            future.result()
        for pool in (self._hasher, self._writer):
            pool.shutdown()
        if any(self._left.values()):
            raise ValueError(f"unfinished tensors: {[name for name, left in self._left.items() if left][:3]}")
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        return {"": self._head_hash} | {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def discard(self) -> None:
        """Removes a file that was not finished by `close`."""
        if not self._file.closed:
            for pool in (self._hasher, self._writer):
                pool.shutdown(wait=True, cancel_futures=True)
            self._file.close()
            self._partial.unlink(missing_ok=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in order: its own memory, where that is contiguous and the CPU's."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


@contextmanager
def new_shard(path: Path, tensors: Sequence[NewTensor]) -> Iterator[ShardWriter]:
    """A `ShardWriter`, whose failures to write are the user's errors. Left by an exception, or without `close`, it
    leaves no file."""
    with writing(path):
        writer = ShardWriter(path, tensors)
        try:
            yield writer
        finally:
            writer.discard()


def free_disk(folder: Path) -> tuple[Path, int]:
    """The first folder on the way up from `folder` that exists, and the bytes that are free there."""
    folder = folder.absolute()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    return existing, shutil.disk_usage(existing).free


def check_disk(out: Path, size: int) -> None:
    """`UserError` if the disk of the future folder `out` has not `size` bytes free."""
    existing, free = free_disk(out.absolute().parent)
    if free < size:
        raise UserError(
            f"{out} needs {size / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free.",
            "Make room, or give a folder on another disk.",
        )


def index_json(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The bytes of `model.safetensors.index.json`."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all: to a temporary name, flushed to disk, renamed."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
