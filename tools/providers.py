"""Search services behind one protocol: SearXNG, Serper, Brave and Tavily.

    provider = search_provider("serper", store=store, client=client, guard=client.guard)
    hits = await provider.search("query", 5)

What a service answers is recorded under query and service; its key comes from the environment and is in no record.
Formats as published: docs.searxng.org/dev/search_api.html, serper.dev, api-dashboard.search.brave.com and
docs.tavily.com.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

from tools.api import Api, Client, Request, one_line, read_json, rows_at, text_at
from tools.pages import canonical_url, tool_key
from tools.search import SNIPPET_CHARS, Hit
from tools.store import PageStore
from tools.types import ToolErrorKind, ToolFailure

ProviderName = Literal["searxng", "serper", "brave", "tavily"]
MAX_QUERY_CHARS = 400
"""Brave and Tavily take no more."""
NUM_ASKED = 10
"""Hits asked for, if no more are wanted: costs what fewer do, and some may be refused by the guard."""
MAX_HITS = 20
"""Brave and Tavily give no more."""
TITLE_CHARS = 200


class ProviderError(ValueError):
    """A search service cannot be set up; says which variable or key is missing."""


class SearchProvider(Protocol):
    """Finds web pages."""

    name: str

    async def search(self, query: str, num_hits: int, /) -> Sequence[Hit]:
        """Hits, the best first; at most `num_hits`. Raises `ToolFailure`."""
        ...


class UrlCheck(Protocol):
    """What a hit must pass: `tools.guard.Guard`."""

    def check_url(self, url: str) -> Any:
        """Raises `ToolFailure` for a URL that may not be opened."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Service:
    """How one service is asked and read."""

    title: str
    url: str | None
    """Address by default."""
    key_variable: str | None
    """Environment variable of its key; None: it has none."""
    request: Callable[[str, str, str, int], Request]
    """(address, key, query, number of hits) -> what is sent."""
    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    """Hits in its answer."""
    fields: tuple[str, str, str]
    """Keys of URL, title and snippet in a hit."""


def _ask_searxng(url: str, key: str, query: str, count: int) -> Request:
    return Request(url=url, params={"q": query, "format": "json"}, headers={"Accept": "application/json"})


def _ask_serper(url: str, key: str, query: str, count: int) -> Request:
    return Request(url=url, payload={"q": query, "num": count}, headers={"X-API-KEY": key})


def _ask_brave(url: str, key: str, query: str, count: int) -> Request:
    headers = {"X-Subscription-Token": key, "Accept": "application/json"}
    return Request(url=url, params={"q": query, "count": str(count), "text_decorations": "false"}, headers=headers)


def _ask_tavily(url: str, key: str, query: str, count: int) -> Request:
    payload = {"query": query, "max_results": count, "search_depth": "basic"}
    return Request(url=url, payload=payload, headers={"Authorization": f"Bearer {key}"})


_SERVICES: dict[str, _Service] = {
    "searxng": _Service(
        title="SearXNG",
        url=None,
        key_variable=None,
        request=_ask_searxng,
        rows=lambda answer: rows_at(answer, "results"),
        fields=("url", "title", "content"),
    ),
    "serper": _Service(
        title="Serper",
        url="https://google.serper.dev/search",
        key_variable="SERPER_API_KEY",
        request=_ask_serper,
        rows=lambda answer: rows_at(answer, "organic"),
        fields=("link", "title", "snippet"),
    ),
    "brave": _Service(
        title="Brave Search",
        url="https://api.search.brave.com/res/v1/web/search",
        key_variable="BRAVE_API_KEY",
        request=_ask_brave,
        rows=lambda answer: rows_at(answer, "web", "results"),
        fields=("url", "title", "description"),
    ),
    "tavily": _Service(
        title="Tavily",
        url="https://api.tavily.com/search",
        key_variable="TAVILY_API_KEY",
        request=_ask_tavily,
        rows=lambda answer: rows_at(answer, "results"),
        fields=("url", "title", "content"),
    ),
}


