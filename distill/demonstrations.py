"""Recorded episodes as something to imitate: what was said, in the tokens in which the student would have said it.

An episode that was recorded with the student's own tokenizer keeps its ids and its mask. Any other (`distill.collect`,
another model's tokens) is rendered by the student's renderer as `TokenActor` would have played it: the first prompt by
the chat template, then turn for turn what the student would have sampled, and what follows it. Every turn is read back;
one that does not say what was said is not trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent_loop.episodes import read_episodes
from agent_loop.renderer import Renderer, RendererError
from agent_loop.trace import TraceBuilder
from agent_loop.types import Episode, Turn
from distill.documents import ENV_ID as DATA
from distill.rundir import episode_files
from envs.jsonl import TaskError
from envs.types import Message, StopReason
from tools.types import ToolSpec

COLLECTED = "collect.json"
"""What `distill.collect` writes beside its episodes: with what they were played."""

ToolsOf = Callable[[Episode], Sequence[ToolSpec]]
"""The tools that an episode was played with."""


@dataclass(slots=True)
class Demonstrations:
    """What there is to train on, and what is left out."""

    episodes: list[Episode] = field(default_factory=list)
    """With traces of the student's ids."""
    num_exact: int = 0
    """Episodes of them that were recorded in these ids; the others are rendered."""
    num_masked: int = 0
    """Turns that are there and not trained on: their ids do not say what was said, or hold a malformed call."""
    num_cut: int = 0
    """Turns without an end, left out."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes that are not trained on, by reason."""

    def __str__(self) -> str:
        tokens = sum(trace.num_trained for episode in self.episodes for trace in episode.traces)
        traces = sum(max(0, len(episode.traces) - 1) for episode in self.episodes)
        rendered = len(self.episodes) - self.num_exact
        lines = [
            f"{len(self.episodes)} episodes, {tokens:,} trained tokens ({self.num_exact} exact, {rendered} rendered)"
        ]
        if traces:
            lines.append(f"{traces} traces more than episodes: the template rewrites earlier turns")
        if self.num_masked:
            lines.append(
                f"{self.num_masked} turns not trained on: malformed, or the template does not write what was said"
            )
        if self.num_cut:
            lines.append(f"{self.num_cut} turns left out: they were cut off")
        return "\n".join([*lines, *(f"left out: {n} episodes {reason}" for reason, n in self.left_out.most_common())])


