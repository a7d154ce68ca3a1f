"""A folder is an environment: `tools.py` with `@tool` functions, `train.jsonl` with tasks.

    my_folder/
      tools.py       optional; without it an episode is a single turn
      rewards.py     optional: functions with `@reward` (envs.rewards)
      train.jsonl
      eval.jsonl     optional: held-out tasks
      test.jsonl     optional: the split `test`

`python -m distill.run --env path/to/my_folder`

The functions of `rewards.py` grade, else `grade(task, state, messages) -> dict[str, float]` in `tools.py`; without
either an episode succeeds if its last message, or the arguments of its last calls, contain `metadata.answer`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from envs.registry import RegistryError
from envs.rewards import Reward
from envs.tool_env import Grader, ToolEnv
from envs.types import Message, Task
from tools.tool import Tool

NOTHING_THERE = "it needs tools.py (functions with @tool), train.jsonl (one task a line), or both"


class FolderError(RegistryError):
    """The folder is not an environment; the message names the file and the line."""


class FolderEnv(ToolEnv):
    """The environment of a folder.

    Args:
        path: the folder.
        kwargs: of `ToolEnv`.

    Raises:
        FolderError: no folder, neither tools nor tasks in it, or a `tools.py` that cannot be imported.
    """

    def __init__(self, path: str | Path, **kwargs: Any) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            found = "it is a file" if self.path.exists() else "there is nothing"
            raise FolderError(f"{self.path} is not a folder ({found}); make one: python -m envs new {self.path.name}")
        if not any((self.path / name).is_file() for name in ("tools.py", "train.jsonl")):
            raise FolderError(f"{self.path} is no environment: {NOTHING_THERE}")
        file = self.path / "tools.py"
        self._module = _import(file) if file.is_file() else None
        file = self.path / "rewards.py"
        self._rewards = _import(file) if file.is_file() else None
        super().__init__(**kwargs)
        self.env_id = self.path.resolve().name

    def tools(self) -> Sequence[Tool]:
        if self._module is None:
            return ()
        # A dict, as two names may stand for one tool.
        found = list(dict.fromkeys(value for value in vars(self._module).values() if isinstance(value, Tool)))
        if not found:
            file = self.path / "tools.py"
            raise FolderError(
                f"{file} declares no tool: put @tool (`from tools.tool import tool`) on its functions, or delete it"
            )
        return found

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        """The tasks of `<split>.jsonl`; none where the file is missing.

        Raises:
            TaskError: a row that is not a task, with file and line.
        """
        from envs.dataset import read_tasks

        file = self.path / f"{split}.jsonl"
        return read_tasks(file, limit=num_tasks) if file.is_file() else ()

    def rewards(self) -> Sequence[Reward]:
        if self._rewards is None:
            return ()
        found = list(dict.fromkeys(value for value in vars(self._rewards).values() if isinstance(value, Reward)))
        if not found:
            file = self.path / "rewards.py"
            raise FolderError(
                f"{file} declares no reward: put @reward (`from envs.rewards import reward`) on functions, or delete it"
            )
        return found

    def grader(self) -> Grader:
        """The rewards, `grade` of `tools.py`, or `contains_answer`."""
        if self._rewards is not None:
            return super().grader()
        grade = getattr(self._module, "grade", None)
        return grade if callable(grade) else contains_answer


def contains_answer(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
    """`success` is 1.0 if the assistant's last message, or an argument of its calls, contains `metadata.answer` as
    whole words, letter case aside: "5" is in "It is 5." and not in "15". Nothing for a task without an answer."""
    answer = task.metadata.get("answer")
    if answer is None:
        return {}
    said = [message for message in messages if message["role"] == "assistant"]
    last: Message = said[-1] if said else {"role": "assistant", "content": ""}
    arguments = [call["function"]["arguments"] for call in last.get("tool_calls", ())]
    text = " ".join([last.get("content", ""), *(str(value) for call in arguments for value in call.values())])
    wanted = re.escape(str(answer).strip().casefold())
    return {"success": float(re.search(rf"(?<!\w){wanted}(?!\w)", text.casefold()) is not None)}


class _Source(SourceFileLoader):
    """Without a bytecode cache, which misses an edit of the same size within a second."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("no cache")


def _import(file: Path) -> ModuleType:
    """Import `tools.py` under a name of its own: two folders do not meet, and our package `tools` stays what it is."""
    digest = hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:12]
    name = f"_folder_env_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file, loader=_Source(name, str(file)))
    if spec is None or spec.loader is None:
        raise FolderError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise FolderError(_words(file, error)) from error
    return module


def _words(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno or 1}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = "; install it, or put the code into tools.py: other files of the folder cannot be imported"
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}{hint}"
