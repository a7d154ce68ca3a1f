"""The arguments of a tool: JSON schema from type hints and docstring, and strict validation against it.

Arguments are validated as JSON, strictly: nothing is coerced ("5" is no integer, 5.0 is none either), except that
an integer may stand for a float, as JSON has one kind of number. Unknown keys are refused at every depth.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import Field, FieldInfo
from pydantic_core import PydanticSerializationError

from tools.types import ToolErrorKind, ToolFailure

NUM_ERRORS_SHOWN = 3
PREVIEW_CHARS = 40
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Return|Raises|Yields):\s*$")
_ARGUMENT = re.compile(r"^(\s*)(\*{0,2}[A-Za-z_]\w*)\s*(?:\([^)]*\))?:\s*(.*)$")


class ToolContractError(TypeError):
    """A tool breaks the contract of tools: a bug of its author, raised to them and never shown to a model."""


@dataclass(frozen=True, slots=True)
class Docstring:
    description: str
    """The text before the first section."""
    parameters: dict[str, str]
    """Text of each entry of the Args section, lines joined."""


def parse_docstring(text: str) -> Docstring:
    """Reads a Google-style docstring; sections other than Args are dropped."""
    description: list[str] = []
    parameters: dict[str, str] = {}
    section, indent, current = "", -1, ""
    for line in inspect.cleandoc(text).splitlines():
        header = _SECTION.match(line)
        if header:
            section, indent, current = header.group(1), -1, ""
        elif not section:
            description.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            entry = _ARGUMENT.match(line)
            if entry and (indent < 0 or len(entry.group(1)) <= indent):
                indent, current = len(entry.group(1)), entry.group(2).lstrip("*")
                parameters[current] = entry.group(3).strip()
            elif current and line.strip():
                parameters[current] = f"{parameters[current]} {line.strip()}".strip()
    return Docstring("\n".join(description).strip(), parameters)


class Arguments:
    """Schema and validator of one tool's parameters, built once at declaration."""

    def __init__(self, tool: str, parameters: Mapping[str, tuple[Any, Any]], descriptions: Mapping[str, str]) -> None:
        """
        Args:
            tool: name of the tool, for messages.
            parameters: type hint and default (`inspect.Parameter.empty` for none) by parameter name.
            descriptions: texts of the docstring's Args section; a description inside `Annotated` goes first.

        Raises:
            ToolContractError: a hint has no JSON schema, or a default is no JSON value of its hint.
        """
        self.names = tuple(parameters)
        fields: dict[str, Any] = {}
        for index, (name, (hint, default)) in enumerate(parameters.items()):
            description = _description(hint) or descriptions.get(name) or None
            required = default is inspect.Parameter.empty
            field = (
                Field(alias=name, description=description)
                if required
                else Field(alias=name, description=description, default=_json_default(tool, name, hint, default))
            )
            # Fields go by number, with the name as alias: a parameter may be called `schema`, `copy` or `_id`.
            fields[f"p{index}"] = (hint, field)
        try:
            self._model: type[BaseModel] = create_model(
                tool, __config__=ConfigDict(strict=True, extra="forbid"), **fields
            )
            schema = self._model.model_json_schema()
        except (PydanticUserError, TypeError) as error:
            reason = str(error).split("\n\nFor further information")[0]
            raise ToolContractError(f"tool {tool!r}: a parameter has no JSON schema: {reason}") from error
        self.schema: dict[str, Any] = compact_schema(tool, schema)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function wants them (nested models and dataclasses built). Parameters that were not
        given are left out, so that the function's own defaults hold.

        Raises:
            ToolFailure: kind `invalid_arguments`; names the parameter, what was found and what is wanted.
        """
        try:
            text = json.dumps(arguments, allow_nan=False)
            model = self._model.model_validate_json(text, strict=True, extra="forbid")
        except ValidationError as error:
            raise ToolFailure(self._explain(arguments, error), ToolErrorKind.INVALID_ARGUMENTS) from None
        except (ValueError, TypeError, RecursionError):
            reason = "arguments are not plain JSON: NaN, infinity and nesting without end are refused"
            raise ToolFailure(reason, ToolErrorKind.INVALID_ARGUMENTS) from None
        given = model.model_fields_set
        return {name: getattr(model, f"p{i}") for i, name in enumerate(self.names) if f"p{i}" in given}

    def _explain(self, arguments: Mapping[str, Any], error: ValidationError) -> str:
        by_parameter: dict[str, list[Any]] = {}
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            by_parameter.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
        lines = [self._explain_one(name, arguments, details) for name, details in by_parameter.items()]
        more = len(lines) - NUM_ERRORS_SHOWN
        return "; ".join(lines[:NUM_ERRORS_SHOWN]) + (f"; and {more} more" if more > 0 else "")

    def _explain_one(self, name: str, arguments: Mapping[str, Any], details: list[Any]) -> str:
        first = details[0]
        wanted = schema_words(self.schema["properties"].get(name, {}), self.schema)
        if not name:
            return "arguments cannot be read: text that is no Unicode, or nesting too deep"
        if name not in self.schema["properties"]:
            close = difflib.get_close_matches(name, self.names, n=1)
            guess = f', did you mean "{close[0]}"?' if close else ""
            takes = ", ".join(self.names) or "no arguments"
            return f'unknown argument "{_short(name)}"{guess} (the tool takes: {takes})'
        if first["type"] == "missing" and len(first["loc"]) == 1:
            return f'missing argument "{name}": wanted {wanted}'
        value, path = _value_at(arguments, first["loc"])
        if len(details) == 1:
            if not (first["type"].endswith("_type") and len(first["loc"]) == 1):
                reason = first["msg"].removeprefix("Input ").replace("Extra inputs are", "is")
                return f'argument "{path}": {reason[0].lower()}{reason[1:]}, found {value_words(value)}'
        else:
            value, path = arguments.get(name), name
        return f'argument "{path}": wanted {wanted}, found {value_words(value)}'


def _description(hint: Any) -> str | None:
    """The text in `Annotated[T, "text"]` or `Annotated[T, Field(description="text")]`."""
    if get_origin(hint) is not Annotated:
        return None
    for item in get_args(hint)[1:]:
        if isinstance(item, str):
            return item
        if isinstance(item, FieldInfo) and item.description:
            return item.description
    return None


def _json_default(tool: str, name: str, hint: Any, default: Any) -> Any:
    if isinstance(default, FieldInfo):
        raise ToolContractError(
            f"tool {tool!r}: parameter {name!r} has Field(...) as default; write Annotated[type, Field(...)] = value"
        )
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
        text = adapter.dump_json(default, warnings="error")
        adapter.validate_json(text, strict=True)
        json.dumps(json.loads(text), allow_nan=False)
    except PydanticUserError as error:
        raise ToolContractError(f"tool {tool!r}: parameter {name!r} has no JSON schema: {error.message}") from error
    except (PydanticSerializationError, ValueError) as error:
        raise ToolContractError(
            f"tool {tool!r}: default {default!r} of parameter {name!r} is no JSON value of its type {hint!r}"
        ) from error
    return default


def compact_schema(tool: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's JSON schema without `title`s and with `$defs` inlined, unless a definition is recursive. Every
    object with named properties gets `additionalProperties: false`, as validation refuses unknown keys."""
    definitions: dict[str, Any] = schema.get("$defs", {})
    recursive = {name for name in definitions if name in _reachable(name, definitions)}

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        name = str(node.get("$ref", "")).removeprefix("#/$defs/")
        if name in definitions and name not in recursive:
            beside = {key: value for key, value in node.items() if key != "$ref"}
            return walk({**definitions[name], **beside})
        result: dict[str, Any] = {}
        for key, value in node.items():
            if key in ("title", "$defs"):
                continue
            if key == "properties":
                result[key] = {field: walk(field_schema) for field, field_schema in value.items()}
            elif key in ("default", "const", "enum", "examples"):
                result[key] = value
            else:
                result[key] = walk(value)
        if "properties" in result:
            if result.get("additionalProperties", False) is not False:
                raise ToolContractError(
                    f"tool {tool!r}: a parameter's model allows extra keys; use dict[str, Any] for an open object"
                )
            result["additionalProperties"] = False
        return result

    compact: dict[str, Any] = walk({key: value for key, value in schema.items() if key != "description"})
    properties = compact.pop("properties", {})
    required = {"required": compact["required"]} if compact.get("required") else {}
    compact = {"type": "object", "properties": properties, **required, "additionalProperties": False}
    if recursive:
        compact["$defs"] = {name: walk(definitions[name]) for name in definitions if name in recursive}
    return compact


