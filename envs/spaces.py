"""Gymnasium spaces of messages. Both can sample, so Gymnasium's own checks and fuzz tests play real episodes."""

from __future__ import annotations

import json
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
        return isinstance(x, tuple) and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in x
        )

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
    """An assistant message; `sample()` calls one of the tools with arguments that satisfy its schema, or answers."""

    def __init__(self, specs: Sequence[ToolSpec], seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)
        self.specs = tuple(specs)

    def sample(self, mask: None = None, probability: None = None) -> AssistantMessage:
        if not self.specs or self.np_random.random() < 0.1:
            return AssistantMessage(content=str(self.np_random.choice(WORDS)) or "done")
        calls = []
        for index in range(int(self.np_random.integers(1, 3))):
            spec = self.specs[int(self.np_random.integers(len(self.specs)))]
            arguments = sample_schema(spec.parameters, spec.parameters, self.np_random)
            raw = json.dumps({"name": spec.name, "arguments": arguments})
            calls.append(ToolCall(id=f"call_{index}", name=spec.name, arguments=arguments, raw=raw))
        return AssistantMessage(content="", tool_calls=tuple(calls))

    def contains(self, x: Any) -> bool:
        return isinstance(x, AssistantMessage) and all(isinstance(call, ToolCall) for call in x.tool_calls)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AssistantSpace) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(tuple(spec.name for spec in self.specs))

    def __repr__(self) -> str:
        return f"AssistantSpace({', '.join(spec.name for spec in self.specs)})"


def sample_schema(schema: dict[str, Any], root: dict[str, Any], random: np.random.Generator, depth: int = 0) -> Any:
    """A value that satisfies a JSON schema of the kind that `tools.tool` makes.

    Raises:
        ValueError: for a schema without type, enum, const, anyOf or $ref: it would accept anything.
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
            return sample_schema(
                options[-1 if depth > 4 else int(random.integers(len(options)))], root, random, depth + 1
            )
    match schema.get("type"):
        case "object":
            known = schema.get("properties", {})
            required = set(schema.get("required", ()))
            return {
                name: sample_schema(sub, root, random, depth + 1)
                for name, sub in known.items()
                if name in required or (depth < 4 and random.random() < 0.5)
            }
        case "array":
            low = int(schema.get("minItems", 0))
            count = max(low, int(random.integers(0, 3)) if depth < 4 else low)
            return [
                sample_schema(schema.get("items", {"type": "string"}), root, random, depth + 1) for _ in range(count)
            ]
        case "string":
            text = str(random.choice(WORDS))
            return text.ljust(int(schema.get("minLength", 0)), "x")[: int(schema.get("maxLength", 1000))]
        case "integer":
            low, high = int(schema.get("minimum", -3)), int(schema.get("maximum", max(8, schema.get("minimum", 0) + 8)))
            return int(random.integers(low, high + 1))
        case "number":
            return float(random.uniform(float(schema.get("minimum", -3)), float(schema.get("maximum", 8))))
        case "boolean":
            return bool(random.random() < 0.5)
        case "null":
            return None
    if schema == {} or "type" not in schema:
        raise ValueError(f"cannot sample a value of the schema {schema}")
    raise ValueError(f"cannot sample a value of the type {schema['type']!r}")
