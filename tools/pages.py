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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from tools.types import ToolErrorKind, ToolFailure

logger = logging.getLogger(__name__)
Mode = Literal["live", "record", "replay"]
MAX_URL_CHARS = 2000
TOOL_SCHEME = "tool:"


class PageStoreError(ValueError):
    """A page file or page record is broken; names file and line."""


KEPT_HEADERS = ("content-type", "last-modified", "etag", "retry-after", "x-original-content-type")
"""Response headers that a page keeps. No other is stored: they hold cookies, addresses and request ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageError:
    """A fetch that failed. It is stored as a page is, so that a replay fails in the same words."""

    kind: str
    """Value of a `ToolErrorKind`."""
    message: str
    """In words for the model."""

    def __post_init__(self) -> None:
        if self.kind not in list(ToolErrorKind):
            raise PageStoreError(f"page error of unknown kind {self.kind!r}; there are: {', '.join(ToolErrorKind)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page as it was fetched, or the failure to fetch it."""

    url: str
    """What was asked for: absolute http or https, or the `tool_key` of a tool's request that has no URL of its own."""
    body: str
    """The decoded body, as sent: not cleaned, not turned to text. Empty for a PDF, which has `text` only."""
    status: int = 200
    """HTTP status; 0 where there was no answer (`error`)."""
    final_url: str = ""
    """Where redirects ended; `url` if left empty."""
    content_type: str = "text/html"
    """Without parameters, lower case."""
    fetched_at: str = ""
    """ISO 8601 in UTC; "" for a generated page."""
    sha256: str = ""
    """Of the body in UTF-8, hex. Computed if left empty, checked if given."""
    text: str | None = None
    """As the model reads it, before it is cut into pages: markdown. None: made from `body` when it is read."""
    title: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Those of `KEPT_HEADERS` that were sent, in lower case."""
    hops: tuple[str, ...] = ()
    """URLs of the redirects, first to last. Empty without one."""
    error: PageError | None = None
    """Set if and only if the page could not be had."""

    def __post_init__(self) -> None:
        try:
            digest = hashlib.sha256(self.body.encode("utf-8")).hexdigest()
            (self.text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise PageStoreError(f"page {self.url}: the body is no Unicode text: {error.reason}") from None
        if self.sha256 not in ("", digest):
            raise PageStoreError(f"page {self.url}: sha256 is {self.sha256}, but the body's is {digest}")
        object.__setattr__(self, "sha256", digest)
        object.__setattr__(self, "final_url", self.final_url or self.url)
        if not set(self.headers) <= set(KEPT_HEADERS):
            unknown = sorted(set(self.headers) - set(KEPT_HEADERS))
            raise PageStoreError(f"page {self.url}: header {unknown[0]!r} is not kept; use kept_headers")


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Of an answer's headers, in any case, those that a page keeps."""
    lower = {name.lower(): value for name, value in headers.items()}
    return {name: lower[name] for name in KEPT_HEADERS if name in lower}


def tool_key(name: str, arguments: Mapping[str, Any]) -> str:
    """The key of what a tool asked for: `tool:NAME?` and the arguments as JSON with sorted keys. API keys are no
    arguments: they must not be in it."""
    canonical = json.dumps(arguments, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{TOOL_SCHEME}{name}?{canonical}"


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
            self._pages[asked_for or checked_key(page.url)] = page
            self._by_final_url[checked_key(page.final_url)] = page
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
          "sha256": str, "text": str, "title": str, "headers": dict, "hops": list, "error": dict}  # fmt: skip
_LEFT_OUT = ("title", "headers", "hops", "error")


def _page_from_row(row: object, where: str) -> Page:
    if not isinstance(row, dict) or not {"url", "body"} <= row.keys():
        raise PageStoreError(f"{where}: a page is an object with at least url and body")
    for key, value in row.items():
        if key not in _TYPES:
            raise PageStoreError(f"{where}: unknown key {key!r}; a page has {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise PageStoreError(f"{where}: {key} must be {_TYPES[key].__name__}, found {type(value).__name__}")
    try:
        return page_from_row(row)
    except (TypeError, ValueError) as error:
        raise PageStoreError(f"{where}: {error}") from None


def page_from_row(row: Mapping[str, Any]) -> Page:
    """
    Raises:
        TypeError, ValueError: a value is not what it should be.
    """
    values = dict(row)
    for key, of in (("hops", row.get("hops", ())), ("headers", dict(row.get("headers", {})).values())):
        if not all(isinstance(value, str) for value in of):
            raise TypeError(f"{key} must hold strings only")
    values["hops"] = tuple(row.get("hops", ()))
    if row.get("error") is not None:
        values["error"] = PageError(**row["error"])
    page = Page(**values)
    checked_key(page.url)
    return page


def checked_key(url: str) -> str:
    """The key under which a page is stored: its canonical URL, or a `tool_key` as it is.

    Raises:
        ValueError: neither of the two.
    """
    return url if url.startswith(TOOL_SCHEME) else canonical_url(url)


def page_to_row(page: Page) -> dict[str, Any]:
    """The page as a JSON object; of the newer keys those that say nothing are left out."""
    row = asdict(page)
    if page.text is None:
        del row["text"]
    return {key: value for key, value in row.items() if value or key not in _LEFT_OUT}


def _line(page: Page) -> str:
    return json.dumps(page_to_row(page), ensure_ascii=False) + "\n"


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
