"""The web tools on the open web: `search`, `browse` and `find` over a page store that may fetch.

    web = OpenWebTools(PageStore("pages", "record"), fetch=session.fetch, search=provider.search)

What they share with the tools of a closed corpus (`tools.web`) are names and arguments; what is shown differs: pages
are cut by tokens, links have numbers that `browse` takes, all text from outside stands in a frame, and where each URL
was seen first is kept.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import urljoin

from pydantic import Field

from tools.clean import clean_text
from tools.frame import FRAME_CHARS, framed
from tools.pages import Page, canonical_url
from tools.paging import Document, paginate
from tools.search import Hit
from tools.store import Fetcher, PageStore
from tools.tool import State, Tool, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure
from tools.web import find_lines, page_text

Search = Callable[[str, int], Awaitable[Sequence[Hit]]]
"""(query, number of hits) -> hits, the best first. Raises `ToolFailure`."""

OPEN_KEY, SEEN_KEY = "open_page", "seen_urls"
"""Keys of the episode's state: the `_Opened` page; where each URL was seen first, in words."""
FRAME_TOKENS = 150
MIN_PAGE_TOKENS = 200
LARGE_TEXT_CHARS = 20_000
"""Longer texts are cut in a thread."""
CACHED_DOCUMENTS = 64
SNIPPET_CHARS = 200

_NUMBER = re.compile(r"\s*\[?(\d{1,5})\]?\s*")
_BARE_DOMAIN = re.compile(
    r"(?:[a-z0-9-]+\.)+(?!html?\b|php\b|aspx?\b|jsp\b|pdf\b|json\b|xml\b|txt\b|csv\b)[a-z]{2,}(?:[/?#:]|$)", re.I
)
_URL_IN_TEXT = re.compile(r"https?://[^\s<>\"')\]]+")


@dataclass(frozen=True, slots=True)
class _Opened:
    """The page that is open in an episode."""

    asked: str
    """Canonical URL that was asked for."""
    page: Page
    title: str
    document: Document


