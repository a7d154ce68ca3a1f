"""Environments by name.

    envs.register("my_env", "my_package.my_env:MyEnv")
    env = envs.make("my_env", limits=Limits(max_turns=6))

Registered names are Gymnasium's too: `gymnasium.make("my_env")`. Those that come with this package are registered when
this module is imported: `gymnasium.make("envs.registry:medbrowse")` does both. Those of plug-ins are known here only.

An installed package offers environments through the entry-point group `distill_gym.envs`; only the one asked for is
imported, so a broken plug-in is listed as broken and stops nothing. A name that is registered goes before a plug-in's.
A path of a folder is a name as well (`envs.folder`), and so is `verifiers:NAME` or `openenv:URL` (`envs.adapters`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import gymnasium

from envs.tool_env import EnvSetupError, ToolEnv

GROUP = "distill_gym.envs"
ADAPTERS = {
    "openenv": ("envs.adapters.openenv:OpenEnvEnv", "base_url"),
    "verifiers": ("envs.adapters.verifiers:VerifiersEnv", "name"),
}
"""By prefix: the class, and the argument that takes what stands behind the colon."""
_ID = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?")


class RegistryError(Exception):
    """An environment that cannot be found, imported or made; the message says what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvEntry:
    """One known environment."""

    id: str
    entry_point: str
    """`module:Class`, or the name of the class that was registered."""
    source: Literal["built-in", "registered", "plug-in", "adapter"]
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Defaults of its constructor."""
    loader: Callable[[], Any] | None = None
    """Imports the class of a plug-in, or gives the class that was registered."""
    problem: str = ""
    """Why it cannot be made, as far as that is known without importing it."""


_entries: dict[str, EnvEntry] = {}


def register(id: str, entry_point: str | type[ToolEnv], **kwargs: Any) -> None:
    """Make an environment known here and to Gymnasium. Registering the same once more changes nothing.

    Args:
        id: `name` or `owner/name`, letters, digits, `_` and `-`.
        entry_point: `"module:Class"`, imported when the environment is made, or the class itself.
        kwargs: defaults of its constructor.

    Raises:
        RegistryError: a bad id or entry point; an id that is taken.
    """
    if not _ID.fullmatch(id):
        raise RegistryError(f"environment id {id!r}: wanted name or owner/name of ASCII letters, digits, '_' and '-'")
    if isinstance(entry_point, str):
        module, colon, name = entry_point.partition(":")
        if not (module and colon and name):
            raise RegistryError(f"environment {id!r}: the entry point must be 'module:Class', found {entry_point!r}")
        shown, loader = entry_point, None
    else:
        _check_class(id, entry_point)
        shown, loader = f"{entry_point.__module__}:{entry_point.__qualname__}", lambda: entry_point
    known = _entries.get(id)
    if known is not None and (known.entry_point, known.kwargs) != (shown, kwargs):
        raise RegistryError(f"environment id {id!r} is taken by {known.entry_point}; choose another for {shown}")
    if known is None and id in gymnasium.registry:
        raise RegistryError(f"environment id {id!r} is taken by one of Gymnasium's own; choose another for {shown}")
    source: Literal["built-in", "registered"] = "built-in" if shown.startswith("envs.") else "registered"
    _entries[id] = EnvEntry(id=id, entry_point=shown, source=source, kwargs=kwargs, loader=loader)
    if known is None:
        # Gymnasium's own order wrapper would hide areset and astep; ToolEnv enforces the order itself.
        # A string, not a function: Gymnasium can then write the spec to JSON.
        gymnasium.register(
            id,
            entry_point="envs.registry:make_for_gymnasium",
            kwargs={"registered_id": id},
            order_enforce=False,
            disable_env_checker=True,
        )


def make(id: str, **kwargs: Any) -> ToolEnv:
    """Make an environment from its name or from the path of a folder.

    Args:
        id: a name of `list_envs`, `PREFIX:NAME` with a prefix of `ADAPTERS`, or a path: one that begins with `.`, `~`
            or `/`, or that has a `/` and is a folder.
        kwargs: of its constructor, over the defaults that it was registered with.

    Raises:
        RegistryError: unknown, not importable, no `ToolEnv`, or not to be made with these arguments.
    """
    if is_path(id):
        from envs.folder import FolderEnv

        folder = Path(id).expanduser()
        env = _construct(FolderEnv, id, {"path": folder, **kwargs})
        env.env_id = folder.resolve().name
        return env
    entry = spec(id)
    env = _construct(load(entry), id, {**entry.kwargs, **kwargs})
    env.env_id = id
    return env


def make_for_gymnasium(registered_id: str, **kwargs: Any) -> ToolEnv:
    """`make`, as Gymnasium calls it: `gymnasium.make` has an argument `id` of its own."""
    return make(registered_id, **kwargs)


def _construct(env_class: type[ToolEnv], id: str, kwargs: dict[str, Any]) -> ToolEnv:
    try:
        return env_class(**kwargs)
    except EnvSetupError as error:
        raise RegistryError(f"environment {id!r}: {error}") from error
    except TypeError as error:
        # Only what Python says of the call itself, `X.__init__() got an unexpected keyword argument 'y'`.
        if "__init__() " not in str(error):
            raise
        raise RegistryError(f"environment {id!r} cannot be made: {error}. {_takes(env_class)}") from error


def _takes(env_class: type[ToolEnv]) -> str:
    names = [
        parameter.name
        for base in env_class.__mro__
        if "__init__" in vars(base) and issubclass(base, ToolEnv)
        for parameter in inspect.signature(vars(base)["__init__"]).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and parameter.name != "self"
    ]
    return f"{env_class.__name__} takes: {', '.join(dict.fromkeys(names))}"


def load(entry: EnvEntry) -> type[ToolEnv]:
    """Import the class of an environment.

    Raises:
        RegistryError: saying what was imported and what was found.
    """
    where = f"environment {entry.id!r} ({entry.source}, {entry.entry_point})"
    if entry.problem:
        raise RegistryError(f"{where}: {entry.problem}")
    try:
        if entry.loader is not None:
            found = entry.loader()
        else:
            module, _, name = entry.entry_point.partition(":")
            found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a plug-in's module may do anything when it is imported
        raise RegistryError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    _check_class(entry.id, found)
    env_class: type[ToolEnv] = found
    return env_class


def _check_class(id: str, found: Any) -> None:
    if not (isinstance(found, type) and issubclass(found, ToolEnv)):
        raise RegistryError(f"environment {id!r}: {found!r} is not a subclass of envs.tool_env.ToolEnv")


def spec(id: str) -> EnvEntry:
    """What is known of an environment, without importing it.

    Raises:
        RegistryError: unknown; close names are suggested.
    """
    if id in _entries:  # before the plug-ins, whose listing reads the metadata of every installed package
        return _entries[id]
    prefix, _, rest = id.partition(":")
    if rest and prefix in ADAPTERS:
        entry_point, argument = ADAPTERS[prefix]
        return EnvEntry(id=id, entry_point=entry_point, source="adapter", kwargs={argument: rest})
    known = {entry.id: entry for entry in list_envs()}
    if id in known:
        return known[id]
    close = difflib.get_close_matches(id, known, n=3)
    guess = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(sorted(known))}."
    folder = (
        f"For the folder of that name write ./{id}."
        if Path(id).is_dir()
        else "A folder's path is a name too: ./my_env."
    )
    raise RegistryError(f"no environment {id!r}. {guess} {folder}")


def exists(id: str) -> None:
    """Whether there is something of that name, without importing it.

    Raises:
        RegistryError: no environment of that name, no folder at that path.
    """
    if not is_path(id):
        spec(id)
    elif not Path(id).expanduser().is_dir():
        raise RegistryError(f"no folder {id}; make one: python -m envs new {Path(id).name or 'my_env'}")


def list_envs() -> list[EnvEntry]:
    """All environments by name: built in, registered, and those of installed plug-ins. Imports none of them."""
    plugins: dict[str, EnvEntry] = {}
    for point in entry_points(group=GROUP):
        entry = _of_plugin(point)
        other = plugins.get(entry.id)
        if other is not None and other.entry_point != entry.entry_point:
            both = f"two packages offer it: {other.entry_point} and {entry.entry_point}; uninstall one"
            entry = replace(other, problem=both)
        plugins[entry.id] = entry
    return sorted((plugins | _entries).values(), key=lambda entry: entry.id)


def _of_plugin(point: EntryPoint) -> EnvEntry:
    problem = "" if _ID.fullmatch(point.name) else "its id is not name or owner/name of letters, digits, '_' and '-'"
    return EnvEntry(id=point.name, entry_point=point.value, source="plug-in", loader=point.load, problem=problem)


def is_path(id: str) -> bool:
    """Whether an environment is named by the folder of its code."""
    return id.startswith((".", "~", os.sep)) or (os.sep in id and id not in _entries and Path(id).is_dir())


register("medbrowse", "envs.medbrowse.env:MedBrowseEnv")
register("reasoning", "envs.reasoning:ReasoningEnv")
register("gsm8k", "envs.reasoning:Gsm8kEnv")
