"""The web tools: `search`, `browse` and `find` over a page store and a search index.

    tools = web_tools(PageStore(pages), index, page_chars=2000)

Output is compact, as small models read it too. What page is open lives in the episode's state, so the tools may be
shared by many episodes at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urljoin, urlsplit

from pydantic import Field

from tools.clean import clean_text
from tools.html import PageText, html_to_text, short_url
from tools.pages import Page
from tools.search import Document, SearchIndex
from tools.store import PageStore
from tools.tool import State, Tool, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure

STATE_KEY = "open_page"
"""Key of the episode's state: `{"url", "title", "pages": [str]}` of the page that is open, absent before the first."""
MAX_LINES_FOUND = 10
LINE_CHARS = 200
FOOTER_CHARS = 24

_LINK = re.compile(r"\[([^\[\]]*)\]\([^()\s]*\)")


class WebTools:
    """Holds what the tools share. Reads only; everything of an episode is in its state."""

    def __init__(
        self,
        store: PageStore,
        index: SearchIndex,
        *,
        page_chars: int,
        num_hits: int = 5,
        snippets: bool = False,
        base_url: str | None = None,
    ) -> None:
        if page_chars <= 2 * FOOTER_CHARS:
            raise ValueError(f"page_chars must be more than {2 * FOOTER_CHARS}, got {page_chars}")
        self.store = store
        self.index = index
        self.page_chars = page_chars
        self.num_hits = num_hits
        self.snippets = snippets
        self.base_url = base_url if base_url is not None else _common_origin(index)

    @tool(parallel_safe=True, idempotent=True)
    async def search(self, query: Annotated[str, "words to look for"]) -> ToolOutput:
        """Search the pages. Returns one hit a line: title and url."""
        if not query.strip():
            raise ToolFailure("the query is empty", ToolErrorKind.INVALID_ARGUMENTS)
        hits = self.index.search(query, self.num_hits)
        lines = []
        for hit in hits:
            url = (short_url(hit.url, self.base_url) if self.base_url else None) or hit.url
            line = f"{' '.join(hit.title.split())} {url}"
            lines.append(f"{line}\n  {hit.snippet}" if self.snippets and hit.snippet else line)
        return ToolOutput(content="\n".join(lines) or "no results", metadata={"urls": [hit.url for hit in hits]})

    @tool(idempotent=True)
    async def browse(
        self,
        url: Annotated[str, "url of the page"],
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Open a page and read it."""
        found = await self._get(url, state)
        if found.status in (404, 410):
            raise ToolFailure(f"no page at {url}", ToolErrorKind.NOT_FOUND)
        if found.status >= 400:
            raise ToolFailure(f"the page answered with status {found.status}")
        text = page_text(found)
        pages = split_pages(text.text, self.page_chars)
        if page > len(pages):
            pages_there = "has 1 page" if len(pages) == 1 else f"has pages 1 to {len(pages)}"
            raise ToolFailure(f"no page {page}: {url} {pages_there}", ToolErrorKind.INVALID_ARGUMENTS)
        state[STATE_KEY] = {"url": found.final_url, "title": text.title, "pages": pages}
        content = pages[page - 1] or "(empty page)"
        if len(pages) > 1:
            content += f"\n[page {page}/{len(pages)}]"
        metadata = {"url": found.final_url, "sha256": found.sha256, "page": page, "num_pages": len(pages)}
        return ToolOutput(content=content, metadata=metadata)

    @tool(idempotent=True)
    async def find(self, text: Annotated[str, "text to look for"], *, state: State) -> str:
        """Find text in the open page. Returns the lines that hold it."""
        opened: dict[str, Any] | None = state.get(STATE_KEY)
        if opened is None:
            raise ToolFailure("no page is open: browse one first")
        return find_lines(text, opened["pages"])

    async def _get(self, url: str, state: dict[str, Any]) -> Page:
        """The page at `url`, resolved against the open page first, then against `base_url`."""
        opened = state.get(STATE_KEY)
        bases = [base for base in (opened["url"] if opened else None, self.base_url) if base]
        try:
            candidates = list(dict.fromkeys(urljoin(base, url.strip()) for base in bases)) or [url.strip()]
        except ValueError:
            raise ToolFailure("this is no URL", ToolErrorKind.INVALID_ARGUMENTS) from None
        for candidate in candidates:
            try:
                return await self.store.get(candidate)
            except ToolFailure as failure:
                if failure.kind is not ToolErrorKind.NOT_FOUND:
                    raise
        raise ToolFailure(f"no page at {url}", ToolErrorKind.NOT_FOUND)


def web_tools(
    store: PageStore,
    index: SearchIndex,
    *,
    page_chars: int,
    num_hits: int = 5,
    snippets: bool = False,
    base_url: str | None = None,
) -> list[Tool]:
    """The tools `search(query)`, `browse(url, page=1)` and `find(text)`.

    Args:
        store: the pages that `browse` opens.
        index: what `search` searches; see `documents_of`.
        page_chars: characters of one page of output, footer included; keep it at or under the toolbox's limit.
        num_hits: hits a search lists.
        snippets: show a line of text under each hit.
        base_url: what a relative URL is resolved against before a page is open; search shows paths only on its host.
            Default: the origin of the index's documents, if they all have the same.
    """
    web = WebTools(store, index, page_chars=page_chars, num_hits=num_hits, snippets=snippets, base_url=base_url)
    return [web.search, web.browse, web.find]


def page_text(page: Page) -> PageText:
    """A page as text: HTML through `html_to_text`, other text types cleaned only.

    Raises:
        ToolFailure: the content type is neither HTML nor text.
    """
    kind = page.content_type.partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml", ""):
        return html_to_text(page.body, page.final_url)
    if kind.startswith("text/") or kind in ("application/json", "application/xml") or kind.endswith(("+json", "+xml")):
        return PageText("", clean_text(page.body).strip(), ())
    raise ToolFailure(f"the page is no text but {kind}")


def documents_of(store: PageStore) -> list[Document]:
    """A document for the index from each readable page of a store, in the store's order; links as their text only."""
    documents = []
    for page in store:
        try:
            text = page_text(page)
        except ToolFailure:
            continue
        words = _LINK.sub(r"\1", text.text)
        documents.append(Document(page.final_url, text.title or page.final_url, words))
    return documents


def find_lines(text: str, pages: Sequence[str]) -> str:
    """The lines of a page that hold a text, a part of each where they are long; "no match" if none does.

    Raises:
        ToolFailure: the text is empty.
    """
    wanted = " ".join(text.casefold().split())
    if not wanted:
        raise ToolFailure("the text is empty", ToolErrorKind.INVALID_ARGUMENTS)
    lines = [
        (number, line)
        for number, page in enumerate(pages, start=1)
        for line in page.splitlines()
        if wanted in " ".join(line.casefold().split())
    ]
    if not lines:
        return "no match"
    several = len(pages) > 1
    shown = [
        f"[page {number}] {_window(line, wanted)}" if several else _window(line, wanted)
        for number, line in lines[:MAX_LINES_FOUND]
    ]
    more = len(lines) - len(shown)
    return "\n".join(shown) + (f"\n({more} more)" if more else "")


def split_pages(text: str, page_chars: int) -> list[str]:
    """Cuts text into pages of at most `page_chars` characters with room for the footer; between lines where that
    leaves a page at least half full, else between words, else anywhere. At least one page, which may be empty."""
    if len(text) <= page_chars:
        return [text]
    size = page_chars - FOOTER_CHARS
    pages = []
    while len(text) > size:
        cut = text.rfind("\n", size // 2, size + 1)
        if cut < 0:
            cut = text.rfind(" ", size // 2, size + 1)
        if cut < 0:
            cut = size
        pages.append(text[:cut].rstrip())
        text = text[cut:].lstrip("\n ")
    if text:
        pages.append(text)
    return pages


def _window(line: str, wanted: str) -> str:
    """The part of a long line around the first match."""
    line = line.strip()
    if len(line) <= LINE_CHARS:
        return line
    start = max(0, line.casefold().find(wanted) - LINE_CHARS // 3)
    piece = line[start : start + LINE_CHARS]
    return f"{'...' if start else ''}{piece}{'...' if start + LINE_CHARS < len(line) else ''}"


def _common_origin(index: SearchIndex) -> str | None:
    parts = [urlsplit(document.url) for document in index.documents]
    origins = {f"{part.scheme}://{part.netloc}/" for part in parts}
    return origins.pop() if len(origins) == 1 else None
