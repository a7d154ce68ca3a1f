"""Any table: one column or template is the prompt, one the answer, others metadata."""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.converters import OptionError
from envs.converters.rows import OnBadRow, Row, iter_rows
from envs.dataset import kind_of, raise_error, suggest, task_from_row
from envs.jsonl import TaskError
from envs.types import Task

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def convert(
    source: str,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    metadata: Sequence[str] = (),
    system: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    on_bad_row: OnBadRow = raise_error,
) -> Iterator[Task]:
    """One task a row, in constant memory.

    Args:
        source: see `envs.converters.rows.iter_rows`.
        prompt: the column of the user's message, or a template with columns in braces: `{question}\\n{options}`
            (`{{` is a brace). A column that holds a list of messages is taken as the dialogue.
        answer: the column that becomes `metadata["answer"]`, as it is: "NA" stays "NA". A field of a column that holds
            objects, here and in all other names of columns, is named with a dot: `reward_model.ground_truth`.
        metadata: further columns to keep, under their own names.
        system: text of a system message before each prompt.
        on_bad_row: gets each row that makes no task; returns to skip it.

    Raises:
        TaskError: the source cannot be read; a bad row.
        OptionError: a column that is not there, with those that are.
    """
    if not prompt:
        raise OptionError("--prompt is missing: which column, or template of {columns}, is the user's message?")
    rows = iter_rows(source, split=split, subset=subset, on_bad_row=on_bad_row)
    return _tasks(rows, prompt, answer, tuple(metadata), system, on_bad_row)


def _tasks(
    rows: Iterator[Row],
    prompt: str,
    answer: str | None,
    metadata: tuple[str, ...],
    system: str | None,
    on_bad_row: OnBadRow,
) -> Iterator[Task]:
    fields: list[str] | None = None
    for row in rows:
        if fields is None:
            fields = [prompt] if prompt in row.values else template_fields(prompt)
            _check_columns([*fields, *([answer] if answer else []), *metadata], row.values)
        is_template = fields != [prompt]
        try:
            task = _task(row, prompt, is_template, answer, metadata, system)
        except TaskError as error:
            on_bad_row(error)
            continue
        yield task


def _task(
    row: Row, prompt: str, is_template: bool, answer: str | None, metadata: tuple[str, ...], system: str | None
) -> Task:
    value = fill(prompt, row) if is_template else cell(row, prompt)
    if isinstance(value, list):
        messages = list(value)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        messages = [{"role": "user", "content": str(value)}]
    else:
        raise TaskError(row.where, f"column {prompt!r} is the prompt, but holds {kind_of(value)}")
    if messages[0:1] == [{"role": "user", "content": ""}] or (isinstance(value, str) and not value.strip()):
        raise TaskError(row.where, "the prompt is empty")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    kept = {name: to_json(cell(row, name)) for name in metadata}
    if answer is not None:
        kept["answer"] = to_json(cell(row, answer))
        if kept["answer"] is None:
            raise TaskError(row.where, f"column {answer!r} is the answer, but is null")
    return task_from_row({"messages": messages, "metadata": kept}, row.where)


def template_fields(template: str) -> list[str]:
    """The columns that a template names; a template without braces is itself the name of one."""
    fields = [match[1] for match in _FIELD.finditer(template) if match[1] is not None]
    return fields or [template]


def fill(template: str, row: Row) -> str:
    """A template with its columns' values. Plain names only: no attributes, indexes or format codes."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = cell(row, match[1])
        if found is None or isinstance(found, dict | list):
            raise TaskError(row.where, f"column {match[1]!r} is in the prompt, but holds {kind_of(found)}")
        return str(found)

    return _FIELD.sub(value, template)


def cell(row: Row, column: str) -> Any:
    """The row's value in a column, or in a field of one.

    Raises:
        TaskError: this row has no such column (rows of JSONL may differ).
    """
    if column in row.values:
        return row.values[column]
    name, _, field = column.partition(".")
    value = row.values.get(name)
    if not isinstance(value, dict) or field not in value:
        raise TaskError(row.where, f"has no column {column!r}, which earlier rows have")
    return value[field]


def to_json(value: Any) -> Any:
    """Dates and decimals of Parquet as strings; all else as it is."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return value


def _check_columns(wanted: list[str], first: Mapping[str, Any]) -> None:
    there = [
        *first,
        *(f"{name}.{field}" for name, value in first.items() if isinstance(value, dict) for field in value),
    ]
    unknown = [name for name in wanted if name not in there]
    if unknown:
        named = "; ".join(f"no column {name!r}{suggest(name, there)}" for name in dict.fromkeys(unknown))
        raise OptionError(f"{named}. The columns are: {', '.join(there)}")
