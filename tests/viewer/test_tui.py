"""The terminal's screens, by keyboard; hostile episodes neither steer the terminal nor style themselves (B16)."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from agent_loop.view.index import Index
from agent_loop.view.pieces import pieces_of
from agent_loop.view.tui import ListPage, Viewer
from agent_loop.view.tui_episode import MARK_STYLES, EpisodePage, TokenPage
from agent_loop.view.tui_parts import Help, Rows, folded, heat, line_of
from bench.viewer import episode_line
from tests.viewer.conftest import HOSTILE, ROOT, hostile, line

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@pytest.fixture
def index(run: Path, tmp_path: Path) -> Iterator[Index]:
    found = Index([run], tmp_path / "cache")
    yield found
    found.close()


@asynccontextmanager
async def playing(index: Index, *, follow: bool = False) -> AsyncIterator[tuple[Viewer, Pilot[None]]]:
    app = Viewer(index, [pieces_of(root, None) for root in index.roots], follow=follow)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: isinstance(app.screen, ListPage) and app.screen.count > 0)
        yield app, pilot


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        await pilot.pause(0.02)


def drawn(app: Viewer) -> str:
    """The screen's text as it is sent to the terminal."""
    lines = [strip.text for strip in app.screen._compositor.render_strips()]
    return "\n".join(lines)


def said(app: Viewer, selector: str) -> str:
    return str(app.screen.query_one(selector, Static).content)


async def query(pilot: Pilot[None], text: str) -> None:
    await pilot.press("slash", "ctrl+a", "ctrl+k", *[{" ": "space"}.get(c, c) for c in text], "enter")


async def open_episode(app: Viewer, pilot: Pilot[None], text: str) -> EpisodePage:
    page = app.screen
    assert isinstance(page, ListPage)
    await query(pilot, text)
    await until(pilot, lambda: page.count == 1)
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, EpisodePage) and bool(app.screen.lines))
    assert isinstance(app.screen, EpisodePage)
    return app.screen


async def test_the_list(index: Index) -> None:
    async with playing(index) as (app, pilot):
        page = app.screen
        assert isinstance(page, ListPage)
        assert "10 of 10 episodes" in said(app, "#status")
        await query(pilot, "step:1")
        await until(pilot, lambda: page.count == 6)
        await pilot.press("s", "s", "s")
        await until(pilot, lambda: "KL↓" in drawn(app))
        kls = [row.kl or 0.0 for row in page.found]
        assert kls == sorted(kls, reverse=True)
        await pilot.press("S")
        await until(pilot, lambda: "KL↑" in drawn(app))
        assert [row.kl for row in page.found] == sorted(kls)
        await pilot.press("G", "k")
        assert page.cursor == 4
        await query(pilot, "tool:zebrafish")
        await until(pilot, lambda: page.count == 1)
        await query(pilot, "colour:red")
        await until(pilot, lambda: "there is no such field" in said(app, "#status"))
        assert page.query_one(Rows).has_focus


async def test_a_query_takes_no_control_characters(index: Index) -> None:
    async with playing(index) as (app, pilot):
        field = app.screen.query_one(Input)
        field.focus()
        field.insert_text_at_cursor("a\x1b[2J\u202e")
        field.insert_text_at_cursor("b")
        await pilot.pause()
        assert field.value == "b"


async def test_an_episode(index: Index) -> None:
    async with playing(index) as (app, pilot):
        page = await open_episode(app, pilot, "tool:zebrafish")
        await pilot.press("j")
        assert page.cursor == 1
        text = drawn(app)
        assert "── turn 1" in text
        assert "the Zebrafish answer: Ünï 漢字" in text
        assert "▌ search  10.0 ms" in text
        assert f"KL {page.kls[1]:.3f}" in text
        assert page.query_one("#rail", Rows).count == 8
        folds = len(page.lines)
        await pilot.resize_terminal(40, 30)
        await until(pilot, lambda: len(page.lines) > folds)
        await pilot.press("o", "G", "pageup", "space", "g", "escape")
        assert isinstance(app.screen, ListPage)
        await query(pilot, "step:1")
        await until(pilot, lambda: app.screen.count == 6)  # type: ignore[attr-defined]
        await pilot.press("enter", "n", "n", "p")
        await until(pilot, lambda: isinstance(app.screen, EpisodePage))
        assert app.screen.row.key == index.rows()[1].key  # type: ignore[attr-defined]


