"""What belongs to this machine and must not be published: its paths, and the values of its secrets."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from harness.serve import CONTAINER_CACHE

_NAMES_A_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY")
_SHORTEST_SECRET = 8


def of_this_machine(
    folder: Path, files: Iterable[str], places: Iterable[Path], environment: Mapping[str, str]
) -> Iterator[str]:
    """Where a file of `folder` holds one of the paths `places`, or the value of a variable whose name is that of a
    secret: a sentence for each, which does not repeat a secret. Weights are not looked at."""
    wanted = [(str(place), str(place), True) for place in places if len(place.parts) > 1]
    for name, value in sorted(environment.items()):
        if _NAMES_A_SECRET.search(name.upper()) and len(value) >= _SHORTEST_SECRET:
            wanted.append((f"the value of the variable {name}", value, False))
    for file in sorted(files):
        if file.endswith(".safetensors"):
            continue
        data = (folder / file).read_bytes()
        for what, text, is_path in wanted:
            if (place := _position(data, text, is_path)) is not None:
                line = data.count(b"\n", 0, place) + 1
                yield f"{file}, line {line} holds {what}: that is of this machine alone"


def _position(data: bytes, text: str, is_path: bool) -> int | None:
    """Where a text first stands, as it is, as JSON has it or as a link has it; None if it does not. A path stands where
    it is not inside another, nor the start of a longer name; one of a single name may be a word, and counts where
    something follows it. The cache of a container, as the commands to serve a variant mount it, is of no machine."""
    ways = (way.encode(errors="surrogateescape") for way in dict.fromkeys((text, json.dumps(text)[1:-1], quote(text))))
    start = rb"(?<![\w.~-])(?!(?<=:)" + re.escape(CONTAINER_CACHE.encode()) + rb"\b)"
    end = rb"/[\w.]" if text.count("/") == 1 else rb"(?![\w-])"
    for way in ways:
        if way in data:  # the expression is slow, and seldom needed
            if not is_path:
                return data.index(way)
            if found := re.search(start + re.escape(way) + end, data):
                return found.start()
    return None
