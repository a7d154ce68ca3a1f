"""Forks: an episode played again up to a turn, and on otherwise."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_loop.conversation import TokenActor
from agent_loop.episodes import read_episodes
from agent_loop.renderer import load_renderer
from agent_loop.rollout import EpisodeJob, run_episode
from agent_loop.types import Episode, SegmentSource
from agent_loop.view.fork import ForkError, ReplayDiffers, fork
from agent_loop.view.index import Index
from agent_loop.view.whatif import Model, WhatIf, fork_row
from envs.tool_env import ToolEnv
from envs.types import Limits, Task
from tests.fakes.fake_vllm import FakeVllm
from tests.runs.conftest import save_tokenizer
from tests.viewer.conftest import SITE, Played, call, script, write_store
from tools.tool import Tool, tool


@tool
def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: first.
        b: second.
    """
    return a + b


def what_if(played: Played, **options: Any) -> WhatIf:
    return WhatIf(played.path, played.tokenizer, **options)


def forked(played: Played, turn: int, text: str | None, **options: Any) -> Episode:
    return what_if(played, **options).fork(played.episode(), turn, played.forks.parent, text)


def test_an_edited_turn_is_the_last_without_a_model(played: Played) -> None:
    original, before = played.episode(), played.file.read_bytes()
    made = forked(played, 2, call("submit_answer", answer="Nobody"))
    assert (made.id, made.stop_reason.value, len(made.turns)) == ("1/t/0#fork-1", "answered", 3)
    assert made.metadata["fork"] == {"of": "1/t/0", "turn": 2, "how": "edited"}
    assert made.rewards == {"success": 0.0, "answered": 1.0}
    [trace], [stored] = made.traces, original.traces
    start = original.turns[2].start
    assert start is not None
    assert made.turns[2].start == start
    assert trace.token_ids[:start] == stored.token_ids[:start]
    assert trace.segments[:-1] == [s for s in stored.segments if s.end <= start]
    assert trace.sampling_logprobs[:start] == stored.sampling_logprobs[:start]
    assert stored.teacher_logprobs is not None
    assert trace.teacher_logprobs == [*stored.teacher_logprobs[:start], *[None] * (len(trace) - start)]
    assert trace.loss_mask[:start] == stored.loss_mask[:start]
    assert not any(trace.loss_mask[start:])  # nobody sampled it: there is nothing to train on
    assert set(trace.sampling_logprobs[start:]) == {None}
    assert trace.segments[-1].source is SegmentSource.ASSISTANT
    assert [turn.tool_results[0].content for turn in made.turns[:2]] == [
        turn.tool_results[0].content for turn in original.turns[:2]
    ]
    assert played.file.read_bytes() == before
    assert list(read_episodes(played.forks)) == [made]


def test_forks_are_numbered_and_can_be_forked(played: Played) -> None:
    first = forked(played, 1, call("browse", url=f"{SITE}/drug"))
    second = forked(played, 1, "I give up.")
    assert (first.id, first.stop_reason.value) == ("1/t/0#fork-1", "max_turns")
    assert (second.id, second.stop_reason.value) == ("1/t/0#fork-2", "last_tool")
    index = Index([played.path], played.path.parent / "cache")
    [row] = [row for row in index.rows() if row.id == first.id]
    made = fork_row(index, row, what_if(played), 0, "No.")
    assert made.id == "1/t/0#fork-1#fork-1"
    assert (made.file, made.line) == ("forks.jsonl", 3)
    index.close()


def test_a_fork_goes_through_an_edited_turn_again(played: Played) -> None:
    with FakeVllm("m", vocab_size=302) as server:
        model = Model(server.base_url, "m")
        first = forked(played, 1, call("browse", url=f"{SITE}/drug"), model=model)
        assert len(first.turns) > 2
        second = what_if(played).fork(first, 2, played.forks.parent, "It is Acme.")
    start, end = first.turns[1].start, first.turns[1].end
    assert start is not None
    assert second.traces[0].token_ids[:end] == first.traces[0].token_ids[:end]
    assert set(second.traces[0].sampling_logprobs[start:end]) == {None}


