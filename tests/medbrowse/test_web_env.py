"""MedBrowse on the web and on recordings of it: configuration, tasks, a replay without network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.medbrowse.web_tasks import INGREDIENTS, QUESTIONS, web_tasks
from envs.registry import RegistryError
from envs.types import AssistantMessage, Limits, StepOutcome, Task
from tools.browse_config import BrowseConfig, BrowseConfigError, browse_config
from tools.pages import Page, PageError, write_pages
from tools.store import PageStore
from tools.types import ToolCall

SITE = "https://registry.test"
PAGES = [
    Page(url=f"{SITE}/", body="", text="[The drug](/drug) and [a slow page](/slow)", title="Home"),
    Page(url=f"{SITE}/drug", body="<main><h1>Abc</h1><p>Made by <a href='/company'>Acme</a></p></main>"),
    Page(url=f"{SITE}/slow", body="", status=0, error=PageError(kind="timeout", message="no answer in 45 s")),
]
TASK = Task(
    id="t",
    messages=({"role": "user", "content": f"Who makes Abc? Start at {SITE}/"},),
    metadata={"answer": "Acme", "question_type": "Ingredient"},
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_pages(tmp_path / "pages.jsonl", PAGES)
    return tmp_path / "pages.jsonl"


def make(store: Path, limits: Limits | None = None, **browse: Any) -> Any:
    table = {"mode": "replay", "store": str(store), "tools": []} | browse
    return envs.make("medbrowse", limits=limits or Limits(), browse=table, skip_verification=False)


async def call(env: Any, name: str, **arguments: Any) -> StepOutcome:
    outcome: StepOutcome = await env.astep(
        AssistantMessage(content="", tool_calls=(ToolCall(id="c", name=name, arguments=arguments, raw=""),))
    )
    return outcome


async def text(env: Any, name: str, **arguments: Any) -> str:
    content: str = (await call(env, name, **arguments)).observation[0]["content"]
    return content


async def test_an_episode_on_a_recording(store: Path) -> None:
    env = make(store)
    assert [spec.name for spec in env.tool_specs] == ["browse", "find", "submit_answer"]
    await env.areset(options={"task": TASK})
    first = await call(env, "browse", url=f"{SITE}/")
    assert "The drug [1] and a slow page [2]" in first.observation[0]["content"]
    assert first.info["tool_results"][0].metadata["seen"] == "the task"
    assert "Made by Acme [1]" in await text(env, "browse", url="1")
    assert await text(env, "browse", url="/slow") == "timeout: no answer in 45 s"
    assert await text(env, "browse", url="/other") == f"not_found: no page at {SITE}/other"
    assert (await call(env, "submit_answer", answer="Acme")).terminated
    assert await env.verify() == {"success": 1.0, "answered": 1.0}
    assert env.episode_metadata() == {"pages": {"mode": "replay", "manifest": PageStore(store).manifest_hash}}
    await env.areset(options={"task": TASK})
    assert await text(env, "find", text="Acme") == "execution: no page is open: browse one first"  # a new episode
    await env.aclose()


async def test_only_seen_urls_begins_with_those_of_the_task(store: Path) -> None:
    env = make(store, only_seen_urls=True)
    await env.areset(options={"task": TASK})
    assert (await text(env, "browse", url=f"{SITE}/drug")).startswith("blocked: ")
    assert "The drug [1]" in await text(env, "browse", url=f"{SITE}/")
    assert "Made by Acme" in await text(env, "browse", url=f"{SITE}/drug")


def test_environments_share_a_store(store: Path) -> None:
    one, two = make(store), make(store)
    assert one._live.store is two._live.store


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"browse": {}}, r"env_args\.browse: mode \"record\" needs store"),
        ({"browse": {"mode": "replay", "store": "/nowhere/pages"}}, r"env_args\.browse\.store: no page store at"),
        ({"browse": {"mode": "live", "stor": "x"}}, r"env_args\.browse\.stor: there is no such key; there are: mode"),
        ({"browse": {"mode": "live"}, "pages": "x.jsonl"}, "either pages"),
        ({"browse": {"mode": "live", "executable": "/no/chrome"}}, "/no/chrome"),
        ({"browse": {"mode": "live", "search": "searxng", "search_url": "ftp://x/"}}, "address of SearXNG"),
        ({"browse": {"mode": "live", "open_addresses": ["x"]}}, "open_addresses"),
        ({"browse": {"mode": "live"}, "limits": Limits(max_tool_output_chars=500)}, "max_tool_output_chars must be"),
    ],
)
def test_a_wrong_table_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        envs.make("medbrowse", **options)


def test_all_mistakes_of_a_table_at_once() -> None:
    with pytest.raises(BrowseConfigError) as caught:
        browse_config({"mode": "x", "contact": "a b", "ports": [0], "page_tokens": 1, "robots": 1, "search_url": 3})
    lines = str(caught.value).splitlines()
    named = {line.partition(": ")[0].removeprefix("browse.") for line in lines}
    assert named >= {"mode", "search_url", "contact", "ports.0", "robots", "page_tokens"}


@pytest.mark.parametrize("contact", ["me@example.org", "https://example.org/bot", ""])
def test_contacts(contact: str) -> None:
    assert browse_config({"mode": "live", "contact": contact}).contact == contact
    with pytest.raises(BrowseConfigError, match="mail address"):
        browse_config({"mode": "live", "contact": "nobody\r\nX: y"})


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "medbrowse.md").read_text()
    section = page.partition("## Keys of")[2].partition("\n### ")[0]
    table = re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)
    assert table == list(BrowseConfig.model_fields)


def test_questions_for_the_web() -> None:
    train, test = web_tasks(0), web_tasks(0, split="test")
    assert len(train) + len(test) == len(INGREDIENTS) * len(QUESTIONS) == len({task.id for task in (*train, *test)})
    ingredients = [{task.metadata["ingredient"] for task in tasks} for tasks in (train, test)]
    assert not ingredients[0] & ingredients[1]
    assert web_tasks(0, 7) == train[:7]
    assert web_tasks(1, 7) != train[:7]
    assert len(set(INGREDIENTS)) == len(INGREDIENTS)


async def test_without_a_golden_answer_nothing_is_graded(store: Path) -> None:
    env = make(store)
    tasks = env.default_tasks("eval", 3)
    assert [task.metadata["answer"] for task in tasks] == [None] * 3
    await env.areset(options={"task": tasks[0]})
    await call(env, "submit_answer", answer="Acme")
    assert await env.verify() == {}
