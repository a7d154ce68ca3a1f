"""`python -m distill.config`: look at the configuration without running anything."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from distill.config_keys import documentation
from distill.config_load import ConfigError, LoadedConfig, add_config_arguments, leaves, load_from_arguments


def main(argv: list[str] | None = None) -> int:
    """Verbs `show`, `schema` and `docs`. Exit code 2 if the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="python -m distill.config", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="print every value and where it came from", description="Every value.")
    add_config_arguments(show)
    show.add_argument("--json", action="store_true", help="print JSON: {key: {value, origin}}")
    verbs.add_parser("schema", help="print the JSON schema of a configuration file")
    verbs.add_parser("docs", help="print docs/configuration.md")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb != "show":
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        print(schema_text() if arguments.verb == "schema" else documentation(), end="")
        return 0
    try:
        loaded = load_from_arguments(arguments, rest, lambda note: print(note, file=sys.stderr))
    except ConfigError as error:
        print("\n".join(f"error: {message}" for message in error.messages), file=sys.stderr)
        return 2
    print(as_json(loaded) if arguments.json else as_text(loaded))
    return 0


def schema_text() -> str:
    """JSON schema (draft 2020-12) of a configuration file."""
    from distill.config import RunConfig

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    _write_none(schema)
    return json.dumps(schema, indent=2) + "\n"


def _write_none(schema: Any) -> None:
    """Where a value may be missing, let it be `"none"` too: TOML has no null."""
    if isinstance(schema, dict):
        choices = schema.get("anyOf")
        if isinstance(choices, list) and {"type": "null"} in choices:
            choices.append({"const": "none"})
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _write_none(part)


def as_text(loaded: LoadedConfig) -> str:
    """One line a key: `loss.teacher_tau = 0.5    # configs/a.toml:14`."""
    rows = [(f"{name} = {_value(value)}", loaded.provenance[name]) for name, value in leaves(loaded.config)]
    width = min(60, max(len(text) for text, _ in rows))
    notes = [f"# note: {note}" for note in loaded.config.notes()]
    return "\n".join([*(f"{text:<{width}}  # {origin}" for text, origin in rows), *notes])


def as_json(loaded: LoadedConfig) -> str:
    values = {n: {"value": v, "origin": loaded.provenance[n]} for n, v in leaves(loaded.config)}
    return json.dumps(values, indent=2)


def _value(value: object) -> str:
    return '"none"' if value is None else json.dumps(value, ensure_ascii=False)
