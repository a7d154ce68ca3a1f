"""Markdown to pages that a model reads one at a time: cut by tokens, links numbered and listed.

    [The trial](https://example.org/t) met ...  ->  The trial [1] met ...

                                                    [1] https://example.org/t

Tools know no tokenizer, so tokens are estimated (`approximate_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urljoin

from tools.pages import canonical_url

MAX_TEXT_CHARS = 2_000_000
"""A longer text is cut here."""
RUN_CHARS = 200
MAX_URL_SHOWN = 300
"""A longer URL is cut in the list of links; its number opens it all the same."""

# Two brackets deep: `[[1]](url)`, `[a [b]](url)`; one parenthesis in a URL. All runs are bounded: time is linear.
_LABEL = r"(?:[^\[\]\n]|\[[^\[\]\n]{0,100}\]){0,300}"
_TARGET = r"<?((?:[^\s()<>]|\([^\s()<>]{0,200}\)){1,2000})>?"
_MARKDOWN_LINK = re.compile(rf"(!?)\[({_LABEL})\]\(\s{{0,3}}{_TARGET}(?:\s{{1,3}}\"[^\"\n]{{0,300}}\")?\s{{0,3}}\)")
_PICTURE = re.compile(r"!\[([^\[\]\n]{0,300})\]\([^()\s]{0,2000}\)")
_MARK = re.compile("\ue000(\\d+)\ue001")
"""A link's number, until the pages are cut; private-use characters that a text is rid of before."""
_PIECE = re.compile("\ue000\\d+\ue001|[^\\s\ue000]+[^\\S\n]*|\\s+")

_TOKEN = re.compile(
    r"(?P<word>[A-Z]?[a-z]+)|(?P<capitals>[A-Z]+)|(?P<one>[0-9]|[ \t]+(?=[0-9])|[ \t]{2,}|[\r\n]+)"
    r"|(?P<marks>[!-/:-@\[-`{-~]+)|(?P<other>[^\x00-\x7f])"
)
_OTHER_SCRIPTS = ((0x250, 75), (0x3A0, 50), (0x400, 70), (0x700, 40), (0x3000, 130), (0xA000, 60), (0xAC00, 130),
                  (0xD7B0, 70))  # fmt: skip
"""Code points below, and hundredths of a token a character: accented letters, Greek, Cyrillic to Arabic, symbols,
Chinese and Japanese, Hangul. Measured on Qwen3's tokenizer."""


