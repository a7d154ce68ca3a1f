"""`ToolEnv`: a Gymnasium environment whose actions are assistant messages and whose observations are new messages.

    class Adding(ToolEnv):
        def tools(self):
            return [add]

        def default_tasks(self, split="train", num_tasks=None):
            return [Task(id="one", messages=({"role": "user", "content": "What is 2 + 3?"},), metadata={"answer": "5"})]

        def grader(self):
            return lambda task, state, messages: {"success": float(task.metadata["answer"] in messages[-1]["content"])}

`areset` and `astep` are the core. `reset` and `step` have Gymnasium's signatures and run the same on one background
thread. An instance plays one episode at a time; concurrent episodes have an instance each.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from envs.background import run_in_background
from envs.rewards import Reward, grader_of
from envs.spaces import AssistantSpace, MessagesSpace
from envs.types import AssistantMessage, Limits, Message, StepOutcome, StopReason, Task
from tools.tool import Tool
from tools.toolbox import Toolbox
from tools.types import ToolCall, ToolError, ToolErrorKind, ToolResult, ToolSpec

Grader = Callable[[Task, dict[str, Any], Sequence[Message]], dict[str, float] | Awaitable[dict[str, float]]]
"""(task, the episode's state, all messages of the episode) -> tracked rewards by name; `success` in [0, 1] is the
headline."""

TERMINATED = (StopReason.ANSWERED, StopReason.LAST_TOOL)

OPEN_LIMITS = Limits()


class EnvSetupError(ValueError):
    """An environment that cannot be made as asked; the message names the argument and how to mend it."""


class ToolEnv(gymnasium.Env[tuple[Message, ...], AssistantMessage]):
    """Base class of all environments. Override `tools` and `default_tasks`; the rest has defaults.

    Args:
        limits: every budget of an episode. Turns, calls and malformed calls are counted here; tokens and time by the
            agent loop.
        tasks: what `reset` draws from when it is given no task: tasks, a JSONL file, or None for `default_tasks`.
        skip_verification: no grader is built or called, and `verify` refuses.

    Raises:
        EnvSetupError: `limits.max_calls_per_tool` names a tool that is not there.
    """

    def __init__(
        self,
        *,
        limits: Limits = OPEN_LIMITS,
        tasks: Sequence[Task] | str | Path | None = None,
        skip_verification: bool = True,
    ) -> None:
        self.metadata = {"render_modes": []}
        self.env_id = type(self).__name__
        """The name it was made by; the registry sets it."""
        self.limits = limits
        self.skip_verification = skip_verification
        self.toolbox = Toolbox(tuple(self.tools()), max_output_chars=limits.max_tool_output_chars)
        self._check_limits()
        self.observation_space = MessagesSpace()
        self.action_space = AssistantSpace(self.toolbox.specs)
        self._given_tasks = tasks
        self._tasks: Sequence[Task] | None = None
        self._grader: Grader | None = None
        self._task: Task | None = None
        self._task_metadata: dict[str, Any] = {}
        self._ended = True
        self._stepping = False
        self._episode_number = 0
        self.state: dict[str, Any] = {}
        """The episode's own values, shared by its tools (`tools.tool.State`); a fresh dict each episode, so that a
        late result of an earlier one cannot reach it."""
        self.messages: list[Message] = []
        """The whole dialogue of the episode, as the environment saw it."""

    # To override

    converses: bool = False
    """A message without a call ends nothing, whatever `termination_policy` says: `on_no_call` decides."""

    def tools(self) -> Sequence[Tool]:
        """The tools of this environment; none makes every episode a single turn."""
        return ()

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        """Tasks of the environment's own, where it ships or generates some. `split` is `train` or `eval`."""
        return ()

    async def on_reset(self, task: Task) -> None:
        """Prepare the episode: fill `self.state`. `self.np_random` is seeded. Where the opening depends on what was
        prepared, change `self.messages`, which hold the task's."""

    def on_no_call(self, action: AssistantMessage) -> Message | Awaitable[Message | None] | None:
        """What the environment answers to a message without a call, under `termination_policy = "max_turns"` or where
        it `converses`; None ends the episode."""
        return {"role": "user", "content": "Go on. Call a tool."}

    async def is_over(self) -> bool:
        """Whether the episode has reached its end by a rule of the environment's; asked after each step that no budget
        has ended."""
        return False

    def episode_metadata(self) -> dict[str, Any]:
        """JSON values for the episode's file, asked for at its end: what the episode was played against (the hash of a
        page store's manifest)."""
        return {}

    def rewards(self) -> Sequence[Reward]:
        """Reward functions (`envs.rewards`); a simpler way to grade than `grader`."""
        return ()

    def grader(self) -> Grader:
        """Built once, and only where verification is on. Of `rewards`, if there are any."""
        if rewards := self.rewards():
            return grader_of(rewards)
        raise NotImplementedError(f"environment {self.env_id!r} has no grader; run it with skip_verification = true")

    # The contract

    @property
    def task(self) -> Task:
        if self._task is None:
            raise ResetNeeded("the environment has no task yet: call reset first")
        return self._task

    @property
    def tool_specs(self) -> tuple[ToolSpec, ...]:
        """The tools that the present task may use, all of them before the first reset."""
        allowed = self._task.tools if self._task is not None else None
        return tuple(s for s in self.toolbox.specs if allowed is None or s.name in allowed)

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: as in Gymnasium: seeds `self.np_random`.
            options: `{"task": Task}` names the task; without it one of the environment's own is drawn. Other keys
                are left to subclasses.

        Returns:
            The task's messages, as `on_reset` left them, and `{"task_id", "stop_reason": None}`.

        Raises:
            ValueError: no task given and none of its own; a task that names a tool which is not there.
            TypeError: `options["task"]` is no `Task`.
            ResetNeeded: another reset began while this one ran: the episode is the other's.
        """
        gymnasium.Env.reset(self, seed=seed, options=options)
        given = (options or {}).get("task")
        if given is not None and not isinstance(given, Task):
            raise TypeError(f'options["task"] must be an envs.types.Task, found {type(given).__name__}')
        task = given if given is not None else self._draw()
        unknown = set(task.tools or ()) - {spec.name for spec in self.toolbox.specs}
        if unknown:
            raise ValueError(
                f"task {task.id!r} names tools that environment {self.env_id!r} has not: {sorted(unknown)}"
            )
        self._task = task
        self._ended = True  # until it is prepared: a step after a reset that failed is refused
        self._stepping = False
        self._episode_number += 1
        number = self._episode_number
        self._turns = 0
        self._calls: Counter[str] = Counter()
        self._parse_errors = 0
        self.state = {}
        self.messages = list(copy.deepcopy(task.messages))
        # Tools get a copy: what one writes into its Metadata must not be there when the task is played again.
        self._task_metadata = copy.deepcopy(task.metadata)
        await self.on_reset(task)
        if number != self._episode_number:
            raise ResetNeeded("the environment was reset again while this reset ran; have an instance for each episode")
        self._ended = False
        # A copy: whoever changes what was observed must not change the task.
        return tuple(copy.deepcopy(self.messages)), {"task_id": task.id, "stop_reason": None}

    async def astep(self, action: AssistantMessage) -> StepOutcome:
        """Take one assistant message: run its calls, count, and say whether the episode goes on.

        Budgets are looked at before a call runs. A call over a budget is answered with a `budget` error, and the
        episode ends. A malformed call is answered with what was wrong; it is never "no call". A message that was cut
        off (`finished` False) has its complete calls run like any other: whether to end there is up to the agent loop.

        Raises:
            ResetNeeded: before the first reset, after the end, while another step runs; and out of a step during which
                the environment was reset: its late results belong to no episode and are dropped.
            TypeError: the action is no `AssistantMessage`; nothing is counted.
        """
        if self._task is None:
            raise ResetNeeded("step was called before reset")
        if self._stepping:
            raise ResetNeeded("a step is still running: wait for it; concurrent episodes have an instance each")
        if self._ended:
            raise ResetNeeded("the episode has ended: call reset before the next step")
        if not isinstance(action, AssistantMessage):
            raise TypeError(
                f"step takes an envs.types.AssistantMessage, found {type(action).__name__}; "
                "a reply without calls is AssistantMessage(content=...)"
            )
        said = action.to_message()  # before anything is counted: a broken action leaves the episode as it was
        number = self._episode_number
        self._stepping = True
        self._turns += 1
        self.messages.append(said)
        num_malformed = sum(call.parse_error is not None for call in action.tool_calls)
        self._parse_errors += num_malformed
        try:
            results, over = await self._run_calls(action.tool_calls)
            self._still(number)
            stop = self._stop_reason(action, results, over, num_malformed)
            observation: tuple[Message, ...] = tuple(
                {"role": "tool", "tool_call_id": r.call_id, "name": r.name, "content": r.content} for r in results
            )
            if not results and (stop is None or (self.converses and stop is StopReason.MAX_TURNS)):
                answer = self.on_no_call(action)
                answer = await answer if inspect.isawaitable(answer) else answer
                self._still(number)
                if answer is None:
                    stop = StopReason.LAST_TOOL
                elif stop is None:
                    observation = (answer,)
            self.messages.extend(observation)
            if stop is None and await self.is_over():
                stop = StopReason.ANSWERED
            self._still(number)
        except BaseException:
            if number == self._episode_number:
                self._ended, self._stepping = True, False
            raise
        self._stepping = False
        self._ended = stop is not None
        info = {
            "stop_reason": stop,
            "tool_results": tuple(results),
            "num_parse_errors": num_malformed,
            "budget": self._budget(),
        }
        return StepOutcome(observation, 0.0, stop in TERMINATED, stop is not None and stop not in TERMINATED, info)

    async def verify(self) -> dict[str, float]:
        """Grade the episode that was just played.

        Raises:
            RuntimeError: with `skip_verification`, where no grader may be built.
        """
        if self.skip_verification:
            raise RuntimeError("verify was called with skip_verification: nothing is graded in pure distillation")
        if self._grader is None:
            self._grader = self.grader()
        rewards = self._grader(self.task, self.state, tuple(self.messages))
        return await rewards if inspect.isawaitable(rewards) else rewards

    async def aclose(self) -> None:
        """Free what `on_reset` took."""

    # Gymnasium's synchronous side

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """`areset`, on the background thread."""
        return run_in_background(self.areset(seed=seed, options=options))

    def step(self, action: AssistantMessage) -> tuple[tuple[Message, ...], float, bool, bool, dict[str, Any]]:
        """`astep`, on the background thread."""
        return run_in_background(self.astep(action))

    def close(self) -> None:
        run_in_background(self.aclose())

    # Inside

    def _still(self, number: int) -> None:
        if number != self._episode_number:
            raise ResetNeeded("the environment was reset while this step ran; its results are dropped")

    def _check_limits(self) -> None:
        names = [spec.name for spec in self.toolbox.specs]
        for name in self.limits.max_calls_per_tool:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"its tools: {', '.join(names) or 'none'}"
                raise EnvSetupError(
                    f"limits.max_calls_per_tool names {name!r}, which {type(self).__name__} does not have; {hint}"
                )

    def _draw(self) -> Task:
        if self._tasks is None:
            from envs.dataset import read_tasks

            given = self._given_tasks
            if given is None:
                self._tasks = tuple(self.default_tasks())
            else:
                self._tasks = read_tasks(given) if isinstance(given, str | Path) else tuple(given)
        if not self._tasks:
            raise ValueError(
                f'environment {self.env_id!r} has no tasks of its own; reset it with options={{"task": ...}}'
            )
        return self._tasks[int(self.np_random.integers(len(self._tasks)))]

    async def _run_calls(self, calls: Sequence[ToolCall]) -> tuple[list[ToolResult], StopReason | None]:
        """One result a call, in the order of the calls, and the budget that ran out, if one did."""
        over: StopReason | None = None
        refused: dict[int, ToolResult] = {}
        allowed: list[ToolCall] = []
        names = {spec.name for spec in self.tool_specs}
        for index, call in enumerate(calls):
            reason = self._over_budget(call) if call.parse_error is None else None
            if reason is not None:
                over = over or reason
                refused[index] = _refusal(call, ToolErrorKind.BUDGET, f"no calls left ({reason.value})")
            elif call.parse_error is None and call.name not in names and call.name in self._all_names():
                refused[index] = _refusal(call, ToolErrorKind.UNKNOWN_TOOL, f"{call.name} cannot be used in this task")
            else:
                allowed.append(call)
            if reason is None and call.parse_error is None:  # a budget is one of attempts, wrong ones among them
                self._calls[call.name] += 1
        ran = iter(await self.toolbox.run(allowed, metadata=self._task_metadata, state=self.state))
        return [refused[i] if i in refused else next(ran) for i in range(len(calls))], over

    def _all_names(self) -> set[str]:
        return {spec.name for spec in self.toolbox.specs}

    def _over_budget(self, call: ToolCall) -> StopReason | None:
        per_tool = self.limits.max_calls_per_tool.get(call.name)
        if per_tool is not None and self._calls[call.name] >= per_tool:
            return StopReason.TOOL_BUDGET
        if self.limits.max_tool_calls is not None and self._calls.total() >= self.limits.max_tool_calls:
            return StopReason.MAX_TOOL_CALLS
        return None

    def _stop_reason(
        self, action: AssistantMessage, results: Sequence[ToolResult], over: StopReason | None, num_malformed: int
    ) -> StopReason | None:
        limits = self.limits
        if any(result.ends_episode for result in results):
            return StopReason.ANSWERED
        if num_malformed and (limits.on_parse_error == "stop" or self._parse_errors > limits.max_parse_errors):
            return StopReason.PARSE_ERROR
        if over is not None:
            return over
        last = limits.termination_policy == "last_tool" or not self.tool_specs
        if not action.tool_calls and last and not self.converses:
            return StopReason.LAST_TOOL
        if self._turns >= limits.max_turns:
            return StopReason.MAX_TURNS
        return None

    def _budget(self) -> dict[str, int | None]:
        calls = self.limits.max_tool_calls
        left = {
            "turns": self.limits.max_turns - self._turns,
            "tool_calls": None if calls is None else calls - self._calls.total(),
            "parse_errors": self.limits.max_parse_errors - self._parse_errors,
        }
        per_tool = self.limits.max_calls_per_tool
        return left | {f"tool_calls[{name}]": most - self._calls[name] for name, most in per_tool.items()}


def _refusal(call: ToolCall, kind: ToolErrorKind, message: str) -> ToolResult:
    error = ToolError(kind=kind, message=message)
    return ToolResult(call_id=call.id, name=call.name, content=f"{kind.value}: {message}", error=error)
