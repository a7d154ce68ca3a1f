"""How the registry's pages look: HTML with a site's navigation around a title and `key: value` lines.

The text that a tool makes of a page is always made from its HTML. Because all pages of a kind share one layout, that
conversion can also be done once a kind with marks in place of the values: `RegistryPage.text` is that short cut, used
where many thousand pages are read (search index, demonstrations); a test holds it equal to the long way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape

from tools.html import html_to_text

_MARK = re.compile(r"Qz(\d)z")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTemplate:
    """Text with numbered gaps: `literals[0] values[gaps[0]] literals[1] ...`."""

    literals: tuple[str, ...]
    gaps: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> TextTemplate:
        parts = _MARK.split(text)
        return cls(literals=tuple(parts[::2]), gaps=tuple(int(gap) for gap in parts[1::2]))

    def fill(self, values: tuple[str, ...]) -> str:
        parts = [self.literals[0]]
        for gap, literal in zip(self.gaps, self.literals[1:], strict=True):
            parts += (values[gap], literal)
        return "".join(parts)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of page. `{0}` to `{9}` are its values."""

    kind: str
    title: str
    lines: tuple[str, ...]
    """Inner HTML of the list's items."""

    def html(self, values: tuple[str, ...]) -> str:
        """The page as a server would send it."""
        safe = [escape(value) for value in values]
        items = "\n".join(f"<li>{line.format(*safe)}</li>" for line in self.lines)
        return _FRAME.format(title=self.title.format(*safe), items=items)

    @cached_property
    def _marked(self) -> tuple[TextTemplate, TextTemplate]:
        page = html_to_text(self.html(tuple(f"Qz{i}z" for i in range(10))), "https://registry.example/p10")
        return TextTemplate.of(page.title), TextTemplate.of(page.text)

    @property
    def title_template(self) -> TextTemplate:
        return self._marked[0]

    @property
    def text_template(self) -> TextTemplate:
        return self._marked[1]


@dataclass(frozen=True, slots=True)
class RegistryPage:
    """One page of a registry."""

    url: str
    layout: Layout
    values: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.layout.title_template.fill(self.values)

    @property
    def text(self) -> str:
        """What `html_to_text` makes of `html`."""
        return self.layout.text_template.fill(self.values)

    @property
    def html(self) -> str:
        return self.layout.html(self.values)


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>nav a {{ margin: 1em }}</style><script>window.page = {{"ready": true}};</script></head>
<body>
<header><a href="/">Registry</a><form action="/search"><input name="q"></form></header>
<nav><a href="/trials">Trials</a> <a href="/companies">Companies</a> <a href="/help">Help</a></nav>
<main>
<h1>{title}</h1>
<ul>
{items}
</ul>
</main>
<aside>Most read this week: <a href="/p1">annual report</a></aside>
<footer><a href="/terms">Terms</a> An invented registry. Nothing here is medical advice.</footer>
</body>
</html>
"""


@cache
def layouts() -> Mapping[str, Layout]:
    """Every kind of page by its name."""
    kinds = (
        Layout(
            kind="trial",
            title="{0}",
            lines=(
                "more effective: {1}",
                "less effective: {2}",
                'see <a href="/{3}">more effective</a>',
                'see <a href="/{4}">less effective</a>',
            ),
        ),
        Layout(kind="news", title="News on {0}", lines=("funded by {1}", 'see <a href="/{2}">sponsor</a>')),
        Layout(
            kind="ingredient",
            title="{0}",
            lines=(
                "applicant: {1}",
                "approved: {2}",
                'see <a href="/{3}">applicant</a>',
                'see <a href="/{4}">Orange Book</a>',
                'see <a href="/{5}">market on approval</a>',
            ),
        ),
        Layout(kind="company", title="{0}", lines=("ticker: {1}", 'see <a href="/{2}">product</a>')),
        Layout(kind="orange_book", title="Orange Book: {0}", lines=("patent expires: {1}", "exclusivity: {2}")),
        Layout(kind="market_day", title="{0} on {1}", lines=("open: {2}", "close: {3}")),
    )
    return {layout.kind: layout for layout in kinds}
