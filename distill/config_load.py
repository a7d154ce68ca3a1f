"""Read the configuration: defaults < TOML files in their order < flags, with where each value came from, and every
mistake at once."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.config import RunConfig
from distill.config_files import ConfigError, find_file, folder, read_file, shipped, shown
from distill.config_keys import Key, help_text, key_at, owner_of, suggestion
from distill.config_rules import InconsistentConfig, looks_secret

__all__ = [
    "Change",
    "ConfigError",
    "LoadedConfig",
    "add_config_arguments",
    "default_file",
    "help_text",
    "leaves",
    "load_config",
    "load_from_arguments",
]

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose value is not that of the run's earlier attempt."""

    key: str
    old: Any
    new: Any
    """None also where a table was switched off or on."""

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    config: RunConfig
    provenance: dict[str, str]
    """By dotted key: `configs/a.toml:14`, `--loss.teacher_tau` or `default`."""
    changes: tuple[Change, ...] = ()
    """Of a resumed run: what is not as it was."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """One key set by one layer."""

    path: tuple[str, ...]
    value: Any
    origin: str


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, and the help of all keys. The keys themselves are read by `load_from_arguments` from what
    `parser.parse_known_args` leaves."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="TOML file, or a bare name in configs/; repeatable",
    )
    parser.epilog = help_text()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False


def load_from_arguments(arguments: argparse.Namespace, rest: Sequence[str], say: Callable[[str], None]) -> LoadedConfig:
    """Load what the command line asks for.

    With `--resume RUN`, the run's own `config.json` is the first layer (`distill.resume`). With neither that nor
    `--config`, a shipped file of the environment is (`default_file`), where there is one, and `say` is told so.

    Args:
        arguments: has `config`, and maybe `resume` and `allow_change`.
        rest: flags that the parser did not know.
        say: gets notes for the user, a line each.

    Raises:
        ConfigError: everything that is wrong.
    """
    paths: list[str | Path] = list(arguments.config)
    resume = getattr(arguments, "resume", None)
    if resume is not None:
        from distill.resume import load_resumed

        return load_resumed(Path(resume), paths, rest, allowed=getattr(arguments, "allow_change", ()), say=say)
    if not paths and (default := default_file(rest)) is not None:
        say(f"no --config given: using {shown(default)}. Others: {', '.join(shipped())} (--config NAME)")
        paths.append(default)
    elif not paths:
        _check_env(rest)
    loaded = load_config(paths, rest)
    for note in loaded.config.notes():
        say(f"note: {note}")
    return loaded


def _check_env(flags: Sequence[str]) -> None:
    """A name that is misspelt has no shipped configuration either: say the first, not the second."""
    from envs.registry import RegistryError, exists

    env = _env_of(flags)
    try:
        if isinstance(env, str):
            exists(env)
    except RegistryError as error:
        raise ConfigError([f"--env: {error}"]) from error


def _env_of(flags: Sequence[str]) -> Any:
    return next((s.value for s in _flag_settings(flags, []) if s.path == ("env",)), None)


def default_file(flags: Sequence[str], *, on_gpus: bool | None = None) -> Path | None:
    """The shipped configuration of the environment that the flags name, if there is one: `configs/<env>.toml` on a
    machine with two GPUs or more and vLLM, `configs/<env>_cpu.toml` on any other.

    Args:
        on_gpus: None: look at this machine.
    """
    env = _env_of(flags)
    if not isinstance(env, str) or not re.fullmatch(r"\w+", env):
        return None
    if on_gpus is None:
        gpus = list(Path("/dev").glob("nvidia[0-9]*"))
        on_gpus = len(gpus) >= 2 and importlib.util.find_spec("vllm") is not None
    found = folder() / (f"{env}.toml" if on_gpus else f"{env}_cpu.toml")
    return found if found.is_file() else None


def load_config(paths: Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()) -> LoadedConfig:
    """Layer files and flags over the defaults.

    Args:
        paths: TOML files, later ones win; bare names are looked up in `configs/`.
        overrides: flags as on a command line (`["--loss.teacher_tau", "0.5"]`), or values by dotted key.

    Raises:
        ConfigError: everything that is wrong.
    """
    messages: list[str] = []
    settings: list[_Setting] = []
    for path in paths:
        settings += _file_settings(path, messages)
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            settings += _settings(_nested(name.split("."), value), ".".join, messages)
    else:
        settings += _flag_settings(overrides, messages)
    tree, provenance = _merge(settings)
    config = _validate(tree, provenance, messages)
    if messages or config is None:
        raise ConfigError(messages)
    return LoadedConfig(config=config, provenance={name: _origin(name, provenance) for name, _ in leaves(config)})


def _origin(name: str, provenance: dict[str, str]) -> str:
    """Where a key's value came from; of a table inside a free table, where a key in it was last set."""
    found = [origin for key, origin in provenance.items() if key == name or key.startswith(f"{name}.")]
    return found[-1] if found else DEFAULT


