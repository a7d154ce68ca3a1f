"""A store of web pages with the modes live, record and replay.

`replay` never touches a network: a page that is not stored is a `not_found` error for the model. `record` fetches
what is missing and appends it, failures too, so that the store replays the same run later. `live` fetches every time.

    store = PageStore("runs/pages", "record")
    page = await store.get("https://example.org/", session.fetch)
    hits = await store.recall(tool_key("search", {"query": query}), ask)

A recording is final: the first answer of a URL is the answer to all who ask later, in this run, in others that record
into the same folder, and in replays.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from bisect import insort
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol
from weakref import WeakValueDictionary

from tools.page_folder import PageFolder
from tools.pages import (
    Page,
    PageError,
    PageStoreError,
    answer_hash,
    canonical_url,
    checked_key,
    index_row,
    line_of,
    read_pages,
)
from tools.redact import redact, secret_values
from tools.tool import ToolContractError
from tools.types import ToolErrorKind, ToolFailure

Mode = Literal["live", "record", "replay"]


class Fetcher(Protocol):
    """Gets a page from the network. Guards against internal addresses and sizes are its duty, and so is a deadline."""

    async def __call__(self, url: str, /) -> Page:
        """Raises `ToolFailure` if the page cannot be had."""
        ...


class PageStore:
    """Pages by key: the canonical URL, or the `tool_key` of what has none."""

    def __init__(self, pages: str | Path | Iterable[Page], mode: Mode = "replay") -> None:
        """
        Args:
            pages: a folder (`tools.page_folder`), a page file (its name ends with `.jsonl`), or the pages themselves.
                In mode `record` it need not be there.
            mode: `live`, `record` or `replay`.

        Raises:
            PageStoreError: a broken line, with file and line; an object that is missing. A torn last line is dropped
                with a warning.
            FileNotFoundError: no such file or folder in mode `replay`.
        """
        if mode not in ("live", "record", "replay"):
            raise ValueError(f"PageStore mode must be live, record or replay, got {mode!r}")
        self.mode = mode
        self._pages = open_pages(pages, write=mode == "record")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._pages)

    def __bool__(self) -> bool:
        """An empty store is one too: `store or ...` must not replace it."""
        return True

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages)

    @property
    def manifest_hash(self) -> str:
        """SHA-256, hex, over what the stored pages answer, whatever their order and the time of fetching. Equal hashes
        replay equally; a page file and a folder of the same pages have the same."""
        return hashlib.sha256(b"".join(self._pages.answers)).hexdigest()

    async def get(self, url: str, fetch: Fetcher | None = None) -> Page:
        """The page at `url` (absolute).

        Args:
            fetch: gets it from the network; called with the canonical URL, in `live` and `record` only.

        Raises:
            ToolFailure: `not_found` if a replay has no such page, `invalid_arguments` for what is no web URL, or
                whatever the fetcher says or said when it was recorded.
            ToolContractError: the store is broken on the disk, or could not be written.
        """
        try:
            key = canonical_url(url)
        except ValueError as error:
            raise ToolFailure(f"cannot open this URL: {error}", ToolErrorKind.INVALID_ARGUMENTS) from None

        async def ask() -> Page:
            if fetch is None:
                raise ToolContractError(f"the page store is in mode {self.mode!r} but was given nothing to fetch with")
            return await fetch(key)

        return await self._get(key, ask, f"no page at {url}")

    async def recall(self, key: str, fetch: Callable[[], Awaitable[Page]]) -> Page:
        """What a tool asked for that has no URL of its own.

        Args:
            key: from `tool_key`.
            fetch: asks the network, in `live` and `record` only. URLs of its page become `key`: they may hold API keys.

        Raises:
            ToolFailure, ToolContractError: as in `get`.
        """

        async def ask() -> Page:
            return replace(await fetch(), final_url=key, hops=())

        return await self._get(checked_key(key), ask, "this was not recorded")

    async def _get(self, key: str, fetch: Callable[[], Awaitable[Page]], missing: str) -> Page:
        if self.mode == "live":
            return _answer(replace(await fetch(), url=key))
        stored = self._find(key)
        if stored is None and self.mode == "replay":
            raise ToolFailure(missing, ToolErrorKind.NOT_FOUND)
        if stored is None:
            # One fetch a key, however many episodes ask at once.
            async with self._locks.setdefault(key, asyncio.Lock()):
                stored = self._find(key)
                if stored is None:
                    # Once fetched it is stored, even if the episode that asked for it is cancelled meanwhile.
                    stored = await asyncio.shield(asyncio.ensure_future(self._add(await _recorded(key, fetch))))
        return _answer(stored)

    def _find(self, key: str) -> Page | None:
        try:
            return self._pages.find(key)
        except (OSError, PageStoreError) as error:
            raise ToolContractError(f"page store: {error}") from error

    async def _add(self, page: Page) -> Page:
        try:
            return await asyncio.to_thread(self._pages.add, page)
        except (OSError, PageStoreError) as error:
            raise ToolContractError(f"page store: {error}") from error


def _answer(page: Page) -> Page:
    if page.error is not None:
        raise ToolFailure(page.error.message, ToolErrorKind(page.error.kind))
    return page


async def _recorded(key: str, fetch: Callable[[], Awaitable[Page]]) -> Page:
    """The page as it is stored: a failure is one too, and no secret of this process's environment is in it."""
    secrets = secret_values()
    try:
        page = await fetch()
    except ToolFailure as failure:
        message = redact(str(failure), secrets)
        return Page(url=key, body="", status=0, error=PageError(kind=failure.kind.value, message=message))
    text = None if page.text is None else redact(page.text, secrets)
    return replace(page, url=key, body=redact(page.body, secrets), sha256="", text=text)


