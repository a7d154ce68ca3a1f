"""One episode in the Agent Trajectory Interchange Format 1.8, as the models of the package `atif` check it.

    source  https://github.com/harbor-framework/harbor/blob/main/rfcs/0001-trajectory-format.md

A message of the task is a step, a turn with its tool results is one, and so is what a user answered. What ATIF has no
field for stands under `extra` by its name in docs/episodes.md. Prompts are told by their length, not by their ids, and
candidates are left out: the episode file has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from atif import Agent, FinalMetrics, Metrics, Observation, ObservationResult, Step, ToolCall, Trajectory

SOURCES = {"user": "user", "assistant": "agent"}
"""By role; any other is `system`."""


def trajectory_json(episode: dict[str, Any]) -> str:
    """
    Args:
        episode: of `rows.exact`.

    Raises:
        ValueError: a rule of ATIF that the episode does not keep.
    """
    steps = [said(message, copied=message["role"] == "assistant") for message in episode["task"]["messages"]]
    for turn in episode["turns"]:
        steps.append(sampled(turn, episode["traces"]))
        steps += [said(message) for message in turn["observation"] if message["role"] != "tool"]
    metrics = [step["metrics"] for step in steps if step.get("metrics") is not None]
    trajectory = Trajectory(
        schema_version="ATIF-v1.8",
        trajectory_id=episode["id"],
        agent=Agent(name="distill-gym", version=f"episode schema {episode['schema_version']}"),
        steps=[Step(step_id=number, **step) for number, step in enumerate(steps, start=1)],
        final_metrics=FinalMetrics(
            total_prompt_tokens=sum(one.prompt_tokens for one in metrics) if metrics else None,
            total_completion_tokens=sum(one.completion_tokens for one in metrics) if metrics else None,
            total_steps=len(steps),
        ),
        extra=rest(episode, ("id", "turns", "traces", "task")) | {"task": rest(episode["task"], ("messages",))},
    )
    text = json.dumps(trajectory.to_json_dict(), allow_nan=False)
    Trajectory.model_validate_json(text)  # half of a surrogate pair is a string to us, and none to a reader
    return text + "\n"


def said(message: dict[str, Any], *, copied: bool = False) -> dict[str, Any]:
    """A step that was not sampled; `copied`: an example of an answer, which nobody is to train on."""
    return {
        "source": SOURCES.get(message["role"], "system"),
        "message": message["content"],
        "is_copied_context": copied or None,
        "extra": rest(message, ("role", "content")) or None,
    }


def sampled(turn: dict[str, Any], traces: list[dict[str, Any]]) -> dict[str, Any]:
    message = turn["message"]
    ids = {call["id"] for call in message["tool_calls"]}
    results = [
        ObservationResult(
            source_call_id=result["call_id"] if result["call_id"] in ids else None,
            content=result["content"],
            extra=rest(result, ("call_id", "content")),
        )
        for result in turn["tool_results"]
    ]
    calls = [
        ToolCall(
            tool_call_id=call["id"],
            function_name=call["name"],
            arguments=call["arguments"] or {},
            extra=rest(call, ("id", "name", "arguments")),
        )
        for call in message["tool_calls"]
    ]
    return {
        "source": "agent",
        "message": message["content"],
        "reasoning_content": message["reasoning"] or None,
        "tool_calls": calls or None,
        "observation": Observation(results=results) if results else None,
        "metrics": None if turn["start"] is None else metrics_of(traces[turn["trace"]], turn["start"], turn["end"]),
        "llm_call_count": 1,
        "extra": rest(turn, ("message", "observation", "tool_results")),
    }


def metrics_of(trace: dict[str, Any], start: int, end: int) -> Metrics:
    logprobs = trace["sampling_logprobs"][start:end]
    teacher = trace["teacher_logprobs"]
    return Metrics(
        prompt_tokens=start,
        completion_tokens=end - start,
        completion_token_ids=trace["token_ids"][start:end],
        logprobs=None if None in logprobs else logprobs,
        extra={
            "loss_mask": trace["loss_mask"][start:end],
            "teacher_logprobs": None if teacher is None else teacher[start:end],
        },
    )


def rest(value: dict[str, Any], without: Iterable[str]) -> dict[str, Any]:
    """What has no field of its own."""
    return {name: part for name, part in value.items() if name not in without}
