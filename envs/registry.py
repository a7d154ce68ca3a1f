"""Environments by name.

    envs.register("my_env", "my_package.my_env:MyEnv")
    env = envs.make("my_env", limits=Limits(max_turns=6))

Registered names are Gymnasium's too: `gymnasium.make("my_env")`. An installed package offers environments through the
entry-point group `distill_gym.envs`; only the one asked for is imported, so a broken plug-in is listed as broken
and stops nothing. A path of a folder is a name as well (`envs.folder`).
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import gymnasium

from envs.tool_env import ToolEnv

GROUP = "distill_gym.envs"


class RegistryError(Exception):
    """An environment that cannot be found, imported or made; the message says what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvEntry:
    """One known environment."""

    id: str
    entry_point: str
    """`module:Class`, or the name of the class that was registered."""
    source: Literal["built-in", "registered", "plug-in"]
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Defaults of its constructor."""
    loader: Callable[[], Any] | None = None
    """Imports the class of a plug-in, or gives the class that was registered."""


_entries: dict[str, EnvEntry] = {}


def register(id: str, entry_point: str | type[ToolEnv], **kwargs: Any) -> None:
    """Make an environment known here and to Gymnasium.

    Args:
        id: `name` or `owner/name`, letters, digits, `_` and `-`.
        entry_point: `"module:Class"`, imported when the environment is made, or the class itself.
        kwargs: defaults of its constructor.

    Raises:
        RegistryError: a bad id, or one that is taken by another entry point.
    """
    if not all(part.replace("_", "").replace("-", "").isalnum() for part in id.split("/")) or id.count("/") > 1:
        raise RegistryError(f"environment id {id!r}: wanted name or owner/name of letters, digits, '_' and '-'")
    shown = entry_point if isinstance(entry_point, str) else f"{entry_point.__module__}:{entry_point.__qualname__}"
    known = _entries.get(id)
    if known is not None and (known.entry_point, known.kwargs) != (shown, kwargs):
        raise RegistryError(f"environment id {id!r} is taken by {known.entry_point}; choose another for {shown}")
    loader = None if isinstance(entry_point, str) else (lambda: entry_point)
    source: Literal["built-in", "registered"] = "built-in" if shown.startswith("envs.") else "registered"
    _entries[id] = EnvEntry(id=id, entry_point=shown, source=source, kwargs=kwargs, loader=loader)
    if id not in gymnasium.registry:
        # Gymnasium's own order wrapper would hide areset and astep; ToolEnv enforces the order itself.
        gymnasium.register(id, entry_point=lambda **kw: make(id, **kw), order_enforce=False, disable_env_checker=True)


def make(id: str, **kwargs: Any) -> ToolEnv:
    """Make an environment from its name or from the path of a folder.

    Raises:
        RegistryError: unknown, not importable, or no `ToolEnv`.
    """
    if _is_path(id):
        from envs.folder import FolderEnv

        env: ToolEnv = FolderEnv(id, **kwargs)
        env.env_id = Path(id).name
        return env
    entry = spec(id)
    env_class = load(entry)
    try:
        env = env_class(**{**entry.kwargs, **kwargs})
    except TypeError as error:
        if env_class.__name__ not in str(error) and "__init__" not in str(error):
            raise
        raise RegistryError(f"environment {id!r} cannot be made with {sorted(kwargs)}: {error}") from error
    env.env_id = id
    return env


def load(entry: EnvEntry) -> type[ToolEnv]:
    """Import the class of an environment.

    Raises:
        RegistryError: saying what was imported and what was found.
    """
    try:
        if entry.loader is not None:
            found = entry.loader()
        else:
            module, _, name = entry.entry_point.partition(":")
            found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise RegistryError(
            f"environment {entry.id!r} ({entry.source}, {entry.entry_point}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, ToolEnv)):
        raise RegistryError(
            f"environment {entry.id!r}: {entry.entry_point} is {found!r}, not a subclass of envs.tool_env.ToolEnv"
        )
    return found


def spec(id: str) -> EnvEntry:
    """What is known of an environment, without importing it.

    Raises:
        RegistryError: unknown; close names are suggested.
    """
    if id in _entries:  # before the plug-ins, whose listing reads the metadata of every installed package
        return _entries[id]
    known = {entry.id: entry for entry in list_envs()}
    if id in known:
        return known[id]
    close = difflib.get_close_matches(id, known, n=3)
    guess = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(sorted(known))}."
    raise RegistryError(f"no environment {id!r}. {guess} The path of a folder with tools.py and train.jsonl works too.")


def list_envs() -> list[EnvEntry]:
    """All environments by name: built in, registered, and those of installed plug-ins. Imports none of them."""
    plugins = {point.name: _of_plugin(point) for point in entry_points(group=GROUP)}
    return sorted((plugins | _entries).values(), key=lambda entry: entry.id)


def _of_plugin(point: EntryPoint) -> EnvEntry:
    return EnvEntry(id=point.name, entry_point=point.value, source="plug-in", loader=point.load)


def _is_path(id: str) -> bool:
    return id.startswith((".", "~", os.sep)) or (os.sep in id and id not in _entries and Path(id).is_dir())


register("medbrowse", "envs.medbrowse.env:MedBrowseEnv")
