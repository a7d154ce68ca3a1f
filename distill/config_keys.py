"""All keys of the configuration as a flat list, read off its JSON schema: for suggestions, help and documentation."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import fill, indent
from typing import Any, Literal

from distill.config import RunConfig

Shape = Literal["section", "sections", "table", "array", "string", "boolean", "number"]

ANY = "NAME"
"""Stands in a key for the names that the user gives: `sources.NAME.share`."""

_ELSEWHERE = {
    "learning_rate": ("optim.lr",),
    "grad_clip": ("optim.max_grad_norm",),
    "max_steps": ("steps",),
    "num_steps": ("steps",),
    "environment": ("env",),
    "num_generations": ("rollout.group_size",),
    "max_tokens": ("rollout.max_turn_tokens", "rollout.max_episode_tokens"),
    "max_new_tokens": ("rollout.max_turn_tokens",),
    "response_length": ("rollout.max_turn_tokens",),
    "kl_penalty_coef": ("loss.teacher_tau",),
    "kl_loss_coef": ("loss.teacher_tau",),
    "api_key": ("student.api_key_env", "teacher.api_key_env"),
    "lora_rank": ("student.lora.rank",),
    "qlora_rank": ("student.lora.rank",),
    "train_file": ("tasks.train",),
    "train_files": ("tasks.train",),
    "teacher_model": ("teacher.model",),
    "student_model": ("student.model",),
    "model": ("student.model", "teacher.model"),
    "path": ("student.model", "teacher.model"),
    "name": ("student.model", "teacher.model"),
}
"""What other trainers call a key of ours (notes on rnow, verl, prime-rl, TRL)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    name: str
    """Dotted: `loss.teacher_tau`."""
    shape: Shape
    """`section` has keys of its own, `sections` sections by name; `table` takes any."""
    type_text: str
    """What is wanted, in words: `integer >= 1, or none`."""
    optional: bool
    """Whether "none" is a value."""
    required: bool
    default: Any
    doc: str


@cache
def all_keys() -> dict[str, Key]:
    """Every key by its dotted name, in the order of the models."""
    schema = RunConfig.model_json_schema()
    return {key.name: key for key in _walk(schema, schema["$defs"], "")}


