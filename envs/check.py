"""Does an environment keep the contract? `python -m envs check NAME_OR_PATH`.

Tasks and tool schemas, Gymnasium's own `check_env`, determinism under a seed, every budget with its stop reason,
graders, and fuzzed episodes. What is wrong is a `Finding` with a remedy, never an exception.
"""

from __future__ import annotations

import asyncio
import json
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded

from envs.dataset import TaskError, read_tasks
from envs.fuzz import broken_rules, fuzzed_action
from envs.registry import RegistryError, make
from envs.spaces import sample_schema
from envs.tool_env import OPEN_LIMITS, ToolEnv
from envs.types import AssistantMessage, Limits, StopReason, Task
from tools.tool import Tool
from tools.types import ToolCall, ToolFailure

NUM_SAMPLES = 20
"""Sampled arguments a tool; one valid sample among them is enough."""
NUM_REPLAYED = 5
"""Episodes that are played twice."""
MAX_FINDINGS = 20
"""Of the fuzzed episodes; the rest is more of the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    check: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}\n    -> {self.remedy}"


@dataclass(slots=True, kw_only=True)
class Report:
    """What `check_environment` saw."""

    env: str
    checks: list[str] = field(default_factory=list)
    """Names of the checks that ran."""
    tools: list[str] = field(default_factory=list)
    num_tasks: int = 0
    """Tasks of the environment's own, or of the file given."""
    num_episodes: int = 0
    """Fuzzed episodes that were played to their end."""
    stop_reasons: dict[str, int] = field(default_factory=dict)
    """How the fuzzed episodes ended."""
    findings: list[Finding] = field(default_factory=list)


def check_environment(name: str, *, num_episodes: int = 100, seed: int = 0, tasks: str | Path | None = None) -> Report:
    """Make the environment and try everything that the contract promises.

    Args:
        name: of the registry, or the path of a folder.
        num_episodes: fuzzed episodes.
        seed: of all that is drawn.
        tasks: a task file, for an environment without tasks of its own.
    """
    return _Checker(name, num_episodes, seed, tasks).run()


