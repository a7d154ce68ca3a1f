"""What a teacher sees in front of an episode and the student does not: a system prompt, facts of the task, examples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_loop.renderer import Renderer
from agent_loop.types import TokenTrace
from distill.config import OneTeacherConfig
from distill.types import TeacherError
from envs.dataset import dialogue_from_row
from envs.jsonl import TaskError, iter_json_lines
from envs.types import Message, Task
from tools.types import ToolSpec

MAX_EXAMPLES = 1000
"""Dialogues of one file; all of them stand in every prompt."""


class ContextError(Exception):
    """A task lacks what the teacher's prompt wants to say of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherContext:
    """Privileged context: distilling it into the student is context distillation (SDFT, arXiv 2601.19897); with the
    task's own reference in it, on-policy self-distillation (OPSD, arXiv 2601.18734)."""

    renderer: Renderer
    """That of the student's prompts."""
    tool_specs: Sequence[ToolSpec] = ()
    """The environment's tools, in the order in which prompts name them."""
    system_prompt: str | None = None
    prompt_fields: Sequence[str] = ()
    """Names in a task's metadata whose values take the place of `{name}` in `system_prompt`."""
    examples: Sequence[Message] = ()
    """Dialogues, one after the other."""

    def prompt_for(self, task: Task) -> str:
        """The system prompt with the task's facts in it. All are put in at once: what a value says is never a place
        for another one.

        Raises:
            ContextError: the task has no such fact.
        """
        values = {}
        for name in self.prompt_fields:
            value = task.metadata.get(name)
            if value is None:
                raise ContextError(
                    f"task {task.id!r} has no {name!r} in its metadata, which system_prompt wants to say"
                )
            values[f"{{{name}}}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not values:
            return self.system_prompt or ""
        places = re.compile("|".join(map(re.escape, values)))
        return places.sub(lambda place: values[place[0]], self.system_prompt or "")

    def messages(self, task: Task) -> tuple[Message, ...]:
        """The teacher's opening: its system prompt with the task's own behind it, the examples, the task."""
        prompt = self.prompt_for(task)
        opening = with_system_prompt(task.messages, prompt) if prompt else task.messages
        if not self.examples:
            return tuple(opening)
        head = 1 if opening[0]["role"] == "system" else 0
        return (*opening[:head], *self.examples, *opening[head:])

    def head(self, task: Task, trace: TokenTrace) -> tuple[list[int], int]:
        """The ids that replace the trace's first ones for the teacher, and how many they replace.

        Raises:
            TeacherError: the trace does not begin with the task's prompt.
        """
        student, teacher = self._rendered(task)
        shared = 0
        while shared < min(len(student), len(teacher)) and student[-1 - shared] == teacher[-1 - shared]:
            shared += 1
        head = len(student) - shared
        if trace.token_ids[:head] != student[:head]:
            raise TeacherError(
                "the trace does not begin with the task's prompt, so the teacher's prompt cannot take its place",
                "protocol",
            )
        return teacher[: len(teacher) - shared], head

    def extra_tokens(self, tasks: Sequence[Task]) -> int:
        """Tokens that the teacher reads more than the student, at the longest of these tasks' prompts.

        Raises:
            ContextError: a task lacks a fact.
        """
        longest: dict[bool, tuple[int, Task]] = {}  # with a system message of its own, and without: other templates
        lengths: dict[str, int] = {}
        for task in tasks:
            prompt = self.prompt_for(task)
            if prompt not in lengths:
                lengths[prompt] = len(self.renderer.tokenizer.encode(prompt, add_special_tokens=False))
            kind = task.messages[0]["role"] == "system"
            if kind not in longest or lengths[prompt] > longest[kind][0]:
                longest[kind] = (lengths[prompt], task)
        pairs = [self._rendered(task) for _, task in longest.values()]
        return max((len(teacher) - len(student) for student, teacher in pairs), default=0)

    def _rendered(self, task: Task) -> tuple[list[int], list[int]]:
        """The student's prompt and the teacher's."""
        tools = [tool for tool in self.tool_specs if task.tools is None or tool.name in task.tools]
        student = self.renderer.render_prompt(self.renderer.clean(task.messages), tools)
        return student, self.renderer.render_prompt(self.renderer.clean(self.messages(task)), tools)


def context_of(
    config: OneTeacherConfig, examples: Sequence[Message], renderer: Renderer, tool_specs: Sequence[ToolSpec]
) -> TeacherContext | None:
    """What a teacher sees before tasks of an environment; None where it sees what the student sees.

    Args:
        examples: what `read_examples` read of its file; empty where it has none.
    """
    if not config.sees_more:
        return None
    return TeacherContext(
        renderer=renderer,
        tool_specs=tuple(tool_specs),
        system_prompt=config.system_prompt,
        prompt_fields=config.prompt_fields,
        examples=examples,
    )


def read_examples(path: str | Path) -> tuple[Message, ...]:
    """The dialogues of a JSONL file, `{"messages": [...]}` a line, one after the other.

    Raises:
        TaskError: the file is missing or empty, or a line is no dialogue from a user's message to an answer of the
            assistant; with file and line.
    """
    messages: list[Message] = []
    for number, (line, row) in enumerate(iter_json_lines(Path(path)), start=1):
        if isinstance(row, TaskError):
            raise row
        if number > MAX_EXAMPLES:
            raise TaskError(f"{path}:{line}", f"more than {MAX_EXAMPLES} dialogues; each stands in every prompt")
        messages += _example(row, f"{path}:{line}")
    if not messages:
        raise TaskError(str(path), "there is no dialogue in it")
    return tuple(messages)


def _example(row: Any, where: str) -> tuple[Message, ...]:
    """
    Raises:
        TaskError: with the key.
    """
    found = dialogue_from_row(row, where)
    roles = [message["role"] for message in found]
    if "system" in roles:
        raise TaskError(
            where, "an example has no system message; what all of them need goes into teacher.system_prompt"
        )
    if roles[0] != "user" or roles[-1] != "assistant":
        raise TaskError(
            where, f"an example goes from a user's message to the assistant's answer, found {', '.join(roles)}"
        )
    if found[-1].get("tool_calls"):
        raise TaskError(where, "the last message calls a tool; an example ends with an answer")
    return found


def with_system_prompt(messages: Sequence[Message], system_prompt: str) -> tuple[Message, ...]:
    """The dialogue with `system_prompt` before its system message, or as one if it has none."""
    if messages and messages[0]["role"] == "system":
        own: Message = {"role": "system", "content": f"{system_prompt}\n\n{messages[0]['content']}"}
        return (own, *messages[1:])
    return ({"role": "system", "content": system_prompt}, *messages)
