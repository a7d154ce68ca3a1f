"""Web pages as records, and files of them. `tools.store` keeps them with the modes live, record and replay.

File format: JSONL, one `Page` a line (docs/formats.md).

    python -m tools.pages verify | stats | export | merge        # tools/pages_cli.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tools.types import ToolErrorKind

logger = logging.getLogger(__name__)
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


def checked_key(url: str) -> str:
    """The key under which a page is stored: its canonical URL, or a `tool_key` as it is.

    Raises:
        ValueError: neither of the two.
    """
    return url if url.startswith(TOOL_SCHEME) else canonical_url(url)


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
            yield _made(dict(checked_row(row, where)), where)


def write_pages(path: str | Path, pages: Iterable[Page]) -> int:
    """Writes a page file in one go: the whole file appears, or none. Returns the number of pages."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    count = 0
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            for page in pages:
                file.write(line_of(page))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


_ENTRY_TYPES = {"url": str, "status": int, "final_url": str, "content_type": str, "fetched_at": str, "sha256": str,
                "title": str, "headers": dict, "hops": list, "error": dict}  # fmt: skip
_PAGE_TYPES = {"url": str, "body": str} | _ENTRY_TYPES | {"text": str}
_INDEX_TYPES = _ENTRY_TYPES | {"text_sha256": str}
_LEFT_OUT = ("title", "headers", "hops", "error")
_NO_ANSWER = ("fetched_at", "headers")
"""What a reader of the page never sees."""


def line_of(page: Page) -> str:
    """The page as a line of a page file; of the newer keys those that say nothing are left out."""
    row = {key: value for key, value in asdict(page).items() if value or key not in _LEFT_OUT}
    if page.text is None:
        del row["text"]
    return json.dumps(row, ensure_ascii=False) + "\n"


def index_row(page: Page) -> dict[str, Any]:
    """The page as an entry of an index: its row with a hash in the place of its text, and without its body."""
    row = asdict(page)
    del row["body"], row["text"]
    if page.text is not None:
        row["text_sha256"] = hashlib.sha256(page.text.encode()).hexdigest()
    return {key: value for key, value in row.items() if value or key not in _LEFT_OUT}


def answer_hash(row: Mapping[str, Any]) -> bytes:
    """SHA-256 of what an entry of an index answers to a reader: all but the time of fetching and the headers."""
    answer = {key: value for key, value in row.items() if key not in _NO_ANSWER}
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).digest()


def page_of_index(row: object, where: str, load: Callable[[str], str]) -> Page:
    """The page of an entry of an index.

    Args:
        load: gives the text of a hash.

    Raises:
        PageStoreError: the entry is broken, or what it names.
    """
    values = dict(checked_row(row, where, index=True))
    values["body"] = load(values["sha256"])
    if "text_sha256" in values:
        values["text"] = load(values.pop("text_sha256"))
    return _made(values, where)


def checked_row(row: object, where: str, *, index: bool = False) -> dict[str, Any]:
    """A row whose keys are known and whose values have the right types.

    Raises:
        PageStoreError: naming `where` and the key.
    """
    types, needed = (_INDEX_TYPES, {"url", "sha256"}) if index else (_PAGE_TYPES, {"url", "body"})
    if not isinstance(row, dict) or not needed <= row.keys():
        raise PageStoreError(f"{where}: a page is an object with at least {' and '.join(sorted(needed)[::-1])}")
    for key, value in row.items():
        if key not in types:
            raise PageStoreError(f"{where}: unknown key {key!r}; a page has {', '.join(types)}")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise PageStoreError(f"{where}: {key} must be {types[key].__name__}, found {type(value).__name__}")
    for key, inner in (("hops", row.get("hops", ())), *((key, row.get(key, {}).values()) for key in _OBJECTS)):
        if not all(isinstance(value, str) for value in inner):
            raise PageStoreError(f"{where}: {key} must hold strings only")
    return row


_OBJECTS = ("headers", "error")


def _made(values: dict[str, Any], where: str) -> Page:
    values["hops"] = tuple(values.get("hops", ()))
    try:
        if "error" in values:
            values["error"] = PageError(**values["error"])
        page = Page(**values)
        checked_key(page.url)
    except (TypeError, ValueError) as error:
        raise PageStoreError(f"{where}: {error}") from None
    return page


if __name__ == "__main__":
    from tools.pages_cli import main

    raise SystemExit(main())