async def test_tool_output_is_folded(tmp_path: Path) -> None:
    def long(value: dict[str, Any]) -> None:
        value["turns"][0]["tool_results"][0]["content"] = "\n".join(f"line {i}" for i in range(50))

    path = tmp_path / "long.jsonl"
    path.write_bytes(line(0, long))
    index = Index([path], tmp_path)
    async with playing(index) as (app, pilot):
        await open_episode(app, pilot, "line:1")
        assert "… 38 more lines" in drawn(app)
        await pilot.press("o")
        assert "line 12" in drawn(app)
        await pilot.press("t")
        assert "no tokenizer was found" in said(app, "#head")
    index.close()


async def test_tokens(index: Index) -> None:
    async with playing(index) as (app, pilot):
        await open_episode(app, pilot, "unusable>0")
        await pilot.press("t")
        page = app.screen
        assert isinstance(page, TokenPage)
        await pilot.press("g", "right_square_bracket")
        assert "30.0000 nats" in said(app, "#token")
        assert str(page.ids[page.cursor]) in said(app, "#token")
        position = page.cursor
        await pilot.press("h")
        assert "none: unusable" in said(app, "#token")
        await pilot.press("left")
        assert "none: not scored" in said(app, "#token")
        await pilot.press("g")
        assert "none: not in the mask" in said(app, "#token")
        await pilot.press("w")
        assert page.cursor == position
        await pilot.press("w", "j", "j", "k", "pagedown", "pageup", "G", "l")
        assert page.cursor == page.count - 1
        marks = page.trace["marks"]
        for i, mark in enumerate(marks):
            found = next(one for row in [page.starts] for one in row[::-1] if one <= i)
            part = page.draw(page.starts.index(found))[i - found]
            if i != page.cursor:
                gap = page.kls[i]
                assert part.style == (MARK_STYLES[mark] if gap is None else heat(gap, app.scale))
        await pilot.press("escape")
        assert isinstance(app.screen, EpisodePage)


def test_heat_is_that_of_the_pages() -> None:
    css = (ROOT / "agent_loop/view/static/style.css").read_text().split('data-theme="dark"] {')[1].split("}")[0]
    colours = dict(re.findall(r"--([pn]\d|zero): (#\w+)", css))
    shades = {level: heat(level / 6, 1.0).bgcolor for level in range(-7, 8)}
    for level, shade in shades.items():
        name = "zero" if level == 0 else f"{'p' if level > 0 else 'n'}{min(6, abs(level))}"
        assert shade is not None
        assert shade.name == colours[name]


async def test_top_k_is_shown(tmp_path: Path, tiny_tokenizer: Path) -> None:
    def topk(value: dict[str, Any]) -> None:
        trace = value["traces"][0]
        rows = [[7, 9] if trained else None for trained in trace["loss_mask"]]
        trace["teacher_topk"] = {"token_ids": rows, "logprobs": [[-0.25, -3.5] if row else None for row in rows]}

    path = tmp_path / "topk.jsonl"
    path.write_bytes(line(0, topk))
    index = Index([path], tmp_path)
    async with playing(index) as (app, pilot):
        await open_episode(app, pilot, "line:1")
        await pilot.press("t")
        assert re.search(r"teacher's likeliest\n\S+ +7 +-0\.250\n\S+ +9 +-3\.500", said(app, "#token"))
    index.close()


async def test_keys_are_listed(index: Index) -> None:
    async with playing(index) as (app, pilot):
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        assert "/ f" in said(app, "#keys")
        await pilot.press("question_mark")
        await pilot.press("enter", "t", "question_mark")
        assert "next token with a high KL" in said(app, "#keys")
        await pilot.press("escape", "q")
    assert app.return_code == 0


