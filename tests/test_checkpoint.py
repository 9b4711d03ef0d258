"""The stream of shards against the safetensors library: what one writes, the other reads."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from harness.errors import UserError
from harness.formats.format import DTYPES
from harness.model import checkpoint as checkpoint_module
from harness.model.checkpoint import (
    INDEX,
    SINGLE,
    NewTensor,
    inspect_checkpoint,
    new_shard,
    open_checkpoint,
    read_header,
    torch_dtype,
    write_file,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPE_NAME = {torch_dtype(name): name for name in DTYPES}


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any names, dtypes, shapes and bytes."""
    tensors = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPE_NAME))), draw(SHAPES)
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        data = bytearray(draw(st.binary(min_size=size, max_size=size)))
        if dtype is torch.bool:
            data = bytearray(byte & 1 for byte in data)
        tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return tensors


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (DTYPE_NAME[t.dtype], tuple(t.shape), raw(t)) for name, t in tensors.items()}


def read_all(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    opened = open_checkpoint(folder)
    return contents({name: opened.tensor(name) for name in opened.tensors})


@contextmanager
def folder_with(data: bytes) -> Iterator[Path]:
    """A checkpoint folder whose one shard holds `data`; made by hand, since hypothesis runs many in one test."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / SINGLE).write_bytes(data)
        yield folder


def new_tensors(tensors: dict[str, Tensor]) -> list[NewTensor]:
    return [NewTensor(name, DTYPE_NAME[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


@given(tensor_dicts(), st.data())
def test_the_writer_gives_the_librarys_bytes_whatever_the_order_and_the_pieces(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    pieces = {}
    for name, tensor in tensors.items():
        size = tensor.nbytes
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=3))), size]
        pieces[name] = [raw(tensor)[a:b] for a, b in pairwise(cuts)]
    order = data.draw(st.permutations([name for name, parts in pieces.items() for _ in parts]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        with new_shard(path, new_tensors(tensors)) as writer:
            for name in order:
                writer.write(name, pieces[name].pop(0))
            digests = writer.close()
        assert sorted(entry.name for entry in Path(folder).iterdir()) == ["x.safetensors"]
        written = path.read_bytes()
        assert contents(load_file(path)) == contents(tensors)
    assert written == save(tensors, metadata={"format": "pt"})
    assert digests.pop("") == blake3(written[: 8 + struct.unpack("<Q", written[:8])[0]]).hexdigest()
    assert digests == {name: blake3(raw(tensor)).hexdigest() for name, tensor in tensors.items()}


@given(tensor_dicts())
def test_the_writer_takes_tensors_as_it_takes_their_bytes(tensors: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        with new_shard(path, new_tensors(tensors)) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
        assert path.read_bytes() == save(tensors, metadata={"format": "pt"})


@given(tensor_dicts(), st.data())
def test_what_the_library_writes_is_read_identically_in_any_split_of_rows(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    with folder_with(save(tensors)) as folder:
        opened = open_checkpoint(folder)
        assert contents({name: opened.tensor(name) for name in opened.tensors}) == contents(tensors)
        assert opened.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            width = tensor.shape[-1] if tensor.shape else 1
            total = tensor.numel() // width if width else 0
            cuts = [0, *sorted(data.draw(st.lists(st.integers(0, total), max_size=3))), total]
            rows = [opened.rows(name, a, b - a) for a, b in pairwise(cuts)]
            assert [part.shape for part in rows] == [(b - a, width) for a, b in pairwise(cuts)]
            assert b"".join(map(raw, rows)) == raw(tensor)
            assert raw(opened.rows(name, cuts[1])) == raw(tensor)[cuts[1] * width * tensor.itemsize :]
            assert b"".join(opened.pieces(name)) == raw(tensor)


def test_pieces_are_no_longer_than_their_limit_and_join_to_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "PIECE_BYTES", 100)
    with folder_with(save({"w": torch.arange(90, dtype=torch.float32)})) as folder:
        pieces = list(open_checkpoint(folder).pieces("w"))
    assert [len(piece) for piece in pieces] == [100, 100, 100, 60]
    assert b"".join(pieces) == raw(torch.arange(90, dtype=torch.float32))


@given(tensor_dicts(), st.data())
def test_a_file_cut_anywhere_is_a_user_error_that_names_it(tensors: dict[str, Tensor], data: st.DataObject) -> None:
    whole = save(tensors)
    with (
        folder_with(whole[: data.draw(st.integers(0, len(whole) - 1))]) as folder,
        pytest.raises(UserError, match=SINGLE),
    ):
        open_checkpoint(folder)


@given(tensor_dicts(), st.data())
def test_a_damaged_header_is_a_user_error_or_reads_as_the_library_reads_it(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    damaged = bytearray(save(tensors, metadata={"format": "pt"}))
    (length,) = struct.unpack("<Q", damaged[:8])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, 7 + length))
        damaged[place] ^= data.draw(st.integers(1, 255))
    with folder_with(bytes(damaged)) as folder:
        try:
            ours = read_all(folder)
        except UserError as error:
            assert str(folder) in str(error)
            return
    assert ours == contents(load(bytes(damaged)))


def header(fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
BAD_FILES = {
    "empty": b"",
    "a list": header([]),
    "no offsets": header({"w": {"dtype": "U8", "shape": [4]}}) + bytes(4),
    "three offsets": header({"w": ONE | {"data_offsets": [0, 2, 4]}}) + bytes(4),
    "fractional offsets": header({"w": ONE | {"data_offsets": [0, 4.0]}}) + bytes(4),
    "negative shape": header({"w": ONE | {"shape": [-2, -2]}}) + bytes(4),
    "true for one": header({"w": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}) + bytes(1),
    "unknown dtype": header({"w": ONE | {"dtype": "F4"}}) + bytes(4),
    "shape and offsets disagree": header({"w": ONE | {"shape": [5]}}) + bytes(4),
    "backward offsets": header({"w": ONE | {"data_offsets": [4, 0]}}) + bytes(4),
    "gap": header({"w": ONE | {"data_offsets": [1, 5]}}) + bytes(5),
    "overlap": header({"v": ONE, "w": ONE | {"data_offsets": [2, 6]}}) + bytes(6),
    "bytes after the tensors": header({"w": ONE}) + bytes(5),
    "fields are no table": header({"w": 3}),
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff}',
    "nested too deep": struct.pack("<Q", 300_000) + b"[" * 300_000,
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header longer than any": struct.pack("<Q", (1 << 64) - 1) + b"{}",
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=list(BAD_FILES))
def test_a_malformed_file_is_a_user_error_that_names_it_and_the_library_refuses_it_too(data: bytes) -> None:
    with folder_with(data) as folder, pytest.raises(UserError, match=SINGLE):
        open_checkpoint(folder)
    with pytest.raises(SafetensorError):
        load(data)


def test_a_shard_that_shrinks_after_it_was_opened_is_a_user_error() -> None:
    with folder_with(save({"w": torch.ones(100)})) as folder:
        opened = open_checkpoint(folder)
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 4)
        with pytest.raises(UserError, match="before its tensor does"):
            opened.tensor("w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, `a.safetensors` with v and w, `b.safetensors` with x, and their index."""
    save_file({"v": torch.zeros(2), "w": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    set_index(tmp_path, {"v": "a.safetensors", "w": "a.safetensors", "x": "b.safetensors"})
    return tmp_path


def set_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sound_folder_opens_with_every_tensor_its_configuration_and_no_problem(folder: Path) -> None:
    opened, problems = inspect_checkpoint(folder)
    assert problems == []
    assert opened.config == {"architectures": ["X"]}
    assert opened.shards == ("a.safetensors", "b.safetensors")
    assert {name: entry.shard for name, entry in opened.tensors.items()} == {
        "v": "a.safetensors",
        "w": "a.safetensors",
        "x": "b.safetensors",
    }


def test_shards_without_an_index_are_read_by_their_headers(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert list(open_checkpoint(folder).tensors) == ["v", "w", "x"]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def index(**weight_map: Any) -> Callable[[Path], None]:
    sound = {"v": "a.safetensors", "w": "a.safetensors", "x": "b.safetensors"}
    return lambda folder: set_index(folder, sound | weight_map)


def pickled(folder: Path) -> None:
    (folder / INDEX).unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"is not a folder"),
    "no configuration": (remove("config.json"), r"config\.json does not exist"),
    "configuration is not JSON": (write("config.json", "{"), r"config\.json is not JSON"),
    "configuration is a list": (write("config.json", "[]"), r"config\.json is not a JSON object"),
    "nothing but a configuration": (lambda f: [remove(p.name)(f) for p in f.glob("*safe*")], r"holds no model\.safe"),
    "pickled weights": (pickled, r"pickled weights \(pytorch_model\.bin\), which can run code"),
    "index is not JSON": (write(INDEX, "{"), r"index\.json is not JSON"),
    "index without a map": (write(INDEX, "{}"), r"has no weight_map"),
    "index maps to numbers": (index(v=3), r"has no weight_map from tensor names to files"),
    "shard above the folder": (index(v="../a.safetensors"), r"names a file outside its folder: '\.\./a"),
    "absolute shard": (index(v="/etc/passwd"), r"names a file outside its folder: '/etc/passwd'"),
    "shard in a subfolder": (index(y="sub/a.safetensors"), r"names a file outside its folder"),
    "shard is the folder above": (index(v=".."), r"names a file outside its folder"),
    "shard without a name": (index(v=""), r"names a file outside its folder"),
    "missing shard that the others count": (
        lambda f: ((f / INDEX).unlink(), (f / "a.safetensors").rename(f / "model-00001-of-00003.safetensors")),
        r"model-00002-of-00003\.safetensors is missing, though the others count it \(and 1 more\)",
    ),
    "tensor twice": (
        lambda f: ((f / INDEX).unlink(), shutil.copy(f / "b.safetensors", f / "c.safetensors")),
        r"c\.safetensors holds x, and b\.safetensors holds it too",
    ),
    "missing shard": (remove("b.safetensors"), r"b\.safetensors is missing, though"),
    "cut shard": (
        lambda f: os.truncate(f / "b.safetensors", 20),
        r"b\.safetensors is not a safetensors file, or is cut",
    ),
    "missing tensor": (index(y="a.safetensors"), r"a\.safetensors lacks y, which"),
    "tensor in another shard": (index(w="b.safetensors"), r"a\.safetensors holds w, which .* does not place there"),
    "tensor not in the index": (
        lambda f: set_index(f, {"v": "a.safetensors", "x": "b.safetensors"}),
        r"a\.safetensors holds w, which",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=list(BAD_FOLDERS))
def test_a_damaged_folder_is_a_user_error_that_says_what_is_wrong_and_where(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.remedy
    assert str(folder) in caught.value.problem


def test_every_problem_of_a_folder_is_listed_and_the_rest_can_be_read(folder: Path) -> None:
    set_index(folder, {"v": "a.safetensors", "x": "b.safetensors", "y": "c.safetensors"})
    (folder / "b.safetensors").write_bytes(b"short")
    opened, problems = inspect_checkpoint(folder)
    assert len([p for p in problems if "c.safetensors is missing" in p]) == 1
    assert len([p for p in problems if "b.safetensors is not a safetensors file" in p]) == 1
    assert len([p for p in problems if "holds w" in p]) == 1
    assert torch.equal(opened.tensor("w"), torch.ones(3))


def test_a_shard_that_is_a_link_to_a_file_elsewhere_opens_as_the_hubs_cache_does(folder: Path) -> None:
    blob = folder.parent / f"{folder.name}-blob"
    (folder / "b.safetensors").rename(blob)
    (folder / "b.safetensors").symlink_to(blob)
    assert torch.equal(open_checkpoint(folder).tensor("x"), torch.ones(1))


def test_an_unfinished_tensor_fails_the_writer_and_leaves_no_file(tmp_path: Path) -> None:
    new = [NewTensor("w", "F32", (4,)), NewTensor("v", "F32", (1,))]
    with pytest.raises(ValueError, match="unfinished"), new_shard(tmp_path / "x.safetensors", new) as writer:
        writer.write("w", torch.ones(4))
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_too_many_bytes_fail_the_writer_and_leave_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="16 bytes to write, 12 left"),
        new_shard(tmp_path / "x.safetensors", [NewTensor("w", "F32", (4,))]) as writer,
    ):
        writer.write("w", torch.ones(1))
        writer.write("w", torch.ones(4))
    assert list(tmp_path.iterdir()) == []


def test_no_file_of_the_final_name_exists_before_the_writer_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with new_shard(path, [NewTensor("w", "F32", (1,))]) as writer:
        writer.write("w", torch.ones(1))
        assert not path.exists()
        writer.close()
    assert [entry.name for entry in read_header(path)] == ["w"]


def test_write_file_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        write_file(tmp_path / "f", data)
        assert (tmp_path / "f").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_fingerprint_follows_the_weights_and_the_configuration_and_not_the_place(folder: Path) -> None:
    def fingerprint(place: Path) -> str:
        return open_checkpoint(place).fingerprint()

    original = fingerprint(folder)
    copy = Path(shutil.copytree(folder, folder.parent / f"{folder.name}-copy"))
    assert fingerprint(copy) == original
    save_file({"x": torch.zeros(1)}, copy / "b.safetensors")
    assert (changed := fingerprint(copy)) != original
    (copy / "config.json").write_text('{"architectures": ["Y"]}')
    assert fingerprint(copy) not in (original, changed)
