"""Requests to interfaces that answer with data: one way to ask, one way to fail, and no key in what is kept.

    api = Api("ClinicalTrials.gov", store, client)
    answer = await api.ask(tool_key("trial", {"nct": nct}), Request(url=...), read=read_json, empty=(404,))
    title = text_at(answer.value, "protocolSection", "identificationModule", "briefTitle")

Answers are recorded and replayed by their key (`PageStore.recall`). Any field of an answer may be missing or of
another type: `at`, `text_at`, `rows_at` and `texts_at` read it without a failure.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from urllib.parse import quote, quote_plus, urlencode, urlsplit

from tools.clean import clean_text
from tools.pages import Page, kept_headers
from tools.redact import redact, secret_values
from tools.store import PageStore
from tools.text import decode
from tools.types import ToolErrorKind, ToolFailure

if TYPE_CHECKING:
    from tools.fetch import Fetched

logger = logging.getLogger(__name__)

MAX_BYTES = 5_000_000
"""Of one answer that is read as data."""
NUM_TRIES = 3
BUSY = (429, 502, 503, 504)
"""Statuses after which a request is tried again, after 1 s and 2 s."""

T = TypeVar("T")


class Client(Protocol):
    """Sends requests through the guard: `tools.fetch.HttpClient`. Statuses are returned, not raised."""

    async def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> Fetched:
        """Raises `ToolFailure` if there is no answer."""
        ...

    async def post_json(self, url: str, payload: Any, *, headers: Mapping[str, str] | None = None) -> Fetched:
        """Likewise."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent. API keys stand in it, so it is never stored, and its repr shows the address only."""

    url: str
    params: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of the query; empty values are left out."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    payload: Any = field(default=None, repr=False)
    """JSON to post; None: a GET."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What came back."""

    value: T | None
    """As `read` made it; None if the status says that there is nothing."""
    page: Page
    """As it is stored."""