class _Checker:
    def __init__(self, name: str, num_episodes: int, seed: int, tasks: str | Path | None) -> None:
        self.report = Report(env=name)
        self.num_episodes = num_episodes
        self.seed = seed
        self.task_file = tasks
        self.tasks: Sequence[Task] = ()

    def make(self, limits: Limits = OPEN_LIMITS, *, verify: bool = False) -> ToolEnv:
        more: dict[str, Any] = {"tasks": self.tasks} if self.tasks else {}
        return make(self.report.env, limits=limits, skip_verification=not verify, **more)

    def find(self, check: str, message: str, remedy: str) -> None:
        self.report.findings.append(Finding(check=check, message=message, remedy=remedy))

    def run(self) -> Report:
        try:
            env = self.make()
            self._load_tasks(env)
        except RegistryError as error:
            self.find("make", str(error), "mend what the message names; `python -m envs list` shows what is known")
            return self.report
        except TaskError as error:
            self.find("tasks", str(error), "mend the row; docs/formats.md describes task files")
            return self.report
        except Exception as error:
            self.find("make", _words(error), "the constructor and default_tasks must work without arguments")
            return self.report
        self.report.checks.append("make")
        self.report.tools = [spec.name for spec in env.toolbox.specs]
        if not self.tasks:
            self.find("tasks", "no tasks of its own", "override default_tasks, add train.jsonl, or pass --tasks FILE")
            return self.report
        self._guarded("tasks", self._check_tasks)
        self._guarded("schemas", self._check_schemas)
        self._guarded("gymnasium", self._check_gymnasium)
        checks: dict[str, Callable[[], Awaitable[None]]] = {
            "determinism": self._check_determinism,
            "budgets": self._check_budgets,
            "graders": self._check_graders,
            "fuzz": self._fuzz,
        }
        for name, check in checks.items():
            self._guarded(name, lambda check=check: asyncio.run(_finish(check())))  # type: ignore[misc]
        return self.report

    def _guarded(self, name: str, check: Callable[[], None]) -> None:
        self.report.checks.append(name)
        try:
            check()
        except Exception as error:
            self.find(name, _words(error), "the environment must not raise for what a model or a task says")

    def _load_tasks(self, env: ToolEnv) -> None:
        if self.task_file is not None:
            self.tasks = read_tasks(self.task_file)
        else:
            self.tasks = tuple(env.default_tasks())
        self.report.num_tasks = len(self.tasks)

    def _check_tasks(self) -> None:
        if self.task_file is None:
            for split in ("train", "eval"):
                found = len(self.make().default_tasks(split=split, num_tasks=1))
                if found > 1:
                    remedy = "default_tasks(split, num_tasks) must give at most num_tasks tasks"
                    self.find("tasks", f"default_tasks({split!r}, num_tasks=1) gave {found} tasks", remedy)
        known = set(self.report.tools)
        ids = Counter(task.id for task in self.tasks if task.id)
        for task in self.tasks:
            if not task.messages or task.messages[-1]["role"] != "user":
                self.find("tasks", f"task {task.id!r} does not end with a user message", "end messages with the user's")
            elif set(task.tools or ()) - known:
                wrong = sorted(set(task.tools or ()) - known)
                self.find("tasks", f"task {task.id!r} names unknown tools {wrong}", f"known: {sorted(known)}")
            elif ids[task.id] > 1:
                self.find(
                    "tasks", f"task id {task.id!r} is there {ids[task.id]} times", "give each task an id of its own"
                )
            else:
                try:
                    json.dumps(task.metadata, allow_nan=False)
                    continue
                except (TypeError, ValueError) as error:
                    self.find("tasks", f"metadata of task {task.id!r}: {error}", "metadata must be JSON values")
            return  # the others are likely to be wrong in the same way

    def _check_schemas(self) -> None:
        for tool in self.make().toolbox.tools:
            for problem in _schema_problems(tool, self.seed):
                self.find("schemas", f"tool {tool.name!r}: {problem}", "declare it with @tool; see tools/tool.py")

    def _check_gymnasium(self) -> None:
        from gymnasium.utils.env_checker import check_env

        env = self.make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check_env(env, skip_render_check=True)
            except Exception as error:
                self.find("gymnasium", _words(error), "what gymnasium.utils.env_checker.check_env asks for must hold")
            finally:
                env.close()
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            self.find("gymnasium", f"warning: {message}", "see https://gymnasium.farama.org/api/env/")

    async def _check_determinism(self) -> None:
        """The same seed, task and actions in two fresh instances."""
        first, second = self.make(), self.make()
        try:
            for number in range(NUM_REPLAYED):
                seen = [await self._replay(env, number) for env in (first, second)]
                for turn, (one, other) in enumerate(zip(*seen, strict=False)):
                    if one != other:
                        self.find(
                            "determinism",
                            f"turn {turn} of episode {number} differs under the same seed and actions: "
                            f"{_difference(str(one), str(other))}",
                            "draw from env.np_random, keep what an episode changes in State, sort what is a set",
                        )
                        return
        finally:
            await first.aclose()
            await second.aclose()

    async def _replay(self, env: ToolEnv, number: int) -> list[Any]:
        observation, _ = await env.areset(seed=self.seed + number, options=self._task(number))
        env.action_space.seed(self.seed + number)
        seen: list[Any] = [observation]
        for _ in range(env.limits.max_turns):
            outcome = await env.astep(env.action_space.sample())
            seen.append((outcome.observation, outcome.info["stop_reason"]))
            if outcome.terminated or outcome.truncated:
                break
        return seen

    async def _check_budgets(self) -> None:
        usable = self.tasks[0].tools if self.tasks[0].tools is not None else self.report.tools
        for name, limits, action, wanted in _budget_cases(usable):
            env = self.make(limits)
            try:
                await env.areset(seed=self.seed, options=self._task(0))
                if not env.tool_specs and limits.termination_policy == "max_turns" and not action.tool_calls:
                    continue  # without tools every answer is the last
                if env.converses and not action.tool_calls:
                    continue  # what an answer does is the environment's own rule
                stop = None
                for _ in range(5):
                    outcome = await env.astep(action)
                    stop = outcome.info["stop_reason"]
                    if stop is not None:
                        break
                if stop is not wanted:
                    self.find(
                        "budgets",
                        f"{name}: the episode should have stopped with {wanted.value!r}, it "
                        + ("went on" if stop is None else f"stopped with {str(stop)!r}"),
                        "pass `limits` on to ToolEnv.__init__, and leave the counting to ToolEnv.astep",
                    )
            finally:
                await env.aclose()

    async def _check_graders(self) -> None:
        if self.make().grader.__func__ is ToolEnv.grader:  # type: ignore[attr-defined]
            return  # pure distillation needs none
        env = self.make(verify=True)
        try:
            for number in range(min(NUM_REPLAYED, len(self.tasks))):
                await self._replay(env, number)
                rewards = await env.verify()
                for problem in _reward_problems(rewards):
                    self.find("graders", problem, "return {name: number}, with success between 0 and 1, or {}")
                    return
        finally:
            await env.aclose()

    async def _fuzz(self) -> None:
        env = self.make()
        stops: Counter[str] = Counter()
        try:
            for number in range(self.num_episodes):
                if len(self.report.findings) >= MAX_FINDINGS:
                    break
                stop = await self._fuzz_one(env, number)
                if stop is not None:
                    stops[stop] += 1
        finally:
            await env.aclose()
        self.report.num_episodes = stops.total()
        self.report.stop_reasons = {str(stop): count for stop, count in stops.most_common()}
        if env._grader is not None:
            self.find("fuzz", "a grader was built with skip_verification", "build it in grader(), nowhere else")

    async def _fuzz_one(self, env: ToolEnv, number: int) -> StopReason | None:
        random = np.random.default_rng((self.seed, number))
        await env.areset(seed=self.seed + number, options=self._task(number))
        for turn in range(env.limits.max_turns):
            action = fuzzed_action(env, random, turn)
            where = f"episode {number}, turn {turn}, calls {[call.name[:40] for call in action.tool_calls]}"
            try:
                async with asyncio.timeout(env.limits.timeout_s):
                    outcome = await env.astep(action)
            except Exception as error:
                remedy = "a tool raises ToolFailure to tell the model; what it returns is text or JSON"
                self.find("fuzz", f"{where}: {_words(error)}", remedy)
                return None
            for problem in broken_rules(env, action, outcome):
                self.find("fuzz", f"{where}: {problem}", "leave astep to ToolEnv; override tools and on_no_call")
                return None
            stop: StopReason | None = outcome.info["stop_reason"]
            if stop is not None:
                try:
                    await env.astep(action)
                except ResetNeeded:
                    return stop
                self.find("fuzz", f"{where}: a step after the end was taken", "leave astep to ToolEnv")
                return None
        self.find("fuzz", f"episode {number} went on after max_turns", "leave the counting to ToolEnv.astep")
        return None

    def _task(self, number: int) -> dict[str, Any]:
        return {"task": self.tasks[number % len(self.tasks)]}


