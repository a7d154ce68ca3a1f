"""A folder is an environment: `tools.py` with `@tool` functions and `train.jsonl` with tasks.

    my_folder/
      tools.py       optional; without it an episode is a single turn
      train.jsonl
      eval.jsonl     optional: held-out tasks

`python -m distill.run --env path/to/my_folder`
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from envs.tool_env import Grader, ToolEnv
from envs.types import Message, Task
from tools.tool import Tool


class FolderError(Exception):
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
            raise FolderError(f"{self.path} is not a folder")
        if not any((self.path / name).is_file() for name in ("tools.py", "train.jsonl")):
            raise FolderError(f"{self.path} is no environment: it has neither tools.py nor train.jsonl")
        super().__init__(**kwargs)

    def tools(self) -> Sequence[Tool]:
        file = self.path / "tools.py"
        if not file.is_file():
            return ()
        found = [value for value in vars(_import(file)).values() if isinstance(value, Tool)]
        if not found:
            raise FolderError(f"{file} declares no tool; put @tool (from tools.tool) on its functions")
        return found

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        from envs.dataset import read_tasks

        file = self.path / f"{split}.jsonl"
        return read_tasks(file, limit=num_tasks) if file.is_file() else ()

    def grader(self) -> Grader:
        """Success: the last message of the assistant, or the last tool's arguments, hold `metadata.answer`."""
        return contains_answer


def contains_answer(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
    """`success` is 1.0 if the assistant's last message contains `metadata.answer`; nothing where there is none."""
    answer = task.metadata.get("answer")
    if answer is None:
        return {}
    said = [m for m in messages if m["role"] == "assistant"]
    last = str(said[-1].get("content", "")) + str(said[-1].get("tool_calls", "")) if said else ""
    return {"success": float(str(answer).strip().casefold() in last.casefold())}


def _import(file: Path) -> ModuleType:
    """Import `tools.py` under a name of its own: two folders do not meet, and our package `tools` stays what it is."""
    digest = hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:12]
    name = f"_folder_env_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise FolderError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (at[-1] if at else None)
        raise FolderError(f"{file}:{line or 1}: {type(error).__name__}: {error}") from error
    return module
