"""Files and command lines of other trainers, read into a flat list of keys with the line of each.

All of it is hostile input: sizes, depths and counts are bounded, YAML is read without tags and aliases, and nothing of
a shell script is run.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.config_files import ConfigError
from distill.toml_lines import key_lines

MAX_BYTES = 2**18
MAX_DEPTH = 20
"""Tables and arrays inside one another."""
MAX_KEYS = 5000
MAX_VALUE = 8192
"""Characters of a value once the variables of its script are in it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as the source sets it."""

    key: str
    """Dotted, as the source spells it."""
    value: Any
    """Of TOML's or JSON's kinds; None where the source says null. A table without keys is `{}`."""
    origin: str
    """`rl.toml:4`, or `argument 3`."""


def read_text(data: bytes, name: str) -> str:
    """The text of a source, with `\\n` line ends.

    Raises:
        ConfigError: too large, not UTF-8, or binary.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{name} is larger than {MAX_BYTES // 1024} KiB: not a configuration"])
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}:{line}: not UTF-8 at byte {error.start}"]) from None
    if "\0" in text:
        raise ConfigError([f"{name}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL byte; not a text"])
    return text


def read_toml(text: str, name: str) -> list[Entry]:
    """Keys of a TOML text.

    Raises:
        ConfigError: with line and column.
    """
    try:
        data, lines = tomllib.loads(text), key_lines(text)
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        place, words = (f"{name}:{match[2]}:{match[3]}", match[1]) if match else (name, str(error))
        raise ConfigError([f"{place}: not TOML: {words}"]) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise ConfigError([f"{name}: not TOML that can be read: {error}"]) from None

    def origin(path: tuple[str, ...]) -> str:
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        return name if line is None else f"{name}:{line}"

    return _bounded((Entry(".".join(path), value, origin(path)) for path, value in _leaves(data, ())), name)


