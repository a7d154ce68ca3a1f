"""How typed tools show what they found: lines of plain text, cut to pages, in the frame of text from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.frame import FRAME_CHARS, framed
from tools.open_web import FRAME_TOKENS, note_seen
from tools.pages import Page
from tools.paging import paginate
from tools.tool import ToolOutput
from tools.types import ToolErrorKind, ToolFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheets:
    """The size of what is shown at once."""

    page_tokens: int
    max_chars: int

    def output(
        self,
        lines: Iterable[str],
        *,
        url: str,
        page: int,
        state: dict[str, Any],
        answers: Sequence[Page],
        links: Iterable[str] = (),
    ) -> ToolOutput:
        """One page of the lines.

        Args:
            url: where people read the same.
            page: from 1 on.
            answers: what it was made from, for the episode's file.
            links: other URLs that the model has now seen.

        Raises:
            ToolFailure: there is no such page.
        """
        # Links of Markdown in it get no numbers: those are for pages that `browse` shows.
        text = "\n".join(line for line in lines if line).replace("](", "] (")
        document = paginate(
            text, url, page_tokens=self.page_tokens - FRAME_TOKENS, page_chars=self.max_chars - FRAME_CHARS
        )
        count = len(document.pages)
        if page > count:
            there = "there is 1 page" if count == 1 else f"there are pages 1 to {count}"
            raise ToolFailure(f"no page {page}: {there}", ToolErrorKind.INVALID_ARGUMENTS)
        shown = document.pages[page - 1].text.strip("\n")
        content, nonce = framed(url, f"{shown}\n\n[page {page}/{count}]" if count > 1 else shown)
        note_seen(state, [url, *links], "a typed tool")
        metadata = {
            "url": url,
            "keys": [answer.url for answer in answers],
            "sha256": [answer.sha256 for answer in answers],
            "fetched_at": [answer.fetched_at for answer in answers],
            "page": page,
            "num_pages": count,
            "nonce": nonce,
        }
        return ToolOutput(content=content, metadata=metadata)


def line(name: str, *values: str, between: str = "; ") -> str:
    """`name: value; value`, or "" if there is no value."""
    text = between.join(value for value in values if value)
    return f"{name}: {text}" if text else ""


def section(title: str, items: Iterable[str]) -> list[str]:
    """A title and an item a line; nothing without items."""
    rows = [f"- {item}" for item in items if item]
    return [f"{title}:", *rows] if rows else []


def joined(*values: str, between: str = ", ") -> str:
    """Those that say something."""
    return between.join(value for value in values if value)


def few(values: Sequence[str], count: int) -> str:
    """The first ones, and how many more there are."""
    more = len(values) - count
    return joined(*values[:count]) + (f" and {more} more" if more > 0 else "")
