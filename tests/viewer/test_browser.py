"""The pages in a real Chromium: by mouse, by keyboard, with hostile traces, from disk (B16)."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop.view.__main__ import main
from bench.viewer import episode_line
from tests.viewer.conftest import Server
from tools.chromium import find_chromium

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(find_chromium()), args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that notes whatever must not happen."""

    def __init__(self, browser: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 860})
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.on("dialog", lambda dialog: self.faults.append("dialog"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, url: str, ready: str) -> Any:
        self.page.goto(url)
        self.page.wait_for_selector(ready)
        return self.page


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    found = Tab(chromium)
    yield found
    assert found.faults == []
    found.context.close()


def until(page: Any, condition: str) -> None:
    """Ask again until it holds. Playwright's own way would `eval` in the page, which our policy refuses."""
    end = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def rows(server: Server, query: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.url}/api/episodes?q={query}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["rows"]
        return found


def test_the_run_page(tab: Tab, server: Server) -> None:
    page = tab.open(f"{server.url}/", ".chart")
    assert page.locator(".chart").count() >= 3
    assert "1 lines of metrics.jsonl cannot be read" in page.locator(".notices").inner_text()
    assert "alarm truncated: at steps 2 to 3, 5" in page.locator(".notices").inner_text()
    page.locator(".tablebox a").first.click()
    page.wait_for_selector(".tokens .cursor")
    assert "30" in page.locator(".inspector").inner_text()


def test_the_list_by_mouse(tab: Tab, server: Server) -> None:
    page = tab.open(f"{server.url}/#/episodes", ".listrow")
    assert page.locator(".listrow").count() == 10
    shown = [float(text) for text in page.locator(".listrow .c-kl").all_inner_texts()]
    expected = ",".join(f"{value:g}" for value in sorted(shown, reverse=True))
    assert len(set(shown)) > 5
    page.get_by_role("button", name="KL", exact=True).click()
    until(page, "location.hash.includes('sort=-kl')")
    until(page, f"[...document.querySelectorAll('.listrow .c-kl')].map(e => +e.innerText).join() === {expected!r}")
    page.get_by_role("button", name="failed").click()
    until(page, "document.querySelectorAll('.listrow').length === 1")
    page.locator("input.query").fill("tool:zebrafish")
    until(page, "document.querySelector('.toolbar').innerText.includes('1 of 10')")
    page.locator("input.query").fill("colour:red")
    until(page, "document.querySelector('.toolbar').innerText.includes('there is no such field')")
    tab.faults[:] = [fault for fault in tab.faults if "400" not in fault]  # Chromium's note of the answer to that


def test_the_list_by_keyboard(tab: Tab, server: Server) -> None:
    page = tab.open(f"{server.url}/#/episodes", ".listrow")
    page.keyboard.press("/")
    page.keyboard.type("step:1")
    until(page, "document.querySelectorAll('.listrow').length === 6")
    page.keyboard.press("Escape")
    for key in "jjxjx":
        page.keyboard.press(key)
    page.wait_for_selector("text=Compare these two")
    page.keyboard.press("d")
    page.wait_for_selector(".halves .tokens")
    page.go_back()
    page.wait_for_selector(".listrow.cursor")
    assert page.locator("input.query").input_value() == "step:1"
    page.keyboard.press("Enter")
    page.wait_for_selector(".dialogue")


def test_an_episode_by_keyboard(tab: Tab, server: Server) -> None:
    [row] = rows(server, "unusable>0")
    page = tab.open(f"{server.url}/#/episode/{row['key']}", ".turn.current, .turn")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator(".turn.current").get_attribute("data-turn") == "2"
    assert "turn=2" in page.url
    page.keyboard.press("t")
    page.wait_for_selector(".tokens .tok")
    page.keyboard.press("g")
    page.keyboard.press("]")
    assert "30 nats" in page.locator(".inspector").inner_text()
    position = int(re.search(r"token=(\d+)", page.url).group(1))  # type: ignore[union-attr]
    page.keyboard.press("h")
    assert "unusable" in page.locator(".inspector").inner_text()
    page.keyboard.press("h")
    assert "not scored" in page.locator(".inspector").inner_text()
    assert f"token={position - 2}" in page.url
    page.reload()
    page.wait_for_selector(".tokens .cursor")
    assert page.locator(".cursor.tok").get_attribute("data-i") == str(position - 2)
    for mark in ("m0", "m1", "m2", "m3"):
        assert page.locator(f".tokens .tok.{mark}").count() > 0
    page.keyboard.press("m")
    assert page.locator(".tokens.showmask").count() == 1
    page.keyboard.press("w")
    page.locator(".worst .jump").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f".cursor.tok[data-i='{position}']")
    page.keyboard.press("r")
    assert "token ids, exact" in page.locator(".raw").inner_text()
    page.keyboard.press("n")
    until(page, f"document.querySelector('h1').textContent !== '{row['id']}'")
    page.keyboard.press("p")
    until(page, f"document.querySelector('h1').textContent === '{row['id']}'")
    page.keyboard.press("?")
    assert page.locator("dialog.help[open]").count() == 1
    page.keyboard.press("Escape")
    theme = page.evaluate("document.documentElement.dataset.theme || ''")
    page.keyboard.press("T")
    assert page.evaluate("document.documentElement.dataset.theme") != theme


