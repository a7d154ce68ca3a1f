"""On which line a TOML file sets a key: what `tomllib` does not tell."""

from __future__ import annotations

import tomllib

_QUOTES = ('"""', "'''", '"', "'")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line (from 1) of every key and table header. Keys inside an inline table are on the line of that table's key.

    Args:
        text: TOML that `tomllib` has accepted, with `\\n` line ends.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[tuple[str, ...], int] = {}

    def scan(self) -> dict[tuple[str, ...], int]:
        table: tuple[str, ...] = ()
        while self._skip_blank():
            line = self._text.count("\n", 0, self._at) + 1
            if self._text[self._at] == "[":
                while self._text[self._at] == "[":
                    self._at += 1
                table = self._dotted_key()
                self._lines.setdefault(table, line)
                self._skip_to_line_end()
            else:
                key = (*table, *self._dotted_key())
                for length in range(1, len(key) + 1):
                    self._lines.setdefault(key[:length], line)
                self._skip_to_line_end()
        return self._lines

    def _skip_blank(self) -> bool:
        """Go to the next character that is neither white space nor in a comment; False at the end."""
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "#":
                self._at = self._line_end()
            elif character.isspace():
                self._at += 1
            else:
                return True
        return False

    def _line_end(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _dotted_key(self) -> tuple[str, ...]:
        """The key at this place, up to its `=` or `]`."""
        parts: list[str] = []
        bare = ""
        while self._text[self._at] not in "=]":
            character = self._text[self._at]
            if character in "\"'":
                start = self._at
                self._skip_string()
                parts.append(next(iter(tomllib.loads(f"{self._text[start : self._at]} = 0"))))
                continue
            if character == "." or character.isspace():
                if bare:
                    parts.append(bare)
                bare = ""
            else:
                bare += character
            self._at += 1
        if bare:
            parts.append(bare)
        return tuple(parts)

    def _skip_to_line_end(self) -> None:
        """Over the rest of a header or a value, which may go over several lines inside brackets and strings."""
        depth = 0
        while self._at < len(self._text):
            character = self._text[self._at]
            if character in "\"'":
                self._skip_string()
                continue
            if character == "#":
                self._at = self._line_end()
                continue
            if character == "\n" and depth <= 0:
                return
            depth += (character in "[{") - (character in "]}" and depth > 0)
            self._at += 1

    def _skip_string(self) -> None:
        quote = next(q for q in _QUOTES if self._text.startswith(q, self._at))
        self._at += len(quote)
        while not self._text.startswith(quote, self._at):
            self._at += 2 if self._text[self._at] == "\\" and quote[0] == '"' else 1
        self._at += len(quote)
        while len(quote) == 3 and self._text.startswith(quote[0], self._at):  # """ may end in up to five quotes
            self._at += 1
