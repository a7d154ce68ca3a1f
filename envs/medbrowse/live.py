"""The web of an environment: its store of pages and, unless it replays, the way out to the network.

All environments of an event loop that have the same configuration go out together (`tools.way_out`): sites see one
polite visitor, whatever the number of episodes. What belongs to an episode is a session: a browser context of its own,
opened at the first page and closed at the next reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from envs.tool_env import EnvSetupError
from envs.types import Task
from tools.browse_config import BrowseConfig, BrowseConfigError, browse_config
from tools.chromium import BrowserMissing, find_chromium
from tools.crawl import Session
from tools.fetch import Fetched
from tools.medical import medical_tools
from tools.open_web import OpenWebTools
from tools.pages import Page, PageStoreError
from tools.providers import search_provider
from tools.store import PageStore
from tools.text import Converter, ConverterMissing
from tools.tool import Tool
from tools.way_out import crawl_settings, guard_of, services

GRACE_S = 5.0
"""A session keeps its own deadline; should it ever not, it is cut off so much later."""


class LiveWeb:
    """What one environment has of the web. Nothing is opened before the first page is fetched.

    Args:
        browse: the table `[env_args.browse]`.
        max_chars: of one tool output.

    Raises:
        EnvSetupError: the table is wrong, a key is missing, or there is no store to replay.
        PageStoreError: the store is broken.
    """

    def __init__(self, browse: Mapping[str, Any], *, max_chars: int) -> None:
        self._session: Session | None = None
        try:
            self.config = browse_config(browse)
            if self.config.mode != "replay":
                _check_installed(self.config)
            self.store = _shared_store(self.config)
            self._tools = self._make_tools(max_chars)
        except FileNotFoundError as error:
            raise EnvSetupError(f"medbrowse: env_args.browse.store: {error}") from None
        except (BrowserMissing, ConverterMissing) as error:
            raise EnvSetupError(f"medbrowse: env_args.browse: {error}") from None
        except BrowseConfigError as error:
            raise EnvSetupError("\n".join(f"medbrowse: env_args.{line}" for line in str(error).splitlines())) from None
        except PageStoreError:
            raise
        except ValueError as error:
            raise EnvSetupError(f"medbrowse: {error}") from None

    def _make_tools(self, max_chars: int) -> tuple[Tool, ...]:
        config = self.config
        guard = guard_of(config)
        client = None if config.mode == "replay" else _LateClient(config)
        search = None
        if config.search != "none":
            search = search_provider(
                config.search,
                store=self.store,
                client=client,
                guard=guard,
                url=config.search_url,
                timeout_s=config.timeout_s,
            ).search
        self._web = OpenWebTools(
            self.store,
            fetch=self._fetch,
            search=search,
            page_tokens=config.page_tokens,
            max_chars=max_chars,
            num_hits=config.num_hits,
            only_seen_urls=config.only_seen_urls,
            timeout_s=config.timeout_s + GRACE_S,
        )
        typed = medical_tools(
            config.tools,
            store=self.store,
            client=client,
            contact=config.contact,
            page_tokens=config.page_tokens,
            max_chars=max_chars,
            orange_book=config.orange_book,
            timeout_s=config.timeout_s,
        )
        return (*self._web.tools(), *typed)

    def tools(self) -> Sequence[Tool]:
        return self._tools

    async def begin(self, state: dict[str, Any], task: Task) -> None:
        """Prepares an episode: what the last one had open is closed."""
        await self._end_session()
        self._web.begin(state, (message.get("content") or "" for message in task.messages))

    async def aclose(self) -> None:
        await self._end_session()

    async def _fetch(self, url: str, /) -> Page:
        if self._session is None:
            self._session = Session(await crawl_settings(self.config))
        return await self._session.fetch(url)

    async def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()


class _LateClient:
    """`tools.api.Client` for search and typed tools, which are made before there is an event loop."""

    def __init__(self, config: BrowseConfig) -> None:
        self._config = config

    async def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> Fetched:
        return await (await services(self._config)).get(url, headers=headers)

    async def post_json(self, url: str, payload: Any, *, headers: Mapping[str, str] | None = None) -> Fetched:
        return await (await services(self._config)).post_json(url, payload, headers=headers)


def _check_installed(config: BrowseConfig) -> None:
    """What pages are read with must be there before a run, not at the first page: there it would be the model's error.

    Raises:
        ConverterMissing, BrowserMissing: it is not.
    """
    Converter()
    if config.engine == "browser" or config.executable is not None:
        find_chromium(config.executable)


_stores: WeakValueDictionary[tuple[Path, str], PageStore] = WeakValueDictionary()


def _shared_store(config: BrowseConfig) -> PageStore:
    """The store of a configuration: one for all environments of the process, for as long as one of them lives."""
    if config.mode == "live" or config.store is None:
        return PageStore((), "live")
    path = Path(config.store).expanduser().resolve()
    store = _stores.get((path, config.mode))
    if store is None:
        _stores[path, config.mode] = store = PageStore(path, config.mode)
    return store
