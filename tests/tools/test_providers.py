"""Search services, each on a server of ours that answers in the service's own shape."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import unused_port

from tests.fakes.api_site import ApiSite, Reply, api_site, bytes_of
from tools.fetch import HttpClient
from tools.guard import Guard
from tools.open_web import OpenWebTools
from tools.providers import ProviderError, ProviderName, SearchProvider, provider_url, search_provider
from tools.store import PageStore
from tools.toolbox import Toolbox
from tools.types import ToolCall, ToolErrorKind, ToolFailure

KEY = "sk-very+secret/0123456789"
KEYS = {"SERPER_API_KEY": KEY, "BRAVE_API_KEY": KEY, "TAVILY_API_KEY": KEY}
NAMES: tuple[ProviderName, ...] = ("searxng", "serper", "brave", "tavily")
ROWS = [
    ("https://registry.test/zorvex", "Zorvex & its makers", "Zorvex was approved in 2019."),
    ("https://Registry.test:443/trial#results", "", "A trial of zorvex."),
]


def answer_of(name: str, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """An answer in the shape of a service, with what else it has."""
    if name == "searxng":
        results = [
            {"url": u, "title": t, "content": c, "engine": "e", "engines": ["e"], "score": 1.0} for u, t, c in rows
        ]
        return {"query": "q", "number_of_results": 0, "results": results, "answers": [], "infoboxes": [],
                "suggestions": [], "unresponsive_engines": []}  # fmt: skip
    if name == "serper":
        organic = [{"link": u, "title": t, "snippet": c, "position": i} for i, (u, t, c) in enumerate(rows, 1)]
        return {"searchParameters": {"q": "q", "type": "search"}, "organic": organic, "credits": 1}
    if name == "brave":
        marked = [(u, t, c.replace("zorvex", "<strong>zorvex</strong>").replace("&", "&amp;")) for u, t, c in rows]
        results = [{"url": u, "title": t.replace("&", "&amp;"), "description": c, "age": "May 3"} for u, t, c in marked]
        return {"type": "search", "query": {"original": "q"}, "web": {"type": "search", "results": results}}
    results = [{"url": u, "title": t, "content": c, "score": 0.9, "raw_content": None} for u, t, c in rows]
    return {"query": "q", "answer": None, "images": [], "results": results, "response_time": 0.4}


@pytest.fixture
async def site() -> AsyncIterator[ApiSite]:
    async with api_site() as site:
        yield site


def provider_of(site: ApiSite, name: ProviderName, store: PageStore | None = None, **options: Any) -> SearchProvider:
    store = PageStore([], "live") if store is None else store
    url = options.pop("url", f"{site.url}/search")
    return search_provider(name, store=store, client=site.client, url=url, environment=KEYS, **options)


@pytest.mark.parametrize("name", NAMES)
async def test_hits_are_read_whatever_the_service(site: ApiSite, name: ProviderName) -> None:
    site.says("/search", answer_of(name, ROWS))
    hits = await provider_of(site, name).search("  zorvex\n maker ", 5)
    assert [(hit.url, hit.title, hit.snippet) for hit in hits] == [
        ("https://registry.test/zorvex", "Zorvex & its makers", "Zorvex was approved in 2019."),
        ("https://registry.test/trial", "https://registry.test/trial", "A trial of zorvex."),
    ]
    sent = site.asked[0]
    if name == "searxng":
        assert sent.query == {"q": "zorvex maker", "format": "json"}
    elif name == "brave":
        assert (sent.query["q"], sent.query["count"]) == ("zorvex maker", "10")
        assert sent.headers["x-subscription-token"] == KEY
    elif name == "serper":
        assert json.loads(sent.body) == {"q": "zorvex maker", "num": 10}
        assert sent.headers["x-api-key"] == KEY
    else:
        assert json.loads(sent.body)["query"] == "zorvex maker"
        assert sent.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [None, [], "text", 7, [None, 3, {}, {"url": None, "link": 5}], {"results": "x"}])
async def test_missing_and_odd_fields_are_no_hits(site: ApiSite, name: ProviderName, part: Any) -> None:
    answer = answer_of(name, [])
    for key in ("results", "organic", "web"):
        if key in answer:
            answer[key] = part
    site.says("/search", answer)
    assert await provider_of(site, name).search("q", 5) == []


@pytest.mark.parametrize("name", NAMES)
async def test_hits_that_cannot_be_opened_are_left_out(site: ApiSite, name: ProviderName) -> None:
    rows = [
        ("https://denied.test/answers", "Answers", "The answer is 42."),
        ("javascript:alert(1)", "Bad", ""),
        ("ftp://registry.test/x", "Bad", ""),
        ("https://user:pass@registry.test/", "Bad", ""),
        *ROWS,
        *ROWS,
    ]

    class Refuses:
        def check_url(self, url: str) -> None:
            if "denied" in url:
                raise ToolFailure("denied", ToolErrorKind.BLOCKED)

    site.says("/search", answer_of(name, rows))
    hits = await provider_of(site, name, guard=Refuses()).search("q", 5)
    assert [hit.url for hit in hits] == ["https://registry.test/zorvex", "https://registry.test/trial"]
    assert len(await provider_of(site, name).search("q", 1)) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (
            Reply(body="<html>Access denied</html>", content_type="text/html"),
            "execution",
            "a web page",
        ),
        (Reply(body='{"results": [', status=200), "execution", "no readable data"),
        (Reply(body="[1, 2]"), "execution", "no readable data"),
        (Reply(body="[" * 200_000), "execution", "no readable data"),
        (Reply(body=b"\xff\xfe\x00"), "execution", "no readable data"),
        (Reply(body={"message": f"Unauthorized {KEY}"}, status=403), "execution", "refuses the request (status 403)"),
        (Reply(body={"detail": {"error": "limit"}}, status=432), "execution", "refuses the request (status 432)"),
        (Reply(body={"detail": "q"}, status=422), "execution", "does not take this request (status 422)"),
        (Reply(body="oops", status=500, content_type="text/html"), "execution", "out of order (status 500)"),
        (Reply(status=429, headers={"Retry-After": "3600"}), "execution", "too many requests"),
        (Reply(body={}, delay_s=3.0), "timeout", "no answer from"),
    ],
)
@pytest.mark.parametrize("name", ["brave", "serper"])
async def test_failures_are_told_in_words(
    site: ApiSite, name: ProviderName, reply: Reply, kind: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.says("/search", reply)
    with caplog.at_level(logging.DEBUG), pytest.raises(ToolFailure) as caught:
        await provider_of(site, name, timeout_s=1.0).search("q", 5)
    assert (caught.value.kind.value, said in str(caught.value)) == (kind, True), str(caught.value)
    for text in (str(caught.value), caplog.text):
        assert KEY not in text
        assert "127.0.0.1" not in str(caught.value)


async def test_a_busy_service_is_asked_again(site: ApiSite) -> None:
    site.says("/search", Reply(status=429, headers={"Retry-After": "1"}), answer_of("serper", ROWS))
    started = time.monotonic()
    assert len(await provider_of(site, "serper").search("q", 5)) == 2
    assert 0.9 < time.monotonic() - started < 5.0
    site.says("/search", Reply(status=502), answer_of("serper", ROWS))
    assert len(await provider_of(site, "serper").search("q", 5)) == 2
    assert len(site.asked) == 4
    site.says("/search", Reply(status=503))
    with pytest.raises(ToolFailure, match="status 503"):
        await provider_of(site, "serper").search("q", 5)
    assert len(site.asked) == 7


async def test_a_service_that_is_down_is_named_not_its_address(site: ApiSite) -> None:
    url = f"http://127.0.0.1:{unused_port()}/search"
    guard = Guard(open_addresses=(url[7:-7],))
    async with HttpClient(guard, user_agent="test", robots=False) as client:
        provider = search_provider("searxng", store=PageStore([], "live"), client=client, url=url)
        with pytest.raises(ToolFailure) as caught:
            await provider.search("q", 5)
    assert str(caught.value) == "SearXNG: nothing answers there"
    with pytest.raises(ToolFailure) as caught:
        await provider_of(site, "searxng", url="http://10.9.8.7/search").search("q", 5)
    assert caught.value.kind is ToolErrorKind.BLOCKED
    assert "10.9.8.7" not in str(caught.value)


async def test_a_searxng_whose_engines_do_not_answer_is_a_failure_not_an_empty_result(site: ApiSite) -> None:
    site.says("/search", answer_of("searxng", []) | {"unresponsive_engines": [["e", "timeout"]]})
    with pytest.raises(ToolFailure, match="no answer from the engines"):
        await provider_of(site, "searxng").search("q", 5)


@pytest.mark.parametrize(("query", "said"), [(" \n", "empty"), ("x" * 401, "401 characters")])
async def test_bad_queries_are_not_sent(site: ApiSite, query: str, said: str) -> None:
    with pytest.raises(ToolFailure, match=said) as caught:
        await provider_of(site, "tavily").search(query, 5)
    assert caught.value.kind is ToolErrorKind.INVALID_ARGUMENTS
    assert site.asked == []


@pytest.mark.parametrize("name", NAMES)
async def test_a_recording_replays_without_key_and_network_and_holds_no_key(
    site: ApiSite, name: ProviderName, tmp_path: Path
) -> None:
    answer = answer_of(name, ROWS) | {"echo": KEY, "quoted": "sk-very%2Bsecret%2F0123456789"}
    # A service of bad manners: it sends the key back in body and headers.
    site.says("/search", Reply(body=answer, headers={"ETag": KEY, "X-Key": KEY}), Reply(body=f"{KEY}", status=401))
    store = PageStore(tmp_path / "pages", "record")
    provider = provider_of(site, name, store)
    hits = await provider.search("zorvex", 2)
    with pytest.raises(ToolFailure) as refused:
        await provider.search("other", 2)
    stored = bytes_of(tmp_path)
    assert b"zorvex" in stored
    if name != "searxng":  # which has no key: what looks like one is the site's own text
        assert KEY.encode() not in stored
        assert b"sk-very%2B" not in stored
    assert len(site.asked) == 2
    again = search_provider(name, store=PageStore(tmp_path / "pages"), client=None, environment={})
    assert await again.search("zorvex", 2) == hits
    with pytest.raises(ToolFailure) as replayed:
        await again.search("other", 2)
    assert (str(replayed.value), replayed.value.kind) == (str(refused.value), refused.value.kind)
    with pytest.raises(ToolFailure) as missed:
        await again.search("never asked", 2)
    assert missed.value.kind is ToolErrorKind.NOT_FOUND
    assert len(site.asked) == 2


async def test_a_model_reads_hits_of_a_provider(site: ApiSite) -> None:
    site.says("/search", answer_of("brave", ROWS))
    provider = provider_of(site, "brave")
    web = OpenWebTools(PageStore([], "live"), search=provider.search)
    call = ToolCall(id="c", name="search", arguments={"query": "zorvex"}, raw="")
    (result,) = await Toolbox(web.tools()).run([call], metadata={}, state={})
    assert result.error is None
    assert "Zorvex & its makers https://registry.test/zorvex\n  Zorvex was approved in 2019." in result.content
    assert KEY not in json.dumps(result.metadata)


@pytest.mark.parametrize("name", ["serper", "brave", "tavily"])
def test_a_missing_key_is_named_and_a_broken_one_is_not_shown(name: ProviderName) -> None:
    store = PageStore([], "live")
    with pytest.raises(ProviderError, match=f"{name.upper()}_API_KEY"):
        search_provider(name, store=store, client=None, environment={})
    with pytest.raises(ProviderError, match=f"{name.upper()}_API_KEY") as caught:
        search_provider(name, store=store, client=None, environment={f"{name.upper()}_API_KEY": "two\nlines"})
    assert "lines" not in str(caught.value)


def test_addresses() -> None:
    assert provider_url("searxng", None, {"SEARXNG_URL": "http://Search.intranet:8080"}) == (
        "http://search.intranet:8080/search"
    )
    assert provider_url("searxng", "https://s.test/searx/search", {}) == "https://s.test/searx/search"
    assert provider_url("brave", None, {}).startswith("https://api.search.brave.com/")
    with pytest.raises(ProviderError, match="SEARXNG_URL"):
        provider_url("searxng", None, {})
    with pytest.raises(ProviderError, match="only http and https"):
        provider_url("searxng", "file:///etc/passwd", {})
    with pytest.raises(ProviderError, match="there are: searxng, serper, brave, tavily"):
        provider_url("bing")  # type: ignore[arg-type]