async def test_follow(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(episode_line(0, tokens=200))
    index = Index([path], tmp_path / "cache")
    async with playing(index, follow=True) as (app, pilot):
        with path.open("ab") as file:
            file.write(episode_line(1, tokens=200) + b'{"torn')
        await until(pilot, lambda: app.screen.count == 3)  # type: ignore[attr-defined]
        assert "! episodes.jsonl:3: the line has no end" in drawn(app)
        await pilot.press("G", "enter")
        await until(pilot, lambda: "This line is no episode" in drawn(app))
        await pilot.press("j", "t", "o", "escape")
        path.unlink()
        await pilot.press("g", "enter")
        assert isinstance(app.screen, ListPage)
    index.close()


async def test_hostile_text_is_spelled_out(index: Index) -> None:
    async with playing(index) as (app, pilot):
        await query(pilot, "is:failed")
        await until(pilot, lambda: app.screen.count == 1)  # type: ignore[attr-defined]
        assert not STEERING.search(drawn(app))
        page = await open_episode(app, pilot, "is:failed")
        await pilot.press("o")
        text = "".join(segment.text for one in page.lines for segment in one)
        assert "\\x1b[31m" in text
        assert "\\u202eevil\\u2066\\u200b" in text
        for _ in range(12):
            assert not STEERING.search(drawn(app))
            await pilot.press("space")


def test_text_is_never_markup_and_never_too_wide() -> None:
    assert line_of("[red]x[/red] [link=file:///]y") == "[red]x[/red] [link=file:///]y"
    assert line_of("a\ud800\x9b31m\n b", 40) == "a\\ud800\\x9b31m b"
    for text in ("漢" * 50, "a" * 99, " " * 30, "\t\x1b" * 9, ""):
        assert all(len(part) <= 10 for part in folded(text, 10))


def test_in_a_terminal_nothing_is_sent_raw(tmp_path: Path) -> None:
    """A terminal of 120 columns reads all bytes of a visit to the hostile episode, its tokens, and the keys."""
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(line(1, hostile) + b"\x1b]0;owned\x07 torn \xe2\x80\xae\n")
    mine, its = pty.openpty()
    os.set_blocking(mine, False)
    command = [sys.executable, "-m", "agent_loop.view", str(path), "--tui", "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment, close_fds=True)
    os.close(its)
    sent = b""

    def read(until: bytes, limit_s: float = 30) -> None:
        nonlocal sent
        start, end = len(sent), time.monotonic() + limit_s
        while until not in sent[start:]:
            assert time.monotonic() < end, sent[-2000:]
            if select.select([mine], [], [], 0.1)[0]:
                sent += os.read(mine, 65536)

    read(b"2 of 2 episodes")
    os.write(mine, b"\r")
    read("── turn 0".encode())
    os.write(mine, b"oG")
    read(b"stopped:")
    os.write(mine, b"t")
    read(b"KL sample")
    os.write(mine, b"\x1b")
    time.sleep(0.5)
    os.write(mine, b"n")
    read(b"no episode")
    os.write(mine, b"q")
    code = process.wait(timeout=20)
    os.close(mine)
    assert code == 0
    sent = re.sub(rb"\x1b\]22;[a-z]+\x07", b"", sent)  # Textual's own: the pointer's shape
    assert b"\\x1b[31m" in sent
    for order in (
        b"\x1b]8;;",
        b"\x1b]0;owned",
        b"\x9b",
        "\u202e".encode(),
        "\u2066".encode(),
        "\u200b".encode(),
        b"\x07",
    ):
        assert order not in sent
    assert HOSTILE[:30].encode() in sent


def test_without_textual_it_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['textual'] = None; from agent_loop.view.__main__ import main;"
        f"sys.exit(main([{str(run)!r}, '--tui', '--cache', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install -e '.[tui]'" in done.stderr
