"""MedBrowse on a real site of this machine: live, recorded, searched, rendered, refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import envs
from envs.registry import RegistryError
from envs.types import AssistantMessage, Limits, Task
from tools import way_out
from tools.browse_config import browse_config
from tools.guard import DENIED
from tools.store import PageStore
from tools.types import ToolCall

TASK = Task(id="t", messages=({"role": "user", "content": "Who makes Abc?"},), metadata={"answer": "Acme"})
SCRIPTED = (
    "<title>App</title><p id=x>loading</p>"
    "<script>document.getElementById('x').textContent = 'Made by ' + 'Acme'</script>"
)


class Site:
    """A site, and a SearXNG, at a port of their own."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.url = ""

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    async def answer(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        self.agents.add(request.headers.get("User-Agent", ""))
        if request.path == "/drug":
            return web.Response(text="<h1>Abc</h1><p>Made by <a href='/company'>Acme</a></p>", content_type="text/html")
        if request.path == "/app":
            return web.Response(text=SCRIPTED, content_type="text/html")
        if request.path == "/robots.txt":
            return web.Response(text="User-agent: *\nDisallow: /private\n")
        if request.path == "/out":
            raise web.HTTPFound("http://169.254.169.254/latest/meta-data/")
        if request.path == "/search":
            title = f"Hit {self.asked['/search']}"
            hits = [
                {"url": f"{self.url}/drug", "title": title, "content": request.query["q"]},
                {"url": "https://huggingface.co/datasets/AIM-Harvard/MedBrowseComp", "title": "answers"},
            ]
            return web.json_response({"results": hits})
        return web.Response(status=404)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    here = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", here.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    here.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield here
    await way_out.close()
    await runner.cleanup()


def make(site: Site, **browse: Any) -> Any:
    table = {
        "mode": "live",
        "engine": "http",
        "tools": [],
        "open_addresses": [site.address],
        "requests_per_minute": {"127.0.0.1": 6000},
        "contact": "me@example.org",
    }
    return envs.make("medbrowse", limits=Limits(max_turns=50), browse=table | browse)


async def text(env: Any, name: str, **arguments: Any) -> str:
    call = ToolCall(id="c", name=name, arguments=arguments, raw="")
    content: str = (await env.astep(AssistantMessage(content="", tool_calls=(call,)))).observation[0]["content"]
    return content


async def test_live_pages_are_fetched_each_time(site: Site) -> None:
    env = make(site)
    await env.areset(options={"task": TASK})
    for _ in range(2):
        assert f"Made by Acme [1]\n\n[1] {site.url}/company" in await text(env, "browse", url=f"{site.url}/drug")
    assert await text(env, "browse", url="1") == f"not_found: no page at {site.url}/company"
    assert site.asked["/drug"] == 2
    assert site.agents == {"distill-gym/0.1 (research; me@example.org)"}
    assert env.episode_metadata() == {"pages": {"mode": "live", "manifest": PageStore(()).manifest_hash}}
    await env.aclose()


async def test_what_the_guard_and_robots_txt_refuse(site: Site) -> None:
    env = make(site)
    await env.areset(options={"task": TASK})
    port = int(site.address.rpartition(":")[2])
    for url in ("http://169.254.169.254/", f"http://127.0.0.1:{port + 1}/", "http://10.0.0.1/", f"{site.url}/out",
                f"{site.url}/private/x", f"https://{DENIED[0]}/MedBrowseComp"):  # fmt: skip
        answer = await text(env, "browse", url=url)
        assert answer.startswith("blocked: "), (url, answer)
        assert ("robots" in answer) == ("/private/" in url), (url, answer)
    assert site.asked["/private/x"] == 0
    await env.aclose()


async def test_many_environments_are_one_visitor_and_record_one_page_once(site: Site, tmp_path: Path) -> None:
    all_envs = [make(site, mode="record", store=str(tmp_path / "pages")) for _ in range(6)]
    for env in all_envs:
        await env.areset(options={"task": TASK})
    answers = await asyncio.gather(*(text(env, "browse", url=f"{site.url}/drug") for env in all_envs))
    assert len(set(answers)) == 1
    assert site.asked == {"/robots.txt": 1, "/drug": 1}
    for env in all_envs:
        await env.aclose()
    assert all_envs[0].episode_metadata()["pages"]["manifest"] == PageStore(tmp_path / "pages").manifest_hash


async def test_search_is_recorded_and_replayed(site: Site, tmp_path: Path) -> None:
    store = str(tmp_path / "pages")
    env = make(site, mode="record", store=store, search="searxng", search_url=site.url, only_seen_urls=True)
    assert [spec.name for spec in env.tool_specs] == ["search", "browse", "find", "submit_answer"]
    await env.areset(options={"task": TASK})
    found = await text(env, "search", query="abc")
    assert f"Hit 1 {site.url}/drug\n  abc" in found
    assert "huggingface" not in found  # denied pages are no hits
    opened = await text(env, "browse", url=f"{site.url}/drug")
    assert "Acme" in opened
    await env.aclose()

    replay = make(site, mode="replay", store=store, search="searxng", only_seen_urls=True)
    await replay.areset(options={"task": TASK})
    assert await text(replay, "search", query="abc") == found
    assert await text(replay, "browse", url=f"{site.url}/drug") == opened
    assert (await text(replay, "search", query="other")).startswith("not_found: ")
    assert site.asked["/search"] == 1


def test_services_are_reached_where_pages_may_not_be() -> None:
    config = browse_config(
        {"mode": "live", "allow": ["fda.gov"], "search": "searxng", "search_url": "http://127.0.0.1:8888"}
    )
    pages, services = way_out.guard_of(config), way_out.services_guard(config)
    assert services.is_open("127.0.0.1", 8888)
    assert not pages.is_open("127.0.0.1", 8888)
    assert not services.is_open("127.0.0.1", 80)
    assert not services.is_open("10.0.0.1", 8888)
    assert services.check_url("https://eutils.ncbi.nlm.nih.gov/").host == "eutils.ncbi.nlm.nih.gov"
    assert pages.deny == DENIED
    assert way_out.guard_of(browse_config({"mode": "live", "deny": ["a.test"]})).deny == ("a.test",)


def test_a_missing_key_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(RegistryError, match="SERPER_API_KEY"):
        envs.make("medbrowse", browse={"mode": "live", "search": "serper"})


def test_all_typed_tools_are_there_and_a_replay_answers_without_network(tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text("")
    env: Any = envs.make("medbrowse", browse={"mode": "replay", "store": str(tmp_path / "pages.jsonl")})
    assert [spec.name for spec in env.tool_specs] == [
        "browse", "find", "trial", "trials", "pubmed", "drug", "submit_answer"
    ]  # fmt: skip
    outcome = env.reset(options={"task": TASK})
    assert outcome[1]["task_id"] == "t"
    call = ToolCall(id="c", name="trial", arguments={"nct": "NCT00000001"}, raw="")
    observation, *_ = env.step(AssistantMessage(content="", tool_calls=(call,)))
    assert observation[0]["content"].startswith("not_found: ")
    env.close()


CODE = """
import asyncio, sys
import envs
from envs.types import AssistantMessage, Task
from tools.types import ToolCall

async def main(url, address):
    env = envs.make("medbrowse", browse={"mode": "live", "engine": "http", "tools": [], "robots": False,
                                         "open_addresses": [address]})
    await env.areset(options={"task": Task(id="t", messages=({"role": "user", "content": "x"},))})
    call = ToolCall(id="c", name="browse", arguments={"url": url}, raw="")
    outcome = await env.astep(AssistantMessage(content="", tool_calls=(call,)))
    print(outcome.observation[0]["content"])
    await env.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_program_ends_without_leaving_anything_open(site: Site) -> None:
    command = [sys.executable, "-W", "error", "-c", CODE, f"{site.url}/drug", site.address]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert "Made by Acme [1]" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.browser
async def test_pages_are_rendered(site: Site, tmp_path: Path) -> None:
    env = make(site, engine="browser", mode="record", store=str(tmp_path / "pages"))
    await env.areset(options={"task": TASK})
    assert "Made by Acme" in await text(env, "browse", url=f"{site.url}/app")
    await env.aclose()
    replay = make(site, engine="browser", mode="replay", store=str(tmp_path / "pages"))
    await replay.areset(options={"task": TASK})
    assert "Made by Acme" in await text(replay, "browse", url=f"{site.url}/app")
    assert site.asked["/app"] == 1
