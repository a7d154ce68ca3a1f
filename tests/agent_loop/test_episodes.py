"""Episode files: whole lines, nothing lost, nothing invented."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

import agent_loop
from agent_loop.episodes import BadLine, EpisodeWriter, episode_from_json, episode_to_json, read_episodes
from agent_loop.types import (
    ClassSpan,
    Episode,
    EpisodeError,
    Segment,
    SegmentSource,
    TokenClass,
    TokenTrace,
    TopK,
    Turn,
)
from envs.types import AssistantMessage, StopReason, Task
from tools.types import ToolCall, ToolError, ToolErrorKind, ToolResult


def trace(length: int = 6, *, scored: bool = True) -> TokenTrace:
    """A prompt of two tokens, then sampled ones."""
    rng = random.Random(length)
    sampled = [-rng.random() for _ in range(length - 2)]
    return TokenTrace(
        token_ids=[rng.randrange(50_000) for _ in range(length)],
        loss_mask=[False, False] + [True] * (length - 2),
        sampling_logprobs=[None, None, *sampled],
        segments=[
            Segment(start=0, end=2, source=SegmentSource.PROMPT, turn=-1),
            Segment(start=2, end=length, source=SegmentSource.ASSISTANT, turn=0),
        ],
        teacher_logprobs=[None, None, 0.0, *sampled[1:]] if scored else None,
        teacher_topk=TopK(
            token_ids=[None, None] + [[1, 2]] * (length - 2), logprobs=[None, None] + [[-0.5, -1.0]] * (length - 2)
        )
        if scored
        else None,
        policy_versions=[None, None, 3] + [4] * (length - 3) if scored else None,
        sampling_topk=TopK(
            token_ids=[None, None] + [[7]] * (length - 2), logprobs=[None, None] + [[-0.25]] * (length - 2)
        )
        if scored
        else None,
    )


def episode(name: str = "1/a/0", **parts: Any) -> Episode:
    """One of everything."""
    call = ToolCall(id="call_0_0", name="search", arguments={"query": "é\u2028\ud83d"}, raw="search(...)")
    broken = ToolCall(id="call_0_1", name="", arguments=None, raw="<tool", parse_error="cut off")
    turn = Turn(
        index=0,
        message=AssistantMessage(content="", reasoning="hm", tool_calls=(call, broken), finished=False),
        text="<think>hm</think>",
        observation=({"role": "tool", "tool_call_id": "call_0_0", "name": "search", "content": "nothing"},),
        tool_results=(
            ToolResult(call_id="call_0_0", name="search", content="nothing", duration_s=0.5, metadata={"n": [1]}),
            ToolResult(
                call_id="call_0_1",
                name="",
                content="malformed_call: cut off",
                error=ToolError(kind=ToolErrorKind.MALFORMED_CALL, message="cut off"),
            ),
        ),
        trace=0,
        start=2,
        end=6,
        finish_reason="length",
        policy_version=3,
        token_classes=(ClassSpan(token_class=TokenClass.THINK, start=0, end=2),),
        num_parse_errors=1,
        sample_s=1.5,
        env_s=0.25,
    )
    values: dict[str, Any] = {
        "id": name,
        "env_id": "medbrowse",
        "task": Task(
            id="a", messages=({"role": "user", "content": "Who?"},), metadata={"answer": "x"}, tools=("search",)
        ),
        "turns": [turn],
        "traces": [trace(), trace(scored=False)],
        "stop_reason": StopReason.MAX_TURN_TOKENS,
        "rewards": {"success": 1.0},
        "error": EpisodeError(boundary="teacher", kind="not_finite", message="m"),
        "policy_version": 3,
        "seed": 7,
        "timing": {"total": 2.0},
        "metadata": {"sample": 0},
    }
    return Episode(**{**values, **parts})


def bare(name: str = "1/b/0") -> Episode:
    """One of nothing."""
    task = Task(id="b", messages=({"role": "user", "content": ""},))
    return Episode(id=name, env_id="e", task=task, turns=[], traces=[], stop_reason=StopReason.ERROR)


@pytest.fixture(scope="session")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(agent_loop.__file__).parent / "episode.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("make", [episode, bare])
def test_there_and_back(make: Callable[[], Episode]) -> None:
    line = json.dumps(episode_to_json(make()), allow_nan=False)
    assert episode_from_json(json.loads(line)) == make()


def test_none_stays_null_and_zero_stays_zero() -> None:
    value = episode_to_json(episode())
    assert value["reward"] is None
    assert value["traces"][0]["teacher_logprobs"][1:3] == [None, 0.0]
    assert value["traces"][1]["teacher_logprobs"] is None
    back = episode_from_json(value)
    assert back.reward is None
    assert back.traces[1].teacher_logprobs is None
    assert back.traces[1].teacher_topk is None


@pytest.mark.parametrize("make", [episode, bare])
def test_what_is_written_fits_the_schema(
    validator: jsonschema.Draft202012Validator, make: Callable[[], Episode]
) -> None:
    validator.validate(json.loads(json.dumps(episode_to_json(make()))))


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"id": 5},
        {"stop_reason": "bored"},
        {"turns": [{}]},
        {"turns": 3},
        {"traces": [{}]},
        {"error": {"kind": "x"}},
        {"task": None},
        {"traces": [{**episode_to_json(episode())["traces"][0], "loss_mask": [0]}]},
        {"traces": [{**episode_to_json(episode())["traces"][0], "token_ids": ["a"] * 6}]},
        {"traces": [{**episode_to_json(episode())["traces"][0], "sampling_logprobs": [None, None, -9, -9, "x", -9]}]},
        {"traces": [{**episode_to_json(episode())["traces"][0], "segments": [["prompt", -1, 0, 2]]}]},
    ],
)
def test_reader_and_schema_refuse_the_same(
    tmp_path: Path, validator: jsonschema.Draft202012Validator, change: dict[str, Any]
) -> None:
    value = {**json.loads(json.dumps(episode_to_json(episode()))), **change}
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(value) + "\n")
    [item] = read_episodes(path)
    assert isinstance(item, BadLine)
    assert item.line_number == 1
    lengths_only = "traces" in change and ("loss_mask" in str(item.reason) or "segments end" in str(item.reason))
    assert validator.is_valid(value) == lengths_only  # JSON schema cannot compare lengths


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value inside, the inner nodes among them; of a list the first three entries."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


FOREIGN: tuple[Any, ...] = (None, True, -1, 2**70, 0.5, "x", [], {}, [[]], [None], {"x": []})


def test_whatever_stands_in_a_file_it_is_an_episode_or_a_bad_line(tmp_path: Path) -> None:
    text = json.dumps(episode_to_json(episode()))
    values = []
    for path in leaves(json.loads(text)):
        for foreign in FOREIGN:
            value = node = json.loads(text)
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = foreign
            values.append(value)
    file = tmp_path / "e.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    kept = 0
    for value, item in zip(values, read_episodes(file), strict=True):
        if isinstance(item, Episode):
            assert episode_to_json(item) == value  # nothing is made to fit
            kept += 1
    assert 0 < kept < len(values) / 3


@pytest.mark.parametrize("key", sorted(episode_to_json(bare())))
def test_a_missing_key_is_named(key: str) -> None:
    value = episode_to_json(bare())
    del value[key]
    with pytest.raises(ValueError, match=key):
        episode_from_json(value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "-1e999"])
def test_numbers_that_are_none_are_not_read(tmp_path: Path, number: str) -> None:
    path = tmp_path / "e.jsonl"
    text = json.dumps(episode_to_json(episode())).replace('"sampling_logprobs": [null, null, ', f"{'@'}", 1)
    path.write_text(text.replace("@", f'"sampling_logprobs": [null, null, {number}, ').replace(", 0.0,", ","))
    [item] = read_episodes(path)
    assert isinstance(item, BadLine)


def test_writing_an_id_twice_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.jsonl"
    for _ in range(2):
        writer = EpisodeWriter(path, fsync=True)
        writer.append(episode())
        writer.append(episode())
        writer.append(bare())
        writer.close()
    assert [item.id for item in read_episodes(path) if isinstance(item, Episode)] == ["1/a/0", "1/b/0"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_torn_line_costs_only_itself(tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "e.jsonl"
    writer = EpisodeWriter(path)
    writer.append(bare())
    writer.append(episode())
    writer.close()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[: int(len(second) * share)])
    [_, torn] = read_episodes(path)
    assert isinstance(torn, BadLine)
    assert torn.line_number == 2
    assert torn.reason.startswith("torn: ")

    writer = EpisodeWriter(path)
    assert "a crash tore it" in caplog.text
    writer.append(episode())
    writer.append(episode("1/c/0"))
    writer.close()
    items = list(read_episodes(path))
    assert [item.id for item in items if isinstance(item, Episode)] == ["1/b/0", "1/a/0", "1/c/0"]
    assert [item.line_number for item in items if isinstance(item, BadLine)] == [2]


def test_only_the_line_end_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(episode_to_json(bare())))
    writer = EpisodeWriter(path)
    writer.append(bare())
    writer.append(episode())
    writer.close()
    assert [item.id for item in read_episodes(path) if isinstance(item, Episode)] == ["1/b/0", "1/a/0"]


@pytest.mark.parametrize("raw", [b"\xff\xfe\n", b"[]\n", b"null\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"a": \x00}\n'])
def test_lines_of_another_kind(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(raw + b"\n \n" + json.dumps(episode_to_json(bare())).encode() + b"\n")
    bad, good = read_episodes(path)
    assert isinstance(bad, BadLine)
    assert isinstance(good, Episode)


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_json_cannot_hold_is_not_half_written(tmp_path: Path, value: Any) -> None:
    writer = EpisodeWriter(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match=r"episode '1/a/0' cannot be written"):
        writer.append(episode(metadata={"x": value}))
    writer.append(episode())
    writer.close()
    assert [item.id for item in read_episodes(writer.path) if isinstance(item, Episode)] == ["1/a/0"]


def test_32_thousand_tokens_are_encoded_in_time() -> None:
    long = episode(traces=[trace(32_000, scored=False)])
    long.traces[0].teacher_logprobs = list(long.traces[0].sampling_logprobs)
    times = []
    for _ in range(5):
        began = time.process_time()
        json.dumps(episode_to_json(long), allow_nan=False, separators=(",", ":"))
        times.append(time.process_time() - began)
    assert min(times) < 0.1  # 29 ms on an idle core


def test_a_file_of_before_versions_were_kept_for_each_token() -> None:
    value = episode_to_json(episode())
    for old in value["traces"]:
        del old["policy_versions"], old["sampling_topk"]
    read = episode_from_json(json.loads(json.dumps(value)))
    assert [(t.policy_versions, t.sampling_topk) for t in read.traces] == [(None, None)] * len(read.traces)
    assert read.policy_version == episode().policy_version