class Pages(Protocol):
    """Where pages lie. The first page of a key stays."""

    answers: list[bytes]
    """`answer_hash` of every page, sorted."""

    def find(self, key: str) -> Page | None:
        """The page of a key, or else the first whose redirects ended there."""
        ...

    def add(self, page: Page) -> Page:
        """Stores a page, on the disk too; returns the one that stands for its key, which may be an earlier one."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Page]: ...


class PagesInMemory:
    """Pages in memory, and in a page file if there is one."""

    def __init__(self, pages: Iterable[Page], path: Path | None = None) -> None:
        self.answers: list[bytes] = []
        self._by_key: dict[str, Page] = {}
        self._by_final_url: dict[str, Page] = {}
        self._path = path
        for page in pages:
            self._keep(page)

    def find(self, key: str) -> Page | None:
        return self._by_key.get(key) or self._by_final_url.get(key)

    def add(self, page: Page) -> Page:
        kept = self._keep(page)
        if kept is page and self._path is not None:
            _append(self._path, page)
        return kept

    def _keep(self, page: Page) -> Page:
        try:
            key = checked_key(page.url)
            final_key = checked_key(page.final_url)
        except ValueError as error:
            raise PageStoreError(f"page {page.url!r}: {error}") from None
        kept = self._by_key.setdefault(key, page)
        if kept is page:
            insort(self.answers, answer_hash(index_row(page)))
            if page.error is None:
                self._by_final_url.setdefault(final_key, page)
        return kept

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Page]:
        return iter(list(self._by_key.values()))


def open_pages(pages: str | Path | Iterable[Page], *, write: bool) -> Pages:
    """The pages of a folder, a page file or a list.

    Raises:
        PageStoreError, FileNotFoundError: as in `PageStore`.
    """
    if not isinstance(pages, str | Path):
        return PagesInMemory(pages)
    path = Path(pages)
    if path.suffix != ".jsonl" and not path.is_file():
        return PageFolder(path, write=write)
    if write and path.exists():
        _drop_torn_line(path)
    return PagesInMemory(read_pages(path) if path.exists() or not write else (), path if write else None)


def _append(path: Path, page: Page) -> None:
    """One write of one whole line, flushed to the disk: a crash leaves at most a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(line_of(page).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            last = data.rfind(b"\n") + 1
            try:
                json.loads(data[last:])
                file.write(b"\n")  # whole, only its newline is missing
            except ValueError:
                file.truncate(last)
