"""Single-turn reasoning: a prompt, an answer, no tools. Any task JSONL will do.

    python -m distill.run --env reasoning --tasks.train prompts.jsonl

`gsm8k` is the same over grade-school word problems, with a calculator as an option:

    python -m distill.run --env gsm8k --env_args.data path/to/gsm8k --env_args.calculator true
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.folder import contains_answer
from envs.tool_env import OPEN_LIMITS, EnvSetupError, Grader, ToolEnv
from envs.types import Limits, Message, Task
from tools.calculator import calculator
from tools.tool import Tool

SYSTEM = "Solve the problem step by step. Write the answer on the last line, after ####, as a number alone."
FILES = {"train": "train.jsonl", "eval": "test.jsonl", "test": "test.jsonl"}
_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


class ReasoningEnv(ToolEnv):
    """Prompts of the tasks' own; an episode is one turn. `metadata.answer` is what grading and evaluation look for."""

    def grader(self) -> Grader:
        return grade_answer


class Gsm8kEnv(ToolEnv):
    """GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    Args:
        data: folder with the data set's `train.jsonl` and `test.jsonl`. None: tasks come from `tasks.train`, made by
            `convert_dataset.py gsm8k`.
        calculator: gives the model a `calculator` tool; episodes then have several turns.
        system: the system message of tasks from `data`; "" for none.
        limits, tasks, skip_verification: as in `ToolEnv`.
    """

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        calculator: bool = False,
        system: str = SYSTEM,
        limits: Limits = OPEN_LIMITS,
        tasks: Sequence[Task] | str | Path | None = None,
        skip_verification: bool = True,
    ) -> None:
        self._data = Path(data).expanduser() if data is not None else None
        if self._data is not None and not self._data.is_dir():
            raise EnvSetupError(f"gsm8k: data must be a folder with train.jsonl and test.jsonl, found {str(data)!r}")
        self._calculator, self._system = calculator, system
        super().__init__(limits=limits, tasks=tasks, skip_verification=skip_verification)

    def tools(self) -> Sequence[Tool]:
        return (calculator,) if self._calculator else ()

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        """Of `data`: `train`, or for evaluation the data set's test split.

        Raises:
            TaskError: a row that is no problem, with file and line.
        """
        from itertools import islice

        from envs.converters.gsm8k import convert

        if self._data is None:
            return ()
        file = self._data / FILES.get(split, f"{split}.jsonl")
        return list(islice(convert(str(file), system=self._system or None), num_tasks)) if file.is_file() else ()

    def grader(self) -> Grader:
        return grade_answer


def grade_answer(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
    """`success` is 1.0 if the last message's answer equals `metadata.answer`. Nothing for a task without an answer.

    Where the answer is a number, the message's own is what stands in its last `\\boxed{}`, else after its last `####`,
    else its last number; compared as numbers, so that 18, 18.0, $18 and 1,800/100's "18" are one. Other answers have to
    be contained as whole words.
    """
    wanted = number_of(str(task.metadata["answer"])) if task.metadata.get("answer") is not None else None
    if wanted is None:
        return contains_answer(task, state, messages)
    said = [str(m.get("content", "")) for m in messages if m["role"] == "assistant"]
    found = answer_of(said[-1]) if said else None
    return {"success": float(found is not None and abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted)))}


def answer_of(text: str) -> float | None:
    """The number that a text gives as its answer; None if there is none."""
    for pattern in (r"\\boxed\{([^{}]*)\}", r"####\s*(.*)"):
        if found := re.findall(pattern, text):
            return number_of(found[-1])
    numbers = re.findall(_NUMBER, text)
    return number_of(numbers[-1]) if numbers else None


def number_of(text: str) -> float | None:
    """A text that is one number, with or without a currency sign, thousands commas, a unit behind it or a full stop."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:[%°]|[^\W\d]+)?\s*\.?\s*", text)
    return float(re.sub(r"[$,]", "", match[1])) if match else None
