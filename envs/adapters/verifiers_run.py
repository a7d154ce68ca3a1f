"""One episode of a verifiers environment, whose own program runs beside ours.

verifiers' `Env.run(task, agents)` drives its agents: `await agents.solver.run(task)`, or turn by turn in an
`interaction`. Here an agent is a `Seat`. It samples nothing: it hands what the environment says to our loop and waits
for what our model said to it.

    Env.run  --Seat.turn(messages)-->  Run  --opening, next-->  VerifiersEnv (a ToolEnv)
    Env.run  <--------- Segment -----  Run  <---- reply ------  VerifiersEnv
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.agent import Segment
from verifiers.v1.session import call_hook
from verifiers.v1.state import state_cls
from verifiers.v1.types import AssistantMessage, Tool
from verifiers.v1.utils.decorators import discover_decorated, invoke

from envs.adapters.verifiers_messages import opening, ours, theirs
from envs.tool_env import EnvSetupError
from envs.types import Message


class Unmapped(EnvSetupError):
    """What the environment asks of its agents while it runs, and a seat of ours cannot do."""


@dataclass
class Rules:
    """What all runs of an environment share; made once a process."""

    env: vf.Env
    role: str
    """The one agent, which is our model."""
    task_class: type[vf.Task]
    tools: list[Tool] = field(default_factory=list)
    """As the model is told of them."""

    def needs_box(self, task: vf.Task, verify: bool) -> bool:
        """Whether any of the task's hooks wants a runtime, which is a folder and processes on this machine."""
        hooks: list[Callable[..., Any]] = []
        if verify:
            hooks += [*task.hooks("metric"), *task.hooks("reward")]
        wants = any("runtime" in inspect.signature(hook).parameters for hook in hooks)
        overridden = type(task).setup is not vf.Task.setup or (verify and type(task).finalize is not vf.Task.finalize)
        return wants or overridden


class Run:
    """`Env.run` of one episode, in an asyncio task of its own.

    Args:
        verify: grade at the end. Without it neither rewards nor judges are called.
        messages: the dialogue so far, as our environment keeps it.
        enter: prepares the tools for a task and its trace, on the stack that the episode closes.
    """

    def __init__(
        self,
        rules: Rules,
        task: vf.Task,
        *,
        verify: bool,
        messages: Callable[[], Sequence[Message]],
        enter: Callable[[vf.Task, vf.Trace, AsyncExitStack], Any],
    ) -> None:
        self.rules, self.verify = rules, verify
        self.trace: vf.Trace | None = None
        """Of the agent that plays; None before it begins."""
        self._messages, self._enter = messages, enter
        self._num_opening = 0
        self._segment_start = 0
        self._said: asyncio.Queue[list[Message] | None] = asyncio.Queue()
        self._answer: asyncio.Future[Segment] | None = None
        self._over = False
        self._stops: list[Callable[..., Any]] = []
        self._program = asyncio.create_task(self._play(task), name="verifiers-run")

    # What our environment calls

    async def next(self) -> list[Message] | None:
        """What the environment says next; None when it has nothing more to say.

        Raises:
            Exception: whatever its program raised.
        """
        said = await self._said.get()
        if said is None:
            await self._program
        return said

    def opened(self, messages: Sequence[Message]) -> None:
        """The dialogue begins with these; what the model says comes after them."""
        self._num_opening = self._segment_start = len(messages)

    async def reply(self) -> list[Message] | None:
        """The model has answered: what does the environment say to it?"""
        self._deliver()
        return await self.next()

    async def stopped(self) -> bool:
        """Whether one of the task's `@vf.stop` says that this is enough."""
        if self.trace is None or not self._stops:
            return False
        self._record()
        for stop in self._stops:
            if await call_hook(stop, {vf.Trace: self.trace}):
                self.trace.stop(stop.__name__)
                return True
        return False

    async def finish(self) -> vf.Trace:
        """The episode is over, by whatever reason: let the program end, which grades."""
        self._over = True
        if self.trace is not None and self._answer is not None and not self._answer.done():
            self.trace.stop("max_turns")  # the agent was at work: a budget of ours ended it
        self._deliver()
        await self._program
        if self.trace is None:
            raise Unmapped("the environment's run ended without an agent's run")
        return self.trace

    async def abandon(self) -> None:
        """End the program where it stands, ungraded; what it opened is closed."""
        self._program.cancel()
        await asyncio.gather(self._program, return_exceptions=True)

    # What the environment's program calls

    async def turn(self, messages: list[Message]) -> Segment:
        """Say something to the model and wait for its segment: all that it did until it answered without a call."""
        if self._over:
            return Segment(messages=[], terminated=True)
        self._answer = asyncio.get_running_loop().create_future()
        self._said.put_nowait(messages)
        return await self._answer

    @asynccontextmanager
    async def rollout(self, task: vf.Task) -> AsyncIterator[vf.Trace]:
        """One agent's life with a task: setup, what it says, and at the end finalize and scoring."""
        if self.trace is not None:
            raise Unmapped(
                "the environment runs its agent more than once in an episode; an episode of ours is one dialogue"
            )
        if not isinstance(task, self.rules.task_class):
            raise Unmapped(f"the environment made a task of its own, a {type(task).__name__}: its tools are not known")
        trace = vf.Trace(
            task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=state_cls(type(task))(),
            agent=vf.AgentInfo(
                config=vf.AgentConfig(harness={"id": "null"}, runtime=vf.SubprocessConfig()), name=self.rules.role
            ),
            tools=self.rules.tools,
        )
        async with AsyncExitStack() as stack:
            box = None
            if self.rules.needs_box(task, self.verify):
                from verifiers.v1.runtimes import make_runtime

                box = make_runtime(vf.SubprocessConfig(), name=trace.id)
                box.env = dict(task.runtime_env())
                stack.push_async_callback(box.stop)
                await box.start()
            if type(task).setup is not vf.Task.setup:
                await invoke(task.setup, {"trace": trace, "runtime": box})
            await self._enter(task, trace, stack)
            self.trace = trace
            self._stops = list(task.hooks("stop"))
            yield trace
            self._record()
            trace.stop("agent_completed")
            trace.ok = True
            if self.verify:
                if type(task).finalize is not vf.Task.finalize:
                    await invoke(task.finalize, {"trace": trace, "runtime": box})
                await task.score(trace, box)

    async def _play(self, task: vf.Task) -> None:
        env, role = self.rules.env, self.rules.role
        agents: Any = Seats(role, Seat(self))
        try:
            await env.setup(agents)
            await env.run(task, agents)
            if self.verify and self.trace is not None:
                from verifiers.v1.episode import EnvInfo, Episode

                about = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
                episode = Episode(env=EnvInfo(id=env.config.env_id), task=about, traces=[self.trace])
                await env.finalize(task, episode)
        finally:
            self._said.put_nowait(None)

    def _deliver(self) -> None:
        """What was said since the last turn, to whoever waits for it."""
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        messages = list(self._messages())
        self._record()
        said = [theirs(message) for message in messages[self._segment_start :] if message["role"] != "user"]
        self._segment_start = len(messages)
        answered = any(isinstance(message, AssistantMessage) for message in said)
        answer.set_result(Segment(messages=said if answered else [], terminated=not answered))

    def _record(self) -> None:
        """Write the dialogue into the trace: a chain of messages, of which the model's are marked as sampled."""
        if self.trace is None:
            return
        self.trace.nodes = [
            vf.MessageNode(
                parent=index - 1 if index else None,
                tools=[] if index else self.rules.tools,
                message=theirs(message),
                sampled=message["role"] == "assistant" and index >= self._num_opening,
            )
            for index, message in enumerate(self._messages())
        ]


