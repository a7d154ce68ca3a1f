"""The pages that a run's tools read, from its page store: on the disk, never from the network, never written."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from tools.page_folder import INDEX
from tools.pages import Page, PageStoreError, checked_key
from tools.store import Pages, open_pages
from tools.types import ToolFailure

LONGEST_TEXT = 1_000_000
"""Characters of a page that are shown."""


class StoredPages:
    """The page store of one run, opened when a page is first asked for and again when it has grown.

    Args:
        path: folder or page file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = path / INDEX if path.is_dir() else path
        self._lock = threading.Lock()
        self._pages: Pages | None = None
        self._stamp = (-1, -1)

    def find(self, key: str) -> Page | None:
        """The page of a key: the canonical URL that was asked for or where its redirects ended, or a `tool_key`.

        Raises:
            PageStoreError, OSError: the store is broken or gone.
        """
        try:
            key = checked_key(key)
        except ValueError:
            return None
        with self._lock:
            status = self._index.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if self._pages is None or stamp != self._stamp:
                self._pages, self._stamp = open_pages(self.path, write=False), stamp
            return self._pages.find(key)


def stored_pages(run: Path) -> StoredPages | None:
    """The store that the run's `config.json` names (`env_args.browse.store` or `env_args.pages`; a relative one lies
    in the working directory, as for the run itself); None where there is none."""
    try:
        arguments = json.loads((run / "config.json").read_bytes())["env_args"]
        browse = arguments.get("browse") or {}
        path = Path(browse.get("store") or arguments["pages"]).expanduser()
        there = (path / INDEX).is_file() or (path.suffix == ".jsonl" and path.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        return None
    return StoredPages(path) if there else None


def page_of(pages: StoredPages | None, key: str) -> dict[str, Any]:
    """A page for a reader; `problem` says why there is none.

    Returns:
        `url`, `final_url`, `title`, `text` as the model reads it before it is cut, `length` of the whole text in
        characters, `status`, `fetched_at`, `sha256`.
    """
    from tools.web import page_text

    if pages is None:
        return {"problem": "the run has no page store, or it is not where its config.json says"}
    try:
        page = pages.find(key)
        if page is None:
            return {"problem": "this page is not in the store"}
        if page.error is not None:
            return {"problem": f"recorded as a failure: {page.error.kind}: {page.error.message}"}
        title, text = (page.title, page.text) if page.text is not None else page_text(page)[:2]
    except (OSError, PageStoreError, ToolFailure) as error:
        return {"problem": str(error)}
    return {
        "url": page.url,
        "final_url": page.final_url,
        "title": title,
        "text": text[:LONGEST_TEXT],
        "length": len(text),
        "status": page.status,
        "fetched_at": page.fetched_at,
        "sha256": page.sha256,
    }