def _leaves(data: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in data.items():
        path = (*prefix, key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def read_yaml(text: str, name: str) -> list[Entry]:
    """Keys of a YAML text of one document.

    Raises:
        ConfigError: with line and column; also for aliases, tags of other languages, and keys that are set twice.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # flat: checked before anything recurses
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            place = f"{name}:{event.start_mark.line + 1}"
            if depth > MAX_DEPTH:
                raise ConfigError([f"{place}: nested more than {MAX_DEPTH} deep"])
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError([f"{place}: the YAML alias *{event.anchor} is not followed; write the value out"])
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError([f"{name}: wanted a YAML mapping of keys"])
        return _bounded(_yaml_leaves(loader, root, "", name), name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError([f"{place}: not YAML that can be read: {error.problem}"]) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a control character; a date that there is not
        raise ConfigError([f"{name}: not YAML that can be read: {' '.join(str(error).split())}"]) from None


def _yaml_leaves(loader: Any, node: Any, prefix: str, name: str) -> Iterator[Entry]:
    import yaml

    seen: set[str] = set()
    for key_node, value_node in node.value:
        origin = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError([f"{origin}: wanted a plain key"])
        if key_node.value in seen:
            raise ConfigError([f"{origin}: {key_node.value!r} is set twice"])
        seen.add(key_node.value)
        key = prefix + key_node.value
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _yaml_leaves(loader, value_node, f"{key}.", name)
        else:
            yield Entry(key, loader.construct_object(value_node, deep=True), origin)


OVERRIDE = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w/@-]*(?:\.[\w/@-]+)*)(?:=(.*))?", re.DOTALL)
"""A Hydra override: `key=value`, `+key=value`, `++key=value`, `~key`."""
_MODULE = re.compile(r"(?:.*/)?verl[./][\w./]+")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^{}$]*))?\})")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_END = re.compile(r"[|;&]+|\d*[<>].*|\d?>&\d")


def read_command(text: str, name: str) -> list[Entry]:
    """Keys of a Hydra command line, or of the shell script that it stands in. Nothing is run: of the script, plain
    assignments `NAME=value` are put in where the command says `$NAME`.

    Raises:
        ConfigError: quotes that do not close, with the line; no override at all.
    """
    tokens: list[tuple[str, str]] = []
    variables: dict[str, str] = {}
    command: list[tuple[str, str]] = []
    found = False
    for number, raw in enumerate([*text.split("\n"), ""], start=1):
        line = raw.rstrip()
        goes_on = line.endswith("\\")
        try:
            words = shlex.split(line.removesuffix("\\"), comments=True)
        except ValueError as error:
            raise ConfigError([f"{name}:{number}: {error}; quotes have to close on their line"]) from None
        command += [(word, f"{name}:{number}") for word in words]
        if goes_on:
            continue
        module = next((i for i, (word, _) in enumerate(command) if _MODULE.fullmatch(word)), None)
        if module is not None:
            tokens, found = command[module + 1 :], True
            break
        assigned = command[1:] if command and command[0][0] in ("export", "declare", "local") else command
        if assigned and all(_ASSIGNMENT.fullmatch(word) for word, _ in assigned):
            for word, _ in assigned:
                key, _, value = word.partition("=")
                variables[key] = _expanded(value, variables)
        tokens += [word for word in command if OVERRIDE.fullmatch(word[0]) and "." in word[0].partition("=")[0]]
        command = []
    end = next((i for i, (word, _) in enumerate(tokens) if _END.fullmatch(word)), len(tokens))
    entries = overrides([(_expanded(word, variables), origin) for word, origin in tokens[:end]])
    if not entries:
        where = "after the module's name" if found else "and no `python -m verl...` command"
        raise ConfigError([f"{name}: there is no override (key=value) in it {where}"])
    return _bounded(iter(entries), name)


def overrides(words: Sequence[tuple[str, str]]) -> list[Entry]:
    """Hydra's arguments as keys: overrides, and the options `--config-name` and `--config-path`.

    Args:
        words: each with its origin.
    """
    entries: list[Entry] = []
    waiting = list(words)
    while waiting:
        word, origin = waiting.pop(0)
        match = OVERRIDE.fullmatch(word)
        if match is not None and match[1] == "~":
            entries.append(Entry(word, None, origin))
        elif match is not None and match[3] is not None:
            entries.append(Entry(match[2], _hydra_value(match[3]), origin))
        elif word.startswith("--"):
            key, equals, value = word.partition("=")
            if not equals and waiting and OVERRIDE.fullmatch(waiting[0][0]) and "=" not in waiting[0][0]:
                value = waiting.pop(0)[0]
            entries.append(Entry(key, value, origin))
        else:
            entries.append(Entry(word, "", origin))
    return entries


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[3] if match[3] is not None else match[0])

    return _VARIABLE.sub(value, text)[:MAX_VALUE]


def _hydra_value(text: str) -> Any:
    """The value of an override: a number, true, false, null, a list of them, else text."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        return [_hydra_value(part) for part in text[1:-1].split(",") if part.strip()]
    lowered = text.casefold()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("null", "none"):
        return None
    return as_number(text) if as_number(text) is not None else text


def as_number(text: str) -> int | float | None:
    """The number that a text is, `1e-5` among them, which YAML 1.1 takes for text; None if it is none."""
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d{1,18}\.?\d{0,30}|\.\d{1,30})([eE][+-]?\d{1,3})?", text):
        return float(text)
    return None


def _bounded(entries: Iterator[Entry], name: str) -> list[Entry]:
    result: list[Entry] = []
    for entry in entries:
        if entry.key.count(".") >= MAX_DEPTH:
            raise ConfigError([f"{entry.origin}: nested more than {MAX_DEPTH} deep"])
        result.append(entry)
        if len(result) > MAX_KEYS:
            raise ConfigError([f"{name} sets more than {MAX_KEYS} keys: not a configuration"])
    return result
