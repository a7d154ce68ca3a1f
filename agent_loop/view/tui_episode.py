"""The terminal's screens of one episode: the dialogue, and its tokens."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from math import exp
from statistics import fmean
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Static

from agent_loop.view.detail import MARKS
from agent_loop.view.rows import Row
from agent_loop.view.tui_parts import (
    BAD,
    BOLD,
    CURSOR,
    PLAIN,
    QUIET,
    Page,
    Rows,
    folded,
    heat,
    line_of,
    number,
    shown,
)

MARK_NAMES = ("not in the mask", "scored", "not scored", "unusable")
MARK_STYLES = (QUIET, PLAIN, PLAIN + Style(underline=True), BAD + Style(bgcolor="#3a1f1d", strike=True))
"""Both by `detail.MARKS`."""
CARD = "▌ "
FOLDED = 12
"""Lines of a tool result or of reasoning that are shown before `o` unfolds it."""
WITH_RAIL = 64
"""Columns of a terminal that has room for the rail."""


def kl_of(trace: dict[str, Any], i: int) -> float | None:
    """Nats; None where there is no number, which is never drawn as zero."""
    return trace["student"][i] - trace["teacher"][i] if trace["marks"][i] == MARKS["scored"] else None


def turn_kl(turn: dict[str, Any], traces: list[dict[str, Any]]) -> float | None:
    if turn["trace"] is None or turn["start"] is None:
        return None
    trace = traces[turn["trace"]]
    values = [kl_of(trace, i) for i in range(turn["start"], min(turn["end"] or 0, len(trace["ids"])))]
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


class EpisodePage(Page):
    """
    Args:
        page: of `detail.episode_page`.
        scale: of the run's colours, in nats.
        other: opens the episode so many places further in the list.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t,enter", "tokens", "tokens of the turn"),
        Binding("o", "fold", "unfold or fold tool output and reasoning of the turn"),
        Binding("O", "fold_all", "of all turns"),
        Binding("n", "other(1)", "next episode of the list"), Binding("p", "other(-1)", "previous episode"),
        Binding("escape,b", "app.pop_screen", "back"),
    ]  # fmt: skip

    def __init__(self, row: Row, page: dict[str, Any], scale: float, other: Callable[[int], None]) -> None:
        super().__init__()
        self.row, self.page, self.scale, self.action_other = row, page, scale, other
        self.turns: list[dict[str, Any]] = page["episode"]["turns"] if "episode" in page else []
        self.kls = [turn_kl(turn, page["traces"]) for turn in self.turns]
        self.count = len(self.turns)
        self.unfolded: set[int] = set()
        self.lines: list[list[Segment]] = []
        self.starts: list[int] = []

    def compose(self) -> ComposeResult:
        row = self.row
        name, facts = f"{row.file}:{row.line}", "? keys"
        if row.problem is None:
            name, facts = row.id, f"? keys · KL {number(row.kl)} · reward {number(row.reward)} · {row.stop} · {row.env}"
        yield Static(Text.assemble((line_of(name, 40), BOLD), "  ", (line_of(facts), QUIET)), id="head")
        with Horizontal():
            yield Rows(self.draw_turn, id="rail")
            yield Rows(lambda i: self.lines[i], id="body")

    def on_mount(self) -> None:
        self.query_one("#body").focus()
        self.query_one("#rail", Rows).reset(self.count)

    def on_resize(self) -> None:
        self.query_one("#rail").display = bool(self.turns) and self.size.width >= WITH_RAIL
        self.call_after_refresh(self.lay_out)

    def draw_turn(self, i: int) -> list[Segment]:
        """One line of the rail."""
        turn = self.turns[i]
        calls = ", ".join(call["name"] or "?" for call in turn["message"]["tool_calls"]) or "text"
        failed = any(result["error"] for result in turn["tool_results"])
        return [
            Segment(f"{turn['index']:>3} ", CURSOR if i == self.cursor else QUIET),
            Segment(f"{number(self.kls[i]):>8} ", heat(self.kls[i], self.scale)),
            Segment(f" {line_of(calls, 12)}", BAD if failed else QUIET),
        ]

    def say(self, text: str, style: Style, indent: str = "", most: int | None = None) -> None:
        lines = list(folded(text, max(10, self.query_one("#body", Rows).columns - len(indent))))
        self.lines += [[Segment(indent, QUIET), Segment(line, style)] for line in lines[:most]]
        if most is not None and len(lines) > most:
            self.lines.append([Segment(f"{indent}… {len(lines) - most} more lines", QUIET)])

    def message(self, role: str, text: str) -> None:
        self.say(f"[{role}]", BOLD)
        self.say(text, PLAIN)

    def lay_out(self) -> None:
        self.lines, self.starts = [], []
        if "problem" in self.page:
            self.say(f"This line is no episode: {self.page['problem']}\n", BAD)
            self.say(self.page["head"], PLAIN)
        else:
            episode = self.page["episode"]
            for message in episode["task"]["messages"]:
                self.message(message["role"], message["content"])
            for turn, kl in zip(self.turns, self.kls, strict=True):
                self.starts.append(len(self.lines) + 1)
                self.lay_out_turn(turn, kl, FOLDED if len(self.starts) - 1 not in self.unfolded else None)
            self.say(f"\nstopped: {episode['stop_reason']}", QUIET)
            if episode["error"]:
                self.say("{boundary}: {kind}: {message}".format(**episode["error"]), BAD)
        self.query_one("#body", Rows).reset(len(self.lines))

    def lay_out_turn(self, turn: dict[str, Any], kl: float | None, most: int | None) -> None:
        size = "tokens not known" if turn["start"] is None else f"{turn['end'] - turn['start']} tokens"
        times = f"{size} · {turn['sample_s']:.2f} s model, {turn['env_s']:.2f} s tools"
        parts = [(f"── turn {turn['index']} ", BOLD), (f" KL {number(kl)} ", heat(kl, self.scale))]
        if turn["finish_reason"] != "stop":
            parts.append((f" cut: {turn['finish_reason']}", BAD))
        room = self.query_one("#body", Rows).columns - sum(len(text) for text, _ in parts) - 1
        self.lines += [[], [Segment(*part) for part in [*parts, (" " + line_of(times, max(room, 1)), QUIET)]]]
        message, results = turn["message"], {one["call_id"]: one for one in turn["tool_results"]}
        if message["reasoning"]:
            self.say(message["reasoning"], QUIET, "~ ", most)
        if message["content"]:
            self.say(message["content"], PLAIN)
        for call in message["tool_calls"]:
            self.card(call, results.pop(call["id"], None), most)
        for result in results.values():
            self.card({"name": result["name"], "parse_error": None, "arguments": {}}, result, most)
        for seen in turn["observation"]:
            if seen["role"] != "tool":
                self.message(seen["role"], seen["content"])

    def card(self, call: dict[str, Any], result: dict[str, Any] | None, most: int | None) -> None:
        error = result["error"] if result else None
        wrong = call["parse_error"] or (f"{error['kind']}: {error['message']}" if error else "")
        took = f"{result['duration_s'] * 1000:.1f} ms" if result else "no result"
        self.say(f"{call['name'] or '(no name)'}  {took}  {wrong}", BAD if wrong else BOLD, CARD)
        if call["arguments"] is None:
            self.say(call["raw"], QUIET, CARD)
        for name, value in (call["arguments"] or {}).items():
            self.say(f"{name}: {value if isinstance(value, str) else json.dumps(value)}", QUIET, CARD)
        if result:
            self.say(result["content"], PLAIN, CARD, most)
            if result["truncated_chars"]:
                self.say(f"{result['truncated_chars']} characters were cut", QUIET, CARD)

    def moved(self) -> None:
        if self.starts:
            self.query_one("#rail", Rows).show(self.cursor)
            self.query_one("#body", Rows).to(self.starts[self.cursor])

    def action_page(self, step: int) -> None:
        """The cursor goes to the turn that is then on top."""
        body = self.query_one("#body", Rows)
        body.to(body.scroll_offset.y + step * (body.size.height - 1))
        self.cursor = max(0, bisect_right(self.starts, body.scroll_offset.y) - 1)
        self.query_one("#rail", Rows).show(self.cursor)

    def action_edge(self, last: bool) -> None:
        super().action_edge(last)
        self.query_one("#body", Rows).to(len(self.lines) if last else 0)

    def action_fold(self) -> None:
        self.unfolded ^= {self.cursor}
        self.lay_out()
        self.moved()

    def action_fold_all(self) -> None:
        self.unfolded = set() if len(self.unfolded) == self.count else set(range(self.count))
        self.lay_out()
        self.moved()

    def action_tokens(self) -> None:
        traces = self.page.get("traces", [])
        turn = self.turns[self.cursor] if self.turns else {"trace": 0, "start": 0}
        if turn["trace"] is not None and traces and traces[turn["trace"]]["ids"]:
            self.app.push_screen(TokenPage(self.page, turn["trace"], turn["start"] or 0, self.scale))
        else:
            self.notify("Only messages were exchanged: no ids were seen.")


