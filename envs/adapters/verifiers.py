"""`verifiers:NAME`: an installed environment of the package `verifiers` (0.4).

    pip install 'distill-gym[verifiers]' my-env
    python -m envs check verifiers:my-env
    python -m distill.run --env verifiers:my-env --env_args.difficulty hard

An environment is a task set: rows with a prompt, tools, rewards, and a program that drives the agents (`Env.run`), by
default one agent on the prompt. All of it is the author's own code, which runs here with our rights; only the agent is
ours (`envs.adapters.verifiers_run`). Rewards, metrics and judges are called with verification only.

Versions before 0.4, with `load_environment`, have another interface and are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from envs.adapters.foreign import foreign_tool
from envs.tool_env import OPEN_LIMITS, EnvSetupError, Grader, ToolEnv
from envs.types import AssistantMessage, Limits, Message, Task
from tools.tool import Tool

NUM_ENDLESS = 1000
"""Tasks that are taken of a task set without end."""
TOOL_TIMEOUT_S = 600.0
"""verifiers' own limit of a tool call."""
HARNESSES = ("bash", "null")
"""Programs that play an agent where the task set names none: ours takes their place, with the environment's tools."""


def _installed() -> None:
    try:
        found = version("verifiers")
    except PackageNotFoundError as error:
        raise EnvSetupError("the package verifiers is not installed: pip install 'distill-gym[verifiers]'") from error
    if found.split(".")[:2] != ["0", "4"]:
        raise EnvSetupError(f"verifiers {found} is installed; its interface changes, and this adapter is for 0.4")