def test_playback(tab: Tab, server: Server) -> None:
    key = rows(server, "step:1")[0]["key"]
    page = tab.open(f"{server.url}/#/episode/{key}", ".turn")
    page.keyboard.press(".")
    page.keyboard.press(".")
    assert page.locator(".turn.current").get_attribute("data-turn") == "1"
    assert page.locator(".turn.future").count() == 6
    page.get_by_label("step by").select_option("token")
    page.get_by_label("steps a second").select_option("30")
    page.get_by_label("step forward").click()
    page.wait_for_selector(".tokens .future")
    before = int(page.locator(".cursor.tok").get_attribute("data-i"))
    page.get_by_label("play or pause").click()
    until(page, f"Number(document.querySelector('.cursor.tok').dataset.i) > {before + 5}")
    page.get_by_label("play or pause").click()
    stopped = page.locator(".cursor.tok").get_attribute("data-i")
    time.sleep(0.3)
    assert page.locator(".cursor.tok").get_attribute("data-i") == stopped
    page.get_by_label("position in the episode").fill("17")
    assert page.locator(".cursor.tok").get_attribute("data-i") == "17"


def test_compare(tab: Tab, server: Server) -> None:
    first, second = rows(server, "id:/t0/")
    page = tab.open(f"{server.url}/#/episode/{first['key']}", ".turn")
    page.get_by_label("compare with").select_option(second["key"])
    page.wait_for_selector(".halves .tokens .tok")
    assert "First difference at token 0" in page.locator(".toolbar").inner_text()
    assert page.locator(".firstdiff").count() == 2
    assert page.locator(".banner").count() == 0
    page.keyboard.press("s")
    until(page, f"location.hash === '#/compare/{second['key']}/{first['key']}'")


def check_hostile(tab: Tab, page: Any) -> None:
    for view in ("dialogue", "tokens", "worst", "raw"):
        page.locator(".tabs button", has_text=view).click()
        page.evaluate("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
        assert page.evaluate("window.owned === undefined && ({}).polluted === undefined")
        assert page.locator("#outlet img, #outlet script, #outlet style, #outlet iframe").count() == 0
        assert page.locator("a[href^='javascript']").count() == 0
        assert not re.search("[\u202e\u2066\u200b\x1b]", page.locator("body").inner_text())
        assert page.locator("body").is_visible()


def test_hostile_traces(tab: Tab, server: Server) -> None:
    tab.open(f"{server.url}/#/episodes", ".listrow")
    [row] = rows(server, "is:failed")
    page = tab.open(f"{server.url}/#/episode/{row['key']}", ".turn")
    check_hostile(tab, page)
    assert "\\u{202e}evil" in page.locator(".raw").inner_text()
    assert all(url.startswith((server.url, "data:")) for url in tab.requests)


def test_one_file_from_disk(tab: Tab, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main([str(run), "--export", str(out), "--query=-step:1", "--cache", str(tmp_path)]) == 0
    page = tab.open(out.as_uri(), ".listrow")
    assert page.locator(".listrow").count() == 4
    page.locator(".listrow.failed").click()
    page.wait_for_selector(".turn")
    check_hostile(tab, page)
    page.keyboard.press("1")
    page.wait_for_selector(".chart")
    assert [url for url in tab.requests if url != out.as_uri() and not url.startswith("data:")] == []


def test_follow_reaches_the_page(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(episode_line(0, tokens=200))
    server = Server(str(path), "--follow", "--cache", str(tmp_path / "cache"))
    page = tab.open(f"{server.url}/#/episodes", ".listrow")
    with path.open("ab") as file:
        file.write(episode_line(1, tokens=200))
    start = time.monotonic()
    until(page, "document.querySelectorAll('.listrow').length === 2")
    assert time.monotonic() - start < 2
    tab.page.goto("about:blank")
    server.stop()


@pytest.mark.parametrize(("tokens", "limit_s"), [(32_768, 0.3), (100_000, 2.0)])
def test_long_episodes_open_and_scroll(tab: Tab, tmp_path: Path, tokens: int, limit_s: float) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b"".join(episode_line(i, tokens=tokens, turns=60) for i in range(2)))
    server = Server(str(path), "--cache", str(tmp_path / "cache"))
    key = rows(server, "")[0]["key"]
    page = tab.open(f"{server.url}/#/episodes", ".listrow")
    taken = []
    for _ in range(3):
        page.evaluate("location.hash = '#/episodes'")
        page.wait_for_selector(".listrow")
        taken.append(
            page.evaluate(
                """(key) => new Promise((done) => {
                    const start = performance.now();
                    location.hash = `#/episode/${key}?view=tokens`;
                    const look = () => document.querySelector('.tokens .tok')
                        ? requestAnimationFrame(() => done(performance.now() - start)) : requestAnimationFrame(look);
                    look();
                })""",
                key,
            )
        )
    nodes, frames = page.evaluate(
        """() => new Promise((done) => {
            const box = document.querySelector('.tokens');
            let most = 0, frames = 0;
            const start = performance.now();
            const step = () => {
                box.scrollTop += 400;
                frames += 1;
                most = Math.max(most, document.querySelectorAll('*').length);
                if (performance.now() - start < 1000) requestAnimationFrame(step);
                else done([most, frames]);
            };
            step();
        })"""
    )
    print(f"{tokens} tokens: open {sorted(taken)[1]:.0f} ms, {nodes} nodes at most, {frames} frames/s while scrolling")
    page.keyboard.press("t")
    page.wait_for_selector(".turn")
    assert page.evaluate("document.querySelectorAll('*').length") <= 3000
    assert nodes <= 3000
    assert sorted(taken)[1] / 1000 < limit_s * 2  # twice the aim: the machine that runs this may be busy
    server.stop()
