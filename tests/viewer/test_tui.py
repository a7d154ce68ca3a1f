"""The terminal's screens, by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from textual.widgets import Input

from agent_loop.view.index import Index
from agent_loop.view.tui import ListPage
from agent_loop.view.tui_episode import MARK_STYLES, EpisodePage, TokenPage
from agent_loop.view.tui_parts import Help, Rows, heat
from bench.viewer import episode_line
from tests.viewer.conftest import ROOT, line, marks
from tests.viewer.terminal import drawn, open_episode, playing, query, said, until


@pytest.fixture
def index(run: Path, tmp_path: Path) -> Iterator[Index]:
    found = Index([run], tmp_path / "cache")
    yield found
    found.close()


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
        assert "… 38 more lines" not in drawn(app)
        await pilot.press("j", "o", "k", "o")
        assert "… 38 more lines" in drawn(app)
        assert app.screen.unfolded == {1}  # type: ignore[attr-defined]
        await pilot.press("O")
        assert "line 12" in drawn(app)
        await pilot.press("O")
        assert "… 38 more lines" in drawn(app)
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
        parts = [part for row in range(len(page.starts)) for part in page.draw(row)]
        assert len(parts) == page.count == 300
        for part, mark, gap in list(zip(parts, page.trace["marks"], page.kls, strict=True))[
            :-1
        ]:  # the cursor: the last
            assert part.style == (MARK_STYLES[mark] if gap is None else heat(gap, app.scale))
        assert len(set(MARK_STYLES)) == 4
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


async def test_a_small_terminal(index: Index) -> None:
    async with playing(index, size=(80, 24)) as (app, pilot):
        assert "stopped" in drawn(app)
        assert "trained" not in drawn(app)
        await pilot.press("question_mark")
        assert re.search(r"in the dialogue: system .* think", drawn(app))
        await pilot.press("escape")
        page = await open_episode(app, pilot, "unusable>0")
        rail = page.query_one("#rail")
        assert rail.display
        columns = page.query_one("#body", Rows).columns
        assert max(cell_len("".join(part.text for part in one)) for one in page.lines) <= columns < 80 - rail.size.width
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, TokenPage) and len(app.screen.starts) > 1)
        tokens = app.screen
        assert isinstance(tokens, TokenPage)
        columns = tokens.query_one("#tokens", Rows).columns
        widths = [sum(cell_len(part.text) for part in tokens.draw(row)) for row in range(len(tokens.starts))]
        assert columns - 10 < max(widths) <= columns
        assert re.search(r"^-5.0 +\+5.0 nats +not in the mask +not scored +unusable", drawn(app).splitlines()[-1])
        await pilot.resize_terminal(60, 20)
        await pilot.press("escape")
        await until(pilot, lambda: not rail.display)


async def test_the_turn_on_top_is_the_one_whose_tokens_are_shown(index: Index) -> None:
    async with playing(index, size=(80, 24)) as (app, pilot):
        page = await open_episode(app, pilot, "unusable>0")
        await pilot.press("space")
        body = page.query_one("#body", Rows)
        assert 0 < page.starts[page.cursor] <= body.scroll_offset.y < page.starts[page.cursor + 1]
        turn = page.turns[page.cursor]
        assert turn["index"] > 0
        await pilot.press("t")
        assert isinstance(app.screen, TokenPage)
        assert app.screen.cursor == turn["start"]


async def test_an_empty_run(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b"")
    index = Index([path], tmp_path / "cache")
    async with playing(index, follow=True) as (app, pilot):
        await pilot.press("enter", "s", "S", "j", "k", "G", "g", "pagedown", "pageup", "escape")
        assert isinstance(app.screen, ListPage)
        assert app.scale == 2.0
        path.write_bytes(line(11, marks))
        await until(pilot, lambda: "1 of 1 episodes" in drawn(app) and app.scale == 10.0)
    index.close()


async def test_two_runs_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(line(3))
    index = Index(paths, tmp_path / "cache")
    async with playing(index) as (app, pilot):
        assert re.search(r"run:0 1/t3/0.*\n.*run:1 1/t3/0", drawn(app))
        await query(pilot, "run:1")
        await until(pilot, lambda: "1 of 2 episodes" in drawn(app))
        assert [row.file for row in app.screen.found] == ["b.jsonl"]  # type: ignore[attr-defined]
    index.close()


async def test_a_file_that_went_away_is_said(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(line(3))
    index = Index([path], tmp_path / "cache")
    async with playing(index) as (app, pilot):
        path.unlink()
        await query(pilot, "dose")
        await until(pilot, lambda: "No such file" in said(app, "#status"))
        await pilot.press("enter")
        assert isinstance(app.screen, ListPage)
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
