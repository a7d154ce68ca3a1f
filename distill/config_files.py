"""Configuration files: found, read, and blamed by line."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.toml_lines import key_lines

MAX_FILE_BYTES = 2**20


class ConfigError(Exception):
    """The configuration cannot be used. `messages` has everything that is wrong, one line each."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)


def find_file(path: str | Path) -> Path:
    """The file that a user names: a path, or the bare name of one in `configs/`.

    Raises:
        ConfigError: there is none.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ConfigError([f"{path} is a folder; name a TOML file in it"])
    packaged = folder() / f"{path}.toml"
    if os.sep not in str(path) and packaged.is_file():
        return packaged
    raise ConfigError([f"{path}: there is no such file. Shipped in configs/: {', '.join(shipped())}"])


def read_file(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The values of a TOML or JSON file, and the line of each key (none for JSON).

    Raises:
        ConfigError: it cannot be read, with line and column.
    """
    name = shown(file)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"{name} is larger than 1 MiB: not a configuration"])
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError([f"{name} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{name}: not UTF-8 at byte {error.start}"]) from None
    try:
        if file.suffix == ".json":
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ConfigError([f"{name}: wanted a JSON object"])
            return data, {}
        return tomllib.loads(text), key_lines(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg}"]) from None
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        place = f"{name}:{match[2]}:{match[3]}" if match else f"{name}:{text.count(chr(10)) + 1}"
        raise ConfigError([f"{place}: not TOML: {match[1] if match else error}"]) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise ConfigError([f"{name}: {error}"]) from None


def folder() -> Path:
    """Where the shipped configurations lie."""
    import configs

    return Path(next(iter(configs.__path__)))


def shipped() -> list[str]:
    """Their bare names."""
    return sorted(file.stem for file in folder().glob("*.toml"))


def shown(file: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
