"""Names with a prefix, and tools that come as JSON schema; the real packages are in `tests/adapters`."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter

import envs
from envs.adapters.foreign import foreign_tool
from envs.adapters.openenv import _actions, _constants, _tool_of
from envs.registry import RegistryError
from envs.tool_env import EnvSetupError
from tools.tool import Tool
from tools.toolbox import Toolbox
from tools.types import ToolCall

SCHEMA = {
    "type": "object",
    "title": "Move",
    "properties": {"x": {"title": "X", "type": "integer"}, "to": {"$ref": "#/$defs/Side"}},
    "required": ["x"],
    "$defs": {"Side": {"enum": ["left", "right"], "type": "string"}},
}


async def move(arguments: dict[str, Any]) -> str:
    return f"moved {arguments}"


def moving(**more: Any) -> Tool:
    return foreign_tool(
        **{"name": "move", "description": "Move.", "schema": SCHEMA, "call": move, "timeout_s": 5, **more}
    )


async def said(**arguments: Any) -> str:
    call = ToolCall(id="c", name="move", arguments=arguments, raw="")
    [result] = await Toolbox([moving()]).run([call], metadata={}, state={})
    return result.content


async def test_a_tool_from_its_schema() -> None:
    assert moving().spec.parameters == {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "to": {"enum": ["left", "right"], "type": "string"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    assert await said(x=1, to="left") == "moved {'x': 1, 'to': 'left'}"
    assert await said(to="left") == 'invalid_arguments: missing argument "x": wanted an integer'
    assert (await said(x=1, tp="left")).startswith('invalid_arguments: unknown argument "tp" (the tool takes: x, to)')
    assert (await said(x=float("nan"))).startswith("invalid_arguments: arguments are not plain JSON")
    assert (await said(x=1, to="\ud800")).startswith("invalid_arguments: arguments are not plain JSON")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "move-it"}, "tool 'move-it': its name"),
        ({"description": " "}, "no description"),
        ({"schema": {**SCHEMA, "additionalProperties": True}}, "extra keys"),
    ],
)
def test_what_a_model_cannot_be_told(more: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvSetupError, match=message):
        moving(**more)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openenv:http://127.0.0.1:9", "no OpenEnv server answers"),
        ("openenv:127.0.0.1:8000", "wanted the URL of a server"),
        ("openenv:", "no environment 'openenv:'"),
        ("opennev:x", "no environment 'opennev:x'"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        envs.make(name)


def test_a_package_that_is_not_installed() -> None:
    if importlib.util.find_spec("verifiers") is not None:
        pytest.skip("verifiers is installed here")
    with pytest.raises(RegistryError, match=r"pip install 'distill-gym\[verifiers\]'"):
        envs.make("verifiers:anything")
    assert envs.spec("verifiers:anything").source == "adapter"


class MovePieceAction(BaseModel):
    """Move a piece."""

    kind: Literal["move"] = "move"
    square: str = Field(pattern="[a-h][1-8]")
    metadata: dict[str, Any] = Field(default_factory=dict)


class ResignAction(BaseModel):
    kind: Literal["resign"]


def test_a_union_of_actions_is_a_tool_each() -> None:
    either = TypeAdapter(Annotated[MovePieceAction | ResignAction, Field(discriminator="kind")])
    found = _actions("url", either.json_schema())
    move, resign = (_tool_of(title, schema) for title, schema in found)
    assert (move[:2], resign[:2]) == (("move_piece", "Move a piece."), ("resign", "Take the action ResignAction."))
    assert move[2]["properties"] == {"square": {"pattern": "[a-h][1-8]", "title": "Square", "type": "string"}}
    assert (move[2]["required"], resign[2]["required"], resign[2]["properties"]) == (["square"], [], {})
    assert [_constants(schema) for _, schema in found] == [{"kind": "move"}, {"kind": "resign"}]
    [(title, only)] = _actions("url", MovePieceAction.model_json_schema())
    assert (title, only["required"]) == ("MovePieceAction", ["square"])
    with pytest.raises(EnvSetupError, match="'Text' has no named fields"):
        _actions("url", {"type": "string", "title": "Text"})
