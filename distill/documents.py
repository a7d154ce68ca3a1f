"""Plain data as something to imitate: documents and dialogues from JSONL, for `distill.sft --data`.

    {"text": "The ferry to Orvo leaves at nine."}
    {"messages": [{"role": "user", "content": "When does it leave?"}, {"role": "assistant", "content": "At nine."}]}

Of a document every token is trained on but the first, which nothing comes before; no chat template is around it, and it
ends with the tokenizer's end token, as in pre-training. Of a dialogue the assistant's turns are trained on, rendered as
any episode to imitate (`distill.demonstrations`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent_loop.renderer import Renderer
from agent_loop.types import Episode, Segment, SegmentSource, TokenTrace, Turn
from envs.dataset import kind_of, message_of, task_from_row
from envs.jsonl import TaskError, iter_json_lines
from envs.types import AssistantMessage, Message, StopReason, Task
from tools.types import ToolCall

ENV_ID = "(data)"
"""Of episodes that were made of such rows: no environment, no tools, no reward."""


def read_data(paths: Sequence[Path], renderer: Renderer, *, max_tokens: int | None) -> Iterator[Episode]:
    """Every row of the files, in order. A document that is longer than the student's context becomes several.

    Args:
        max_tokens: of the student's context; None: no limit.

    Raises:
        TaskError: a row that is neither, with file and line.
    """
    for path in paths:
        for line, row in iter_json_lines(path):
            where = f"{path}:{line}"
            if isinstance(row, TaskError):
                raise row
            if not isinstance(row, dict) or len({"text", "messages"} & row.keys()) != 1 or len(row) != 1:
                found = ", ".join(row) or "no key" if isinstance(row, dict) else kind_of(row)
                raise TaskError(
                    where, f'wanted {{"text": ...}} or {{"messages": [...]}} and no other key, found {found}'
                )
            if "text" in row:
                yield from _documents(row["text"], where, renderer, max_tokens)
            else:
                yield dialogue(row["messages"], where)


def _documents(text: Any, where: str, renderer: Renderer, max_tokens: int | None) -> Iterator[Episode]:
    if not isinstance(text, str) or not text.strip():
        raise TaskError(where, f"text must be a string with something in it, found {kind_of(text)}")
    tokenizer = renderer.tokenizer
    # Special tokens as the tokenizer itself puts them around a text; control tokens in the text are letters.
    ids = list(tokenizer(renderer.clean_text(text), verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    size = max_tokens or len(ids)
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        if len(piece) > 1:  # a last token alone is predicted by nothing
            yield document(piece, renderer.decode(piece[1:]), f"{where}/{start}")


def document(token_ids: list[int], text: str, name: str) -> Episode:
    """An episode of one turn that is all of the text but its first token, which is the prompt."""
    length = len(token_ids)
    trace = TokenTrace(
        token_ids=token_ids,
        loss_mask=[False] + [True] * (length - 1),
        sampling_logprobs=[None] * length,
        segments=[
            Segment(start=0, end=1, source=SegmentSource.PROMPT, turn=-1),
            Segment(start=1, end=length, source=SegmentSource.ASSISTANT, turn=0),
        ],
    )
    turn = Turn(index=0, message=AssistantMessage(content=text), text=text, trace=0, start=1, end=length)
    return _episode(name, (), [turn], [trace])


def dialogue(messages: Any, where: str) -> Episode:
    """An episode without traces, as `distill.collect` records one; the turns are the assistant's messages.

    Raises:
        TaskError: no dialogue that ends with the assistant, with the place.
    """
    if not isinstance(messages, list) or not messages:
        raise TaskError(where, f"messages must be an array of messages, found {kind_of(messages)}")
    read = [message_of(message, f"messages[{i}]", where) for i, message in enumerate(messages)]
    first = next((i for i, message in enumerate(read) if message["role"] == "assistant"), len(read))
    if read[-1]["role"] != "assistant":
        raise TaskError(where, f"the last message must be the assistant's, found role {read[-1]['role']!r}")
    task = task_from_row({"messages": messages[:first]}, where)
    turns: list[Turn] = []
    for message in read[first:]:
        if message["role"] == "assistant":
            turns.append(Turn(index=len(turns), message=_said(message), text=message["content"]))
        else:
            turns[-1].observation = (*turns[-1].observation, message)
    return _episode(where, task.messages, turns, [])


def _said(message: Message) -> AssistantMessage:
    calls = tuple(
        ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"], raw="")
        for call in message.get("tool_calls", ())
    )
    return AssistantMessage(content=message["content"], reasoning=message.get("reasoning_content"), tool_calls=calls)


def _episode(name: str, messages: tuple[Message, ...], turns: list[Turn], traces: list[TokenTrace]) -> Episode:
    task = Task(id=name, messages=messages)
    return Episode(
        id=f"0/{name}/0", env_id=ENV_ID, task=task, turns=turns, traces=traces, stop_reason=StopReason.LAST_TOOL
    )
