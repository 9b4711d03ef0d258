"""The page of a card, in the browser that Debian ships: what it shows, how it sorts, and that it asks for nothing.

`nox -s browser` runs these tests; `tests/test_page.py` has those that need no browser.
"""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from harness.report import figure_data
from harness.report.page import page

ROOT = Path(__file__).parents[2]
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="100" viewBox="0 0 9 9">'
)
WIDER = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"


@dataclass(frozen=True)
class Card:
    """A card without its front matter, its figures by file name, and its page."""

    text: str
    images: dict[str, bytes]
    page: bytes


def programs() -> list[str]:
    """Chromium and its driver."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.fail("The page is tested in Debian's Chromium: apt-get install chromium chromium-driver", pytrace=False)
    return [path for path in found if path]


class Browser:
    """One window of headless Chromium."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location, driver = programs()
        for argument in ("--headless=new", "--no-sandbox"):  # the sandbox does not start for root, as in a container
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.folder = folder

    def open(self, text: str | bytes, *, width: int = 1400, **images: str) -> None:
        """Opens a page, given as its own bytes or as the card's Markdown and its figures."""
        path = self.folder / "index.html"
        drawn = {f"{name}.svg": svg.encode() for name, svg in images.items()}
        path.write_bytes(text if isinstance(text, bytes) else page("A card", text, drawn))
        self.visit(path.as_uri(), width)

    def visit(self, url: str, width: int = 1400) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.driver.get("about:blank")  # or an address that differs by its #part alone would not be loaded
        self.driver.get(url)
        # On a busy machine `get` may come back while the page is still read.
        loaded = "return location.href === arguments[0] && document.readyState === 'complete'"
        WebDriverWait(self.driver, 60, ignored_exceptions=[WebDriverException]).until(lambda _: self.run(loaded, url))

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of https://chromedevtools.github.io/devtools-protocol/."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def prefer(self, scheme: str, media: str = "") -> None:
        reduced = {"name": "prefers-reduced-motion", "value": "reduce"}
        features = [{"name": "prefers-color-scheme", "value": scheme}, reduced]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def column(self, number: int = 0) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[arguments[0]].textContent)", number
        )

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since this was last asked."""
        return self.driver.get_log(kind)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("pages"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(shared: Browser) -> Browser:
    """The shared window, light, with scripts, and with an empty log."""
    shared.prefer("light")
    shared.command("Emulation.setScriptExecutionDisabled", value=False)
    shared.driver.get("about:blank")
    for kind in ("browser", "performance"):
        shared.log(kind)
    return shared


@pytest.fixture(scope="module")
def demo() -> Card:
    """The card of the demo suite: what `card.render` made of the committed records, and `harness report --check` holds
    against them."""
    folder = ROOT / "reports/demo"
    text = (folder / "README.md").read_text("utf-8").split("---\n", 2)[2]
    images = {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    return Card(text, images, page("The demo", text, images))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a web server on this machine that serves `tmp_path`, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def table(*rows: str, heading: str = "name | size", aligned: str = ":-- | --:") -> str:
    return "\n".join(f"| {row} |" for row in (heading, aligned, *rows))


def literal(text: str) -> str:
    """Any text as Markdown that means just that: every ASCII punctuation mark may follow a backslash
    (https://spec.commonmark.org/0.31.2/#backslash-escapes)."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


# -- It asks for nothing -----------------------------------------------------------------------------------------


def test_a_page_opens_from_a_file_without_a_request_or_a_complaint(browser: Browser, demo: Card) -> None:
    browser.open(demo.page)
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.log("browser") == []
    sent = [entry["message"] for entry in browser.log("performance") if "Network.requestWillBeSent" in entry["message"]]
    addresses = {url for message in sent for url in re.findall(r'"url":"([^"]*)"', message)}
    assert [url for url in addresses if not url.startswith("data:")] == [(browser.folder / "index.html").as_uri()]


def test_a_page_on_a_server_asks_for_itself_alone(
    browser: Browser, demo: Card, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = server
    (tmp_path / "index.html").write_bytes(demo.page)
    browser.visit(f"{address}/index.html")
    assert len(browser.all("th button")) > 50
    assert asked == ["/index.html"]
    assert browser.one("link[rel=icon]").get_attribute("href") == "data:,", "or a browser with tabs asks for one"


@pytest.mark.parametrize(
    "script",
    [
        "fetch(arguments[0])",
        "new Image().src = arguments[0]",
        "navigator.sendBeacon(arguments[0])",
        "document.head.append(Object.assign(document.createElement('link'), {rel: 'stylesheet', href: arguments[0]}))",
        "document.head.append(Object.assign(document.createElement('script'), {src: arguments[0]}))",
        "document.body.style.background = `url(${arguments[0]})`",
        "document.body.append(Object.assign(document.createElement('iframe'), {src: arguments[0]}))",
    ],
)
def test_the_policy_of_a_page_forbids_every_request(
    browser: Browser, server: tuple[str, list[str]], script: str
) -> None:
    address, asked = server
    browser.open("# A card")
    browser.run(f"try {{ {script} }} catch (refused) {{}}", f"{address}/outside")
    browser.run("return new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert asked == []
    assert any("Content Security Policy" in entry["message"] for entry in browser.log("browser"))


def test_the_policy_of_a_page_forbids_every_script_but_its_own(browser: Browser) -> None:
    browser.open("# A card")
    browser.run("document.body.insertAdjacentHTML('beforeend', '<a id=\"new\" onclick=\"window.ran = 1\">x</a>')")
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 2'}));"
        "document.getElementById('new').click()"
    )
    assert browser.run("return window.ran") is None


# -- Sorting -----------------------------------------------------------------------------------------------------


def sorts(browser: Browser, *cells: str, aligned: str = "--:") -> tuple[list[str], list[str]]:
    """The cells of a column after one click on its heading and after two."""
    browser.open(table(*cells, heading="value", aligned=aligned))
    button = browser.one("th button")
    button.click()
    up = browser.column()
    button.click()
    return up, browser.column()


def test_a_click_on_a_heading_sorts_by_number_and_the_next_reverses_and_the_third_restores(browser: Browser) -> None:
    given_order = ["10", "9", "-2.5", "1,200", "+0.5"]
    browser.open(table(*(f"{number} | {value}" for number, value in enumerate(given_order))))
    heading = browser.all("th")[1]
    for said, expected in (
        ("ascending", ["-2.5", "+0.5", "9", "10", "1,200"]),
        ("descending", ["1,200", "10", "9", "+0.5", "-2.5"]),
        (None, given_order),
    ):
        heading.find_element(By.TAG_NAME, "button").click()
        assert browser.column(1) == expected
        assert heading.get_attribute("aria-sort") == said
        assert [given_order[int(row)] for row in browser.column(0)] == expected, "rows move as a whole"


def test_only_one_heading_says_that_it_sorts(browser: Browser) -> None:
    browser.open(table("b | 1", "a | 2"))
    for button in browser.all("th button"):
        button.click()
    assert [heading.get_attribute("aria-sort") for heading in browser.all("th")] == [None, "ascending"]
    assert browser.column() == ["b", "a"]


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_a_table_is_sorted_by_keyboard(browser: Browser, key: str) -> None:
    browser.open(table("b | 2", "a | 1"))
    focused = browser.driver.switch_to.active_element
    for _ in range(9):
        focused.send_keys(Keys.TAB)
        focused = browser.driver.switch_to.active_element
        if focused.tag_name == "button" and focused.text == "size":
            break
    assert focused.value_of_css_property("outline-style") == "solid", "where the focus is can be seen"
    focused.send_keys(key)
    assert browser.column() == ["a", "b"]
    assert browser.driver.switch_to.active_element == focused


def test_dashes_and_words_are_last_in_both_directions_and_keep_their_order(browser: Browser) -> None:
    last = ["—", "≤ noise", "incomparable: windows", "—"]
    up, down = sorts(browser, "—", "3", "≤ noise", "-1", "incomparable: windows", "2", "—")
    assert (up, down) == (["-1", "2", "3", *last], ["3", "2", "-1", *last])


def test_bytes_sort_by_size(browser: Browser) -> None:
    expected = ["48.00 B", "9.98 kB", "524.29 kB", "1.57 MB", "1.49 GiB", "18.82 GB", "17.53 GiB"]
    up, down = sorts(browser, *sorted(expected))
    assert (up, down) == (expected, expected[::-1])


def test_percentages_signs_exponents_and_intervals_sort_by_their_leading_number(browser: Browser) -> None:
    expected = ["−3.0 %", "-0.5 [-9.0, 8.0]", "1e-05", "0.001", "≤ 0.002", "+0.19 %", "3 / 9", "64.4 %", "1,000 [2, 3]"]
    up, down = sorts(browser, *sorted(expected))
    assert (up, down) == (expected, expected[::-1])


def test_names_sort_as_text_with_their_numbers_in_order_and_ids_are_no_numbers(browser: Browser) -> None:
    assert sorts(browser, "layer 10", "—", "layer 2", aligned=":--")[0] == ["layer 2", "layer 10", "—"]
    runs = ["9e1a0000", "8c6cdfce", "f402ce99", "158fbf81"]
    assert sorts(browser, *runs, aligned=":--")[0] == ["8c6cdfce", "9e1a0000", "158fbf81", "f402ce99"]


def test_a_column_of_nothing_but_numbers_sorts_by_them_wherever_they_stand(browser: Browser) -> None:
    assert sorts(browser, "1.5", "0.95", "—", "0.8", aligned="---")[0] == ["0.8", "0.95", "1.5", "—"]


def test_rows_that_are_equal_keep_their_order_in_both_directions(browser: Browser) -> None:
    browser.open(table("c | 2", "a | 1", "d | 2", "b | 1"))
    button = browser.all("th button")[1]
    button.click()
    assert browser.column() == ["a", "b", "c", "d"]
    button.click()
    assert browser.column() == ["c", "d", "a", "b"]


def leading(text: str) -> Decimal | None:
    """The number that a cell of the card begins with, in its smallest unit."""
    words = text.replace("\u00a0", " ").split()
    unit = {"kB": 10**3, "MB": 10**6, "GB": 10**9}.get(words[1], 1) if len(words) > 1 else 1
    try:
        return Decimal(words[0].replace(",", "")) * unit
    except ArithmeticError:
        return None


def test_every_column_of_numbers_of_the_demo_card_sorts(browser: Browser, demo: Card) -> None:
    browser.open(demo.page)
    columns = browser.run(
        """return [...document.querySelectorAll('th.number')].filter(th => th.querySelector('button')).map(th => {
            th.querySelector('button').click();
            return [...th.closest('table').querySelectorAll('tbody tr')].map(tr => tr.cells[th.cellIndex].textContent);
        })"""
    )
    assert len(columns) > 50
    for cells in columns:
        numbers = [leading(cell) for cell in cells]
        known = [number for number in numbers if number is not None]
        assert known == sorted(known)
        assert numbers[: len(known)] == known, "words and dashes are last"


# -- What it shows -----------------------------------------------------------------------------------------------


def test_every_figure_is_seen_and_none_needs_an_id_of_another(browser: Browser, demo: Card) -> None:
    alternatives = dict(re.findall(r"!\[([^\]]*)\]\((\w+)\.png\)", demo.text))
    browser.open(demo.page)
    figures = browser.all("figure")
    assert [figure.get_attribute("data-figure") for figure in figures] == list(alternatives.values()) != []
    for figure in figures:
        svg = figure.find_element(By.TAG_NAME, "svg")
        name = figure.get_attribute("data-figure")
        assert svg.is_displayed() and svg.size["width"] > 300 and svg.size["height"] > 100
        assert svg.get_attribute("role") == "img"
        assert alternatives[svg.get_attribute("aria-label")] == name
        assert figure.get_attribute("data-sha256") == figure_data.embedded_digest(demo.images[f"{name}.svg"])
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids)) > 100
    within = browser.run(
        """return [...document.querySelectorAll('figure svg')].map(svg => [...svg.querySelectorAll('*')].flatMap(
            one => [...one.attributes].flatMap(({name, value}) =>
                [...value.matchAll(/url\\("?#([^")]*)"?\\)/g)].map(found => found[1])
                .concat(name === 'href' && value.startsWith('#') ? [value.slice(1)] : [])))
            .map(id => svg.contains(document.getElementById(id))))"""
    )
    assert len(within) == len(figures) and all(found and all(found) for found in within)


