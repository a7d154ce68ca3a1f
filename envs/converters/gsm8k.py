"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems; the answer is the number after `####`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from envs.converters.rows import OnBadRow, Row, iter_rows
from envs.dataset import raise_error, task_from_row
from envs.jsonl import TaskError
from envs.types import Task

_ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


def convert(
    source: str,
    *,
    system: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    on_bad_row: OnBadRow = raise_error,
) -> Iterator[Task]:
    """One task a problem; `metadata["answer"]` is the number as a string without thousands commas.

    Args:
        source: `train.jsonl`, the folder with `train.jsonl` and `test.jsonl` (then `split` is needed), or
            `openai/gsm8k` (then `subset="main"`).
    """
    for row in iter_rows(source, split=split, subset=subset, on_bad_row=on_bad_row):
        try:
            task = _task(row, system)
        except TaskError as error:
            on_bad_row(error)
            continue
        yield task


def _task(row: Row, system: str | None) -> Task:
    question, solution = row.values.get("question"), row.values.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise TaskError(row.where, f"a GSM8K row has the texts question and answer, found {', '.join(row.values)}")
    match = _ANSWER.search(solution)
    if match is None:
        raise TaskError(row.where, "the answer does not end with '#### <number>'")
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    metadata = {"answer": match[1].replace(",", ""), "question_type": "gsm8k", "dataset": "gsm8k"}
    return task_from_row({"messages": messages, "metadata": metadata}, row.where)
