"""The servers of one model: sticky routing among them, and what happens when one goes away.

A `Fleet` is a `Transport`. Requests of one key go to one server as long as it is up; while none is up they wait. A
server that died is started again under a new port and key; one that was given is polled until it answers. Either way
`on_return` (the publisher's: push the weights, verify them) runs before a single request goes there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from agent_loop.transport import HttpTransport, Transport, TransportError
from distill.serving.vllm import Launch, LaunchError, Server

T = TypeVar("T")

WATCH_S = 1.0
"""Between two looks at a server."""
HEALTH_S = 30.0
"""For an answer to a look. A server that computes still answers, but not while it writes out long log-probabilities
(1.1 s of Python for a prompt of 16k tokens with 20 each), and many of those may come at once."""
RETRY_S = 60.0
"""How long an error that may pass, of a server that lives, is tried again."""

_LOG = logging.getLogger(__name__)


class ServerLost(Exception):
    """No server of a model for longer than `max_outage_s`, or one crashed more often than it may."""


class Replica:
    """One server of a fleet, through all its incarnations."""

    def __init__(
        self, name: str, *, launch: Launch | None = None, base_url: str = "", api_key: str | None = None
    ) -> None:
        self.name = name
        self.launch = launch
        self.base_url = base_url
        self.server: Server | None = None
        self.up = False
        self._api_key = api_key
        self._transport: HttpTransport | None = None

    @property
    def transport(self) -> Transport:
        """To its present incarnation; waits for nobody."""
        if self._transport is None:
            # No retries of its own: they could reach a restarted server that has not been made fit.
            self._transport = HttpTransport(self.base_url, self._api_key, retry_deadline_s=0.0)
        return self._transport

    async def start(self) -> None:
        """Start it if it is ours, and wait until it answers.

        Raises:
            LaunchError: it does not.
        """
        if self.launch is not None:
            await self.end()
            self.server = Server(self.launch)
            self.base_url, self._api_key = self.server.base_url, self.server.api_key
            await self.server.wait_ready()
        elif not await self.answers():
            raise LaunchError(f"{self.name}: {self.base_url} does not answer")

    async def answers(self) -> bool:
        """Whether it lives."""
        if self.server is not None and self.server.exit_code is not None:
            return False
        # /health knows of a dead engine behind a living API server; what was given need not be vLLM and have it.
        path = "/health" if self.launch is not None else "/v1/models"
        try:
            await self.transport.get_json(path, timeout_s=HEALTH_S)
        except TransportError as error:
            return error.kind != "unavailable"
        return True

    async def end(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None
        if self.server is not None:
            await self.server.aclose()
            self.server = None


class Fleet:
    """All servers of one model.

    Args:
        name: `student` or `teacher`.
        max_outage_s: without any server for longer, the run is told (`lost`).
        max_restarts: of crashed servers, over the whole run.
    """

    def __init__(self, name: str, replicas: Sequence[Replica], *, max_outage_s: float, max_restarts: int = 0) -> None:
        self.name = name
        self.replicas = list(replicas)
        self.on_return: Callable[[Replica], Awaitable[None]] | None = None
        """Makes a server that came back fit for use; called before it is `up`."""
        self.num_restarts = 0
        self._max_outage_s = max_outage_s
        self._max_restarts = max_restarts
        self._away_s = 0.0
        self._away_since: float | None = None
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []
        self._lost: asyncio.Future[None] | None = None

    @classmethod
    def given(cls, name: str, base_urls: Sequence[str], api_key: str | None, *, max_outage_s: float) -> Fleet:
        """Servers that are there and that somebody else looks after."""
        replicas = [Replica(f"{name}-{i}", base_url=url, api_key=api_key) for i, url in enumerate(base_urls)]
        return cls(name, replicas, max_outage_s=max_outage_s)

    @classmethod
    def launched(cls, name: str, launches: Sequence[Launch], *, max_outage_s: float, max_restarts: int) -> Fleet:
        """Servers that this run starts and ends."""
        replicas = [Replica(launch.name, launch=launch) for launch in launches]
        return cls(name, replicas, max_outage_s=max_outage_s, max_restarts=max_restarts)

    def plan(self) -> str:
        """What `start` will do, in words."""
        ours = [replica.launch for replica in self.replicas if replica.launch is not None]
        if ours:
            return f"starting {len(ours)} vLLM server{'s' * (len(ours) > 1)}, log in {ours[0].log.parent}"
        return f"served at {', '.join(replica.base_url for replica in self.replicas)}"

    @property
    def lost(self) -> asyncio.Future[None]:
        """Gets a `ServerLost` when there is no hope; the run awaits it beside its work."""
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
            self._lost.add_done_callback(lambda future: future.cancelled() or future.exception())  # never "unretrieved"
        return self._lost

    @property
    def away_s(self) -> float:
        """Seconds so far in which no server of this model was up."""
        return self._away_s + (time.monotonic() - self._away_since if self._away_since is not None else 0.0)

    async def start(self) -> None:
        """Start all of them at once, wait until each answers, and watch them from then on.

        Raises:
            LaunchError: one does not start; the others are ended.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas:
                    group.create_task(replica.start())
        except BaseExceptionGroup as failed:
            await self.aclose()
            raise failed.exceptions[0] from None
        for replica in self.replicas:
            replica.up = True
        self._watchers = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def each(self, call: Callable[[Replica], Awaitable[T]]) -> list[T]:
        """Call something on every server that is up, at once; waits for the first one."""
        await self._until_up()
        return list(await asyncio.gather(*(call(replica) for replica in self.replicas if replica.up)))

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        """See `Transport`; the time without a server is not part of `timeout_s`."""
        return await self._request(lambda to, left: to.post_json(path, payload, timeout_s=left), timeout_s, key)

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        """From one of them."""
        return await self._request(lambda to, left: to.get_json(path, timeout_s=left), timeout_s, "")

    async def aclose(self) -> None:
        """End every server that this run started; nothing of them is left."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(replica.end() for replica in self.replicas))
        self._watchers = []

    # --- requests

    async def _request(
        self, send: Callable[[Transport, float], Awaitable[dict[str, Any]]], timeout_s: float, key: str
    ) -> dict[str, Any]:
        used, pause = 0.0, 0.25
        while True:
            await self._until_up()
            replica = self._choose(key)
            transport, began = replica.transport, time.monotonic()
            try:
                return await send(transport, max(0.001, timeout_s - used))
            except TransportError as error:
                if error.kind != "unavailable":
                    raise
                in_time = time.monotonic() - began < timeout_s - used
                if await self._is_gone(replica, transport, broken_off=error.status is None and in_time):
                    await self.doubt(replica, str(error))
                    continue  # what it was sent is sent again, and took no time
                used += time.monotonic() - began
                if used + pause >= min(timeout_s, RETRY_S):
                    raise
            await asyncio.sleep(pause)
            used += pause
            pause = min(2 * pause, 8.0)

    async def _is_gone(self, replica: Replica, transport: Transport, *, broken_off: bool) -> bool:
        """Whether a failed request means that the server went away. One of ours has a port and a key of its own each
        time; a given one that broke off may have been started anew behind the same address, even if it answers."""
        if transport is not replica.transport or not replica.up or (broken_off and replica.launch is None):
            return True
        return not await replica.answers()

    def _choose(self, key: str) -> Replica:
        """Rendezvous hashing (Thaler and Ravishankar, 1998): a server that leaves moves only its own keys."""

        def weight(replica: Replica) -> bytes:
            return hashlib.blake2b(f"{replica.name}/{key}".encode(), digest_size=8).digest()

        return max((replica for replica in self.replicas if replica.up), key=weight)

    async def _until_up(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: any(replica.up for replica in self.replicas))

    # --- supervision

    async def doubt(self, replica: Replica, why: str) -> None:
        if replica.up:
            _LOG.warning("%s (%s) is away: %s", replica.name, replica.base_url, why)
        replica.up = False
        if self._away_since is None and not any(r.up for r in self.replicas):
            self._away_since = time.monotonic()

    async def _watch(self, replica: Replica) -> None:
        """Look at one server until the run ends; bring it back when it is gone."""
        try:
            while True:
                await asyncio.sleep(WATCH_S)
                if replica.up and not await replica.answers():
                    await self.doubt(replica, "no answer to a look at its health")
                if not replica.up:
                    await self._bring_back(replica)
        except ServerLost as error:
            if not self.lost.done():
                self.lost.set_exception(error)
        except Exception as error:  # on_return failed: what it serves is not what it should
            if not self.lost.done():
                self.lost.set_exception(error)

    async def _bring_back(self, replica: Replica) -> None:
        """
        Raises:
            ServerLost: it must not be started again, or the outage is too long.
        """
        last_words = ""
        if replica.server is not None:
            last_words = " " + replica.server.last_words()
            if self.num_restarts >= self._max_restarts:
                raise ServerLost(
                    f"{replica.name} crashed, and server.max_restarts = {self._max_restarts} is used up{last_words}"
                )
            self.num_restarts += 1
        while True:
            left = self._max_outage_s - (time.monotonic() - (self._away_since or time.monotonic()))
            try:
                async with asyncio.timeout(max(0.0, left) if self._away_since is not None else None):
                    await replica.start()
                    if self.on_return is not None:
                        await self.on_return(replica)
                break
            except TimeoutError:
                raise ServerLost(
                    f"no server of the {self.name} for max_outage_s = {self._max_outage_s:g} s; the last one is "
                    f"{replica.name} ({replica.base_url}){last_words}"
                ) from None
            except LaunchError as error:
                if replica.launch is not None:
                    raise ServerLost(f"{replica.name} crashed and did not start again: {error}{last_words}") from error
                await asyncio.sleep(WATCH_S)
            except TransportError as error:  # gone again while it was made fit
                _LOG.warning("%s went away again: %s", replica.name, error)
                if replica.launch is not None:
                    return  # the next look restarts it, and counts it
                await asyncio.sleep(WATCH_S)
        replica.up = True
        if self._away_since is not None:
            self._away_s += time.monotonic() - self._away_since
            self._away_since = None
        _LOG.warning("%s is back at %s", replica.name, replica.base_url)
        async with self._changed:
            self._changed.notify_all()
