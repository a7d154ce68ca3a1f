"""What a person reads while a run goes on: one line a phase, one line a step, a bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Console:
    """Plain lines everywhere; a progress bar under them where stderr is a terminal.

    Args:
        quiet: no output but errors.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._shown = ""

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self._rich.print(f"[{time.monotonic() - self._start:7.1f} s] {text}", markup=False)

    def table(self, text: str) -> None:
        self._rich.print(text, markup=False)

    def phase(self, description: str, total: int, *, announce: bool = True) -> Phase:
        """A stretch of work of `total` parts: a bar on a terminal; otherwise a line at its start, if `announce`."""
        return Phase(self, description, total, announce=announce)

    def step(self, step: int, steps: int, metrics: Mapping[str, float | int | None]) -> None:
        """The one line of a training step."""

        def show(name: str, form: str = "{:.3f}") -> str:
            value = metrics.get(name)
            return form.format(value) if value is not None else "-"

        seconds = " ".join(
            f"{stage} {show(f'time/{stage}', '{:.2f}')}"
            for stage in ("rollout", "train", "publish")
            if f"time/{stage}" in metrics
        )
        behind, waited = metrics.get("staleness/mean"), show("idle/trainer", "{:.2f}")
        stale = f", {behind:.1f} updates old, waited {waited}" if behind else ""
        self.say(
            f"step {step:>{len(str(steps))}}/{steps}"
            f"  teacher_kl {show('teacher_kl')}"
            f"  entropy {show('entropy')}"
            f"  turns {show('rollout/num_turns', '{:.1f}')}"
            f"  cut {show('rollout/truncated', '{:.0%}')}"
            f"  tool errors {show('tool/error_rate', '{:.0%}')}"
            f"  trained {show('train/tokens', '{:,}')} tok"
            f"  {show('time/step', '{:.2f}')} s ({seconds}{stale})"
        )


class Phase:
    """A context manager; call `advance` for each part that is done."""

    def __init__(self, console: Console, description: str, total: int, *, announce: bool) -> None:
        self._announce = announce
        self._console = console
        self._description = description
        self._total = total
        self._bar: Progress | None = None

    def __enter__(self) -> Phase:
        rich = self._console._rich
        if rich.is_terminal and not rich.quiet:
            self._bar = Progress(
                TextColumn("[{task.description}]", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=rich,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total)
        elif self._announce:
            self._console.say(f"{self._description} ({self._total})")
        return self

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def fail(message: str) -> None:
    """An error for a person, on stderr, without colour or markup."""
    with contextlib.suppress(OSError):  # a log on a full disk: the exit code still says what happened
        print(f"error: {message}", file=sys.stderr)
