"""The terminal's screens in a test: an app without a terminal, by keyboard."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from textual.pilot import Pilot
from textual.widgets import Static

from agent_loop.view.index import Index
from agent_loop.view.pieces import pieces_of
from agent_loop.view.tui import ListPage, Viewer
from agent_loop.view.tui_episode import EpisodePage


@asynccontextmanager
async def playing(
    index: Index, *, follow: bool = False, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[tuple[Viewer, Pilot[None]]]:
    app = Viewer(index, [pieces_of(root, None) for root in index.roots], follow=follow)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: f"{len(index.rows())} episodes" in drawn(app))
        yield app, pilot


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> None:
    """Let the app go on until it shows what was asked for."""
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
