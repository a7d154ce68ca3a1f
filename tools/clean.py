"""Cleaning of untrusted text: pages, tool output, error messages.

Two steps in two places. The toolbox applies `clean_text` to whatever comes back from a tool. The renderer, which
alone knows the tokenizer, applies `neutralise` so that no text can form one of its added tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REPLACEMENT = "\ufffd"
NUM_SPACING_ROUNDS = 8

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # C0 and C1 controls except tab, newline and (for a moment) return
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"  # soft hyphen, joiners, fillers
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"  # zero-width, bidi, annotations
    "\ud800-\udfff\ufffe\uffff"  # lone surrogates, noncharacters
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"  # tags and variation selectors that can smuggle text
    "]+"
)
_LINE_BREAK = re.compile("\r\n?|\u2028|\u2029")


def clean_text(text: str) -> str:
    """Text without characters that are not seen: controls except newline and tab, zero-width and bidirectional
    characters, lone surrogates. Line breaks of every kind become a newline. Idempotent; no Unicode normalisation."""
    if text.isascii() and text.isprintable():
        return text
    return _LINE_BREAK.sub("\n", _HIDDEN.sub("", text))


def forbidden_pattern(strings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the strings, the longest first; None if there are none. Empty strings do not
    count."""
    ordered = sorted({string for string in strings if string}, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def neutralise(text: str, forbidden: re.Pattern[str] | None) -> str:
    """Breaks every match of `forbidden`, so that none is left; text without a match comes back unchanged.

    A space goes in after a match's first character, again and again until nothing matches; a match of one character
    becomes U+FFFD. Where spaces only make new matches (some tokenizers have runs of spaces as added tokens) the
    matches become U+FFFD, and where even that is forbidden they are cut out, which always comes to an end.

    Args:
        forbidden: from `forbidden_pattern`; None leaves the text as it is.
    """
    if forbidden is None:
        return text
    for _ in range(NUM_SPACING_ROUNDS):
        text, count = forbidden.subn(_spaced, text)
        if not count:
            return text
    for _ in range(NUM_SPACING_ROUNDS):
        text, count = forbidden.subn(REPLACEMENT, text)
        if not count:
            return text
    while forbidden.search(text):
        text = forbidden.sub("", text)
    return text


def _spaced(match: re.Match[str]) -> str:
    found = match.group()
    return REPLACEMENT if len(found) == 1 else f"{found[0]} {found[1:]}"