class VerifiersEnv(ToolEnv):
    """An environment of verifiers.

    Args:
        name: of the installed package, or `owner/name` as on the Environments Hub.
        num_eval: so many of its first tasks are held out for evaluation.
        limits, tasks, skip_verification: as in `ToolEnv`. Tasks of a file come from `default_tasks`: their
            `metadata.verifiers` is the row.
        taskset: fields of the task set's own configuration.

    Raises:
        EnvSetupError: not installed, not loadable, or asking for what is not mapped; the message says which.
    """

    converses = True

    def __init__(
        self,
        *,
        name: str,
        num_eval: int = 0,
        limits: Limits = OPEN_LIMITS,
        tasks: Sequence[Task] | str | Path | None = None,
        skip_verification: bool = True,
        **taskset: Any,
    ) -> None:
        _installed()
        from envs.adapters import verifiers_run, verifiers_tools

        self._name, self._num_eval = name, num_eval
        try:
            self._rules, self._declared = load(name, json.dumps(taskset, sort_keys=True))
        except EnvSetupError as error:
            raise EnvSetupError(f"verifiers:{name}: {error}") from error
        if not skip_verification:
            _check_judges(name, self._rules.env.taskset.config.task)
        self._run: verifiers_run.Run | None = None
        self._servers: verifiers_tools.Servers | None = None
        super().__init__(limits=limits, tasks=tasks, skip_verification=skip_verification)

    def tools(self) -> Sequence[Tool]:
        return [
            foreign_tool(t.name, t.description, t.schema, partial(self._call, t), timeout_s=TOOL_TIMEOUT_S)
            for t in self._declared
        ]

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        """The rows of the task set, in its order.

        Raises:
            EnvSetupError: a row that needs a container, an image or skills.
        """
        first, last = (self._num_eval, None) if split == "train" else (0, self._num_eval)
        if num_tasks is not None:
            last = first + num_tasks if last is None else min(last, num_tasks)
        return list(_tasks(self._name, self._rules.env.taskset, first, last))

    async def on_reset(self, task: Task) -> None:
        from envs.adapters.verifiers_run import Run

        await self.aclose()
        self._run = Run(
            self._rules,
            self._their_task(task),
            verify=not self.skip_verification,
            messages=lambda: self.messages,
            enter=self._enter,
        )
        opening = await self._run.next()
        if not opening or opening[-1]["role"] != "user":
            raise EnvSetupError(f"verifiers:{self._name}: task {task.id!r} does not begin with a user's message")
        self.messages[:] = opening
        self._run.opened(opening)

    async def on_no_call(self, action: AssistantMessage) -> Message | None:
        assert self._run is not None
        said = await self._run.reply()
        if said is None:
            return None
        if len(said) != 1 or said[0]["role"] != "user":
            roles = [message["role"] for message in said]
            raise EnvSetupError(f"verifiers:{self._name} answers with messages of {roles}; one of a user is mapped")
        return said[0]

    async def is_over(self) -> bool:
        return self._run is not None and await self._run.stopped()

    def grader(self) -> Grader:
        return self._grade

    async def aclose(self) -> None:
        run, self._run, self._servers = self._run, None, None
        if run is not None:
            await run.abandon()

    def _their_task(self, task: Task) -> Any:
        row = task.metadata.get("verifiers")
        if not isinstance(row, dict):
            raise EnvSetupError(
                f"verifiers:{self._name}: task {task.id!r} has no metadata.verifiers; take tasks of default_tasks"
            )
        task_class = self._rules.task_class
        return task_class(task_class.data_type().model_validate(row), self._rules.env.taskset.config.task)

    async def _enter(self, task: Any, trace: Any, stack: Any) -> None:
        from envs.adapters.verifiers_tools import Servers

        self._servers = await Servers.enter(self._rules.env.taskset, task, trace, stack)

    async def _call(self, tool: Any, arguments: dict[str, Any]) -> str:
        assert self._servers is not None
        return await self._servers.call(tool, arguments)

    async def _grade(self, task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
        """Rewards and metrics by name, `reward` as verifiers adds it up, and that as `success`, cut to [0, 1]."""
        assert self._run is not None
        trace = await self._run.finish()
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        if not scores:
            return {}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return {**metrics, "success": min(1.0, max(0.0, trace.reward)), "reward": trace.reward, **scores}


@lru_cache(maxsize=8)
def load(name: str, taskset: str) -> tuple[Any, tuple[Any, ...]]:
    """The environment and its tools; loaded once a process, shared by all episodes.

    Args:
        taskset: its configuration as JSON.

    Raises:
        EnvSetupError: what is wrong with it, or cannot be mapped.
    """
    from envs.adapters.verifiers_run import Rules, interceptors
    from envs.adapters.verifiers_tools import declared

    env = _load_env(name, json.loads(taskset))
    task_class = type(env.taskset).task_type()
    if task_class.NEEDS_CONTAINER:
        raise EnvSetupError("its tasks need a container, and none is started here")
    if names := interceptors(task_class):
        raise EnvSetupError(f"it rewrites messages (@vf.intercept {names[0]}); what a model said is not rewritten here")
    _check_stops(task_class, env.taskset.config.task)
    import verifiers.v1 as vf

    if type(env).start is not vf.Env.start:
        raise EnvSetupError(f"{type(env).__name__}.start brings up resources of its own, which is not mapped")
    tools = declared(env.taskset)
    [role] = env._agent_specs
    told = [vf.types.Tool(name=t.name, description=t.description, parameters=t.schema) for t in tools]
    return Rules(env=env, role=role, task_class=task_class, tools=told), tools


def _load_env(name: str, taskset: dict[str, Any]) -> Any:
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils.loaders import (
        default_harness_id,
        environment_class,
        import_taskset,
        load_environment,
        resolve_env_config,
        taskset_class,
    )

    try:
        import_taskset(name)
        taskset_class(name)
    except ModuleNotFoundError as error:
        raise EnvSetupError(f"no such environment is installed ({error}); pip install it first") from error
    except AttributeError as error:
        hint = "; one with load_environment is of verifiers before 0.4" if "__all__" in str(error) else ""
        raise EnvSetupError(f"{error}{hint}") from error
    except (TypeError, ValueError) as error:
        raise EnvSetupError(str(error)) from error
    harness = default_harness_id(name)
    if harness not in HARNESSES:
        raise EnvSetupError("it brings a program that plays the agent (a Harness); here our own loop plays it")
    try:
        config = resolve_env_config({"taskset": {**taskset, "id": name}})
        seats = agent_config_fields(config)
        if len(seats) != 1:
            raise EnvSetupError(
                f"{environment_class(name).__name__} has the agents {', '.join(seats) or 'none'}; "
                "one of them would be ours, and the others need models of their own"
            )
        [(role, seat)] = seats.items()
        if seat.harness is not None and seat.harness.id not in HARNESSES:
            raise EnvSetupError(f"its agent is the program {seat.harness.id!r}; here our own loop plays it")
        config = resolve_env_config({"taskset": {**taskset, "id": name}, role: {"harness": {"id": "null"}}})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise EnvSetupError(f"its configuration refuses env_args: {'; '.join(lines)}") from error
    return load_environment(config)


def _check_stops(task_class: Any, config: Any) -> None:
    """`@vf.stop` of a trace is asked between turns; one of a request or response would see what is not there."""
    import verifiers.v1 as vf
    from verifiers.v1.session import hook_boundary

    probe = object.__new__(task_class)
    probe.config = config
    for stop in probe.hooks("stop"):
        if hook_boundary(stop, allow_trace=True) is not vf.Trace:
            raise EnvSetupError(f"its @vf.stop {stop.__name__} wants a model request; only one of a Trace is mapped")


def _check_judges(name: str, config: BaseModel) -> None:
    """A judge without its key would fail each episode at its end, or ask a server that nobody named."""
    for judge in _judges(config):
        if not os.environ.get(judge.api_key_var):
            raise EnvSetupError(
                f"verifiers:{name}: its judge {judge.id or judge.model!r} asks {judge.base_url} with the key in "
                f"{judge.api_key_var}, which is not set; set it, or the judge's base_url and api_key_var, or leave "
                "skip_verification = true"
            )


def _judges(value: Any) -> Iterator[Any]:
    from verifiers.v1 import JudgeConfig

    if isinstance(value, JudgeConfig):
        yield value
    elif isinstance(value, BaseModel):
        for _, item in value:
            yield from _judges(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _judges(item)


def _tasks(name: str, taskset: Any, first: int, last: int | None) -> Iterator[Task]:
    from envs.adapters.verifiers_messages import opening

    if last is None and not taskset.bounded:
        last = first + NUM_ENDLESS
    view = taskset.skip(first) if last is None else taskset.skip(first).take(max(0, last - first))
    seen: set[str] = set()
    for task in view:
        data = task.data
        wants = {
            "an image": data.image,
            "a user of its box": data.agent_user,
            "skills": data.skills,
            "network rules": data.network_block or data.network_allow != ["*"],
        }
        if wanted := [what for what, value in wants.items() if value]:
            raise EnvSetupError(f"verifiers:{name}: task {data.idx} asks for {wanted[0]}, and no container is started")
        try:
            messages = opening(task)
        except EnvSetupError as error:
            raise EnvSetupError(f"verifiers:{name}: task {data.idx}: {error}") from error
        id = data.id or data.name or str(data.idx)
        row = data.model_dump(mode="json", exclude_defaults=True)
        answer = row.get("answer")
        metadata = {"verifiers": row} | ({"answer": answer} if isinstance(answer, str | int | float) else {})
        if not messages or messages[-1]["role"] != "user":
            messages = [*messages, {"role": "user", "content": ""}]  # the environment's program says it in on_reset
        yield Task(id=id if id not in seen else f"{id}-{data.idx}", messages=tuple(messages), metadata=metadata)
        seen.add(id)