@pytest.mark.parametrize("text", [None, call("browse", url=f"{SITE}/drug")], ids=["anew", "edited"])
def test_a_model_reads_the_stored_prompt_id_for_id(played: Played, text: str | None) -> None:
    [stored] = played.episode().traces
    start = played.episode().turns[1].start
    with FakeVllm("m", vocab_size=302) as server:
        made = forked(played, 1, text, model=Model(server.base_url, "m"))
        prompts = [request.payload["prompt"] for request in server.received if "prompt" in request.payload]
    [trace] = made.traces
    starts = [turn.start for turn in made.turns[1 if text is None else 2 :]]
    assert starts
    assert prompts == [trace.token_ids[:start] for start in starts]
    assert trace.token_ids[:start] == stored.token_ids[:start]
    assert made.metadata["fork"]["how"] == ("sampled by m" if text is None else "edited, then sampled by m")
    sampled = made.turns[-1]
    assert sampled.start is not None
    assert all(value is not None for value in trace.sampling_logprobs[sampled.start : sampled.end])


def test_a_model_that_is_not_there(played: Played) -> None:
    with FakeVllm("m", vocab_size=302) as server, pytest.raises(ForkError, match="does not serve 'other'; it serves m"):
        forked(played, 1, None, model=Model(server.base_url, "other"))
    with pytest.raises(ForkError, match="neither an edited text nor a model"):
        forked(played, 1, None)
    assert not played.forks.exists()


def test_a_replay_that_differs_is_no_fork(played: Played) -> None:
    other = played.path / "other.jsonl"
    write_store(other, maker="Umbrella")
    played.configure(env_args={"browse": {"store": str(other), "tools": []}})
    with pytest.raises(ReplayDiffers, match=r"turn 1: call 0 \(browse\) is answered otherwise .* content was .*, is "):
        forked(played, 2, "No.")
    assert forked(played, 1, "No.").id == "1/t/0#fork-1"  # what differs lies behind it


def test_a_page_store_is_only_replayed(played: Played) -> None:
    reached: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    said = connection.recv(1000)
                if said == b"end":
                    return
                reached.append(said)

        thread = threading.Thread(target=serve)
        thread.start()
        browse = {"store": str(played.store), "tools": [], "engine": "http", "open_addresses": [f"127.0.0.1:{port}"]}
        browse |= {"ports": [port], "robots": False}
        before = played.store.read_bytes()
        for mode in ("record", "live", "replay"):
            played.configure(env_args={"browse": browse | {"mode": mode}})
            made = forked(played, 1, call("browse", url=f"http://127.0.0.1:{port}/"))
            [result] = made.turns[1].tool_results
            assert result.error is not None
            assert result.error.kind.value == "not_found"
            assert made.metadata["pages"]["mode"] == "replay"
        with socket.create_connection(("127.0.0.1", port)) as last:
            last.sendall(b"end")
            thread.join()
    assert reached == []
    assert played.store.read_bytes() == before


def other_id(episode: Episode) -> None:
    episode.id = "elsewhere"


def no_tokens(episode: Episode) -> None:
    episode.turns[0].trace = episode.turns[0].start = episode.turns[0].end = None


def moved(episode: Episode) -> None:
    episode.turns[1].start = (episode.turns[1].start or 0) + 1


def other_words(episode: Episode) -> None:
    episode.turns[0].text += "!"


def other_task(episode: Episode) -> None:
    episode.task = replace(episode.task, tools=("nothing",))


@pytest.mark.parametrize(
    ("turn", "text", "change", "words"),
    [
        (4, "x", None, "there is no turn 4: the episode has 4"),
        (-1, "x", None, "there is no turn -1"),
        (1, "", None, "the edited text is empty"),
        (1, "<|im_end|>", None, "the edited text is empty"),
        (1, "a<|im_end|>b", None, "ends the turn in its middle"),
        (1, "word " * 400, None, "the edited text has .* tokens, and the turn room for 400"),
        (1, "x", other_id, "the episode's id is not"),
        (1, "x", no_tokens, "only messages were exchanged"),
        (1, "x", moved, "turn 1 is not where the trace has it"),
        (1, "x", other_words, "turn 0 was sampled with another tokenizer"),
        (1, "x", other_task, "names tools that environment 'medbrowse' has not"),
    ],
)
def test_what_cannot_be_forked(
    played: Played, turn: int, text: str, change: Callable[[Episode], None] | None, words: str
) -> None:
    episode = played.episode()
    if change is not None:
        change(episode)
    with pytest.raises(ForkError, match=words):
        what_if(played).fork(episode, turn, played.forks.parent, text)
    assert not played.forks.exists()