def provider_url(name: ProviderName, url: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """The address that a service is asked at. One on an intranet must be among the guard's `open_addresses`.

    Raises:
        ProviderError: SearXNG without an address, or an address that is no web URL.
    """
    service = _service(name)
    found = url or (environment.get("SEARXNG_URL", "") if name == "searxng" else "") or service.url
    if not found:
        raise ProviderError("search by SearXNG needs its address: set search_url, or SEARXNG_URL in the environment")
    try:
        found = canonical_url(found)
    except ValueError as error:
        raise ProviderError(f"address of {service.title}: {error}") from None
    if name == "searxng" and not urlsplit(found).path.endswith("/search"):
        found = f"{found.rstrip('/')}/search"
    return found


def search_provider(
    name: ProviderName,
    *,
    store: PageStore,
    client: Client | None,
    guard: UrlCheck | None = None,
    url: str | None = None,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float = 45.0,
) -> SearchProvider:
    """A search service over a store, which asks it, records or replays.

    Args:
        client: None if the store only replays.
        guard: hits that it refuses are left out: what may not be opened shall not be read in a snippet either.
        url: its address; None: SEARXNG_URL, or the service's own.
        environment: where keys are: SERPER_API_KEY, BRAVE_API_KEY, TAVILY_API_KEY. A replay needs none.

    Raises:
        ProviderError: no such service, or no key or address for it.
    """
    service = _service(name)
    key = environment.get(service.key_variable, "").strip() if service.key_variable else ""
    replays = store.mode == "replay"
    if service.key_variable and not key and not replays:
        raise ProviderError(f"search by {service.title} needs its API key in the environment: {service.key_variable}")
    # A key goes into a header: it can have no line breaks, and none of our errors shall quote it.
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ProviderError(f"{service.key_variable} holds blanks or characters that no API key has")
    address = "" if replays else provider_url(name, url, environment)
    api = Api(service.title, store, client, secrets=[key] if key else [], timeout_s=timeout_s)
    return _Provider(name, service, api, address, key, guard)


class _Provider:
    def __init__(self, name: str, service: _Service, api: Api, address: str, key: str, guard: UrlCheck | None) -> None:
        self.name = name
        self._service = service
        self._api = api
        self._address = address
        self._key = key
        self._guard = guard

    async def search(self, query: str, num_hits: int, /) -> Sequence[Hit]:
        query = " ".join(query.split())
        if not query:
            raise ToolFailure("the query is empty", ToolErrorKind.INVALID_ARGUMENTS)
        if len(query) > MAX_QUERY_CHARS:
            raise ToolFailure(
                f"the query has {len(query)} characters; at most {MAX_QUERY_CHARS} can be searched for",
                ToolErrorKind.INVALID_ARGUMENTS,
            )
        count = min(max(num_hits, NUM_ASKED), MAX_HITS)
        stored_as = tool_key("search", {"provider": self.name, "query": query, "count": count})
        request = self._service.request(self._address, self._key, query, count)
        answer = await self._api.ask(stored_as, request, read=self._read)
        return self._hits(answer.value or {})[:num_hits]

    def _read(self, text: str) -> dict[str, Any]:
        answer = read_json(text)
        # A SearXNG whose engines are all blocked or slow answers 200 with nothing found.
        if not self._service.rows(answer) and answer.get("unresponsive_engines"):
            raise ToolFailure(f"{self._api.name} got no answer from the engines behind it; try again later")
        return answer

    def _hits(self, answer: dict[str, Any]) -> list[Hit]:
        """Hits with a web URL that may be opened, each URL once."""
        hits: dict[str, Hit] = {}
        url_key, title_key, snippet_key = self._service.fields
        for number, row in enumerate(self._service.rows(answer)):
            try:
                url = canonical_url(text_at(row, url_key))
                if self._guard is not None:
                    self._guard.check_url(url)
            except (ValueError, ToolFailure):
                continue
            title = _plain(text_at(row, title_key), TITLE_CHARS) or url
            snippet = _plain(text_at(row, snippet_key), SNIPPET_CHARS)
            hits.setdefault(url, Hit(url, title, snippet, 1 / (number + 1)))
        return list(hits.values())


_MARK_UP = re.compile(r"</?(?:strong|b|em|i|mark|span|br|p)\b[^<>]{0,200}>", re.IGNORECASE)


def _plain(text: str, max_chars: int) -> str:
    """Text without the tags and entities that services mark words with."""
    return one_line(html.unescape(_MARK_UP.sub("", text)), max_chars)


def _service(name: str) -> _Service:
    if name not in _SERVICES:
        raise ProviderError(f"no search service {name!r}; there are: {', '.join(get_args(ProviderName))}")
    return _SERVICES[name]