def test_ids_and_styles_of_figures_do_not_reach_into_each_other(browser: Browser) -> None:
    def drawing(width: int, style: str) -> str:
        shape = f'<defs><style>{style}</style><rect id="shape" width="{width}" height="1"/></defs>'
        return f'{SVG}{shape}<g clip-path="url(#shape)"><use xlink:href="#shape"/></g></svg>'

    browser.open(
        "![one](one.png)\n\n![two](figures/two.png)\n\n![one](one.svg)",
        one=drawing(3, "rect { fill: #ff0000 }"),
        two=drawing(7, ""),
    )
    found = browser.run(
        "return [...document.querySelectorAll('use')].map(use => [use.getBBox().width,"
        " getComputedStyle(use.ownerSVGElement.querySelector('rect')).fill])"
    )
    red, black = "rgb(255, 0, 0)", "rgb(0, 0, 0)"
    assert found == [[3, red], [7, black], [3, red]]


def test_a_picture_that_is_not_there_or_not_alone_is_a_link(browser: Browser) -> None:
    browser.open(
        "![far](https://example.org/one.png)\n\n[![near](two.png)](two.svg)\n\nText ![small](one.png) text.",
        one=f"{SVG}</svg>",
    )
    links = [(link.text, link.get_dom_attribute("href")) for link in browser.all("main a")]
    assert links == [("far", "https://example.org/one.png"), ("near", "two.svg"), ("small", "one.png")]
    assert browser.all("figure, img") == []


