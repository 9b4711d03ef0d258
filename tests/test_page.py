"""The page of a card, byte by byte: the same everywhere, and compared without its drawings.

`tests/browser/test_page.py` looks at the page in a browser.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from harness.report import figure_data
from harness.report.page import comparable, page

ROOT = Path(__file__).parent.parent
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="100" viewBox="0 0 9 9">'
TABLE = "| name | size |\n| :-- | --: |\n| a | 1 |"


def test_another_process_makes_the_same_bytes() -> None:
    markdown, images = f"## a\n\n![b](one.png)\n\n{TABLE}", drawn("a", "M 0 0")
    program = (
        "import hashlib; from harness.report.page import page\n"
        f"print(hashlib.sha256(page('x', {markdown!r}, {images!r})).hexdigest())"
    )
    environment = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert said.stdout.decode().strip() == hashlib.sha256(page("x", markdown, images)).hexdigest()


def drawn(digest: str, path: str) -> dict[str, bytes]:
    metadata = f"<metadata>harness-figure-sha256:{digest * 64}</metadata>"
    return {"one.svg": f'{SVG}{metadata}<path d="{path}"/></svg>'.encode()}


def test_pages_are_compared_by_the_data_of_their_figures_and_not_by_their_drawings() -> None:
    def made(text: str = "before\n\n![alt](one.png)\n\nafter", digest: str = "a", path: str = "M 0 0") -> bytes:
        return page("x", text, drawn(digest, path))

    assert made() != made(path="M 1 1")
    assert comparable(made()) == comparable(made(path="M 1 1"))
    assert b"<path" in made() and b"<path" not in comparable(made())
    others = [
        made(digest="b"),
        made("before\n\n![other](one.png)\n\nafter"),
        made("before\n\n![alt](one.png)\n\nlater"),
    ]
    assert len({comparable(one) for one in (made(), *others)}) == 4


def test_a_page_does_not_pass_for_a_figure() -> None:
    folder = ROOT / "reports/demo"
    text = (folder / "README.md").read_text("utf-8").split("---\n", 2)[2]
    made = page("The demo", text, {path.name: path.read_bytes() for path in folder.glob("*.svg")})
    assert figure_data.embedded_digest(made) is None
    assert b"<svg" in made and b"<svg" not in comparable(made)
