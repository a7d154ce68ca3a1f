"""A verifiers environment with tools of both kinds, state, hooks, a stop rule, rewards and metrics."""

import verifiers.v1 as vf

LOG: list[str] = []
"""What was called, in order: tests read it."""


class SumsState(vf.State):
    total: int = 0
    calls: int = 0


class SumsData(vf.TaskData):
    answer: int
    start: int = 0


class SumsConfig(vf.TaskConfig):
    most_calls: int = 100


class SumsTasksetConfig(vf.TasksetConfig):
    count: int = 6
    task: SumsConfig = SumsConfig()


class Counter(vf.Toolset[vf.ToolsetConfig, SumsState]):
    """A tool server of the task's own."""

    async def setup_task(self, task: SumsData) -> None:
        self.start = task.start

    @vf.tool
    async def add(self, number: int, times: int = 1) -> int:
        """Add a number to the total, once or several times."""
        if self.state.calls == 0:
            self.state.total = self.start
        self.state.total += number * times
        self.state.calls += 1
        return self.state.total

    @vf.tool
    def fail(self, reason: str) -> str:
        """Always fails."""
        raise ValueError(reason)


class Facts(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    """A tool server that all tasks share."""

    TOOL_PREFIX = None

    async def setup(self) -> None:
        LOG.append("facts set up")
        self.facts = {"seven": 7}

    @vf.tool
    def look_up(self, word: str) -> dict:
        """The number that a word stands for."""
        return {"word": word, "number": self.facts.get(word)}


class SumsTask(vf.Task[SumsData, SumsState, SumsConfig]):
    @classmethod
    def toolsets(cls, config: SumsConfig) -> list[vf.Toolset]:
        return [Counter(vf.ToolsetConfig())]

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        LOG.append("setup")
        await runtime.write("note.txt", b"written at setup")

    async def finalize(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        LOG.append("finalize")
        trace.info["note"] = (await runtime.read("note.txt")).decode()

    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return trace.state.calls >= self.config.most_calls

    @vf.reward(weight=0.75)
    async def right(self, task: SumsData, trace: vf.Trace) -> float:
        LOG.append("right")
        return float(str(task.answer) in trace.last_reply)

    @vf.reward(weight=0.25)
    async def used_tools(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages) > 0)

    @vf.metric
    async def turns(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return float(trace.num_turns + 100 * (trace.info["note"] != "written at setup"))

    @vf.metric
    async def cut(self, trace: vf.Trace) -> float:
        return float(trace.is_truncated)


class SumsTaskset(vf.Taskset[SumsTask, SumsTasksetConfig]):
    def load(self):
        for i in range(self.config.count):
            yield SumsTask(
                SumsData(
                    name=f"sum-{i}",
                    prompt=f"What is {i} + 3 * 4?",
                    system_prompt="Use the tools." if i % 2 else None,
                    answer=i + 12,
                    start=i,
                ),
                self.config.task,
            )

    @classmethod
    def toolsets(cls, config: SumsTasksetConfig) -> list[vf.Toolset]:
        return [Facts(vf.SharedToolsetConfig())]


__all__ = ["SumsTaskset"]
