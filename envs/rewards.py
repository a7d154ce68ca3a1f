"""Reward functions: `@reward` on a function of an episode that was played.

    @reward
    def cites_a_page(state, messages) -> float: ...

    @reward(precondition=True)
    async def answered(args, messages) -> float: ...

A function names the parameters that it wants, of `task`, `state`, `messages` and `args`; the last is a record with the
task's `metadata`, as ReinforceNow's reward functions take it. It returns a finite number, 1.0 being best. A task lists
the functions that count for it in `rewards`; without a list all do. They are tracked where `skip_verification` is off,
and enter the loss only through `loss.adv_tau`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from envs.types import Message, Task

PARAMETERS = ("task", "state", "messages", "args")


class RewardError(ValueError):
    """A reward function that cannot be declared or chosen; the message names it."""


@dataclass(frozen=True, slots=True)
class RewardArgs:
    """What a ReinforceNow reward function finds in `args`."""

    metadata: dict[str, Any]
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reward:
    """A declared reward function."""

    name: str
    function: Callable[..., float | Awaitable[float]]
    precondition: bool = False
    """Where it returns 0, the episode's headline is 0, whatever the others say."""

    async def __call__(self, task: Task, state: dict[str, Any], messages: Sequence[Message]) -> float:
        given = {"task": task, "state": state, "messages": messages, "args": RewardArgs(task.metadata)}
        wanted = inspect.signature(self.function).parameters
        value = self.function(**{name: given[name] for name in wanted})
        return await value if inspect.isawaitable(value) else value


@overload
def reward(function: Callable[..., Any], /) -> Reward: ...
@overload
def reward(*, precondition: bool = False) -> Callable[[Callable[..., Any]], Reward]: ...
def reward(
    function: Callable[..., Any] | None = None, /, *, precondition: bool = False
) -> Reward | Callable[[Callable[..., Any]], Reward]:
    """Declare a reward function.

    Raises:
        RewardError: it wants a parameter that there is not.
    """

    def declare(function: Callable[..., Any]) -> Reward:
        name = getattr(function, "__name__", repr(function))
        odd = [p for p in inspect.signature(function).parameters if p not in PARAMETERS]
        if odd:
            raise RewardError(f"@reward {name}: wants {odd[0]!r}; there are {', '.join(PARAMETERS)}")
        return Reward(name, function, precondition)

    return declare if function is None else declare(function)


def grader_of(rewards: Sequence[Reward]) -> Callable[..., Awaitable[dict[str, float]]]:
    """A grader: every function that the task lists, by name; `success` is their mean where none has that name.

    Raises (when it grades):
        RewardError: the task lists a function that there is not.
    """
    by_name = {item.name: item for item in rewards}

    async def grade(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
        unknown = [name for name in task.rewards if name not in by_name]
        if unknown:
            raise RewardError(f"task {task.id!r} lists reward {unknown[0]!r}; there are {', '.join(by_name) or 'none'}")
        chosen = [by_name[name] for name in task.rewards or by_name]
        found = {item.name: float(await item(task, state, messages)) for item in chosen}
        if not found:
            return {}
        headline = found.get("success", sum(found.values()) / len(found))
        if any(item.precondition and found[item.name] == 0 for item in chosen):
            headline = 0.0
        return found | {"success": headline}

    return grade
