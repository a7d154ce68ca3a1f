"""What an import has found so far: our settings, and a row of the report for every key of the source."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.config_rules import looks_secret
from distill.migrate.source import Entry, as_number

Verdict = Literal["mapped", "dropped", "impossible", "not known", "added"]
"""mapped: it stands in the new file. dropped: it has no meaning here. impossible: its effect is not to be had as it
was; the words say what to do. not known: no key of the source system that we know. added: not in the source."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report."""

    origin: str
    key: str
    value: str
    """As one would write it; never a secret."""
    verdict: Verdict
    words: str
    """Where it went and how it was converted; why it was dropped; what to do instead."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of ours."""

    value: Any
    comment: str
    """Where it comes from."""


class Draft:
    """Settings and rows; every entry of the source has one row in the end, or `close` fails."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.settings: dict[str, Setting] = {}
        """By our dotted key. `{}` switches a table on."""
        self.rows: list[Row] = []
        self.entries: dict[str, Entry] = {}
        """By the source's key. Of a key that is set again, the last one counts."""
        self._open: dict[int, Entry] = {}
        for entry in entries:
            before = self.entries.get(entry.key)
            self.entries[entry.key] = entry
            self._open[id(entry)] = entry
            if before is not None:
                self.drop(before, f"set again at {entry.origin}")

    def map(self, entry: Entry, key: str, value: Any, note: str = "") -> None:
        """Set our `key`. If another key has set it to another value, the first one stays and the row says so."""
        known = self.settings.get(key)
        if known is not None and known.value != value:
            words = (
                f"sets {key} to {shown(value)}, but {known.comment} says {shown(known.value)}; one value is possible"
            )
            self._report(entry, "impossible", words)
            return
        if known is None:
            self.settings[key] = Setting(value, entry.key)
        # The value is not shown twice.
        same = shown(value) == shown(entry.value)
        written = key if value == {} or same else f"{key} = {shown(value)}"
        self._report(entry, "mapped", "; ".join(filter(None, (written, note))))

    def drop(self, entry: Entry, why: str) -> None:
        """It has no meaning here."""
        self._report(entry, "dropped", why)

    def refuse(self, entry: Entry, instead: str) -> None:
        """Its effect is not to be had."""
        self._report(entry, "impossible", instead)

    def unknown(self, entry: Entry, known: Sequence[str]) -> None:
        """The source system has no such key, as far as we know."""
        near = difflib.get_close_matches(entry.key, known, n=1, cutoff=0.8)
        self._report(entry, "not known", f"did you mean {near[0]}?" if near else "no key that the importer knows")

    def add(self, key: str, value: Any, why: str) -> None:
        """Set our `key`, which the source does not set, unless it is set."""
        if key not in self.settings:
            self.settings[key] = Setting(value, why)
            self.rows.append(Row("", key, "" if value == {} else shown(value), "added", why))

    def say(self, origin: str, key: str, verdict: Verdict, words: str) -> None:
        """A row for something that is no key: a file that lies beside the source."""
        self.rows.append(Row(origin, key, "", verdict, words))

    def value(self, key: str) -> Any:
        """What our key is set to; None if it is not."""
        setting = self.settings.get(key)
        return None if setting is None else setting.value

    def close(self) -> None:
        """
        Raises:
            AssertionError: an entry without a row; a bug.
        """
        assert not self._open, [entry.key for entry in self._open.values()]

    def _report(self, entry: Entry, verdict: Verdict, words: str) -> None:
        del self._open[id(entry)]  # one row each
        self.rows.append(Row(entry.origin, entry.key, shown(entry.value), verdict, words))


Rule = Callable[[Draft, Entry], None]
"""What becomes of one key."""


def to(key: str, convert: Callable[[Any], Any], note: str = "") -> Rule:
    """The key is ours by another name.

    Args:
        convert: of the value; raises ValueError with words where it cannot be.
    """

    def rule(draft: Draft, entry: Entry) -> None:
        draft.map(entry, key, convert(entry.value), note)

    return rule


def drop(why: str) -> Rule:
    return lambda draft, entry: draft.drop(entry, why)


def refuse(instead: str) -> Rule:
    return lambda draft, entry: draft.refuse(entry, instead)


def only(values: object | tuple[object, ...], why: str, instead: str) -> Rule:
    """Dropped where it has one of these values, which is how it is here; impossible with any other."""
    allowed = values if isinstance(values, tuple) else (values,)

    def rule(draft: Draft, entry: Entry) -> None:
        value = as_number(entry.value) if isinstance(entry.value, str) else None
        found = entry.value if value is None else value
        if any(found == one and isinstance(found, bool) == isinstance(one, bool) for one in allowed):
            draft.drop(entry, why)
        else:
            draft.refuse(entry, instead)

    return rule


def later(draft: Draft, entry: Entry) -> None:
    """A rule of several keys together sees to it."""


def apply(draft: Draft, rules: Mapping[str, Rule]) -> None:
    """Give each entry to its rule: that of its key, else the one of the longest `prefix.*`. Entries whose value cannot
    be read have their row then, and are taken out of `entries`."""
    for entry in list(draft.entries.values()):
        rule = rules.get(entry.key)
        parts = entry.key.split(".")
        for length in range(len(parts) - 1, 0, -1):
            rule = rule or rules.get(".".join(parts[:length]) + ".*")
        if rule is None:
            draft.unknown(entry, [key for key in rules if not key.endswith("*")])
        elif entry.value is None:
            draft.drop(entry, "null: nothing is set")
            del draft.entries[entry.key]
        elif "$" in shown(entry.value):
            draft.refuse(entry, "holds a variable that only the source system resolves; write the value")
            del draft.entries[entry.key]
        else:
            try:
                rule(draft, entry)
            except ValueError as error:
                draft.refuse(entry, str(error))


# Conversions of values


def number(value: Any) -> int | float:
    found = as_number(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"wanted a number, found {shown(value)}")
    return found


def integer(value: Any) -> int:
    found = number(value)
    if found != found or found in (float("inf"), float("-inf")) or int(found) != found:
        raise ValueError(f"wanted a whole number, found {shown(value)}")
    return int(found)


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"wanted true or false, found {shown(value)}")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"wanted a text, found {shown(value)}")
    return value


def texts(value: Any) -> list[str]:
    return [text(item) for item in (value if isinstance(value, list) else [value])]


def numbers(value: Any) -> list[int | float]:
    if not isinstance(value, list):
        raise ValueError(f"wanted a list of numbers, found {shown(value)}")
    return [number(item) for item in value]


def integers(value: Any) -> list[int]:
    """A list of whole numbers, which may be written as text: `0,1`."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [integer(item.strip() if isinstance(item, str) else item) for item in items]


def one_of(**allowed: Any) -> Callable[[Any], Any]:
    """A word of theirs to a value of ours."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{shown(value)} is not to be had; there are {', '.join(allowed)}")
        return allowed[value]

    return convert


def shown(value: Any) -> str:
    """A value for the report: short, on one line, and never a secret."""
    try:
        written = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        written = "?"
    if looks_secret(written):
        return "(not shown)"
    return printable(written if len(written) <= 80 else f"{written[:77]}...")


def printable(written: str) -> str:
    """Control characters and lone surrogates as `?`: for a terminal, and for a comment of TOML."""
    return "".join(c if c.isprintable() else "?" for c in written)
