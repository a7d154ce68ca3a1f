"""What the terminal's screens share: text that is safe to draw, the colours of style.css, lines, moves and help."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from math import floor
from typing import Any, ClassVar

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.screen import ModalScreen, Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Static

from agent_loop.view.text import visible

LESS = ("#33261c", "#4a321f", "#6b4421", "#8a5422", "#a8632a", "#b8702f")  # dark --p1 to --p6
MORE = ("#1b2735", "#20364d", "#264a6d", "#2c5d8c", "#3570a8", "#3d7cb8")  # --n1 to --n6
ZERO = "#262b32"
PLAIN, BOLD, QUIET, BAD = Style(color="#e6e9ee"), Style(bold=True), Style(color="#9aa5b3"), Style(color="#ff9a8f")
GROUND = Style(bgcolor="#14171b")
CURSOR = Style(reverse=True, bold=True)


def shown(text: Any) -> str:
    """Text that cannot steer the terminal. Whatever a file holds goes through here before it is drawn."""
    return visible(str(text).expandtabs(4))


def line_of(text: Any, width: int = 200) -> str:
    """One line of at most `width` cells."""
    found = " ".join(shown(str(text)[: width * 8]).split())
    return found if cell_len(found) <= width else set_cell_size(found, width - 1) + "…"


def folded(text: str, width: int) -> Iterator[str]:
    """All lines, none wider than `width` cells."""
    for line in shown(text).split("\n"):
        if line.isascii():
            yield from textwrap.wrap(line, width, drop_whitespace=False, break_on_hyphens=False) or [""]
        else:
            yield from chop_cells(line, width) or [""]


def number(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def heat(value: float | None, scale: float) -> Style:
    """As in the pages: six steps on both sides of zero."""
    if value is None:
        return PLAIN
    level = min(6, floor(abs(value) / scale * 6 + 0.5))
    return Style(color="#ffffff", bgcolor=ZERO if level == 0 else (LESS if value > 0 else MORE)[level - 1])


class Rows(ScrollView, can_focus=True, inherit_bindings=False):
    """Lines of which only those in sight are drawn, by `draw`."""

    def __init__(self, draw: Callable[[int], list[Segment]], *, id: str) -> None:
        super().__init__(id=id)
        self.draw, self.count = draw, 0

    def reset(self, count: int) -> None:
        self.count = count
        self.virtual_size = Size(1, count)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        i = y + self.scroll_offset.y
        return Strip(self.draw(i) if i < self.count else []).adjust_cell_length(self.size.width).apply_style(GROUND)

    @property
    def columns(self) -> int:
        """Cells of a line beside the scroll bar."""
        return self.scrollable_content_region.width

    def to(self, line: int) -> None:
        self.scroll_to(y=line, animate=False, immediate=True, force=True)
        self.refresh()

    def show(self, i: int) -> None:
        """Scroll as little as brings the line into sight."""
        first, height = self.scroll_offset.y, self.size.height
        self.to(i if i < first else max(first, i - height + 1))


class Help(ModalScreen[None]):
    """The keys of a screen, and what else it has to say."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss", "close")]

    def __init__(self, bindings: list[Binding], notes: tuple[str, ...]) -> None:
        super().__init__()
        self.keys, self.notes = bindings, notes

    def compose(self) -> ComposeResult:
        names = {"question_mark": "?", "slash": "/", "left_square_bracket": "[", "right_square_bracket": "]"}
        lines = [(" ".join(names.get(key, key) for key in one.key.split(",")), one.description) for one in self.keys]
        text = "\n".join([*(f"{keys:16} {what}" for keys, what in lines), *self.notes])
        yield VerticalScroll(Static(Text(text), id="keys"))


class Page(Screen[None]):
    """A screen with a cursor in `count` things."""

    NOTES: ClassVar[tuple[str, ...]] = ()
    """Lines below the keys in the help."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j,down", "move(1)", "next row, turn or line"), Binding("k,up", "move(-1)", "previous one"),
        Binding("space,pagedown", "page(1)", "a page down"), Binding("pageup", "page(-1)", "a page up"),
        Binding("g,home", "edge(False)", "first"), Binding("G,end", "edge(True)", "last"),
        Binding("question_mark", "keys", "this help"), Binding("q", "app.quit", "quit"),
    ]  # fmt: skip
    cursor = 0
    count = 0

    def go(self, i: int) -> None:
        """Move the cursor there, or as near as there is something."""
        self.cursor = max(0, min(i, self.count - 1))
        self.moved()

    def moved(self) -> None:
        """Draw what depends on the cursor."""

    def action_move(self, step: int) -> None:
        self.go(self.cursor + step)

    def action_edge(self, last: bool) -> None:
        self.go(self.count - 1 if last else 0)

    def action_keys(self) -> None:
        both = [*type(self).BINDINGS, *Page.BINDINGS]
        self.app.push_screen(Help([one for one in both if isinstance(one, Binding) and one.description], self.NOTES))
