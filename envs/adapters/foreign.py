"""Tools that come with a JSON schema and no Python signature of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from envs.tool_env import EnvSetupError
from tools.schema import Arguments, ToolContractError, compact_schema
from tools.tool import Tool, ToolOutput
from tools.types import ToolErrorKind, ToolFailure, ToolSpec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

Call = Callable[[dict[str, Any]], Awaitable[str | ToolOutput]]
"""Arguments by name -> what the model reads. Raises `ToolFailure` for what the model did wrong."""


class ForeignArguments(Arguments):
    """Names are checked here, values by whoever owns the tool: the same rules that hold elsewhere hold here.

    Args:
        schema: as `compact_schema` leaves it.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.names = tuple(schema["properties"])
        self.schema = schema

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as they are.

        Raises:
            ToolFailure: kind `invalid_arguments`: a name too many or too few, or no plain JSON.
        """
        for name in arguments:
            if name not in self.schema["properties"]:
                raise ToolFailure(self._explain_one(name, arguments, [{}]), ToolErrorKind.INVALID_ARGUMENTS)
        for name in self.schema.get("required", ()):
            if name not in arguments:
                missing = [{"type": "missing", "loc": (name,)}]
                raise ToolFailure(self._explain_one(name, arguments, missing), ToolErrorKind.INVALID_ARGUMENTS)
        try:
            json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, TypeError, RecursionError):
            reason = "arguments are not plain JSON: NaN, infinity, broken Unicode and nesting without end are refused"
            raise ToolFailure(reason, ToolErrorKind.INVALID_ARGUMENTS) from None
        return dict(arguments)


def foreign_tool(name: str, description: str, schema: dict[str, Any], call: Call, *, timeout_s: float) -> Tool:
    """A tool from its JSON schema.

    Args:
        schema: of the arguments, an object.
        timeout_s: seconds of wall time a call may take.

    Raises:
        EnvSetupError: a name, description or schema that a model cannot be told.
    """
    if not _NAME.fullmatch(name):
        raise EnvSetupError(f"tool {name!r}: its name is not letters, digits and '_', at most 64, no digit first")
    if not description.strip():
        raise EnvSetupError(f"tool {name!r} has no description, so no model can know what it is for; give it one")
    try:
        compact = compact_schema(name, schema)
    except ToolContractError as error:
        raise EnvSetupError(str(error)) from error

    async def function(**arguments: Any) -> str | ToolOutput:
        return await call(arguments)

    return Tool(
        function=function,
        spec=ToolSpec(name=name, description=description.strip(), parameters=compact),
        arguments=ForeignArguments(compact),
        injected={},
        accepts_none=False,
        timeout_s=timeout_s,
        parallel_safe=False,
        idempotent=False,
        ends_episode=False,
    )
