"""The web of an environment: its store of pages and, unless it replays, the way out to the network.

One guard, one HTTP client and at most one browser serve all environments of an event loop that have the same
configuration: sites see one polite visitor, whatever the number of episodes. What belongs to an episode is a session:
a browser context of its own, opened at the first page and closed at the next reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from envs.tool_env import EnvSetupError
from envs.types import Task
from tools.browse_config import BrowseConfig, BrowseConfigError, browse_config
from tools.open_web import OpenWebTools
from tools.pages import Page, PageStoreError
from tools.store import PageStore
from tools.tool import Tool
from tools.types import ToolFailure


class LiveWeb:
    """What one environment has of the web. Nothing is opened before the first page is fetched.

    Args:
        browse: the table `[env_args.browse]`.
        max_chars: of one tool output.

    Raises:
        EnvSetupError: the table is wrong, or there is no store to replay.
        PageStoreError: the store is broken.
    """

    def __init__(self, browse: Mapping[str, Any], *, max_chars: int) -> None:
        try:
            self.config = browse_config(browse)
            self.store = _shared_store(self.config)
            self._web = OpenWebTools(
                self.store,
                fetch=self._fetch,
                page_tokens=self.config.page_tokens,
                max_chars=max_chars,
                only_seen_urls=self.config.only_seen_urls,
                num_hits=self.config.num_hits,
                timeout_s=self.config.timeout_s,
            )
        except FileNotFoundError as error:
            raise EnvSetupError(f"medbrowse: env_args.browse.store: {error}") from None
        except BrowseConfigError as error:
            raise EnvSetupError(f"medbrowse: env_args.{error}") from None
        except PageStoreError:
            raise
        except ValueError as error:
            raise EnvSetupError(f"medbrowse: {error}") from None

    def tools(self) -> Sequence[Tool]:
        return self._web.tools()

    async def begin(self, state: dict[str, Any], task: Task) -> None:
        """Prepares an episode: what the last one had open is closed."""
        self._web.begin(state, (message.get("content") or "" for message in task.messages))

    async def aclose(self) -> None:
        """Closes what is open."""

    async def _fetch(self, url: str, /) -> Page:
        raise ToolFailure("the network is out of reach")


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