def _reachable(name: str, definitions: dict[str, Any]) -> set[str]:
    """Names of the definitions that `name` refers to, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in re.findall(r'"#/\$defs/([^"]+)"', json.dumps(definitions[waiting.pop()])):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


_TYPE_WORDS = {"string": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false",
               "null": "null", "object": "an object", "array": "a list"}  # fmt: skip


def schema_words(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """A JSON schema in words for a model, e.g. `an integer or null`."""
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        return schema_words(root.get("$defs", {}).get(name, {}), root)
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(schema_words(item, root) for item in schema[key]))
    if schema.get("type") == "array" and schema.get("items"):
        return f"a list, each item {schema_words(schema['items'], root)}"
    if schema.get("type") == "object" and schema.get("properties"):
        return "an object with " + ", ".join(schema["properties"])
    return _TYPE_WORDS.get(str(schema.get("type")), "any value")


def value_words(value: Any) -> str:
    """What a JSON value is, with a short preview, e.g. `a string ("5")`."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    kind = {bool: "a boolean", int: "an integer", float: "a number with a fraction", str: "a string"}[type(value)]
    return f"{kind} ({_short(json.dumps(value, ensure_ascii=False))})"


def _short(text: str) -> str:
    return text if len(text) <= PREVIEW_CHARS else text[: PREVIEW_CHARS - 3] + "..."


def _value_at(arguments: Mapping[str, Any], location: tuple[int | str, ...]) -> tuple[Any, str]:
    """The value that an error's location points at and its path; parts that only name a branch of a union are
    skipped, and the way ends where the value lacks the next part."""
    value: Any = arguments
    path = ""
    for part in location:
        if isinstance(value, dict) and part in value:
            value, path = value[part], f"{path}.{part}" if path else str(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value, path = value[part], f"{path}[{part}]"
    return value, path
