"""A verifiers environment whose own program talks to the agent: a guessing game without tools."""

import verifiers.v1 as vf


class GuessData(vf.TaskData):
    hidden: int


class GuessTask(vf.Task[GuessData]):
    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        hidden = 0
        while True:
            yield GuessTask(GuessData(prompt=None, system_prompt="Answer with a number.", hidden=hidden % 10))
            hidden += 1


class GuessEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessEnvConfig]):
    async def run(self, task, agents):
        right, guesses = False, 0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn("I hide a number below ten. Guess!")
            while not segment.terminated:
                guesses += 1
                if segment.last_reply == str(task.data.hidden):
                    right = True
                    break
                segment = await interaction.turn(f"No, not {segment.last_reply}. Again!")
        interaction.trace.record_reward("right", float(right))
        interaction.trace.info["guesses"] = guesses

    async def finalize(self, task, episode):
        [trace] = episode.traces
        trace.record_metric("guesses", trace.info["guesses"])


__all__ = ["GuessEnv", "GuessTaskset"]
