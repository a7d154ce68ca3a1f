"""Gymnasium spaces of messages. Both can sample, so Gymnasium's own checks and fuzz tests play real episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from envs.types import AssistantMessage, Message
from tools.types import ToolCall, ToolSpec

ROLES = ("system", "user", "assistant", "tool")
WORDS = ("alpha", "beta", "trial", "12", "yes", "")


class MessagesSpace(gymnasium.Space[tuple[Message, ...]]):
    """A tuple of chat messages, possibly empty after the last step."""

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> tuple[Message, ...]:
        text = " ".join(self.np_random.choice(WORDS, size=3))
        return ({"role": "user", "content": text},)

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(_is_message(message) for message in x)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MessagesSpace)

    def __hash__(self) -> int:
        return hash(MessagesSpace)

    def __repr__(self) -> str:
        return "MessagesSpace()"


class AssistantSpace(gymnasium.Space[AssistantMessage]):
    """An assistant message; `sample()` calls one or two of the tools with arguments that satisfy their schemas, or
    answers. A call that is malformed, of an unknown tool or with wrong arguments is an action too: the environment
    answers it. What is no action is a record that breaks the types of `envs.types`, or two calls of one id."""

    def __init__(self, specs: Sequence[ToolSpec], seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)
        self.specs = tuple(specs)

    def sample(self, mask: None = None, probability: None = None) -> AssistantMessage:
        if not self.specs or self.np_random.random() < 0.1:
            return AssistantMessage(content=str(self.np_random.choice(WORDS)) or "done")
        calls: list[ToolCall] = []
        message_id = int(self.np_random.integers(2**32))  # the space knows no turn, and ids are of an episode
        for index in range(int(self.np_random.integers(1, 3))):
            spec = self.specs[int(self.np_random.integers(len(self.specs)))]
            arguments = sample_schema(spec.parameters, spec.parameters, self.np_random)
            raw = json.dumps({"name": spec.name, "arguments": arguments})
            calls.append(ToolCall(id=f"call_{message_id:08x}_{index}", name=spec.name, arguments=arguments, raw=raw))
        return AssistantMessage(content="", tool_calls=tuple(calls))

    def contains(self, x: Any) -> bool:
        return (
            isinstance(x, AssistantMessage)
            and isinstance(x.content, str)
            and isinstance(x.reasoning, str | None)
            and isinstance(x.finished, bool)
            and isinstance(x.tool_calls, tuple)
            and all(_is_call(call) for call in x.tool_calls)
            and len({call.id for call in x.tool_calls}) == len(x.tool_calls)
        )

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AssistantSpace) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(tuple(spec.name for spec in self.specs))

    def __repr__(self) -> str:
        return f"AssistantSpace({', '.join(spec.name for spec in self.specs)})"


def _is_message(x: Any) -> bool:
    if not (isinstance(x, dict) and x.get("role") in ROLES and isinstance(x.get("content"), str)):
        return False
    # The keys that a role need not have are text where they are there; a tool message always names its call.
    texts = [x[key] for key in ("reasoning_content", "name", "tool_call_id") if key in x]
    named = x["role"] != "tool" or bool(x.get("tool_call_id"))
    return named and all(isinstance(text, str) for text in texts) and isinstance(x.get("tool_calls", []), list)


def _is_call(x: Any) -> bool:
    return (
        isinstance(x, ToolCall)
        and isinstance(x.id, str)
        and x.id != ""
        and isinstance(x.name, str)
        and isinstance(x.raw, str)
        and isinstance(x.arguments, dict | None)
    )


def sample_schema(schema: dict[str, Any], root: dict[str, Any], random: np.random.Generator, depth: int = 0) -> Any:
    """A value that satisfies a JSON schema of the kind that `tools.tool` makes. Of `pattern` and `format` it knows
    nothing: such a string comes from the schema's `examples` or `default`, if it has them.

    Raises:
        ValueError: for a type that JSON schema does not have.
    """
    if "$ref" in schema:
        return sample_schema(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, random, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][int(random.integers(len(schema["enum"])))]
    for union in ("anyOf", "oneOf"):
        if union in schema:
            options = schema[union]
            # Deep inside a recursive schema the last option, by custom null, ends it.
            index = len(options) - 1 if depth > 4 else int(random.integers(len(options)))
            return sample_schema(options[index], root, random, depth + 1)
    if "pattern" in schema or "format" in schema:
        known = [*schema.get("examples", ()), *([schema["default"]] if "default" in schema else ())]
        if known:
            return known[int(random.integers(len(known)))]
    match schema.get("type", "string"):  # without a type anything will do
        case "object":
            return _sample_object(schema, root, random, depth)
        case "array":
            return _sample_array(schema, root, random, depth)
        case "string":
            text = str(random.choice(WORDS))
            return text.ljust(int(schema.get("minLength", 0)), "x")[: int(schema.get("maxLength", 1000))]
        case "integer":
            return _sample_integer(schema, random)
        case "number":
            low, high = _bounds(schema)
            # The middle half: the ends may be exclusive.
            return float(random.uniform(low + (high - low) / 4, high - (high - low) / 4))
        case "boolean":
            return bool(random.random() < 0.5)
        case "null":
            return None
    raise ValueError(f"cannot sample a value of the type {schema['type']!r}")


def _sample_object(schema: dict[str, Any], root: dict[str, Any], random: np.random.Generator, depth: int) -> Any:
    known = schema.get("properties", {})
    required = set(schema.get("required", ()))
    values = {
        name: sample_schema(sub, root, random, depth + 1)
        for name, sub in known.items()
        if name in required or (depth < 4 and random.random() < 0.5)
    }
    others = schema.get("additionalProperties")
    if not known and isinstance(others, dict):
        values |= {
            f"key{i}": sample_schema(others, root, random, depth + 1) for i in range(_count(schema, random, depth))
        }
    return values


def _sample_array(schema: dict[str, Any], root: dict[str, Any], random: np.random.Generator, depth: int) -> Any:
    first = [sample_schema(sub, root, random, depth + 1) for sub in schema.get("prefixItems", ())]
    items = schema.get("items", {})
    if items is False:
        return first
    values = first + [
        sample_schema(items, root, random, depth + 1) for _ in range(_count(schema, random, depth) - len(first))
    ]
    if schema.get("uniqueItems"):  # a set; a short one where its values run out
        return list({json.dumps(value, sort_keys=True): value for value in values}.values())
    return values


def _count(schema: dict[str, Any], random: np.random.Generator, depth: int) -> int:
    """How many entries of an array or an open object."""
    low = int(schema.get("minItems", schema.get("minProperties", 0)))
    high = int(schema.get("maxItems", schema.get("maxProperties", low + 2)))
    return low if depth >= 4 else int(random.integers(low, min(high, low + 2) + 1))


def _sample_integer(schema: dict[str, Any], random: np.random.Generator) -> int:
    low, high = _bounds(schema)
    first = math.floor(low) + 1 if "exclusiveMinimum" in schema else math.ceil(low)
    last = math.ceil(high) - 1 if "exclusiveMaximum" in schema else math.floor(high)
    step = int(schema.get("multipleOf", 1))
    first = -(-first // step) * step
    return first + step * int(random.integers((last - first) // step + 1))


def _bounds(schema: dict[str, Any]) -> tuple[float, float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    span = 10 * max(1, abs(int(schema.get("multipleOf", 1))))
    if low is None:
        low = high - span if high is not None else -3
    return low, high if high is not None else low + span