def approximate_tokens(text: str) -> int:
    """How many tokens a text has, about: the same on every machine and for every model.

    Against Qwen3's tokenizer (tests/tools/test_paging.py): abstracts, tables, JSON, lists of URLs and code within
    -25 % and +25 %; other scripts within -20 % and +35 %; random letters (base64) down to -30 %.
    """
    return -(-_hundredths(text) // 100)


def _hundredths(text: str) -> int:
    total = 0
    for match in _TOKEN.finditer(text):
        kind, length = match.lastgroup, match.end() - match.start()
        if kind == "word":
            total += 85 if length <= 3 else max(100, length * 18)
        elif kind == "capitals":
            total += 100 if length == 1 else length * 45
        elif kind == "one":
            total += 100
        elif kind == "marks":
            total += 100 * ((length + 2) // 3)
        else:
            point = ord(match.group())
            total += next((cost for below, cost in _OTHER_SCRIPTS if point < below), 130)
    return total


@dataclass(frozen=True, slots=True)
class TextPage:
    """What is shown at once."""

    text: str
    links: tuple[int, ...]
    """Numbers of the links in it, in the order in which they come."""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole page of the web, cut into pages to read."""

    pages: tuple[TextPage, ...]
    """At least one."""
    links: tuple[str, ...]
    """Canonical URLs; number 1 is the first. A URL has one number, however often it is linked."""

    def listing(self, page: int) -> str:
        """The links of a page (from 1 on), one a line."""
        return "\n".join(_listed(number, self.links[number - 1]) for number in self.pages[page - 1].links)


def paginate(text: str, base_url: str, *, page_tokens: int, page_chars: int) -> Document:
    """Cuts markdown into pages and numbers its links.

    Args:
        base_url: relative links are resolved against it. Links that lead to no other web page become plain text.
        page_tokens: tokens of one page at most, its list of links included, by `approximate_tokens`.
        page_chars: characters likewise.
    """
    marked, links = _number_links(text[:MAX_TEXT_CHARS], base_url)
    pages = tuple(page.done() for page in _cut(marked, links, page_tokens, page_chars))
    return Document(pages or (TextPage("", ()),), links)


def _number_links(text: str, base_url: str) -> tuple[str, tuple[str, ...]]:
    """The text with a mark after each link's label, and the URLs by number."""
    numbers: dict[str, int] = {}
    own = _web_url(base_url, base_url)

    def replaced(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        label = " ".join(label.split())
        url = None if picture or target.startswith("#") else _web_url(target, base_url)
        if url is None or url == own or not label:
            return label
        return f"{label}\ue000{numbers.setdefault(url, len(numbers) + 1)}\ue001"

    text = text.replace("\ue000", "").replace("\ue001", "")
    return _MARKDOWN_LINK.sub(replaced, _PICTURE.sub(r"\1", text)), tuple(numbers)


def _web_url(url: str, base_url: str) -> str | None:
    try:
        return canonical_url(urljoin(base_url, url))
    except ValueError:
        return None


def _listed(number: int, url: str) -> str:
    shown = url if len(url) <= MAX_URL_SHOWN else f"{url[:MAX_URL_SHOWN]}..."
    return f"[{number}] {shown}"


@dataclass(slots=True)
class _Sheet:
    """A page that is being filled."""

    parts: list[str] = field(default_factory=list)
    links: dict[int, None] = field(default_factory=dict)
    tokens: int = 0
    """Hundredths."""
    chars: int = 0

    def done(self) -> TextPage:
        return TextPage(_MARK.sub(r" [\1]", "".join(self.parts)).strip("\n"), tuple(self.links))


def _cut(text: str, links: tuple[str, ...], page_tokens: int, page_chars: int) -> Iterator[_Sheet]:
    """Cuts between lines where that leaves a page at least half full, else between words, else anywhere."""
    limit = 100 * page_tokens
    sheet = _Sheet()

    def add(piece: str) -> bool:
        """Puts a piece on the sheet if it fits."""
        if sheet.chars + len(piece) > 2 * page_chars:  # far too long, marks or not
            return False
        shown = _MARK.sub(r" [\1]", piece)
        new = [n for n in map(int, _MARK.findall(piece)) if n not in sheet.links]
        listed = "".join(f"{_listed(n, links[n - 1])}\n" for n in dict.fromkeys(new))
        tokens, chars = _hundredths(shown) + _hundredths(listed), len(shown) + len(listed)
        if sheet.tokens + tokens > limit or sheet.chars + chars > page_chars:
            return False
        sheet.parts.append(piece)
        sheet.links.update(dict.fromkeys(new))
        sheet.tokens, sheet.chars = sheet.tokens + tokens, sheet.chars + chars
        return True

    for line in text.splitlines(keepends=True):
        if add(line):
            continue
        if sheet.tokens > limit // 2 or sheet.chars > page_chars // 2:
            yield sheet
            sheet = _Sheet()
            if add(line):
                continue
        for run in _runs(_pieces(line, min(page_tokens, page_chars) // 4)):
            if add("".join(run)):
                continue
            for piece in run:
                if not add(piece):
                    if sheet.parts:
                        yield sheet
                        sheet = _Sheet()
                    if not add(piece):  # a link whose line in the list fills a page: its number goes, its label stays
                        add(_MARK.sub("", piece))
    if sheet.parts:
        yield sheet


def _runs(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Neighbours together, about `RUN_CHARS` of them: what fits together need not be tried one by one."""
    run: list[str] = []
    size = 0
    for piece in pieces:
        run.append(piece)
        size += len(piece)
        if size >= RUN_CHARS:
            yield run
            run, size = [], 0
    if run:
        yield run


def _pieces(line: str, size: int) -> Iterator[str]:
    """Words and marks; a word of more than `size` characters in parts."""
    for match in _PIECE.finditer(line):
        piece = match.group()
        if piece.startswith("\ue000") or len(piece) <= size:
            yield piece
        else:
            yield from (piece[i : i + size] for i in range(0, len(piece), size))