class OpenWebTools:
    """Holds what the tools share; everything of an episode is in its state.

    Args:
        fetch: gets a page; not called in replays. None: replays only.
        search: None leaves out the tool `search`.
        page_tokens: of one output of `browse`, frame and links included (`tools.paging.approximate_tokens`).
        max_chars: of any output; keep it at or under the toolbox's limit, which cuts without regard to the frame.
        num_hits: hits a search lists.
        only_seen_urls: `browse` opens only what the task, a search or a page that was read has named.
        timeout_s: seconds that fetching a page may take.
    """

    def __init__(
        self,
        store: PageStore,
        *,
        fetch: Fetcher | None = None,
        search: Search | None = None,
        page_tokens: int = 1500,
        max_chars: int = 8000,
        num_hits: int = 5,
        only_seen_urls: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        if page_tokens < MIN_PAGE_TOKENS:
            raise ValueError(f"page_tokens must be at least {MIN_PAGE_TOKENS}, got {page_tokens}")
        if max_chars < 3 * FRAME_CHARS:
            raise ValueError(
                f"max_tool_output_chars must be at least {3 * FRAME_CHARS} for pages in a frame, got {max_chars}"
            )
        self.store = store
        self.fetch = fetch
        self._search = search
        self._page_tokens = page_tokens - FRAME_TOKENS
        self._page_chars = max_chars - FRAME_CHARS
        self._num_hits = num_hits
        self._only_seen_urls = only_seen_urls
        self._timeout_s = timeout_s

    def tools(self) -> list[Tool]:
        """`search` if there is one, `browse` and `find`."""
        # Longer than the fetch, which is to end by its own deadline: that is stored, and fails a replay likewise.
        patience_s = 2 * self._timeout_s + 30
        names = [self.search] if self._search is not None else []
        return [replace(each, timeout_s=patience_s) for each in (*names, self.browse, self.find)]

    def begin(self, state: dict[str, Any], texts: Iterable[str]) -> None:
        """Prepares an episode's state; URLs in the task's own texts count as seen."""
        state[SEEN_KEY] = {}
        for text in texts:
            note_seen(state, _URL_IN_TEXT.findall(text), "the task")

    @tool(parallel_safe=True, idempotent=True)
    async def search(self, query: Annotated[str, "words to look for"], *, state: State) -> ToolOutput:
        """Search the web. Returns title, url and a few words of each hit."""
        if not query.strip():
            raise ToolFailure("the query is empty", ToolErrorKind.INVALID_ARGUMENTS)
        assert self._search is not None
        hits = (await self._search(query, self._num_hits))[: self._num_hits]
        note_seen(state, (hit.url for hit in hits), f"search: {query}")
        text = "\n".join(map(_hit_text, hits)) or "no results"
        content, nonce = framed("search results", text[: self._page_chars])
        return ToolOutput(content=content, metadata={"urls": [hit.url for hit in hits], "nonce": nonce})

    @tool(idempotent=True)
    async def browse(
        self,
        url: Annotated[str, "url of the page, or the number of a link on the open page"],
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Open a page and read it. Links are numbered; long pages have several page numbers."""
        asked = self._target(url, state.get(OPEN_KEY))
        seen: dict[str, str] = state.setdefault(SEEN_KEY, {})
        if self._only_seen_urls and asked not in seen:
            raise ToolFailure(
                "only URLs of the task, of search results and of pages that were read may be opened",
                ToolErrorKind.BLOCKED,
            )
        opened = state.get(OPEN_KEY)
        # Later pages are of what was read before; a page that is asked for anew may have changed.
        if opened is None or page == 1 or asked not in (opened.asked, opened.page.final_url):
            opened = await self._open(asked)
        document = opened.document
        count = len(document.pages)
        if page > count:
            there = "has 1 page" if count == 1 else f"has pages 1 to {count}"
            raise ToolFailure(f"no page {page}: {asked} {there}", ToolErrorKind.INVALID_ARGUMENTS)
        state[OPEN_KEY] = opened
        shown, final_url = document.pages[page - 1], opened.page.final_url
        seen.setdefault(asked, "the model")
        came_from = seen[asked]
        note_seen(state, [final_url], f"redirect of {asked}")
        note_seen(state, (document.links[number - 1] for number in shown.links), f"link on {final_url}")
        parts = [shown.text or "(empty page)", document.listing(page), f"[page {page}/{count}]" if count > 1 else ""]
        content, nonce = framed(final_url, "\n\n".join(part for part in parts if part))
        metadata = {
            "url": final_url,
            "asked": asked,
            "seen": came_from,
            "status": opened.page.status,
            "sha256": opened.page.sha256,
            "fetched_at": opened.page.fetched_at,
            "hops": list(opened.page.hops),
            "page": page,
            "num_pages": count,
            "nonce": nonce,
        }
        return ToolOutput(content=content, metadata=metadata)

    @tool(idempotent=True)
    async def find(self, text: Annotated[str, "text to look for"], *, state: State) -> ToolOutput:
        """Find text in the open page. Returns the lines that hold it."""
        opened: _Opened | None = state.get(OPEN_KEY)
        if opened is None:
            raise ToolFailure("no page is open: browse one first")
        found = find_lines(text, [page.text for page in opened.document.pages])
        content, nonce = framed(opened.page.final_url, found[: self._page_chars])
        return ToolOutput(content=content, metadata={"url": opened.page.final_url, "nonce": nonce})

    def _target(self, url: str, opened: _Opened | None) -> str:
        """What `browse` was told to open, as a canonical URL: a link's number, a URL, a path, a domain."""
        number = _NUMBER.fullmatch(url)
        try:
            if number is not None:
                return _link(int(number[1]), opened)
            if "://" not in url and _BARE_DOMAIN.match(url.strip()):
                url = f"https://{url.strip()}"
            return canonical_url(urljoin(opened.page.final_url, url.strip()) if opened else url)
        except ValueError as error:
            raise ToolFailure(f"cannot open this URL: {error}", ToolErrorKind.INVALID_ARGUMENTS) from None

    async def _open(self, url: str) -> _Opened:
        page = await self.store.get(url, self._fetched)
        if page.status in (404, 410):
            raise ToolFailure(f"no page at {url}", ToolErrorKind.NOT_FOUND)
        if page.status >= 400:
            raise ToolFailure(f"the page answered with status {page.status}")
        title, document = await self._document(page)
        return _Opened(url, page, title, document)

    async def _fetched(self, url: str, /) -> Page:
        """Fetches under a deadline of our own: a fetch that ends by it is stored as a failure."""
        assert self.fetch is not None, "a store that fetches needs fetch="
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self.fetch(url)
        except TimeoutError:
            raise ToolFailure(f"no answer in {self._timeout_s:g} s", ToolErrorKind.TIMEOUT) from None

    async def _document(self, page: Page) -> tuple[str, Document]:
        key = (page.final_url, page.sha256, page.text, self._page_tokens, self._page_chars)
        if key not in _documents:
            is_large = len(page.text if page.text is not None else page.body) > LARGE_TEXT_CHARS
            read = partial(_read, page, self._page_tokens, self._page_chars)
            _documents[key] = await asyncio.to_thread(read) if is_large else read()
            while len(_documents) > CACHED_DOCUMENTS:
                _documents.popitem(last=False)
        return _documents[key]


_documents: OrderedDict[tuple[Any, ...], tuple[str, Document]] = OrderedDict()
"""Pages as they were cut last, for the other episodes of a group."""


def note_seen(state: dict[str, Any], urls: Iterable[str], where: str) -> None:
    """URLs that an episode has now seen; of each the first place is kept."""
    seen: dict[str, str] = state.setdefault(SEEN_KEY, {})
    for url in urls:
        try:
            seen.setdefault(canonical_url(url.rstrip(".,;:")), where)
        except ValueError:
            continue


def _read(page: Page, page_tokens: int, page_chars: int) -> tuple[str, Document]:
    """Title and text of a page, cut.

    Raises:
        ToolFailure: it is no text.
    """
    if page.text is not None:
        title, text = clean_text(page.title), clean_text(page.text)
    else:
        title, text, _ = page_text(page)
    return title, paginate(text, page.final_url, page_tokens=page_tokens, page_chars=page_chars)


def _link(number: int, opened: _Opened | None) -> str:
    if opened is None:
        raise ToolFailure(f"no page is open, so there is no link {number}", ToolErrorKind.INVALID_ARGUMENTS)
    links = opened.document.links
    if not 1 <= number <= len(links):
        there = f"has links 1 to {len(links)}" if links else "has no links"
        raise ToolFailure(f"no link {number}: the open page {there}", ToolErrorKind.INVALID_ARGUMENTS)
    return links[number - 1]


def _hit_text(hit: Hit) -> str:
    title, snippet = (" ".join(clean_text(text).split()) for text in (hit.title, hit.snippet))
    line = f"{title[:SNIPPET_CHARS]} {hit.url}"
    return f"{line}\n  {snippet[:SNIPPET_CHARS]}" if snippet else line