# Layers


def _file_settings(path: str | Path, messages: list[str]) -> list[_Setting]:
    try:
        file = find_file(path)
        data, lines = read_file(file)
    except ConfigError as error:
        messages += error.messages
        return []

    def origin(key: tuple[str, ...]) -> str:
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        return shown(file) if line is None else f"{shown(file)}:{line}"

    return list(_settings(data, origin, messages))


def _settings(
    data: Mapping[str, Any],
    origin: Callable[[tuple[str, ...]], str],
    messages: list[str],
    *,
    written: tuple[str, ...] = (),
    known: tuple[str, ...] = (),
) -> Iterator[_Setting]:
    """The keys of one layer; unknown ones become messages.

    Args:
        written, known: where `data` lies, as the layer spells it and as we do (`teacher-tau`, `teacher_tau`).
    """
    seen: set[str] = set()
    parent = key_at(known) if known else None
    for raw, value in data.items():
        # A name that the user gives stays as it is, for others to refer to.
        place, name = (*written, raw), raw if parent and parent.shape == "sections" else raw.replace("-", "_")
        path = (*known, name)
        key = key_at(path)
        if key is None:
            for unknown in _unknown(value, place):
                dotted = ".".join(unknown)
                messages.append(f"{origin(unknown)}: unknown key {dotted!r}.{suggestion(dotted)}")
            continue
        if name in seen:
            messages.append(f"{origin(place)}: {key.name!r} is set twice, with '-' and with '_'")
        seen.add(name)
        if key.shape in ("section", "sections") and isinstance(value, Mapping):
            yield _Setting(path, {}, origin(place))
            yield from _settings(value, origin, messages, written=place, known=path)
        elif key.shape == "table" and isinstance(value, Mapping):
            for inner, item in value.items():
                yield _Setting((*path, inner), item, origin((*place, inner)))
        else:
            yield _Setting(path, None if value == "none" and key.optional else value, origin(place))


