"""The way out to the network that environments of one event loop and one configuration share.

    session = Session(await crawl_settings(config))         # pages: one session an episode
    client = await services(config)                         # search services, public interfaces

Every request goes through a guard. Pages are fetched under the rules of `[env_args.browse]`. Services, which the user
has named and the model cannot choose, have a client of their own, which `allow` and robots.txt do not narrow. What is
open is closed when the event loop ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from tools.browse_config import BrowseConfig
from tools.crawl import CrawlSettings, close_all
from tools.fetch import FetchLimits, HttpClient, user_agent
from tools.guard import Guard
from tools.providers import provider_url
from tools.rate import HostRate

SERVICE_TYPES = ("application/json", "application/xml", "text/", "application/zip", "application/x-zip-compressed",
                 "application/octet-stream")  # fmt: skip
SERVICE_BYTES = 50_000_000
"""The Orange Book's data files are the largest."""


def guard_of(config: BrowseConfig) -> Guard:
    """Where pages may come from.

    Raises:
        ValueError: an entry of `open_addresses` is none.
    """
    guard = Guard(allow=config.allow, ports=config.ports, open_addresses=config.open_addresses)
    return guard if config.deny is None else replace(guard, deny=config.deny)


async def crawl_settings(config: BrowseConfig) -> CrawlSettings:
    """How pages are read. Sessions of equal configurations share a browser and take turns."""
    shared = await _shared(config)
    if shared.settings is None:
        shared.settings = CrawlSettings(
            guard=guard_of(config),
            user_agent=user_agent(config.contact),
            engine=config.engine,
            executable=config.executable,
            limits=FetchLimits(timeout_s=config.timeout_s, max_bytes=config.max_bytes),
            robots=config.robots,
            rate=shared.rate,
            timeout_s=config.timeout_s,
        )
    return shared.settings


async def services(config: BrowseConfig) -> HttpClient:
    """The client of search services and public interfaces."""
    shared = await _shared(config)
    if shared.services is None:
        shared.services = HttpClient(
            services_guard(config),
            user_agent=user_agent(config.contact),
            limits=FetchLimits(timeout_s=config.timeout_s, max_bytes=SERVICE_BYTES, content_types=SERVICE_TYPES),
            robots=False,
            rate=shared.rate,
        )
    return shared.services


def services_guard(config: BrowseConfig) -> Guard:
    """Where services may be: at any public address, and at the search service's own if that is an address."""
    guard = Guard(ports=config.ports, open_addresses=config.open_addresses, deny=())
    if config.search == "none":
        return guard
    parts = urlsplit(provider_url(config.search, config.search_url))
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    ports = tuple(dict.fromkeys((*config.ports, port)))
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return replace(guard, ports=ports)
    own = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    return replace(guard, ports=ports, open_addresses=(*config.open_addresses, own))


@dataclass(slots=True)
class _Shared:
    """What one configuration has open on one event loop."""

    rate: HostRate
    settings: CrawlSettings | None = None
    services: HttpClient | None = None


@dataclass(slots=True)
class _OnLoop:
    end: AsyncGenerator[None, None]
    by_config: dict[str, _Shared] = field(default_factory=dict)


_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _OnLoop] = WeakKeyDictionary()


async def _shared(config: BrowseConfig) -> _Shared:
    loop = asyncio.get_running_loop()
    if loop not in _loops:
        _loops[loop] = _OnLoop(_until_the_loop_ends())
        await anext(_loops[loop].end)
    key = config.model_dump_json()
    by_config = _loops[loop].by_config
    if key not in by_config:
        by_config[key] = _Shared(HostRate(config.requests_per_minute))
    return by_config[key]


async def _until_the_loop_ends() -> AsyncGenerator[None, None]:
    """Closes what is open when `asyncio.run` closes the loop's generators: nobody else knows who came last."""
    try:
        yield
    finally:
        await close()


async def close() -> None:
    """Closes all that is open on this event loop: clients, browsers, converters. What is asked for later opens anew."""
    on_loop = _loops.pop(asyncio.get_running_loop(), None)
    for shared in on_loop.by_config.values() if on_loop is not None else ():
        if shared.services is not None:
            await shared.services.aclose()
    await close_all()