def origin_of(path: Path) -> dict[str, Any]:
    """`collect.json` beside the episodes; {} where there is none.

    Raises:
        TaskError: it is no JSON object.
    """
    file = (path if path.is_dir() else path.parent) / COLLECTED
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskError(str(file), f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TaskError(str(file), "no JSON object")
    return found


def recorded(paths: Sequence[Path]) -> Iterator[Episode]:
    """Every episode of the paths, in order.

    Raises:
        TaskError: a path has none; or a line is none, naming it; what a crash tore is passed over.
    """
    for path in paths:
        files = episode_files(path)
        if not files:
            raise TaskError(str(path), "no episodes there: wanted a file, a folder with episodes, or a run")
        for file in files:
            for item in read_episodes(file):
                if isinstance(item, Episode):
                    yield item
                elif not item.reason.startswith("torn: "):
                    raise TaskError(f"{file}:{item.line_number}", item.reason)


def demonstrations(
    episodes: Iterator[Episode],
    renderer: Renderer,
    tools_of: ToolsOf,
    *,
    only_success: bool = False,
    max_tokens: int | None = None,
) -> Demonstrations:
    """Choose and render.

    Args:
        only_success: leave out episodes whose reward is below 1, or that were not graded; rows of `distill.documents`
            stay.
        max_tokens: leave out episodes with a longer trace.
    """
    found = Demonstrations()
    for episode in episodes:
        reason = _unwanted(episode, only_success)
        if reason is None:
            try:
                taken, exact = _taken(episode, renderer, tools_of, found)
            except RendererError as error:
                reason = f"that the student's chat template does not take ({str(error)[:200]})"
            else:
                reason = _untrainable(taken, max_tokens)
        if reason is not None:
            found.left_out[reason] += 1
        else:
            found.episodes.append(taken)
            found.num_exact += exact
    return found


def _unwanted(episode: Episode, only_success: bool) -> str | None:
    if episode.stop_reason is StopReason.ERROR:
        return "that failed"
    only_success = only_success and episode.env_id != DATA
    if only_success and episode.reward is None:
        return "that were not graded (--only-success)"
    if only_success and (episode.reward or 0.0) < 1:
        return "without success (--only-success)"
    return None


def _untrainable(episode: Episode, max_tokens: int | None) -> str | None:
    if not any(trace.num_trained for trace in episode.traces):
        return "without a token to train on"
    if max_tokens is not None and any(len(trace) > max_tokens for trace in episode.traces):
        return f"longer than the student's context of {max_tokens:,} tokens"
    return None


def _taken(episode: Episode, renderer: Renderer, tools_of: ToolsOf, found: Demonstrations) -> tuple[Episode, bool]:
    if is_in_ids_of(renderer, episode):
        return episode, True
    rendered = render(episode, renderer, tools_of(episode))
    found.num_cut += len(episode.turns) - len(rendered.turns)
    trained = {s.turn for t in rendered.traces for s in t.segments if any(t.loss_mask[s.start : s.end])}
    found.num_masked += len(rendered.turns) - len(trained)
    return rendered, False


def is_in_ids_of(renderer: Renderer, episode: Episode) -> bool:
    """Whether the episode has token ids, and they read as its text with this tokenizer."""
    if not episode.traces:
        return False
    return all(
        turn.trace is not None
        and renderer.decode(episode.traces[turn.trace].token_ids[turn.start : turn.end]) == turn.text
        for turn in episode.turns
    )


def render(episode: Episode, renderer: Renderer, tools: Sequence[ToolSpec]) -> Episode:
    """The episode with traces of the student's ids: as if the student had sampled what was said.

    A turn without an end, and whatever followed it, is left out. Turns whose ids do not read as what was said, or that
    hold a malformed call, are there and masked.

    Raises:
        RendererError: the template refuses the dialogue, or does not write such a turn.
    """
    messages = list(renderer.clean(episode.task.messages))
    builder = TraceBuilder(renderer.render_prompt(messages, tools))
    turns: list[Turn] = []
    ids: list[int] = []
    reasoned = False
    for index, turn in enumerate(episode.turns):
        if not turn.message.finished:
            break
        if index:
            answer = renderer.clean(episode.turns[index - 1].observation)
            messages.extend(answer)
            extension = renderer.extend(ids, "stop", answer, has_reasoning=reasoned)
            if extension is None:
                builder.fork(renderer.render_prompt(messages, tools))
                reasoned = False
            else:
                builder.extend(extension.glue_ids, extension.tool_ids, turn=index - 1)
        (said,) = renderer.clean([turn.message.to_message()])
        ids = renderer.write(said, tools)
        parsed = renderer.parse(ids, index, "stop")
        malformed = any(call.parse_error is not None for call in turn.message.tool_calls)
        faithful = not malformed and _what(parsed.message.to_message()) == _what(said)
        start, end = builder.add_written(ids, turn=index, trained=faithful)
        messages.append(said)
        reasoned |= parsed.message.reasoning is not None
        turns.append(
            replace(
                turn,
                index=index,
                text=parsed.text,
                trace=builder.index,
                start=start,
                end=end,
                finish_reason="stop",
                token_classes=parsed.token_classes,
            )
        )
    return replace(episode, turns=turns, traces=builder.traces())


def _what(message: Message) -> tuple[Any, ...]:
    """What a message says: white space around its texts and the ids of its calls are the template's."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"].strip(), message.get("reasoning_content", "").strip(), calls
