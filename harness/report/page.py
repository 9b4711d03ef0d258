"""The page: a card as one HTML file, for people who would rather look than read.

It is made from the card's Markdown and nothing else, so that the two cannot say different things. Figures are inlined,
tables sort, and the file asks for nothing: its content security policy (https://www.w3.org/TR/CSP3/) forbids every
request, and every script but its own. Of HTML in the Markdown, `<details>` and `<summary>` without attributes are
markup, comments are left out, and all else is literal text.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from harness.report import figure_data

_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_MARKUP = re.compile(r"&lt;(/?(?:details|summary))&gt;")
_REFERENCE = re.compile(r"url\(([\"']?)#")  # in an SVG's attribute or style
_DRAWING = re.compile(
    rb'(<figure data-figure="[^"]*" data-sha256="[0-9a-f]{64}">)<svg .*?</svg>(?=<figcaption)', re.DOTALL
)


@dataclass(frozen=True)
class _Heading:
    level: int
    id: str
    words: str


def page(title: str, markdown: str, images: Mapping[str, bytes]) -> bytes:
    """The page of a card: one HTML file in UTF-8, the same bytes for the same card.

    `markdown` is the card without its front matter, in CommonMark with tables. `images` are its figures, by name: where
    the Markdown shows `NAME.png` or `NAME.svg`, of whatever folder, alone in a paragraph, and `NAME.svg` is among them,
    the page shows that; any other picture becomes a link to it. Links stay as they are, so the page belongs beside the
    card. An image that is only the mark of a figure (see `card.generated_files`) gives the page without that drawing.
    """
    tokens = _MARKDOWN.parse(markdown)
    headings = _numbered(tokens)
    _lay_out(tokens, images)
    style, script, template = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(template).render(
        title=title,
        contents=[heading for heading in headings if heading.level in (2, 3)],
        content=Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})),
        style=Markup(style),
        script=Markup(script),
        script_digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return made.encode()


def comparable(data: bytes) -> bytes:
    """A page without the drawings inside its figures, whose bytes differ between builds of the drawing library: two
    pages say the same if this is equal. Every figure keeps its caption and the digest of its data (`figure_data`)."""
    return _DRAWING.sub(rb"\1", data)


# -- Headings ----------------------------------------------------------------------------------------------------


def _numbered(tokens: Sequence[Token]) -> list[_Heading]:
    """Every heading. They get the ids that GitHub gives them: a link inside a card leads to the same place on both."""
    headings: list[_Heading] = []
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            words = _words(tokens[place + 1])
            slug = re.sub(r"[^\w -]", "", words.lower()).strip().replace(" ", "-") or "section"
            taken = {heading.id for heading in headings}
            candidates = (slug, *(f"{slug}-{count}" for count in range(1, len(taken) + 1)))
            token.attrSet("id", next(one for one in candidates if one not in taken))
            headings.append(_Heading(int(token.tag[1:]), str(token.attrGet("id")), words))
    return headings


def _words(token: Token) -> str:
    """A token's text without markup, a picture by its alternative text."""
    if token.children is not None:
        return "".join(_words(child) for child in token.children)
    return " " if token.type in ("softbreak", "hardbreak") else token.content


# -- Figures -----------------------------------------------------------------------------------------------------


def _pictured(paragraph: Token) -> str | None:
    """The name of the picture, without folder and ending, that is all of a paragraph, linked or not; None for other
    text, and for pictures from elsewhere."""
    content = [child for child in paragraph.children or () if child.type not in ("link_open", "link_close")]
    if [child.type for child in content] != ["image"]:
        return None
    place = urlsplit(str(content[0].attrs["src"]))
    return None if place.netloc else PurePosixPath(unquote(place.path)).stem


def _figure(name: str, words: str, svg: bytes, number: int) -> str:
    digest = figure_data.embedded_digest(svg) or hashlib.sha256(svg).hexdigest()
    drawing = _inlined(svg, words, number) if b"<svg" in svg else ""
    return (
        f'<figure data-figure="{escape(name)}" data-sha256="{digest}">{drawing}'
        f'<figcaption aria-hidden="true">{escape(words)}</figcaption></figure>\n'
    )


def _inlined(svg: bytes, words: str, number: int) -> str:
    """An SVG file as an element of HTML: no namespaces and no metadata, its ids and its style for itself alone."""
    drawing = f"figure-{number}"
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{drawing}.{value}"
            elif key == "href" and value.startswith("#"):
                element.attrib[key] = f"#{drawing}.{value[1:]}"
            else:
                element.attrib[key] = _REFERENCE.sub(rf"url(\1#{drawing}.", value)
        if element.tag == "style":
            element.text = f".{drawing} {{ {element.text} }}"
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    size = {key: value for key, value in root.attrib.items() if key in ("width", "viewBox")}
    root.attrib = {"class": drawing, "role": "img", "aria-label": words, **size}
    return ElementTree.tostring(root, "unicode")


# -- Text and tables ---------------------------------------------------------------------------------------------


def _lay_out(tokens: Sequence[Token], images: Mapping[str, bytes]) -> None:
    """Pictures become figures, tables get boxes to scroll in and classes for their cells, and HTML becomes literal."""
    num_figures = 0
    for place, token in enumerate(tokens):
        if token.type == "html_block":
            token.content = _literal(token.content)
        elif token.type == "inline":
            opening, closing, below = tokens[place - 1], tokens[place + 1], tokens[place + 2 : place + 3]
            name = _pictured(token) if opening.type == "paragraph_open" else None
            if name and f"{name}.svg" in images:
                num_figures += 1
                figure = _figure(name, _words(token), images[f"{name}.svg"], num_figures)
                token.type, token.content = "html_block", figure
                opening.hidden = closing.hidden = True  # a paragraph holds no figure
                continue
            if opening.type == "paragraph_open" and below and below[0].type == "table_open" and _is_caption(token):
                opening.attrSet("class", "caption")
            token.children = list(_text(token.children or ()))
        elif token.type in ("th_open", "td_open"):
            # The card aligns columns of numbers to the right.
            token.attrs = {"class": "number"} if token.attrGet("style") == "text-align:right" else {}
            if token.type == "th_open":
                token.attrSet("scope", "col")
        elif token.type == "table_open":
            token.type, token.content = "html_block", '<div class="table"><table>\n'
        elif token.type == "table_close":
            token.type, token.content = "html_block", "</table></div>\n"


def _is_caption(line: Token) -> bool:
    """Whether a line above a table says what its rows have in common: plain words that are no sentence."""
    kinds = {child.type for child in line.children or ()}
    return kinds <= {"text", "link_open", "link_close"} and not line.content.endswith((".", ":"))


def _text(children: Sequence[Token]) -> Iterator[Token]:
    """Inline tokens as the page has them: pictures as links, HTML as literal text."""
    is_linked = False
    for child in children:
        is_linked = (is_linked or child.type == "link_open") and child.type != "link_close"
        if child.type == "html_inline":
            yield _html(_literal(child.content))
        elif child.type == "image":
            words = escape(_words(child))
            yield _html(words if is_linked else f'<a href="{escape(str(child.attrs["src"]))}">{words}</a>')
        else:
            yield child


def _literal(html: str) -> str:
    return _MARKUP.sub(r"<\1>", escape(_COMMENT.sub("", html)))


def _html(content: str) -> Token:
    return Token("html_inline", "", 0, content=content)