class Seats:
    """`agents` of `Env.run`: one role."""

    def __init__(self, role: str, seat: Seat) -> None:
        self._role, self._seat = role, seat

    def __getattr__(self, name: str) -> Seat:
        if name != self._role:
            raise AttributeError(f"no agent {name!r}; there is {self._role!r}")
        return self._seat


class Seat:
    """An agent that our loop plays."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.trainable = True

    async def run(self, task: vf.Task, **borrowed: Any) -> vf.Trace:
        """Let the agent work on a prompted task until it answers."""
        _refuse(borrowed)
        async with self._run.rollout(task) as trace:
            await self._run.turn(opening(task))
        return trace

    @asynccontextmanager
    async def interaction(self, task: vf.Task, **borrowed: Any) -> AsyncIterator[Interaction]:
        """Talk with the agent, turn by turn."""
        _refuse(borrowed)
        async with self._run.rollout(task) as trace:
            yield Interaction(self._run, task, trace)

    def __getattr__(self, name: str) -> Any:
        raise Unmapped(f"the environment asks its agent for {name!r}; a seat of ours has `run` and `interaction`")


def _refuse(borrowed: dict[str, Any]) -> None:
    given = [name for name, value in borrowed.items() if value]
    if given:
        raise Unmapped(f"the environment hands its agent {given[0]!r}, which a seat of ours cannot take")


class Interaction:
    """`async with agents.solver.interaction(task) as interaction`."""

    def __init__(self, run: Run, task: vf.Task, trace: vf.Trace) -> None:
        self._run, self._task, self.trace = run, task, trace
        self._begun = self._over = False

    async def turn(self, message: Any = None) -> Segment:
        """The next user turn; without one a prompted task's first."""
        if self._over:
            raise RuntimeError("the exchange is over (the run ended); read interaction.trace")
        prompted = not self._begun and self._task.data.prompt is not None
        if (message is None) != prompted:
            raise ValueError("a bare turn() takes a prompted task's first reply, any other turn says something")
        said = ours(message) if message is not None else []
        segment = await self._run.turn(said if self._begun else [*opening(self._task), *said])
        self._begun = True
        self._over = segment.terminated
        return segment

    def __getattr__(self, name: str) -> Any:
        raise Unmapped(f"the environment asks its interaction for {name!r}; one of ours has `turn` and `trace`")


def interceptors(task_class: type[vf.Task]) -> list[str]:
    """Names of `@vf.intercept` methods: they rewrite what a model said or is told."""
    return [hook.__name__ for hook in discover_decorated(object.__new__(task_class), "intercept")]
