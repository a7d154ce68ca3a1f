"""Politeness: how soon a host may be asked again.

rate = HostRate({"clinicaltrials.gov": 30})
await rate.turn("clinicaltrials.gov")
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

POLITE_PER_MINUTE = {
    "eutils.ncbi.nlm.nih.gov": 180.0,  # 3 a second without a key (NCBI, E-utilities in depth)
    "clinicaltrials.gov": 50.0,
    "api.fda.gov": 240.0,  # openFDA, without a key
}
DEFAULT_PER_MINUTE = 120.0
"""Of any other host."""
MAX_WAIT_S = 60.0
"""No host's wish to be left alone counts for longer."""


class HostRate:
    """Turns by host, evenly spaced, one after another. Belongs to one event loop."""

    def __init__(
        self, per_minute: Mapping[str, float] | None = None, *, default_per_minute: float = DEFAULT_PER_MINUTE
    ) -> None:
        """
        Args:
            per_minute: requests a minute by host; over `POLITE_PER_MINUTE`.
            default_per_minute: of hosts that neither names; may be infinite.
        """
        self._per_minute = POLITE_PER_MINUTE | {host.lower(): rate for host, rate in (per_minute or {}).items()}
        self._default = default_per_minute
        self._next: dict[str, float] = {}
        self._queues: dict[str, asyncio.Lock] = {}

    def seconds_between(self, host: str) -> float:
        """Between two requests."""
        return 60.0 / self._per_minute.get(host, self._default)

    def space(self, host: str, seconds: float) -> None:
        """At least so many seconds between two requests from now on."""
        self._per_minute[host] = min(60.0 / seconds, self._per_minute.get(host, self._default))

    async def turn(self, host: str) -> None:
        """Waits until the host may be asked; whoever comes later waits longer. Callers set their own deadline: who is
        cancelled gives the turn to the next."""
        async with self._queues.setdefault(host, asyncio.Lock()):
            while (wait := self._next.get(host, 0.0) - time.monotonic()) > 0:  # noqa: ASYNC110 - `hold` moves it
                await asyncio.sleep(wait)
            self._next[host] = time.monotonic() + self.seconds_between(host)

    def hold(self, host: str, seconds: float) -> None:
        """The host asked to be left alone; counts for at most `MAX_WAIT_S`."""
        until = time.monotonic() + min(max(seconds, 0.0), MAX_WAIT_S)
        self._next[host] = max(until, self._next.get(host, 0.0))


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    if value is None:
        return None
    value = value.strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