def test_runs_that_cannot_be_played_on(played: Played, tmp_path: Path) -> None:
    with pytest.raises(ForkError, match="name its folder with --tokenizer"):
        WhatIf(played.path, None)
    with pytest.raises(ForkError, match=r"none/config\.json does not say how the episodes were played: FileNotFound"):
        WhatIf(tmp_path / "none", played.tokenizer)
    played.configure(rollout={"max_turns": 0})
    with pytest.raises(ForkError, match="max_turns must be at least 1"):
        what_if(played)
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / "tools.py").write_text("raise RuntimeError('this ran')\n")
    played.configure(env=str(folder))
    with pytest.raises(ForkError, match="its code runs if you add --env"):
        what_if(played)
    played.configure(env_args={"browse": {"mode": "live"}})
    with pytest.raises(ForkError, match=r"replay.* needs store"):
        forked(played, 1, "x")
    played.configure()
    played.forks.symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ForkError, match="is a link"):
        forked(played, 1, "x")
    assert not (tmp_path / "elsewhere.jsonl").exists()


def test_an_environment_that_opens_otherwise(tiny_tokenizer: Path) -> None:
    class Greeting(ToolEnv):
        greeting = "You add."

        def tools(self) -> list[Tool]:
            return [add]

        async def areset(self, **kwargs: Any) -> Any:
            messages, info = await super().areset(**kwargs)
            return ({"role": "system", "content": self.greeting}, *messages[-1:]), info

    async def made() -> Episode:
        renderer = load_renderer(tiny_tokenizer)
        task = Task(id="a", messages=({"role": "user", "content": "add 1 and 2"},))
        actor = TokenActor(renderer, script(renderer, call("add", a=1, b=2), "3"))
        episode = await run_episode(EpisodeJob(task=task), Greeting(limits=Limits()), actor)
        made = await fork(episode, 1, fork_id="f", env=Greeting(limits=Limits()), renderer=renderer, edited_text="4")
        assert made.task == episode.task
        env = Greeting(limits=Limits())
        env.greeting = "You subtract."
        with pytest.raises(ReplayDiffers, match="opens the task with other messages"):
            await fork(episode, 1, fork_id="f", env=env, renderer=renderer, edited_text="4")
        return made

    assert asyncio.run(made()).turns[1].message.content == "4"


def test_a_thinking_model_s_forks_begin_new_traces_where_the_original_did(shared_data: Path) -> None:
    """Qwen3's template drops thoughts behind a later user message: the dialogue is then rendered anew."""

    class Talking(ToolEnv):
        def tools(self) -> list[Tool]:
            return [add]

        def on_no_call(self, action: Any) -> Any:
            return {"role": "user", "content": "Go on."}

    async def play() -> tuple[Episode, Episode]:
        renderer = load_renderer(shared_data / "tokenizers" / "qwen3")
        limits = Limits(termination_policy="max_turns", max_turns=3)
        texts = [f"<think>\nthought {i}\n</think>\n\nsaid {i}" for i in range(3)]
        task = Task(id="a", messages=({"role": "user", "content": "Talk."},))
        actor = TokenActor(renderer, script(renderer, *texts))
        original = await run_episode(EpisodeJob(task=task), Talking(limits=limits), actor)
        env = Talking(limits=limits)
        return original, await fork(original, 2, fork_id="f", env=env, renderer=renderer, edited_text="Enough.")

    original, made = asyncio.run(play())
    assert len(original.traces) == 3
    assert made.traces[:2] == original.traces[:2]
    start = original.turns[2].start
    assert (made.turns[2].trace, made.turns[2].start) == (2, start)
    assert made.traces[2].token_ids[:start] == original.traces[2].token_ids[:start]


def test_another_tokenizer_is_noticed(played: Played, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other", ("<|other|>",))
    with pytest.raises(ForkError, match="another tokenizer than"):
        WhatIf(played.path, tmp_path / "other").fork(played.episode(), 1, played.forks.parent, "x")
