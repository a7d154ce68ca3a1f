"""HTML to the text that a model reads: compact markdown of a page's main content."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from tools.clean import clean_text

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

MAX_HTML_CHARS = 2_000_000
"""A longer page is cut here before it is parsed, so that time and memory are bounded."""
CACHE_PAGES = 2048

_DROPPED = (
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "embed", "canvas", "audio", "video",
    "nav", "footer", "aside", "form", "button", "select", "input", "textarea", "dialog", "head",
)  # fmt: skip
_DROPPED_ROLES = ("navigation", "banner", "contentinfo", "complementary", "search", "dialog", "alertdialog")
_HIDING_STYLE = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*hidden|opacity\s*:\s*0(?:\.0+)?\s*(?:;|$)|font-size\s*:\s*0(?![\d.])", re.I
)
_BODY = re.compile(r"<body\b", re.IGNORECASE)
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*>")
_BLANK_LINES = re.compile(r"\n\s*\n")
_SPACES = re.compile(r"(?<=\S)[ \t\xa0]+")


class Link(NamedTuple):
    text: str
    url: str
    """As in the page's text: a path on the page's own host, an absolute URL elsewhere."""


class PageText(NamedTuple):
    title: str
    text: str
    """Markdown without runs of blank lines; two-column tables and definition lists as `key: value` lines."""
    links: tuple[Link, ...]
    """The links of `text`, in order."""


_cache: OrderedDict[bytes, PageText] = OrderedDict()
_cache_lock = threading.Lock()


def html_to_text(html: str, base_url: str) -> PageText:
    """The readable part of a page.

    Navigation, headers, footers, asides, forms, scripts, styles and hidden elements are dropped; where the page
    marks its main content, only that is kept. Links come out as `[text](url)`: `/path` on the host of `base_url`,
    absolute elsewhere, and as plain text if they lead to no page. Cached by content.

    Args:
        html: at most `MAX_HTML_CHARS` are read.
        base_url: absolute URL of the page; links are resolved against it.
    """
    digest = hashlib.sha256(f"{base_url}\n{html}".encode("utf-8", "surrogatepass")).digest()
    with _cache_lock:
        if digest in _cache:
            _cache.move_to_end(digest)
            return _cache[digest]
    page = _convert(html[:MAX_HTML_CHARS], base_url)
    with _cache_lock:
        _cache[digest] = page
        while len(_cache) > CACHE_PAGES:
            _cache.popitem(last=False)
    return page


def short_url(url: str, base_url: str) -> str | None:
    """`url` as a page at `base_url` should show it: the path on the same host, the absolute URL elsewhere, None if
    it is no http or https URL. Fragments are cut off; blanks and brackets are percent-encoded."""
    try:
        parts = urlsplit(urljoin(base_url, url.strip()))
        base = urlsplit(base_url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        return None
    path = quote(parts.path or "/", safe="/%:@!$&'*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'*+,;=~-._?")
    same = (parts.scheme, parts.netloc.lower()) == (base.scheme, base.netloc.lower())
    # A path that starts with two slashes would be read as a host.
    if same and not path.startswith("//"):
        return urlunsplit(("", "", path, query, ""))
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))


def _convert(html: str, base_url: str) -> PageText:
    from bs4 import BeautifulSoup, Comment

    # With a doctype and no XML declaration BeautifulSoup has no doubt, and no warning, about what it is given.
    source = _XML_DECLARATION.sub("", clean_text(html))
    # Without a <body> of its own, lxml may put what follows a <title> into the head.
    opened = "" if _BODY.search(source) else "<body>"
    soup = BeautifulSoup(f"<!doctype html>{opened}{source}", "lxml")
    title = _one_line(soup.title.get_text()) if soup.title else ""
    if soup.title:
        soup.title.decompose()
    base = soup.find("base", href=True)
    if base is not None:
        base_url = _joined(base_url, str(base["href"]))
    for comment in soup.find_all(string=lambda text: isinstance(text, Comment)):
        comment.extract()
    for tag in soup.find_all(_is_dropped):
        tag.decompose()
    main = _main_content(soup)
    links: list[Link] = []
    _rewrite_links(main, base_url)
    try:
        text = _converter().convert_soup(main)
        links = _links(main)
    except RecursionError:
        text = main.get_text("\n")
    # Cleaned again: `&#8203;` in the source is a zero-width space only now.
    text = _compact(clean_text(text))
    if not title:
        heading = main.find("h1")
        title = _one_line(heading.get_text()) if heading else ""
    return PageText(clean_text(title), text, tuple(links))


def _joined(base_url: str, url: str) -> str:
    try:
        return urljoin(base_url, url)
    except ValueError:
        return base_url


def _is_dropped(tag: Tag) -> bool:
    if tag.name in _DROPPED or tag.get("role") in _DROPPED_ROLES:
        return True
    if tag.name == "header":
        # The header of the site goes, one that holds the heading of the content itself stays.
        return tag.find_parent(["main", "article"]) is None or tag.find("h1") is None
    if tag.has_attr("hidden") or tag.get("aria-hidden") == "true":
        return True
    return _HIDING_STYLE.search(str(tag.get("style", ""))) is not None


def _main_content(soup: BeautifulSoup) -> Tag:
    found = soup.find("main") or soup.find(role="main")
    if found is not None and found.get_text(strip=True):
        return found
    articles = soup.find_all("article")
    if len(articles) == 1 and articles[0].get_text(strip=True):
        return articles[0]
    return soup.body or soup


def _rewrite_links(main: Tag, base_url: str) -> None:
    for anchor in main.find_all("a"):
        href = str(anchor.get("href", ""))
        url = None if not href.strip() or href.lstrip().startswith("#") else short_url(href, base_url)
        label = _one_line(anchor.get_text())
        if url is None or not label:
            anchor.unwrap()
        else:
            anchor.attrs = {"href": url}


def _links(main: Tag) -> list[Link]:
    return [Link(clean_text(_one_line(anchor.get_text())), str(anchor["href"])) for anchor in main.find_all("a")]


_converters: list[Any] = []


def _converter() -> Any:
    """One converter, made at the first use: markdownify is imported only then."""
    if not _converters:
        from markdownify import ATX, MarkdownConverter

        class Converter(MarkdownConverter):
            def convert_a(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                label = _one_line(text)
                return f"[{label}]({element['href']})" if label else ""

            def convert_img(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return _one_line(str(element.get("alt", "")))

            def convert_table(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return f"\n\n{text.strip()}\n\n"

            def convert_tr(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                names = [cell.name for cell in element.find_all(["td", "th"], recursive=False)]
                cells = text.split("\0")[:-1]
                if len(names) == 2 and names[1] == "td":
                    return f"{cells[0].rstrip(':')}: {cells[1]}\n"
                row = f"| {' | '.join(cells)} |\n"
                is_heading = bool(names) and set(names) == {"th"}
                return row + f"|{' --- |' * len(cells)}\n" if is_heading else row

            def convert_td(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return _one_line(text) + "\0"

            convert_th = convert_td

            def convert_dl(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return f"\n\n{text.strip()}\n\n"

            def convert_dt(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return f"\n{_one_line(text).rstrip(':')}:"

            def convert_dd(self, element: Tag, text: str, parent_tags: set[str]) -> str:
                return f" {_one_line(text)}"

        _converters.append(
            Converter(
                heading_style=ATX,
                bullets="-",
                escape_asterisks=False,
                escape_underscores=False,
                escape_misc=False,
                autolinks=False,
            )
        )
    return _converters[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _compact(text: str) -> str:
    lines = [_SPACES.sub(" ", line).rstrip() for line in text.replace("\0", " ").splitlines()]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()
