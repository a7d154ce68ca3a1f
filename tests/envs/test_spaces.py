"""Spaces sample what they contain, and arguments that the tools accept."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from envs.spaces import AssistantSpace, MessagesSpace, sample_schema
from envs.types import AssistantMessage
from tools.tool import Tool, tool
from tools.types import ToolCall


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Node(BaseModel):
    name: str
    child: Node | None = None


@tool
def simple(text: str, count: int, share: float, flag: bool = False) -> str:
    """Simple types."""
    return ""


@tool
def bounded(
    many: Annotated[int, Field(ge=3, le=9)],
    odd: Annotated[int, Field(gt=-8, lt=-5)],
    even: Annotated[int, Field(gt=3, multiple_of=4)],
    low: Annotated[int, Field(le=-100)],
    share: Annotated[float, Field(gt=0, lt=1)],
    word: Annotated[str, Field(min_length=9, max_length=9)],
    some: Annotated[list[int], Field(min_length=2, max_length=3)],
) -> str:
    """Bounds of all kinds."""
    return ""


@tool
def nested(
    node: Node,
    colour: Colour,
    kind: Literal["a", "b"],
    pair: tuple[int, str],
    table: dict[str, int],
    anything: Any,
    maybe: list[Any] | None = None,
    code: Annotated[str, Field(pattern=r"^N\d+$", examples=["N1", "N22"])] = "N3",
) -> str:
    """Nested and recursive types."""
    return ""


@pytest.mark.parametrize("declared", [simple, bounded, nested], ids=lambda t: t.name)
def test_sampled_arguments_satisfy_the_tool(declared: Tool) -> None:
    random = np.random.default_rng(0)
    schema = declared.spec.parameters
    seen = [sample_schema(schema, schema, random) for _ in range(200)]
    for arguments in seen:
        declared.arguments.validate(arguments)
    assert len({repr(arguments) for arguments in seen}) > 10


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match="'colour'"):
        sample_schema({"type": "colour"}, {}, np.random.default_rng(0))


def test_actions_are_contained_and_seeded() -> None:
    space = AssistantSpace([simple.spec, nested.spec], seed=3)
    actions = [space.sample() for _ in range(50)]
    assert all(action in space for action in actions)
    assert any(not action.tool_calls for action in actions)
    assert any(len(action.tool_calls) > 1 for action in actions)
    again = AssistantSpace([simple.spec, nested.spec], seed=3)
    assert [again.sample() for _ in range(50)] == actions
    assert again == space
    assert hash(again) == hash(space)
    assert space != AssistantSpace([simple.spec])
    assert "simple" in repr(space)


def called(call_id: str) -> ToolCall:
    return ToolCall(id=call_id, name="simple", arguments={}, raw="")


def test_without_tools_an_action_is_an_answer() -> None:
    space = AssistantSpace([])
    assert all(space.sample().content and not space.sample().tool_calls for _ in range(20))


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        None,
        {"content": "x"},
        [AssistantMessage(content="")],
        AssistantMessage(content=None),  # type: ignore[arg-type]
        AssistantMessage(content="", reasoning=5),  # type: ignore[arg-type]
        AssistantMessage(content="", finished=None),  # type: ignore[arg-type]
        AssistantMessage(content="", tool_calls=[called("a")]),  # type: ignore[arg-type]
        AssistantMessage(content="", tool_calls=("simple",)),  # type: ignore[arg-type]
        AssistantMessage(content="", tool_calls=(called(""),)),
        AssistantMessage(content="", tool_calls=(called("a"), called("a"))),
    ],
)
def test_what_is_no_action(wrong: Any) -> None:
    assert wrong not in AssistantSpace([simple.spec])


def test_a_bad_call_is_an_action_too() -> None:
    malformed = ToolCall(id="a", name="", arguments=None, raw="{", parse_error="no JSON")
    unknown = ToolCall(id="b", name="no_such_tool", arguments={"x": []}, raw="")
    cut_off = AssistantMessage(content="", reasoning="hm", tool_calls=(malformed, unknown), finished=False)
    assert cut_off in AssistantSpace([simple.spec])


def test_call_ids_are_of_one_episode() -> None:
    space = AssistantSpace([simple.spec], seed=0)
    ids = [call.id for _ in range(200) for call in space.sample().tool_calls]
    assert len(set(ids)) == len(ids) > 200


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        [],
        ({"role": "robot", "content": ""},),
        ({"role": "user"},),
        ("text",),
        ({"role": "tool", "content": "5"},),
        ({"role": "tool", "content": "5", "tool_call_id": 3},),
        ({"role": "assistant", "content": "", "tool_calls": {}},),
        ({"role": "assistant", "content": "", "reasoning_content": None},),
    ],
)
def test_what_is_no_observation(wrong: Any) -> None:
    assert wrong not in MessagesSpace()


def test_observations() -> None:
    space = MessagesSpace(seed=1)
    assert space.sample() in space
    assert () in space
    assert ({"role": "tool", "content": "5", "tool_call_id": "a", "name": "simple"},) in space
    assert space == MessagesSpace()