def _unknown(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _unknown(item, (*path, name))
    else:
        yield path


def _flag_settings(flags: Sequence[str], messages: list[str]) -> list[_Setting]:
    settings: list[_Setting] = []
    waiting = list(flags)
    while waiting:
        flag = waiting.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            messages.append(f"{flag!r} stands alone; flags are --key value, such as --loss.teacher_tau 0.5")
            continue
        raw, equals, text = flag[2:].partition("=")
        path = tuple(raw.replace("-", "_").split("."))
        key = owner_of(path)
        has_value = equals or (waiting and not waiting[0].startswith("--"))
        if not has_value and not (key is not None and key.shape == "boolean"):
            unknown = "" if key is not None else f" It is no key, either.{suggestion(raw)}"
            messages.append(f"--{raw}: a value is missing.{unknown}")
            continue
        if not equals:
            text = waiting.pop(0) if has_value else "true"
        if key is None:
            messages.append(f"--{raw}: unknown key.{suggestion(raw)}")
            continue
        settings.append(_Setting(path, _flag_value(text, key, inside=key.name.count(".") + 1 < len(path)), f"--{raw}"))
    return settings


def _flag_value(text: str, key: Key, *, inside: bool) -> Any:
    """A flag's text as TOML would have it: strings need no quotes, arrays no brackets."""
    if text == "none" and key.optional and not inside:
        return None
    value = _toml(text)
    if inside:
        return text if value is None else value
    if key.shape == "string":
        return value if isinstance(value, str) else text
    if key.shape == "array" and not isinstance(value, list):
        value = _toml(f"[{text}]")
        return [part.strip() for part in text.split(",")] if value is None else value
    return text if value is None else value


def _toml(text: str) -> Any:
    """The value of a TOML literal; None if the text is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return None
    return parsed["value"] if len(parsed) == 1 else None


def _nested(parts: Sequence[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nested(parts[1:], value) if len(parts) > 1 else value}


def _merge(settings: Sequence[_Setting]) -> tuple[dict[str, Any], dict[str, str]]:
    tree: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    for setting in settings:
        *parents, last = setting.path
        node = tree
        for name in parents:
            inner = node.get(name)
            if not isinstance(inner, dict):
                inner = node[name] = {}
            node = inner
        if setting.value == {} and isinstance(node.get(last), dict):
            continue  # a table's header: it switches the table on and sets nothing
        node[last] = {} if setting.value == {} else setting.value
        name = ".".join(setting.path)
        provenance.pop(name, None)  # so that the order is that of the last setting
        provenance[name] = setting.origin
    return tree, provenance


# Checking


def _validate(tree: dict[str, Any], provenance: dict[str, str], messages: list[str]) -> RunConfig | None:
    tree.setdefault("student", {})  # so that what is missing is `student.model`
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        bad: set[str] = set()
        for item in error.errors(include_url=False):
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, InconsistentConfig):
                _report_problems(cause, bad, provenance, messages)
                return None
            key = owner_of(tuple(str(part) for part in item["loc"]))
            parts = [str(part) for part in item["loc"] if part != "[key]"]  # pydantic's word for a name in a table
            name = ".".join(parts[: key.name.count(".") + 1] if key is not None and key.shape == "array" else parts)
            if name not in bad:
                bad.add(name)
                messages.append(_explain(name, key, item["type"], item["input"], cause, provenance, item["loc"]))
    # Settings that contradict one another are found although others are wrong by themselves.
    rest = {"env": "unset", **tree, "student": {"model": "unset", **_mapping(tree.get("student"))}}
    for name in bad:
        _drop(rest, name.split("."))
    rest.setdefault("env", "unset")
    rest["student"] = {"model": "unset", **_mapping(rest.get("student"))}
    try:
        RunConfig.model_validate(rest)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, InconsistentConfig):
                _report_problems(cause, bad, provenance, messages)
    return None


def _report_problems(error: InconsistentConfig, bad: set[str], provenance: dict[str, str], messages: list[str]) -> None:
    for problem in error.problems:
        if bad.isdisjoint(problem.keys):
            origin = next((provenance[key] for key in problem.keys if key in provenance), None)
            messages.append(f"{f'{origin}: ' if origin else ''}{problem.keys[0]} {problem.message}")


def _explain(
    name: str,
    key: Key | None,
    kind: str,
    found: Any,
    cause: Exception | None,
    provenance: dict[str, str],
    location: tuple[int | str, ...],
) -> str:
    if kind == "missing":
        flag = f"; set it in a file or with --{name}"
        return f"{name} is not set{flag}. {key.doc if key else ''}"
    origin = provenance.get(".".join(str(p) for p in location)) or provenance.get(name)
    # A flag names its key already.
    place = "--" if origin == f"--{name}" else f"{origin}: " if origin else ""
    what = _found(found)
    if cause is not None:
        return f"{place}{name}: {cause}; found {what}"
    wanted = key.type_text if key else "another value"
    hint = ""
    if isinstance(found, str) and key is not None and key.shape in ("number", "boolean"):
        literal = _toml(found)
        hint = " (without the quotes)" if literal is not None and not isinstance(literal, str) else ""
    return f"{place}{name}: wanted {wanted}; found {what}{hint}"


def _found(value: Any) -> str:
    """A value for a message: short, and never a secret."""
    if isinstance(value, str):
        return "something like a key (not shown)" if looks_secret(value) else f"the string {json.dumps(value[:80])}"
    kinds = (
        (bool, "the boolean"),
        (int, "the integer"),
        (float, "the number"),
        (list, "the array"),
        (dict, "the table"),
    )
    kind = next((words for t, words in kinds if isinstance(value, t)), type(value).__name__)
    text = json.dumps(value, default=str)[:80]
    return f"{kind} (not shown)" if looks_secret(str(value)) else f"{kind} {text}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _drop(tree: dict[str, Any], parts: Sequence[str]) -> None:
    for name in parts[:-1]:
        inner = tree.get(name)
        if not isinstance(inner, dict):
            return
        tree[name] = tree = dict(inner)
    tree.pop(parts[-1], None)


def leaves(config: RunConfig) -> list[tuple[str, Any]]:
    """Every key with its value, in the order of the models; tables of free keys one by one."""

    def walk(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, item in value.items():
            dotted = prefix + name
            key = key_at(tuple(dotted.split(".")))
            if isinstance(item, dict) and item and key is not None:
                yield from walk(item, f"{dotted}.")
            else:
                yield dotted, item

    return list(walk(config.model_dump(mode="json"), ""))
