"""The new TOML, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from distill.config_keys import all_keys, general
from distill.migrate.draft import Row, Setting, printable

WIDTH = 118
"""Columns of the report; a terminal's, or a page's."""


def toml(settings: dict[str, Setting], title: str) -> str:
    """A configuration file: each key with where it comes from; as a comment what a run needs and the source lacks."""
    top = [f"# {printable(title)}"]
    if "env" not in settings:
        top.append(
            '# env = "./my_folder"    # REQUIRED, and not in the source: a name or a folder (docs/write_an_env.md)'
        )
    sections: dict[str, list[str]] = {"": []}
    order = [key.name for key in all_keys().values()]

    def place(name: str) -> int:
        return order.index(".".join(general(tuple(name.split(".")))))

    for name in sorted(settings, key=place):
        section, _, last = name.rpartition(".")
        setting = settings[name]
        if setting.value == {}:
            sections.setdefault(name, [])
            continue
        line = f"{last} = {toml_value(setting.value)}"
        sections.setdefault(section, []).append(f"{line:<36}  # {printable(setting.comment)}")
    if "student.model" not in settings:
        missing = '# model = "..."    # REQUIRED, and not in the source: the model that is trained'
        sections.setdefault("student", []).insert(0, missing)
    alone = not any(name.startswith("sources.") for name in settings)
    if alone and "env" in settings and settings["env"].value == "reasoning" and "tasks.train" not in settings:
        missing = '# train = "train.jsonl"    # REQUIRED: a task file (docs/formats.md) of convert_dataset.py'
        sections.setdefault("tasks", []).insert(0, missing)
    ordered = sorted((name for name in sections if name), key=place)
    lines = [*top, *sections[""]]
    for name in ordered:
        lines += ["", f"[{name}]", *sections[name]]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A string, number, boolean or list as TOML."""
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def table(rows: Sequence[Row]) -> str:
    """The report for a terminal: a line a key and its words below, in the order of the source; what was added last."""
    lines = []
    for row in rows:
        what = printable(row.key) + (f" = {row.value}" if row.value else "")
        where = f"  ({printable(row.origin)})" if row.origin else ""
        lines.append(f"{row.verdict:<10}  {what}{where}")
        lines += wrap(printable(row.words), WIDTH, initial_indent=" " * 14, subsequent_indent=" " * 14)
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    return "\n".join([*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])
