"""An installed package that offers an environment through the entry-point group `distill_gym.envs`."""

from collections.abc import Sequence

from envs.tool_env import ToolEnv
from envs.types import Task
from tools.tool import Tool, tool


@tool
def count(text: str) -> int:
    """Count the letters of a text."""
    return len(text)


class CountingEnv(ToolEnv):
    def tools(self) -> Sequence[Tool]:
        return (count,)

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        return (Task(id="abc", messages=({"role": "user", "content": "How long is abc?"},), metadata={"answer": "3"}),)


NOT_AN_ENV = 1
