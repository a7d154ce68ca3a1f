"""What `@tool` makes of a function, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tools.tool import Metadata, State, Tool, ToolContractError, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure


class Filter(BaseModel):
    """Which trials."""

    phase: int
    title: str = "any"


class Node(BaseModel):
    name: str
    children: list[Node] = []


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


@dataclass
class Span:
    start: int
    end: int | None = None


def check(function: Callable[..., Any]) -> Tool:
    declared = tool(function)
    jsonschema.Draft202012Validator.check_schema(declared.spec.parameters)
    json.dumps(declared.spec.parameters)
    return declared


def test_schema_of_a_plain_function() -> None:
    def search(query: str, limit: int = 5) -> str:
        """Search the registry.

        Two paragraphs.

        Args:
            query: words to look for,
                in any order
            limit (int): how many

        Returns:
            The hits.
        """
        return query

    spec = check(search).spec
    assert spec.name == "search"
    assert spec.description == "Search the registry.\n\nTwo paragraphs."
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "query": {"description": "words to look for, in any order", "type": "string"},
            "limit": {"default": 5, "description": "how many", "type": "integer"},
        },
        "required": ["query"],
        "additionalProperties": False,
    }
    assert list(spec.parameters) == ["type", "properties", "required", "additionalProperties"]


def test_every_kind_of_hint() -> None:
    def pick(
        optional: int | None,
        either: int | str,
        several: list[str],
        table: dict[str, float],
        mode: Literal["a", "b"],
        described: Annotated[str, "what it is"],
        bounded: Annotated[int, Field(ge=1, description="a page")],
        nested: Filter,
        span: Span,
        tree: Node,
    ) -> str:
        """Pick."""
        return ""

    schema = check(pick).spec.parameters
    properties = schema["properties"]
    assert properties["optional"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert properties["either"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    assert properties["several"] == {"items": {"type": "string"}, "type": "array"}
    assert properties["table"] == {"additionalProperties": {"type": "number"}, "type": "object"}
    assert properties["mode"] == {"enum": ["a", "b"], "type": "string"}
    assert properties["described"]["description"] == "what it is"
    assert properties["bounded"] == {"description": "a page", "minimum": 1, "type": "integer"}
    # A definition that is used is inlined; `title` as a property's name is kept, as pydantic's noise it is not.
    assert properties["nested"]["properties"] == {
        "phase": {"type": "integer"},
        "title": {"default": "any", "type": "string"},
    }
    assert properties["nested"]["additionalProperties"] is False
    assert properties["span"]["required"] == ["start"]
    # A recursive one cannot be.
    assert properties["tree"] == {"$ref": "#/$defs/Node"}
    assert set(schema["$defs"]) == {"Node"}
    assert "title" not in schema["$defs"]["Node"]


def test_names_that_pydantic_would_fight_over() -> None:
    @tool
    def odd(schema: str, copy: int, model_config: bool, _private: str = "x") -> str:
        """Odd."""
        return f"{schema}{copy}{model_config}{_private}"

    assert list(odd.spec.parameters["properties"]) == ["schema", "copy", "model_config", "_private"]
    given = {"schema": "s", "copy": 1, "model_config": True}
    assert odd.arguments.validate(given) == given


def test_injected_parameters_are_hidden() -> None:
    @tool
    def peek(key: str, metadata: Metadata, *, memory: State) -> str:
        """Peek.

        Args:
            key: what
            metadata: not for the model
        """
        return key

    assert list(peek.spec.parameters["properties"]) == ["key"]
    assert peek.injected == {"metadata": "metadata", "memory": "state"}


def test_a_tool_is_called_like_its_function() -> None:
    @tool(timeout_s=2, parallel_safe=True, idempotent=True, ends_episode=True, name="add_up")
    async def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    assert asyncio.run(add(1, b=2)) == 3
    assert (add.name, add.timeout_s, add.parallel_safe, add.idempotent, add.ends_episode, add.is_async) == (
        "add_up", 2.0, True, True, True, True,
    )  # fmt: skip


def test_methods_bind_to_their_instance() -> None:
    class World:
        def __init__(self, name: str) -> None:
            self.name = name

        @tool
        def hello(self, greeting: str) -> str:
            """Greet."""
            return f"{greeting} {self.name}"

        @staticmethod
        @tool
        def free(x: int) -> int:
            """Free."""
            return x

    one, two = World("one"), World("two")
    assert (one.hello("hi"), two.hello("hi"), one.free(3)) == ("hi one", "hi two", 3)
    assert one.hello.spec is two.hello.spec
    assert list(one.hello.spec.parameters["properties"]) == ["greeting"]


def test_local_classes_are_resolved_under_future_annotations() -> None:
    class Local(BaseModel):
        x: int

    @tool
    def take(local: Local) -> str:
        """Take."""
        return str(local.x)

    assert take.arguments.validate({"local": {"x": 1}})["local"] == Local(x=1)


def no_docstring(x: int) -> str:
    return ""


def only_sections(x: int) -> str:
    """
    Args:
        x: a number
    """
    return ""


def no_hint(x) -> str:  # type: ignore[no-untyped-def]
    """Doc."""
    return ""


def no_return(x: int):  # type: ignore[no-untyped-def]
    """Doc."""


def star_args(*args: int) -> str:
    """Doc."""
    return ""


def star_kwargs(**kwargs: int) -> str:
    """Doc."""
    return ""


def positional(x: int, /) -> str:
    """Doc."""
    return ""


def returns_set() -> set[int]:
    """Doc."""
    return set()


def returns_nothing() -> None:
    """Doc."""


def returns_bytes() -> list[bytes]:
    """Doc."""
    return []


def bad_default(x: object = object()) -> str:
    """Doc."""
    return ""


def wrong_default(x: int = None) -> str:  # type: ignore[assignment]  # noqa: RUF013
    """Doc."""
    return ""


def nan_default(x: float = float("nan")) -> str:
    """Doc."""
    return ""


def field_default(x: int = Field(default=3)) -> str:
    """Doc."""
    return ""


def no_schema(x: Callable[[], int]) -> str:
    """Doc."""
    return ""


def open_model(x: Open) -> str:
    """Doc."""
    return ""


def stale_docstring(x: int) -> str:
    """Doc.

    Args:
        y: renamed long ago
    """
    return ""


def unknown_name(x: Missing) -> str:  # type: ignore[name-defined] # noqa: F821
    """Doc."""
    return ""


def naïve(x: int) -> str:
    """Doc."""
    return ""


def generator() -> str:  # type: ignore[misc]
    """Doc."""
    yield ""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_docstring, "no docstring"),
        (only_sections, "no docstring"),
        (no_hint, "'x' has no type hint"),
        (no_return, "no return hint"),
        (star_args, r"\*args has no schema"),
        (star_kwargs, r"\*\*kwargs has no schema"),
        (positional, "positional-only"),
        (returns_set, "return hint"),
        (returns_nothing, "return hint"),
        (returns_bytes, "return hint"),
        (bad_default, "'x'"),
        (wrong_default, "default None of parameter 'x'"),
        (nan_default, "default nan"),
        (field_default, "write Annotated"),
        (no_schema, "no JSON schema"),
        (open_model, "allows extra keys"),
        (stale_docstring, "'y', which is no parameter"),
        (unknown_name, "TYPE_CHECKING"),
        (naïve, "bad tool name"),
        (generator, "yields"),
        (staticmethod(no_docstring), "below @staticmethod"),
        (print, "needs a function"),
        (Filter, "needs a function"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or str(value)[:20],
)
def test_a_broken_contract_is_raised_at_declaration(function: Any, words: str) -> None:
    with pytest.raises(ToolContractError, match=words):
        tool(function)


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_positive_number(timeout_s: float) -> None:
    with pytest.raises(ToolContractError, match="timeout_s"):
        tool(timeout_s=timeout_s)(test_a_timeout_is_a_positive_number)


@tool
def sample(
    text: str,
    number: int = 1,
    ratio: float = 0.5,
    flag: bool = False,
    mode: Literal["a", "b"] = "a",
    items: list[int] = [],  # noqa: B006
    nested: Filter | None = None,
    either: int | str = 0,
    page: Annotated[int, Field(ge=1)] = 1,
    tree: Node | None = None,
    span: Span | None = None,
) -> ToolOutput:
    """Sample."""
    return ToolOutput(content=text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, 'missing argument "text": wanted a string'),
        ({"text": 5}, 'argument "text": wanted a string, found an integer (5)'),
        ({"text": {"a": 1}}, 'argument "text": wanted a string, found an object of 1'),
        ({"text": None}, 'argument "text": wanted a string, found null'),
        ({"text": "", "number": "5"}, 'argument "number": wanted an integer, found a string ("5")'),
        ({"text": "", "number": 5.0}, 'argument "number": wanted an integer, found a number with a fraction (5.0)'),
        ({"text": "", "number": True}, 'argument "number": wanted an integer, found a boolean (true)'),
        ({"text": "", "number": None}, 'argument "number": wanted an integer, found null'),
        ({"text": "", "ratio": "1"}, 'argument "ratio": wanted a number'),
        ({"text": "", "flag": 1}, 'argument "flag": wanted true or false, found an integer (1)'),
        ({"text": "", "mode": "c"}, "argument \"mode\": should be 'a' or 'b', found a string (\"c\")"),
        ({"text": "", "items": "1"}, 'argument "items": wanted a list, each item an integer'),
        ({"text": "", "items": [1, "2"]}, 'argument "items[1]": should be a valid integer, found a string ("2")'),
        ({"text": "", "nested": {"phase": "1"}}, 'argument "nested.phase": should be a valid integer'),
        ({"text": "", "nested": {"phase": 1, "x": 2}}, 'argument "nested.x": is not permitted'),
        ({"text": "", "span": {"start": 1, "x": 2}}, 'argument "span'),
        ({"text": "", "either": [1]}, 'argument "either": wanted an integer or a string, found a list of 1'),
        ({"text": "", "page": 0}, 'argument "page": should be greater than or equal to 1, found an integer (0)'),
        ({"text": "", "tree": {"name": "a", "children": [{"name": 3}]}}, 'argument "tree.children[0].name"'),
        ({"text": "", "nmber": 3}, 'unknown argument "nmber", did you mean "number"?'),
        ({"text": "", "ratio": float("nan")}, "not plain JSON"),
        ({"text": "", "ratio": float("inf")}, "not plain JSON"),
        ({"text": "\ud800"}, "no Unicode"),
        ({"text": "", "x" * 200: 1}, 'unknown argument "xxxx'),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named_and_never_coerced(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ToolFailure) as caught:
        sample.arguments.validate(arguments)
    assert caught.value.kind is ToolErrorKind.INVALID_ARGUMENTS
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ToolFailure):
        sample.arguments.validate({"text": deep})


def test_right_arguments_arrive_as_declared() -> None:
    values = sample.arguments.validate(
        {"text": "5", "ratio": 2, "nested": {"phase": 3}, "span": {"start": 1}, "either": "5", "items": [1, 2]}
    )
    assert values == {
        "text": "5", "ratio": 2.0, "nested": Filter(phase=3), "span": Span(1), "either": "5", "items": [1, 2],
    }  # fmt: skip
    assert isinstance(values["ratio"], float)


def test_several_errors_come_at_once() -> None:
    with pytest.raises(ToolFailure) as caught:
        sample.arguments.validate({"number": "1", "flag": "no", "mode": 1, "zzz": 2})
    assert str(caught.value).count(";") == 3
    assert "and 2 more" in str(caught.value)