class TokenPage(Page):
    """The tokens of one trace, and all that is known of the one under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l,right", "step(1)", "next token"), Binding("h,left", "step(-1)", "previous token"),
        Binding("right_square_bracket", "jump(1)", "next token with a high KL"),
        Binding("left_square_bracket", "jump(-1)", "previous token with a high KL"),
        Binding("w", "worst", "the worst token, then the next worst"), Binding("t,escape,b", "app.pop_screen", "back"),
    ]  # fmt: skip

    def __init__(self, page: dict[str, Any], trace: int, cursor: int, scale: float) -> None:
        super().__init__()
        self.trace, self.scale, self.cursor = page["traces"][trace], scale, cursor
        self.ids: list[int] = self.trace["ids"]
        self.count = len(self.ids)
        self.kls = [kl_of(self.trace, i) for i in range(self.count)]
        self.texts = {token: spell(token, text) for token, text in self.trace["texts"]}
        self.widths = {token: cell_len(self.text(token)) for token in set(self.ids)}
        self.worst = sorted(
            (i for i, kl in enumerate(self.kls) if kl is not None), key=lambda i: -abs(self.kls[i] or 0)
        )
        self.num_worst = 0
        self.starts = [0]
        self.heading = f"trace {trace}, {self.count} tokens · ? keys · orange: the teacher likes it less"
        self.heading += "" if page["tokenizer"] else "; no tokenizer was found: ids are shown"

    def text(self, token: int) -> str:
        return self.texts.get(token) or f"#{token} "

    def compose(self) -> ComposeResult:
        yield Static(Text(self.heading, QUIET), id="head")
        with Horizontal():
            yield Rows(self.draw, id="tokens")
            yield VerticalScroll(Static(id="token"), can_focus=False)
        swatches = [(" ", heat(level / 6 * self.scale, self.scale)) for level in range(-6, 7)]
        marks = [part for i in (0, 2, 3) for part in (("  ", PLAIN), (MARK_NAMES[i], MARK_STYLES[i]))]
        words = (f"-{self.scale} ", QUIET), *swatches, (f" +{self.scale} nats", QUIET)
        yield Static(Text.assemble(*words, *marks), id="legend")

    def on_mount(self) -> None:
        self.query_one("#tokens").focus()

    def on_resize(self) -> None:
        self.call_after_refresh(self.lay_out)

    def lay_out(self) -> None:
        """A line ends where the next token does not fit, and after a line break."""
        columns, used, self.starts = max(20, self.query_one("#tokens", Rows).columns), 0, [0]
        for i, token in enumerate(self.ids):
            if i and (used + self.widths[token] > columns or self.text(self.ids[i - 1]).endswith("⏎")):
                self.starts.append(i)
                used = 0
            used += self.widths[token]
        self.query_one("#tokens", Rows).reset(len(self.starts))
        self.moved()

    def span(self, line: int) -> range:
        return range(self.starts[line], self.starts[line + 1] if line + 1 < len(self.starts) else self.count)

    def draw(self, line: int) -> list[Segment]:
        parts = []
        for i in self.span(line):
            style = MARK_STYLES[self.trace["marks"][i]] if self.kls[i] is None else heat(self.kls[i], self.scale)
            parts.append(Segment(self.text(self.ids[i]), style + CURSOR if i == self.cursor else style))
        return parts

    def moved(self) -> None:
        self.query_one("#tokens", Rows).show(bisect_right(self.starts, self.cursor) - 1)
        self.query_one("#token", Static).update(self.inspect(self.cursor))

    def inspect(self, i: int) -> Text:
        trace, mark, kl = self.trace, self.trace["marks"][i], self.kls[i]
        source, turn = next(part[:2] for part in trace["segments"] if i < part[3])
        student, teacher = trace["student"][i], trace["teacher"][i]
        unscored = "not scored" if trace["asked"] else "was not asked"
        facts = [
            ("position", i), ("id", self.ids[i]), ("segment", source if turn < 0 else f"{source}, turn {turn}"),
            ("mask", "trained on" if mark else MARK_NAMES[0]),
            ("student", "not sampled" if student is None else chance(student)),
            ("teacher", unscored if teacher is None else chance(teacher)),
            ("KL sample", f"none: {MARK_NAMES[mark]}" if kl is None else f"{kl:.4f} nats"),
            ("weights", "not said" if trace["versions"] is None else trace["versions"][i]),
        ]  # fmt: skip
        found = Text.assemble(
            (self.text(self.ids[i]) + "\n\n", BOLD), *(f"{name:10}{value}\n" for name, value in facts)
        )
        for name, title in (("teacher_topk", "teacher's likeliest"), ("sampling_topk", "student's likeliest")):
            if trace[name] and trace[name][i]:
                found.append(f"\n{title}\n", QUIET)
                for token, value in trace[name][i]:
                    style = BOLD if token == self.ids[i] else PLAIN
                    found.append(f"{set_cell_size(self.text(token), 16)}{token:>8} {value:8.3f}\n", style)
        return found

    def action_step(self, step: int) -> None:
        self.go(self.cursor + step)

    def action_move(self, step: int) -> None:
        line = bisect_right(self.starts, self.cursor) - 1
        other = self.span(max(0, min(line + step, len(self.starts) - 1)))
        self.go(min(other.start + self.cursor - self.starts[line], other.stop - 1))

    def action_page(self, step: int) -> None:
        self.action_move(step * self.query_one("#tokens").size.height)

    def action_jump(self, step: int) -> None:
        """To the next token of at least half of the scale."""
        places = range(self.cursor + step, self.count if step > 0 else -1, step)
        found = next((i for i in places if abs(self.kls[i] or 0.0) >= self.scale / 2), None)
        if found is not None:
            self.go(found)

    def action_worst(self) -> None:
        if self.worst:
            self.go(self.worst[self.num_worst % len(self.worst)])
            self.num_worst += 1


def spell(token: int, text: str) -> str:
    return shown(text.replace("\n", "⏎").replace("\t", "⇥")) if text else f"⟨{token}⟩"


def chance(value: float) -> str:
    return f"{value:.4f} ({100 * exp(min(value, 0.0)):.3g}%)"
