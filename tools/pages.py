"""A store of web pages with the modes live, record and replay.

`replay` never touches a network: a page that is not stored is a `not_found` error for the model. `record` fetches
what is missing and appends it, so that the file replays the same run later. `live` fetches every time.
File format: JSONL, one `Page` a line (docs/formats.md).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from tools.types import ToolErrorKind, ToolFailure

logger = logging.getLogger(__name__)
Mode = Literal["live", "record", "replay"]
MAX_URL_CHARS = 2000


class PageStoreError(ValueError):
    """A page file or page record is broken; names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page as it was fetched."""

    url: str
    """What was asked for; absolute http or https."""
    body: str
    """The decoded body, as sent: not cleaned, not turned to text."""
    status: int = 200
    final_url: str = ""
    """Where redirects ended; `url` if left empty."""
    content_type: str = "text/html"
    """Without parameters, lower case."""
    fetched_at: str = ""
    """ISO 8601 in UTC; "" for a generated page."""
    sha256: str = ""
    """Of the body in UTF-8, hex. Computed if left empty, checked if given."""

    def __post_init__(self) -> None:
        try:
            digest = hashlib.sha256(self.body.encode("utf-8")).hexdigest()
        except UnicodeEncodeError as error:
            raise PageStoreError(f"page {self.url}: the body is no Unicode text: {error.reason}") from None
        if self.sha256 not in ("", digest):
            raise PageStoreError(f"page {self.url}: sha256 is {self.sha256}, but the body's is {digest}")
        object.__setattr__(self, "sha256", digest)
        object.__setattr__(self, "final_url", self.final_url or self.url)


class Fetcher(Protocol):
    """Gets a page from the network. Guards against internal addresses and sizes are its duty."""

    async def __call__(self, url: str) -> Page:
        """Raises `ToolFailure` if the page cannot be had."""
        ...


def canonical_url(url: str) -> str:
    """The form under which pages are stored: lower-case scheme and host, no default port, no fragment.

    Raises:
        ValueError: not http or https, no host, user information, a backslash, blank or control characters, too long.
    """
    url = url.strip()
    if len(url) > MAX_URL_CHARS:
        raise ValueError(f"a URL of {len(url)} characters is too long")
    if any(char <= " " or char == "\\" or "\x7f" <= char <= "\xa0" for char in url):
        raise ValueError("a URL has no blanks, control characters or backslashes")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http and https pages can be opened")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("a URL needs a host and no user name")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if parts.port is not None and parts.port != {"http": 80, "https": 443}[parts.scheme]:
        host = f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))


class PageStore:
    """Pages by canonical URL, in memory, backed by a file or not."""

    def __init__(self, pages: str | Path | Iterable[Page], mode: Mode = "replay", fetch: Fetcher | None = None) -> None:
        """
        Args:
            pages: a JSONL file (which need not be there in mode `record`), or the pages themselves.
            mode: `live`, `record` or `replay`.
            fetch: gets pages in `live` and `record`.

        Raises:
            PageStoreError: a broken line, with file and line; a torn last line is dropped with a warning.
            FileNotFoundError: no such file in mode `replay`.
            ValueError: `live` or `record` without `fetch`.
        """
        if mode not in ("live", "record", "replay"):
            raise ValueError(f"PageStore mode must be live, record or replay, got {mode!r}")
        if mode != "replay" and fetch is None:
            raise ValueError(f"PageStore mode {mode!r} needs fetch=, a function that gets a page")
        self.mode = mode
        self._fetch = fetch
        self._path = Path(pages) if isinstance(pages, str | Path) else None
        self._pages: dict[str, Page] = {}
        self._by_final_url: dict[str, Page] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._manifest_hash: str | None = None
        if self._path is None:
            source: Iterable[Page] = pages  # type: ignore[assignment]
        elif mode == "replay" or self._path.exists():
            source = read_pages(self._path)
        else:
            source = ()
        for page in source:
            self._add(page)
        if mode == "record" and self._path is not None and self._path.exists():
            _drop_torn_line(self._path)

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages.values())

    @property
    def manifest_hash(self) -> str:
        """SHA-256, hex, over what the stored pages answer: URL, final URL, status, content type and body hash, in the
        order of the URLs. Equal hashes replay equally; the time of fetching does not count."""
        if self._manifest_hash is None:
            digest = hashlib.sha256()
            for url in sorted(self._pages):
                page = self._pages[url]
                record = [url, page.final_url, page.status, page.content_type, page.sha256]
                digest.update(json.dumps(record).encode() + b"\n")
            self._manifest_hash = digest.hexdigest()
        return self._manifest_hash

    async def get(self, url: str) -> Page:
        """The page at `url` (absolute).

        Raises:
            ToolFailure: `not_found` if a replay has no such page, `invalid_arguments` for what is no web URL, or
                whatever the fetcher says.
        """
        try:
            key = canonical_url(url)
        except ValueError as error:
            raise ToolFailure(f"cannot open this URL: {error}", ToolErrorKind.INVALID_ARGUMENTS) from None
        if self.mode == "live":
            return await self._fetched(key)
        stored = self._pages.get(key) or self._by_final_url.get(key)
        if stored is not None:
            return stored
        if self.mode == "replay":
            raise ToolFailure(f"no page at {url}", ToolErrorKind.NOT_FOUND)
        # One fetch a URL, however many episodes ask at once.
        async with self._locks.setdefault(key, asyncio.Lock()):
            stored = self._pages.get(key) or self._by_final_url.get(key)
            if stored is None:
                stored = await self._fetched(key)
                self._add(stored, key)
                if self._path is not None:
                    _append(self._path, stored)
        return stored

    async def _fetched(self, url: str) -> Page:
        assert self._fetch is not None
        return await self._fetch(url)

    def _add(self, page: Page, asked_for: str | None = None) -> None:
        try:
            self._pages[asked_for or canonical_url(page.url)] = page
            self._by_final_url[canonical_url(page.final_url)] = page
        except ValueError as error:
            raise PageStoreError(f"page {page.url!r}: {error}") from None
        self._manifest_hash = None


def read_pages(path: str | Path) -> Iterator[Page]:
    """Pages of a JSONL file, in order. A torn last line (no newline, no JSON) is dropped with a warning.

    Raises:
        PageStoreError: a broken line, with file and line.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    logger.warning("%s: the last line is torn and was dropped", where)
                    return
                raise PageStoreError(f"{where}: no JSON: {error}") from None
            yield _page_from_row(row, where)


def write_pages(path: str | Path, pages: Iterable[Page]) -> int:
    """Writes a page file in one go: the whole file appears, or none. Returns the number of pages."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    count = 0
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            for page in pages:
                file.write(_line(page))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


_TYPES = {"url": str, "body": str, "status": int, "final_url": str, "content_type": str, "fetched_at": str,
          "sha256": str}  # fmt: skip


def _page_from_row(row: object, where: str) -> Page:
    if not isinstance(row, dict) or not {"url", "body"} <= row.keys():
        raise PageStoreError(f"{where}: a page is an object with at least url and body")
    for key, value in row.items():
        if key not in _TYPES:
            raise PageStoreError(f"{where}: unknown key {key!r}; a page has {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise PageStoreError(f"{where}: {key} must be {_TYPES[key].__name__}, found {type(value).__name__}")
    try:
        page = Page(**row)
        canonical_url(page.url)
        return page
    except ValueError as error:
        raise PageStoreError(f"{where}: {error}") from None


def _line(page: Page) -> str:
    return json.dumps(asdict(page), ensure_ascii=False) + "\n"


def _append(path: Path, page: Page) -> None:
    """One write of one whole line, flushed to the disk: a crash leaves at most a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(_line(page).encode("utf-8"))
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
