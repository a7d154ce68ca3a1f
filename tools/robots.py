"""robots.txt (RFC 9309), asked once a host.

Without a robots.txt (4xx) all is allowed; where it cannot be had (5xx, no answer in time) nothing is, as the RFC says
(2.3.1.4), until it is asked again after `RETRY_S`. `Crawl-delay` slows us down, within reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tools.rate import HostRate
from tools.types import ToolErrorKind, ToolFailure

MAX_BYTES = 500 * 1024
"""RFC 9309, 2.5: at least this much of a file must be read; more is not."""
MAX_DELAY_S = 10.0
"""A longer `Crawl-delay` counts as this."""
RETRY_S = 300.0
CACHE_S = 86_400.0
"""RFC 9309, 2.4."""
MAX_HOSTS = 500
"""Whose rules are kept: a page may name hosts without end, and one's rules may take megabytes."""

Get = Callable[[str], Awaitable[tuple[int, bytes]]]
"""Status and the first `MAX_BYTES` of a URL; raises `ToolFailure`."""


@dataclass(frozen=True, slots=True)
class _Rules:
    parsed: Any | None
    """Of protego; None where nothing could be had."""
    allowed: bool
    """What holds where `parsed` is None."""
    until: float


class Robots:
    """What hosts ask of robots."""

    def __init__(self, get: Get, rate: HostRate, agent: str) -> None:
        """
        Args:
            agent: the name in the User-Agent that rules are looked up by.
        """
        self._get, self._rate, self._agent = get, rate, agent
        self._rules: dict[str, _Rules] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def check(self, url: str) -> None:
        """
        Raises:
            ToolFailure: `blocked` if the host does not want this page to be fetched.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        async with self._locks.setdefault(origin, asyncio.Lock()):
            rules = self._rules.pop(origin, None)
            if rules is None or rules.until < time.monotonic():
                rules = await self._read(origin, parts.hostname or "")
            self._rules[origin] = rules  # the last one used stands last
            if len(self._rules) > MAX_HOSTS:
                del self._rules[next(iter(self._rules))]
        if rules.parsed is None:
            if not rules.allowed:
                raise ToolFailure(f"{parts.hostname} gave no robots.txt, so it is left alone", ToolErrorKind.BLOCKED)
        elif not rules.parsed.can_fetch(url, self._agent):
            raise ToolFailure(f"{parts.hostname} does not want robots to read this page", ToolErrorKind.BLOCKED)

    async def _read(self, origin: str, host: str) -> _Rules:
        now = time.monotonic()
        try:
            status, body = await self._get(f"{origin}/robots.txt")
        except ToolFailure as failure:
            if failure.kind in (ToolErrorKind.BLOCKED, ToolErrorKind.NOT_FOUND):
                raise  # the page cannot be had either: the guard refuses, or there is no such host
            return _Rules(None, False, now + RETRY_S)
        if status >= 500 or status == 429:
            return _Rules(None, False, now + RETRY_S)
        if status >= 400:
            return _Rules(None, True, now + CACHE_S)
        from protego import Protego

        parsed = Protego.parse(body[:MAX_BYTES].decode("utf-8", "replace"))
        delay = parsed.crawl_delay(self._agent)
        if delay:
            self._rate.space(host, min(float(delay), MAX_DELAY_S))
        return _Rules(parsed, True, now + CACHE_S)