async def _finish(check: Awaitable[None]) -> None:
    await check


def _schema_problems(tool: Tool, seed: int) -> Iterator[str]:
    schema = tool.spec.parameters
    if not tool.spec.description.strip():
        yield "no description: the model cannot know what it is for"
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        yield "its schema is not an object with properties"
        return
    if schema.get("additionalProperties") is not False:
        yield "its schema lets unknown arguments pass"
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"its schema is not JSON: {error}"
        return
    random = np.random.default_rng(seed)
    reason = ""
    for _ in range(NUM_SAMPLES):
        try:
            tool.arguments.validate(sample_schema(schema, schema, random))
            return
        except (ToolFailure, ValueError) as error:
            reason = str(error)
    yield f"arguments made from its schema are refused ({reason}); give Annotated[str, Field(examples=[...])]"


def _budget_cases(tools: Sequence[str]) -> Iterator[tuple[str, Limits, AssistantMessage, StopReason]]:
    """(name, limits, the action that is repeated, the stop reason that must come)."""
    talk = AssistantMessage(content="Let me think.")
    malformed = ToolCall(id="c", name="", arguments=None, raw="{", parse_error="no JSON")
    broken = AssistantMessage(content="", tool_calls=(malformed,))
    yield "last_tool", Limits(), talk, StopReason.LAST_TOOL
    yield "max_turns", Limits(max_turns=2, termination_policy="max_turns"), talk, StopReason.MAX_TURNS
    yield "max_parse_errors", Limits(max_parse_errors=1), broken, StopReason.PARSE_ERROR
    yield "on_parse_error = stop", Limits(on_parse_error="stop"), broken, StopReason.PARSE_ERROR
    if tools:
        # Refused before the tool runs, yet counted: a budget of calls is a budget of attempts.
        wrong = ToolCall(id="c", name=tools[0], arguments={"no such argument": 1}, raw="")
        call = AssistantMessage(content="", tool_calls=(wrong,))
        yield "max_tool_calls", Limits(max_tool_calls=2), call, StopReason.MAX_TOOL_CALLS
        per_tool = Limits(max_calls_per_tool={tools[0]: 1})
        yield f"max_calls_per_tool[{tools[0]}]", per_tool, call, StopReason.TOOL_BUDGET


def _reward_problems(rewards: Any) -> Iterator[str]:
    if not isinstance(rewards, dict):
        yield f"the grader returned {rewards!r}, no dict"
        return
    for name, value in rewards.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            yield f"the grader returned {name} = {value!r}, no finite number"
    success = rewards.get("success", 0.0)
    if isinstance(success, int | float) and not 0 <= success <= 1:
        yield f"the grader returned success = {success!r}"


def _words(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error or 'no message'}{where}"


def _difference(one: str, other: str) -> str:
    """The first place where two texts differ, with a little around it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    cut = slice(max(0, at - 30), at + 50)
    return f"...{one[cut]!r} and ...{other[cut]!r}"
