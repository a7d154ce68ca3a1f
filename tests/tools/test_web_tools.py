"""search, browse and find as a model calls them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.pages import Page
from tools.search import SearchIndex
from tools.store import PageStore
from tools.toolbox import Toolbox
from tools.types import ToolCall, ToolErrorKind, ToolResult
from tools.web import STATE_KEY, documents_of, split_pages, web_tools

SITE = "https://registry.test"


def html(title: str, body: str) -> str:
    return f"<html><head><title>{title}</title></head><body><nav>menu</nav><main><h1>{title}</h1>{body}</main></body>"


PAGES = [
    Page(url=f"{SITE}/trial/NCT1", body=html("Trial NCT1", "<p>Drug: <a href='/drug/abc'>Abc</a></p>")),
    Page(url=f"{SITE}/drug/abc", body=html("Abc", "<p>Made by <a href='../company/acme'>Acme</a></p>")),
    Page(url=f"{SITE}/company/acme", body=html("Acme", "".join(f"<p>Fact {i} is {i * 7}.</p>" for i in range(40)))),
    Page(url=f"{SITE}/gone", body="gone", status=410),
    Page(url=f"{SITE}/broken", body="broken", status=500),
    Page(url=f"{SITE}/data.json", body='{"a":\u200b 1}', content_type="application/json; charset=utf-8"),
    Page(url=f"{SITE}/paper.pdf", body="%PDF", content_type="application/pdf"),
    Page(url=f"{SITE}/empty", body=html("", "").replace("<h1></h1>", "")),
]


class Episode:
    def __init__(self, **options: Any) -> None:
        store = PageStore(PAGES)
        options.setdefault("page_chars", 200)
        self.box = Toolbox(web_tools(store, SearchIndex(documents_of(store)[:3]), **options))
        self.state: dict[str, Any] = {}

    async def __call__(self, name: str, **arguments: Any) -> ToolResult:
        call = ToolCall(id="c", name=name, arguments=arguments, raw="")
        (result,) = await self.box.run([call], metadata={}, state=self.state)
        return result

    async def text(self, name: str, **arguments: Any) -> str:
        return (await self(name, **arguments)).content


async def test_a_walk_through_the_site() -> None:
    episode = Episode()
    assert await episode.text("search", query="nct1 drug") == "Trial NCT1 /trial/NCT1"
    assert await episode.text("browse", url="/trial/NCT1") == "# Trial NCT1\n\nDrug: [Abc](/drug/abc)"
    assert await episode.text("browse", url="/drug/abc") == "# Abc\n\nMade by [Acme](/company/acme)"
    first = await episode("browse", url="/company/acme")
    assert first.content.endswith("\n[page 1/4]")
    assert len(first.content) <= 200
    assert first.metadata == {
        "url": f"{SITE}/company/acme",
        "sha256": PAGES[2].sha256,
        "page": 1,
        "num_pages": 4,
    }
    assert await episode.text("find", text="fact 30  IS") == "[page 3] Fact 30 is 210."
    assert (await episode.text("browse", url="/company/acme", page=4)).endswith("Fact 39 is 273.\n[page 4/4]")


async def test_urls_are_taken_in_every_form() -> None:
    episode = Episode()
    for url in ("/drug/abc", f"{SITE}/drug/abc", "drug/abc", " /drug/abc#part ", "HTTPS://REGISTRY.test/drug/abc"):
        assert (await Episode().text("browse", url=url)).startswith("# Abc")
    await episode("browse", url="/trial/NCT1")
    assert (await episode.text("browse", url="../drug/abc")).startswith("# Abc")
    # Relative to the open page this is /drug/trial/NCT1, which is not there; the site's root is tried next.
    assert (await episode.text("browse", url="trial/NCT1")).startswith("# Trial")


async def test_paths_need_a_base() -> None:
    store = PageStore([*PAGES, Page(url="https://other.test/x", body="x")])
    box = Toolbox(web_tools(store, SearchIndex(documents_of(store)), page_chars=200))
    calls = [ToolCall(id="c", name="search", arguments={"query": "acme"}, raw="")]
    calls += [ToolCall(id="d", name="browse", arguments={"url": "/drug/abc"}, raw="")]
    found, browsed = await box.run(calls, metadata={}, state={})
    assert f"Acme {SITE}/company/acme" in found.content  # two hosts: absolute
    assert browsed.content.startswith("invalid_arguments: cannot open this URL")


async def test_what_can_go_wrong() -> None:
    episode = Episode()
    assert await episode.text("search", query="zzz") == "no results"
    assert await episode.text("search", query=" ") == "invalid_arguments: the query is empty"
    assert await episode.text("find", text="x") == "execution: no page is open: browse one first"
    assert await episode.text("browse", url="/nope") == "not_found: no page at /nope"
    assert await episode.text("browse", url="/gone") == "not_found: no page at /gone"
    assert await episode.text("browse", url="/broken") == "execution: the page answered with status 500"
    assert await episode.text("browse", url="/paper.pdf") == "execution: the page is no text but application/pdf"
    assert await episode.text("browse", url="/empty") == "(empty page)"
    assert await episode.text("browse", url="/data.json") == '{"a": 1}'
    assert await episode.text("find", text="zzz") == "no match"
    assert await episode.text("find", text="") == "invalid_arguments: the text is empty"
    assert "has pages 1 to 4" in await episode.text("browse", url="/company/acme", page=6)
    assert "has 1 page" in await episode.text("browse", url="/drug/abc", page=2)
    assert "greater than or equal to 1" in await episode.text("browse", url="/drug/abc", page=0)
    assert (await episode.text("browse", url="file:///etc/passwd")).startswith(
        "invalid_arguments: cannot open this URL"
    )
    assert (await episode.text("browse", url="https://[bad")).startswith("invalid_arguments")
    assert episode.state[STATE_KEY]["url"] == f"{SITE}/data.json"  # a failed browse leaves the page open


async def test_episodes_share_tools_but_no_state() -> None:
    store = PageStore(PAGES)
    box = Toolbox(web_tools(store, SearchIndex(documents_of(store)), page_chars=400))
    browse = ToolCall(id="a", name="browse", arguments={"url": "/drug/abc"}, raw="")
    find = ToolCall(id="b", name="find", arguments={"text": "acme"}, raw="")
    one: dict[str, Any] = {}
    await box.run([browse], metadata={}, state=one)
    (mine,) = await box.run([find], metadata={}, state=one)
    (other,) = await box.run([find], metadata={}, state={})
    assert mine.content == "Made by [Acme](/company/acme)"
    assert other.error is not None
    assert other.error.kind is ToolErrorKind.EXECUTION


async def test_find_lists_a_few_lines_and_windows_long_ones() -> None:
    page = Page(url=f"{SITE}/x", body="needle\n" * 30 + "x " * 300 + "NEEDLE" + " y" * 300, content_type="text/plain")
    store = PageStore([page])
    box = Toolbox(web_tools(store, SearchIndex([]), page_chars=4000))
    state: dict[str, Any] = {}
    calls = [
        ToolCall(id="a", name="browse", arguments={"url": f"{SITE}/x"}, raw=""),
        ToolCall(id="b", name="find", arguments={"text": "needle"}, raw=""),
        ToolCall(id="c", name="find", arguments={"text": "x needle y"}, raw=""),
    ]
    _, many, long = await box.run(calls, metadata={}, state=state)
    assert many.content == "needle\n" * 10 + "(21 more)"
    assert "NEEDLE" in long.content
    assert len(long.content) < 220


async def test_snippets_on_request() -> None:
    found = await Episode(snippets=True, num_hits=1).text("search", query="made by acme")
    assert found == "Abc /drug/abc\n  # Abc Made by Acme"


async def test_a_hostile_page_is_cleaned_everywhere() -> None:
    nasty = "\u200b\u202e\x00\x1b[31m\u2066"
    page = Page(url=f"{SITE}/evil", body=html(f"T{nasty}itle", f"<p>te{nasty}xt <a href='/a{nasty}b'>l{nasty}</a></p>"))
    store = PageStore([page])
    box = Toolbox(web_tools(store, SearchIndex(documents_of(store)), page_chars=400))
    state: dict[str, Any] = {}
    arguments: list[tuple[str, dict[str, Any]]] = [
        ("browse", {"url": "/evil"}), ("search", {"query": "evil"}), ("find", {"text": "xt"}),
        ("browse", {"url": f"/no{nasty}"}), ("browse", {"url": "/evil", "pa\u202ege": 1}), (f"bro{nasty}", {}),
    ]  # fmt: skip
    calls = [ToolCall(id=str(i), name=name, arguments=given, raw="") for i, (name, given) in enumerate(arguments)]
    results = await box.run(calls, metadata={}, state=state)
    for result in results:
        assert not set(result.content) & set("\u200b\u202e\x00\x1b\u2066"), result
    assert "xt" in results[2].content


@given(st.text("ab \n", max_size=300), st.integers(50, 120))
def test_pages_hold_the_text_within_the_limit(text: str, page_chars: int) -> None:
    pages = split_pages(text, page_chars)
    assert pages
    assert (
        all(len(page) + len(f"\n[page {len(pages)}/{len(pages)}]") <= page_chars for page in pages) or len(pages) == 1
    )
    assert all(len(page) <= page_chars for page in pages)
    assert "".join("".join(pages).split()) == "".join(text.split())


def test_a_page_must_have_room() -> None:
    with pytest.raises(ValueError, match="page_chars"):
        web_tools(PageStore([]), SearchIndex([]), page_chars=20)
