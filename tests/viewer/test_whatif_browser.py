"""The what-if, stored pages and prompts in a real Chromium: by mouse and by keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_loop.view.__main__ import main
from tests.viewer.conftest import HOSTILE, SITE, Played, Server, call
from tests.viewer.test_browser import Tab, chromium, rows, tab, until

__all__ = ["chromium", "tab"]  # fixtures

HARMLESS = "window.owned === undefined && document.querySelectorAll('#outlet img, #outlet script').length === 0"
"""What hostile text must leave true."""

pytestmark = pytest.mark.browser


@pytest.fixture
def forking(played: Played, tab: Tab) -> Iterator[Server]:
    found = Server(str(played.path), "--what-if", "--cache", str(played.path.parent / "cache"))
    yield found
    tab.page.goto("about:blank")
    found.stop()


def test_a_fork_by_mouse(tab: Tab, forking: Server, played: Played) -> None:
    page = tab.open(forking.opens, ".facts")
    assert forking.token not in page.url
    assert forking.token not in page.evaluate("JSON.stringify([history.state, document.documentElement.outerHTML])")
    page.get_by_role("link", name="Episodes", exact=True).click()
    page.locator(".listrow").first.click()
    page.locator("[data-turn='3'] button", has_text="what if").click()
    box = page.get_by_label("text of turn 3")
    assert box.input_value() == played.episode().turns[3].text
    page.get_by_role("button", name="Run the edited text, then stop").click()  # nothing was edited: the same tokens
    page.wait_for_selector("text=The same tokens throughout")
    page.go_back()
    page.wait_for_selector(".turn")
    page.locator("[data-turn='1'] button", has_text="what if").click()
    page.get_by_label("text of turn 1").fill("")
    page.get_by_role("button", name="Run the edited text, then stop").click()
    page.wait_for_selector("text=the edited text is empty")
    page.get_by_label("text of turn 1").fill(call("browse", url=HOSTILE))
    page.get_by_role("button", name="Run the edited text, then stop").click()
    page.wait_for_selector(".halves .tokens .tok")
    start = played.episode().turns[1].start
    assert start is not None
    toolbar = page.locator(".toolbar").inner_text()
    first = int(re.search(r"First difference at token (\d+)", toolbar).group(1))  # type: ignore[union-attr]
    assert first >= start
    assert page.locator(".firstdiff").count() == 2
    assert {mark.get_attribute("data-i") for mark in page.locator(".firstdiff").all()} == {str(first)}
    assert "fork of 1/t/0 at turn 1: edited" in page.locator(".compare").inner_text()
    page.screenshot(path=str(played.path.parent / "compare.png"))
    page.locator(".half h2 a").nth(1).click()
    page.wait_for_selector(".turn")
    assert page.evaluate(HARMLESS)
    page.get_by_role("link", name="compare with it").click()
    page.wait_for_selector(".halves")
    page.keyboard.press("1")
    page.get_by_role("link", name="2 forks").click()
    until(page, "document.querySelectorAll('.listrow').length === 2")
    tab.faults[:] = [fault for fault in tab.faults if "422" not in fault]  # Chromium's note of the empty text
    ids = [json.loads(line)["id"] for line in played.forks.read_text().splitlines()]
    assert ids == ["1/t/0#fork-1", "1/t/0#fork-2"]
    assert all(url.startswith((forking.url, "data:", "about:")) for url in tab.requests)


def test_a_fork_by_keyboard(tab: Tab, forking: Server, played: Played) -> None:
    page = tab.open(forking.opens, ".facts")
    page.keyboard.press("2")
    page.wait_for_selector(".listrow")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn")
    for key in "jj":
        page.keyboard.press(key)
    page.keyboard.press("i")
    page.wait_for_selector(".whatif textarea:focus")
    page.screenshot(path=str(played.path.parent / "editor.png"))
    page.keyboard.press("Control+A")
    page.keyboard.type("It is j, k and ? that I type.")
    assert page.locator(".turn.current").get_attribute("data-turn") == "2"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".halves .tokens .firstdiff")
    [fork] = rows(forking, "id:%23fork-")
    assert fork["turns"] == 3
    page.reload()  # the token is remembered by the tab
    page.wait_for_selector(".halves")
    page.goto(f"{forking.url}/#/episode/{fork['key']}")
    page.wait_for_selector(".turn")
    page.keyboard.press("i")
    page.wait_for_selector(".whatif textarea:focus")
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    until(page, "document.querySelector('.whatif') === null")


def test_without_the_address_nothing_is_played(tab: Tab, forking: Server, played: Played) -> None:
    page = tab.open(f"{forking.url}/#/episodes", ".listrow")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn .turnhead")
    assert page.get_by_role("button", name="what if").count() == 0
    page.keyboard.press("i")
    page.wait_for_selector("text=open the address that it prints")
    page.evaluate(f"location.hash = '#/what-if/{'x' * 43}'")  # pasted into a tab that is open, and of another process
    page.wait_for_selector(".facts")
    page.keyboard.press("2")
    page.wait_for_selector(".listrow")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn .turnhead")
    page.keyboard.press("i")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=not opened with the address that the command printed")
    assert not played.forks.exists()
    tab.faults[:] = [fault for fault in tab.faults if "403" not in fault]


def test_stored_pages_and_prompts(tab: Tab, forking: Server, played: Played, tmp_path: Path) -> None:
    page = tab.open(f"{forking.url}/#/episodes", ".listrow")
    page.keyboard.press("Enter")
    page.locator("[data-turn='1'] .pagelink").click()
    page.wait_for_selector(".pagetext")
    text = page.locator(".page").inner_text()
    assert "Made by Acme" in text
    assert f"{SITE}/drug" in text
    assert "evil" in text
    assert not re.search("[\u202e\u2066\u200b\x1b]", text)
    assert page.locator(".banner").count() == 0
    assert page.evaluate(HARMLESS)
    assert page.locator("#outlet a").count() == 1  # nothing in it leads anywhere
    page.screenshot(path=str(played.path.parent / "page.png"))
    page.get_by_role("link", name="back to the episode").click()
    page.wait_for_selector(".turn.current[data-turn='1']")
    page.keyboard.press("r")
    page.get_by_role("button", name="Show the exact prompt").click()
    page.wait_for_selector(".prompttext")
    shown = page.locator(".prompttext").inner_text()
    assert "The drug" in shown  # the result of turn 0 is in the prompt of turn 1
    assert "Made by Acme" not in shown
    page.screenshot(path=str(played.path.parent / "prompt.png"))
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=forking.url)
    page.get_by_role("button", name="Copy the prompt").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()").rstrip("\n") == shown.rstrip("\n")
    assert all(url.startswith((forking.url, "data:", "about:")) for url in tab.requests)
    out = tmp_path / "out.html"
    assert main([str(played.path), "--export", str(out), "--cache", str(tmp_path / "cache2")]) == 0
    page = tab.open(out.as_uri(), ".listrow")
    page.locator(".listrow").click()
    page.wait_for_selector(".turn .card")
    assert page.locator(".pagelink").count() == 0
    page.keyboard.press("i")
    page.wait_for_selector("text=Start the viewer with --what-if")