class Api:
    """One service.

    Args:
        name: as the model reads it.
        client: None if the store only replays.
        secrets: API keys, taken out of all that comes back.
        timeout_s: seconds an answer may take, waiting for the host's turn and repeated tries included.
    """

    def __init__(
        self,
        name: str,
        store: PageStore,
        client: Client | None,
        *,
        secrets: Sequence[str] = (),
        timeout_s: float = 45.0,
    ) -> None:
        self.name = name
        self.store = store
        self._client = client
        self._secrets = secret_values(form for key in secrets for form in (key, quote(key, safe=""), quote_plus(key)))
        self._timeout_s = timeout_s

    async def ask(
        self, key: str, request: Request, *, read: Callable[[str], T], empty: Collection[int] = ()
    ) -> Answer[T]:
        """The answer to a request, recorded or fetched.

        Args:
            key: from `tool_key`, without API keys.
            read: makes the body into data; raises ValueError if it is none.
            empty: statuses that say "nothing found".

        Raises:
            ToolFailure: in words for the model; recorded too.
        """

        async def fetch() -> Page:
            fetched = await self.fetch(request, empty=empty)
            if len(fetched.body) > MAX_BYTES:
                raise ToolFailure(f"{self.name} answered with more than {MAX_BYTES / 1e6:g} MB; ask for less")
            body = self.cleaned(decoded(fetched))
            if fetched.status not in empty:
                self._read(read, body)  # what is no data is recorded as the failure it is
            headers = {name: self.cleaned(value) for name, value in kept_headers(fetched.headers).items()}
            # Where it came from is left out: the URL may hold a key.
            return Page(
                url=key,
                body=body,
                status=fetched.status,
                content_type=self.cleaned(fetched.content_type),
                fetched_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                headers=headers,
            )

        page = await self.store.recall(key, fetch)
        return Answer(None if page.status in empty else self._read(read, page.body), page)

    async def fetch(self, request: Request, *, empty: Collection[int] = ()) -> Fetched:
        """An answer of status 2xx or one of `empty`, after tries again where the service is busy. Not recorded.

        Raises:
            ToolFailure: as in `ask`.
        """
        if self._client is None:
            raise ToolFailure(f"{self.name} cannot be reached: there is no network here", ToolErrorKind.NOT_FOUND)
        try:
            async with asyncio.timeout(self._timeout_s):
                fetched = await self._send(self._client, request)
        except TimeoutError:
            raise ToolFailure(f"no answer from {self.name} in {self._timeout_s:g} s", ToolErrorKind.TIMEOUT) from None
        except ToolFailure as failure:
            raise self._in_words(request, failure) from None
        if 200 <= fetched.status < 300 or fetched.status in empty:
            return fetched
        logger.warning("%s answered with status %d: %s", self.name, fetched.status, self._said(fetched))
        raise ToolFailure(_refusal(self.name, fetched.status))

    def _in_words(self, request: Request, failure: ToolFailure) -> ToolFailure:
        """A failure of the client, with the service's name in place of its host, which may be one of an intranet."""
        said = self.cleaned(str(failure))
        if failure.kind is ToolErrorKind.BLOCKED:
            # What forbids it is the user's to mend; a redirect may have led to an address that is not to be told.
            logger.warning("%s cannot be used: %s", self.name, said)
            return ToolFailure(f"{self.name} cannot be used here; use another tool", failure.kind)
        host = urlsplit(request.url).hostname or ""
        said = said.replace(host, self.name) if host and host in said else f"{self.name}: {said}"
        return ToolFailure(said, failure.kind)

    def cleaned(self, text: str) -> str:
        """The text without any secret."""
        return redact(text, self._secrets)

    async def _send(self, client: Client, request: Request) -> Fetched:
        params = {name: value for name, value in request.params.items() if value}
        url = f"{request.url}?{urlencode(params)}" if params else request.url
        for number in range(NUM_TRIES):
            if request.payload is None:
                fetched = await client.get(url, headers=request.headers)
            else:
                fetched = await client.post_json(url, request.payload, headers=request.headers)
            # A host that says when to come again has been asked again by the client.
            if fetched.status not in BUSY or "retry-after" in fetched.headers or number == NUM_TRIES - 1:
                break
            await asyncio.sleep(2**number)
        return fetched

    def _read(self, read: Callable[[str], T], body: str) -> T:
        try:
            return read(body)
        except (ValueError, RecursionError):
            found = "a web page in place of data" if body.lstrip()[:1] == "<" else "no readable data"
            raise ToolFailure(f"{self.name} answered with {found}; it may be out of order") from None

    def _said(self, fetched: Fetched) -> str:
        return self.cleaned(" ".join(clean_text(decoded(fetched)[:2000]).split()))[:200]


def decoded(fetched: Fetched) -> str:
    return decode(fetched.body, fetched.charset)


def read_json(text: str) -> dict[str, Any]:
    """The JSON object of a text.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"wanted a JSON object, found {type(value).__name__}")
    return value


def at(value: Any, *path: str) -> Any:
    """What is at a path of keys; None if anything on the way is missing or no object."""
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def text_at(value: Any, *path: str, max_chars: int = 2000) -> str:
    """The text or number at a path, in one line; "" if there is none."""
    found = at(value, *path)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return ""
    return one_line(str(found), max_chars)


def rows_at(value: Any, *path: str) -> list[dict[str, Any]]:
    """The objects of the list at a path."""
    found = at(value, *path)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def texts_at(value: Any, *path: str, max_chars: int = 2000) -> list[str]:
    """The texts of the list at a path, each in one line; without empty ones."""
    found = at(value, *path)
    texts = [one_line(text, max_chars) for text in found if isinstance(text, str)] if isinstance(found, list) else []
    return [text for text in texts if text]


def one_line(text: str, max_chars: int) -> str:
    """The text without hidden characters, in one line, cut."""
    line = " ".join(clean_text(text[: 4 * max_chars]).split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def _refusal(name: str, status: int) -> str:
    if status == 429:
        return f"{name} has had too many requests for now; try again later or use another tool"
    if status in (401, 402, 403, 432, 433):
        return f"{name} refuses the request (status {status}); use another tool"
    if status >= 500:
        return f"{name} is out of order (status {status}); try again later or use another tool"
    return f"{name} does not take this request (status {status}); ask it in other words"