def _walk(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in schema["properties"].items():
        options = [_resolve(o, definitions) for o in field.get("anyOf", [field])]
        optional = any(o.get("type") == "null" for o in options)
        main = next(o for o in options if o.get("type") != "null")
        required = name in schema.get("required", ())
        inner = main.get("additionalProperties")
        inner = _resolve(inner, definitions) if isinstance(inner, dict) else {}
        is_section, are_sections = "properties" in main, "properties" in inner
        text = "table" if is_section else "tables" if are_sections else _type_text(main)
        yield Key(
            name=prefix + name,
            shape="section" if is_section else "sections" if are_sections else _shape(main),
            type_text=text + (', or "none"' if optional else ""),
            optional=optional,
            required=required,
            default=field.get("default"),
            doc=" ".join((field.get("description") or main.get("description") or "").split()),
        )
        if is_section:
            yield from _walk(main, definitions, f"{prefix}{name}.")
        if are_sections:
            yield Key(
                name=f"{prefix}{name}.{ANY}",
                shape="section",
                type_text="table",
                optional=True,
                required=False,
                default=None,
                doc=" ".join(inner["description"].split()),
            )
            yield from _walk(inner, definitions, f"{prefix}{name}.{ANY}.")


def _resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else definitions[reference.rpartition("/")[2]]


def _shape(schema: dict[str, Any]) -> Shape:
    kind = "string" if "enum" in schema else schema["type"]
    return {"object": "table", "integer": "number"}.get(kind, kind)  # type: ignore[return-value]


def _type_text(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" in schema:
            return f"array of {len(schema['prefixItems'])} {_type_text(schema['prefixItems'][0])}"
        return f"array of {_type_text(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"table of {_type_text(inner)}" if isinstance(inner, dict) and inner else "table of anything"
    if kind == "string":
        return "string"
    bounds = [
        f"{sign} {'2^63' if schema[name] == 2**63 else format(schema[name], 'g')}"
        for name, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if name in schema and schema[name] != 2**31  # only there so that no number is absurd
    ]
    return " ".join([kind, " and ".join(bounds)]).strip()


def general(path: tuple[str, ...]) -> tuple[str, ...]:
    """A key with `NAME` for the names that the user gave: `sources.math.share` is `sources.NAME.share`."""
    names = list(path)
    for length in range(1, len(path)):
        key = all_keys().get(".".join(names[:length]))
        if key is not None and key.shape == "sections":
            names[length] = ANY
    return tuple(names)


def key_at(path: tuple[str, ...]) -> Key | None:
    """The key that a path names; None if there is none."""
    return all_keys().get(".".join(general(path)))


def owner_of(path: tuple[str, ...]) -> Key | None:
    """The key that a path names or lies in (`env_args.anything`, `optim.betas.0`); None if there is none."""
    for length in range(len(path), 0, -1):
        key = key_at(path[:length])
        if key is not None:
            return key if length == len(path) or key.shape in ("table", "array") else None
    return None


def suggestion(name: str) -> str:
    """` Did you mean 'loss.teacher_tau'?` for an unknown dotted key, or "". Looks at the whole tree, because keys
    move, and at what other trainers call the same thing."""
    path = tuple(name.split("."))
    known = general(path)
    own = next((given for given, part in zip(path, known, strict=True) if given != part), ANY)
    near = [key.replace(f".{ANY}", f".{own}") for key in _near(".".join(known).replace("-", "_"))]
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    parents = known[:-1]
    for start in range(len(parents)):
        section = ".".join(parents[start:])
        inside = [k for k in all_keys() if k.rpartition(".")[0] == section]
        if inside:
            return f" [{section}] has {', '.join(k.rpartition('.')[2] for k in inside)}."
    return ""


def _near(name: str) -> list[str]:
    names = [key.name for key in all_keys().values()]
    parent, _, last = name.rpartition(".")
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return [siblings[close[0]]]
    if moved := [n for n in names if n.rpartition(".")[2] == last]:
        return sorted(moved, key=lambda n: difflib.SequenceMatcher(None, n, name).ratio(), reverse=True)[:3]
    if last in _ELSEWHERE:
        own = [n for n in _ELSEWHERE[last] if parent and n.startswith(f"{parent}.")]
        return own or list(_ELSEWHERE[last])
    by_last = {n.rpartition(".")[2]: n for n in names}
    return [by_last[n] for n in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]


def default_text(key: Key) -> str:
    """The default as one would write it."""
    if key.required:
        return "required"
    if key.shape in ("section", "table") and not key.default:
        return "none" if key.optional else "empty"
    return "none" if key.default is None else json.dumps(key.default)


def help_text() -> str:
    """All keys with type, default and documentation, for `--help`."""
    parts = ["configuration keys, in a TOML file or as a flag (--loss.teacher_tau 0.5):"]
    for key in all_keys().values():
        if key.shape in ("section", "sections"):
            parts.append(f"\n[{key.name}]  {key.doc}")
            continue
        default = "required" if key.required else f"default: {default_text(key)}"
        parts.append(f"  --{key.name}  {key.type_text}  ({default})")
        parts.append(indent(fill(key.doc, 100), "      "))
    return "\n".join(parts)


def documentation() -> str:
    """The text of docs/configuration.md."""
    lines = [_INTRODUCTION, "", "## Top level", "", *_table_head()]
    for key in all_keys().values():
        if "." not in key.name and key.shape not in ("section", "sections"):
            lines.append(_table_row(key))
    for section in all_keys().values():
        if section.shape not in ("section", "sections"):
            continue
        optional = " Optional." if section.optional else ""
        lines += ["", f"## `[{section.name}]`", "", section.doc + optional]
        if section.shape == "sections":
            continue
        lines += ["", *_table_head()]
        lines += [
            _table_row(key)
            for key in all_keys().values()
            if key.name.rpartition(".")[0] == section.name and key.shape not in ("section", "sections")
        ]
    return "\n".join(lines) + "\n"


def _table_head() -> list[str]:
    return ["| key | type | default | what it is |", "|---|---|---|---|"]


def _table_row(key: Key) -> str:
    cells = (f"`{key.name}`", key.type_text, f"`{default_text(key)}`", key.doc)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_INTRODUCTION = """\
# Configuration

<!-- Made by `python -m distill.config docs > docs/configuration.md`; a test holds it current. -->

A run is configured by TOML files and flags. Later ones win, key by key; arrays are replaced as a whole:

    defaults  <  --config a.toml  <  --config b.toml  <  --loss.teacher_tau 0.5

- `--config` takes a path, the bare name of a file in `configs/` (`--config medbrowse_cpu`), or the `config.json` of an
  earlier run.
- A flag is a key with its dots: `--loss.teacher_tau 0.5`, `--loss.teacher_tau=0.5`, `--loss.teacher-tau 0.5`. Values
  are TOML (`0.5`, `true`, `[0.9, 0.95]`); strings need no quotes, arrays no brackets (`--check.skip a,b`).
- `"none"` takes back a value where the table below says that none is one: TOML has no null.
- Paths are relative to the working directory. Environment variables are not expanded.
- Keys of servers never stand in a configuration: `api_key_env` names the environment variable that holds one.
- All mistakes are reported at once, with file and line, and the run ends with exit code 2.

`python -m distill.config show --config a.toml [flags]` prints every value and where it came from;
`python -m distill.config schema` prints a JSON schema for editors."""
