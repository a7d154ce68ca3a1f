"""How a run is stopped from outside: the first signal lets it save, the second ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from distill.failures import EXIT_INTERRUPT, Interrupted

if TYPE_CHECKING:
    from distill.build import Core

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_GRACE_S = 15.0
"""Seconds that the episodes of the step in hand still get when the run is asked to stop. With what publishing and
saving take, it has ended within 30 s, which is what schedulers give a process."""
TRACKERS_S = 5.0
"""Seconds that trackers then have for what is left; a run that ends by itself gives them more."""
UNWIND_S = 1.5
"""Seconds for closing everything after the second signal."""


class StopFlag:
    """The first SIGINT or SIGTERM lets the step in hand finish and saves; if its episodes take longer than
    `STOP_GRACE_S`, they are given up and the step before is saved. The second stops at once."""

    def __init__(self, parts: Core) -> None:
        self.asked = False
        self._loop = asyncio.get_running_loop()
        self._late: asyncio.Future[None] = self._loop.create_future()
        parts.lost.append(self._late)
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        self.asked = True
        self._loop.call_later(STOP_GRACE_S, self._give_up)
        for number in STOP_SIGNALS:
            self._loop.remove_signal_handler(number)
            signal.signal(number, _stop_now)
        print(f"stopping after this step, or in {STOP_GRACE_S:g} s; once more to stop now", file=sys.stderr)

    def _give_up(self) -> None:
        self._late.set_exception(
            Interrupted("stopped in the middle of a step, which is dropped; continue with --resume")
        )
        self._late.exception()  # it is retrieved: asyncio need not complain if nothing waits


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM for the time before there is a `StopFlag`."""
    raise KeyboardInterrupt


def _stop_now(number: int, frame: FrameType | None) -> None:
    """Unwind, so that everything is closed; whatever still runs after `UNWIND_S` (a step in its thread) ends with the
    process, and so do the servers, whose keepers see to it."""
    last = threading.Timer(UNWIND_S, os._exit, (EXIT_INTERRUPT,))
    last.daemon = True
    last.start()
    raise KeyboardInterrupt