@pytest.mark.parametrize("width", [380, 900, 1400])
def test_nothing_but_boxes_scrolls_sideways(browser: Browser, demo: Card, width: int) -> None:
    browser.open(demo.page, width=width)
    assert browser.run(WIDER) == 0
    long = "x" * 300
    text = f"# {long}\n\n{long} `{long}`\n\n## {long}\n\n```\n{long}\n```\n\n"
    browser.open(text + table(f"{long} | 1", f"1 | {long}"), width=width)
    assert browser.run(WIDER) == 0


def test_a_wide_table_scrolls_in_its_box_under_its_first_column(browser: Browser, demo: Card) -> None:
    browser.open(demo.page, width=380)
    boxes = browser.run(
        """return [...document.querySelectorAll('.table')].map(box => {
            box.scrollLeft = 1e6;
            const [first, last] = [box.querySelector('td'), box.querySelector('tr').lastElementChild];
            const left = (one) => one.getBoundingClientRect().left, right = (one) => one.getBoundingClientRect().right;
            const ends = [box.scrollLeft, left(first) - left(box), right(last) - right(box)];
            box.scrollIntoView({block: 'start'});
            const heading = box.querySelector('th'), place = heading.getBoundingClientRect();
            const isOnTop = Array.from({length: 40}, (_, scrolled) => {
                box.scrollLeft = 5 * scrolled;
                return heading.contains(document.elementFromPoint(place.right - 5, place.bottom - 12));
            });
            return [...ends, isOnTop.every(Boolean)];
        })"""
    )
    assert max(scrolled for scrolled, *_ in boxes) > 300
    for scrolled, first, last, is_on_top in boxes:
        assert abs(first) < 1 and (abs(last) < 1 or scrolled == 0) and is_on_top


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    shares = [int(share) / 255 for share in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_dark_scheme_changes_the_colours_and_all_text_can_be_read_in_both(browser: Browser, demo: Card) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(demo.page)
        ground = browser.one("body").value_of_css_property("background-color")
        grounds.append(luminance(ground))
        for selector in ("h1", "h1 + p", "h2", "main p a", "nav a", ".caption", "th", "td", "figcaption"):
            text = luminance(browser.one(selector).value_of_css_property("color"))
            high, low = max(text, grounds[-1]), min(text, grounds[-1])
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{selector} in the {scheme} scheme"
    assert grounds[0] > 0.9 and grounds[1] < 0.05


@pytest.mark.parametrize("width", [1400, 380])
def test_the_contents_lead_to_their_sections(browser: Browser, demo: Card, width: int) -> None:
    browser.open(demo.page, width=width)
    titles = re.findall(r"^###? (.*)$", demo.text, re.MULTILINE)
    found = browser.run(
        """return [...document.querySelectorAll('nav a')].map(link => {
            link.click();
            const section = document.querySelector(':target'), top = (one) => one.getBoundingClientRect().top;
            const isAtEnd = scrollY + innerHeight >= document.documentElement.scrollHeight - 1;
            return [link.textContent, section.textContent, top(section) / innerHeight, isAtEnd];
        })"""
    )
    assert [link for link, *_ in found] == [section for _, section, *_ in found] == titles != []
    for _, _, top, is_at_end in found:
        assert 0 <= top < 0.2 or (is_at_end and top < 1), "the heading is at the top of the window"
    contents, text = browser.one("nav").rect, browser.one("main").rect
    assert (contents["x"] + contents["width"] <= text["x"]) == (width == 1400), "at the side where there is room"


def test_headings_of_the_same_name_or_none_have_addresses_of_their_own(browser: Browser) -> None:
    browser.open("## A b\n\n## A b\n\n## A b-1\n\n## ⁉\n\n## Größe der Θ\n\n[down](#größe-der-θ)")
    ids = [heading.get_attribute("id") for heading in browser.all("h2")]
    assert ids == ["a-b", "a-b-1", "a-b-1-1", "section", "größe-der-θ"]
    for link in browser.all("a"):
        link.click()
        assert browser.all(":target") != []


def test_without_scripts_everything_is_there_and_nothing_pretends_to_sort(browser: Browser, demo: Card) -> None:
    browser.open(demo.page)
    read = "return document.body.innerText"
    with_scripts = browser.run(read)
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(demo.page)
    assert browser.run(read) == with_scripts != ""
    assert browser.all("button") == []
    assert all(figure.is_displayed() for figure in browser.all("figure svg"))


def test_on_paper_there_are_no_contents_and_no_table_is_cut_off(browser: Browser, demo: Card) -> None:
    browser.prefer("dark", media="print")
    browser.open(demo.page)
    assert not browser.one("nav").is_displayed()
    assert browser.one("body").value_of_css_property("background-color") == "rgba(255, 255, 255, 1)"
    assert {box.value_of_css_property("overflow-x") for box in browser.all(".table, figure, pre")} == {"visible"}


def test_the_page_says_every_cell_of_the_card_and_links_to_the_same_records(browser: Browser, demo: Card) -> None:
    rows = [line for line in demo.text.splitlines() if line.startswith("| ")]
    browser.open(demo.page)
    shown = browser.run(
        "return [...document.querySelectorAll('main tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert len(rows) > 100

    def plain(cell: str) -> str:
        cell = re.sub(r"(?<!\\)\[([^\]]*)\]\([^)]*\)|`", r"\1", cell)
        return re.sub(r"\\(.)", r"\1", cell).strip()

    expected = [[plain(cell) for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert [[cell.replace("\u00a0", " ") for cell in row] for row in shown] == expected
    records = re.findall(r"\((\.\./\.\./results/[^)]*)\)", demo.text)
    linked = "return [...document.querySelectorAll('main a[href$=jsonl]')].map(link => link.getAttribute('href'))"
    assert browser.run(linked) == records != []


# -- Text is text ------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 1</script>",
    '"><img src=x onerror="window.ran = 1">',
    "</title></style><svg onload='window.ran = 1'>",
    "a & b &amp; c",
    "a | b",
    "`code`",
    "**bold** _it_ [x](javascript:window.ran=1)",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "שלום-עולם",
    "\u202edlrow olleh",
    "名前 🦙",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_literal_text_wherever_it_stands_and_runs_nothing(browser: Browser, name: str) -> None:
    text = literal(name)
    code = f"```` {name} ````" if "`" in name else f"``{name}``"
    markdown = f"# {text}\n\n- **{text}** (rtn)\n\n{code}\n\n## {text}\n\n![{text}](one.png)\n\n"
    browser.open(page(name, markdown + table(f"{text} | 1", "b | 2"), {"one.svg": f"{SVG}</svg>".encode()}))
    assert browser.driver.title == name
    for selector in ("h1", "h2", "nav a", "strong", "code", "td", "figcaption"):
        assert browser.one(selector).get_attribute("textContent") == name
    assert browser.one("svg").get_attribute("aria-label") == name
    browser.one("th button").click()
    browser.one("nav a").click()
    assert browser.run("return window.ran") is None
    assert browser.log("browser") == []


@pytest.mark.parametrize("name", ["שלום-עולם", "\u202edlrow olleh"])
def test_a_name_from_right_to_left_does_not_turn_what_stands_beside_it(browser: Browser, name: str) -> None:
    browser.open(f"- **{name}** (1), **b** (2): 3 %")
    left = browser.run(
        """const texts = [...document.querySelector('li').childNodes].map(node => {
            const range = document.createRange(); range.selectNodeContents(node);
            return range.getBoundingClientRect().left;
        }); return texts"""
    )
    assert len(left) == 4 and left == sorted(left)


@settings(max_examples=15)
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30).map(
            lambda text: " ".join(text.split())
        ),
        min_size=1,
        max_size=40,
    )
)
def test_any_name_in_a_table_is_itself(shared: Browser, names: list[str]) -> None:
    shared.open(table(*(f"{literal(name)} | 1" for name in names)))
    assert shared.column() == names


@pytest.mark.parametrize("html", ["<b>x</b>", "<div onclick='x()'>\n<p>\n</div>", "a <script>window.ran=1</script> b"])
def test_html_in_the_markdown_is_literal(browser: Browser, html: str) -> None:
    browser.open(f"before\n\n{html}\n\n- {html}\n\nafter")
    assert html.split("\n")[0] in browser.one("main").text
    assert browser.all("main b, main div, main script") == []
    assert browser.run("return window.ran") is None


def test_details_open_and_comments_are_left_out(browser: Browser) -> None:
    browser.open(
        "<details>\n<summary>Roles & <i>more</i></summary>\n\n"
        f"{table('a | 1', 'b | 2')}\n\n</details>\n\n<!-- harness:begin size -->\n\nafter <!-- no --> all"
    )
    summary, inside = browser.one("summary"), browser.one("table")
    assert summary.text == "Roles & <i>more</i>"
    assert not inside.is_displayed()
    summary.click()
    assert inside.is_displayed()
    text = browser.one("main").text
    assert text.endswith("after all") and "harness:begin" not in text


def test_a_card_without_sections_or_rows_is_a_page(browser: Browser) -> None:
    for markdown in ("", "# A title\n", "| a |\n|---|\n", table("a | 1")):
        browser.open(markdown)
        assert browser.log("browser") == [] and browser.all("nav, button") == []


# -- Where there is no browser -----------------------------------------------------------------------------------


def test_a_machine_without_chromium_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium chromium-driver"):
        programs()
