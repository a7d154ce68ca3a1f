"""The viewer in a terminal, for ssh: `python -m agent_loop.view RUN --tui`; `?` lists the keys.

Three screens over the index of the pages: the list (here), an episode and its tokens (tui_episode.py). Whatever was
read from a file goes through `tui_parts.shown` before it is drawn, and is drawn as text, never as markup: it can
neither steer the terminal nor style itself.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input, Static

from agent_loop.view.detail import episode_page
from agent_loop.view.index import Index
from agent_loop.view.pieces import Pieces
from agent_loop.view.rows import FORKS, Row, scale_of
from agent_loop.view.search import FLAGS, NUMBERS, ROLES, TEXTS, BadQuery, find
from agent_loop.view.tui_episode import EpisodePage
from agent_loop.view.tui_parts import BAD, BOLD, CURSOR, PLAIN, QUIET, Page, Rows, heat, line_of, number

COLUMNS = (("step", 6), ("id", 0), ("kl", 8), ("kl_max", 8), ("reward", 8), ("turns", 7), ("tool_errors", 8),
           ("trained", 9), ("seconds", 8), ("stop", 18))  # fmt: skip
"""Field and width in cells; 0: what is left, at least ID_WIDTH."""
SPARE = ("trained", "seconds", "kl_max", "reward", "turns")
"""Columns that a narrow terminal goes without, the first first."""
ID_WIDTH = 20
TITLES = {"id": "episode", "kl": "KL", "kl_max": "worst", "tool_errors": "errors", "seconds": "time", "stop": "stopped"}
NOT_TYPED = r"[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*"
"""A paste may hold what a terminal takes as an order."""


class ListPage(Page):
    """The episodes that the query is true of."""

    app: Viewer
    NOTES = (
        "",
        'A query: tool:timeout kl>0.5 -is:failed "two words"',
        f"numbers: {' '.join(NUMBERS)}",
        f"texts: {' '.join(TEXTS)} tools; is: {' '.join(FLAGS)}",
        f"in the dialogue: {' '.join(ROLES)}",
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "open the episode"), Binding("slash,f", "query", "filter and search; Esc leaves it"),
        Binding("s", "sort", "order by the next column"), Binding("S", "turn", "turn the order round"),
        Binding("escape", "leave"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Row] = []
        self.sort, self.down = "", True
        self.searched = 0
        """Version of the index that was searched last."""

    def compose(self) -> ComposeResult:
        yield Input(placeholder="/  tool:timeout  kl>0.5  stop:max_turns  is:failed", restrict=NOT_TYPED)
        yield Static(id="status")
        yield Static(id="head")
        yield Rows(self.draw, id="rows")

    def on_mount(self) -> None:
        self.query_one(Rows).focus()
        self.look()
        if self.app.follow:
            self.set_interval(1.0, self.follow)

    def on_resize(self) -> None:
        self.draw_head()

    def look(self) -> None:
        self.run_worker(self.search(), exclusive=True, group="search")

    async def search(self) -> None:
        await asyncio.sleep(0.05)  # whoever types on is not searched for
        index, text = self.app.index, self.query_one(Input).value
        order = ("-" if self.down else "") + self.sort if self.sort else ""
        self.searched = index.version
        try:
            found = await asyncio.to_thread(find, index, text, sort=order)
        except (BadQuery, OSError) as error:
            self.say(str(error), BAD)
            return
        here = self.found[self.cursor].key if self.found else None
        self.found, self.count = found.rows, len(found.rows)
        left = found.candidates - found.searched
        late = f", {left} not searched: the time was up" if left else ""
        self.say(f"{self.count} of {len(index.rows())} episodes{late} · ? keys", QUIET)
        self.draw_head()
        self.query_one(Rows).reset(self.count)
        self.go(next((i for i, row in enumerate(found.rows) if row.key == here), 0))

    def say(self, text: str, style: Style) -> None:
        self.query_one("#status", Static).update(Text(line_of(text, 400), style))

    async def follow(self) -> None:
        index = self.app.index
        try:
            await asyncio.to_thread(index.refresh)
        except OSError as error:
            self.say(str(error), BAD)
        searching = any(one.group == "search" and not one.is_finished for one in self.workers)
        if index.version != self.searched and not searching:  # one that takes longer than a second comes to its end
            self.app.measure()
            self.look()

    def columns(self) -> dict[str, int]:
        """Width of each column that there is room for."""
        found = dict(COLUMNS)
        room = self.query_one(Rows).columns
        for name in SPARE:
            if room - sum(found.values()) < ID_WIDTH:
                del found[name]
        return found | {"id": max(ID_WIDTH, room - sum(found.values()))}

    def draw_head(self) -> None:
        parts = []
        for name, width in self.columns().items():
            arrow = ("↓" if self.down else "↑") if name == self.sort else ""
            parts.append(set_cell_size(TITLES.get(name, name) + arrow, width))
        self.query_one("#head", Static).update(Text("".join(parts), BOLD))

    def draw(self, i: int) -> list[Segment]:
        row = self.found[i]
        if row.problem is not None:
            parts = [Segment(line_of(f"! {row.file}:{row.line}: {row.problem}"), BAD)]
        else:
            parts = [self.cell(row, name, width) for name, width in self.columns().items()]
        return list(Segment.apply_style(parts, post_style=CURSOR)) if i == self.cursor else parts

    def cell(self, row: Row, name: str, width: int) -> Segment:
        value, style = getattr(row, name), PLAIN
        if name == "kl":
            style = heat(row.kl, self.app.scale)
        elif name == "stop" and row.error:
            value, style = row.error, BAD
        elif name == "id" and len(self.app.pieces) > 1:
            value = f"run:{row.run} {row.id}"
        text = value if isinstance(value, str) else number(value)
        return Segment(set_cell_size(line_of(text, width - 1), width), style)

    def moved(self) -> None:
        self.query_one(Rows).show(self.cursor)

    def action_page(self, step: int) -> None:
        self.go(self.cursor + step * self.query_one(Rows).size.height)

    def action_open(self) -> None:
        if self.found:
            self.app.open(self.found, self.cursor)

    def action_query(self) -> None:
        self.query_one(Input).focus()

    def action_leave(self) -> None:
        self.query_one(Rows).focus()

    def action_sort(self) -> None:
        names = ["", *self.columns()]
        place = names.index(self.sort) if self.sort in names else 0
        self.sort = names[(place + 1) % len(names)]
        self.look()

    def action_turn(self) -> None:
        self.down = not self.down
        self.look()

    def on_input_changed(self) -> None:
        self.look()

    def on_input_submitted(self) -> None:
        self.action_leave()


class Viewer(App[None]):
    """
    Args:
        pieces: a run's tokenizer each.
        follow: look for appended episodes each second.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: #14171b; color: #e6e9ee; }
    Input { height: 1; border: none; background: #1c2026; }
    #head, #legend { height: 1; }
    #status { max-height: 4; }
    Rows { scrollbar-gutter: stable; scrollbar-size-vertical: 1; }
    Rows { scrollbar-background: #14171b; scrollbar-color: #333a44; }
    #rail { width: 28; }
    VerticalScroll { width: 38; max-width: 50%; background: #1c2026; padding: 0 1; }
    Help { align: center middle; }
    Help VerticalScroll { width: 76; max-width: 100%; height: auto; max-height: 100%; }
    Help VerticalScroll { scrollbar-size-vertical: 1; border: round #9aa5b3; }
    """

    def __init__(self, index: Index, pieces: list[Pieces | None], *, follow: bool = False) -> None:
        super().__init__()
        self.index, self.pieces, self.follow = index, pieces, follow
        self.measure()

    def measure(self) -> None:
        """The run's colour scale, as of now."""
        self.scale = scale_of([row for row in self.index.rows() if row.problem is None and row.file != FORKS])

    def on_mount(self) -> None:
        self.push_screen(ListPage())

    def open(self, rows: list[Row], place: int, *, instead: bool = False) -> None:
        """Show an episode, above the screen or instead of it."""

        def other(step: int) -> None:
            if 0 <= place + step < len(rows):
                self.open(rows, place + step, instead=True)

        row = rows[place]
        try:
            page = EpisodePage(row, episode_page(self.index, row, self.pieces[row.run]), self.scale, other)
        except OSError as error:
            self.notify(line_of(error), markup=False)
            return
        if instead:
            self.switch_screen(page)
        else:
            self.push_screen(page)
