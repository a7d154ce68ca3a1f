"""`@tool`: makes a Python function callable by a model.

    @tool
    async def search(query: str, limit: int = 5, *, state: State) -> str:
        \"\"\"Search the registry.

        Args:
            query: words to look for.
            limit: how many hits to list.
        \"\"\"

The schema comes from type hints and docstring. Whatever breaks the contract is raised at declaration.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict, overload

from pydantic import BaseModel

from tools.schema import Arguments, ToolContractError, parse_docstring
from tools.types import ToolSpec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SIMPLE_RETURNS = (str, int, float, bool, Any, object)


@dataclass(frozen=True, slots=True)
class Injected:
    """Marks a parameter that the environment fills and the model never sees."""

    source: Literal["metadata", "state"]


Metadata = Annotated[dict[str, Any], Injected("metadata")]
"""Hint of a parameter that gets the task's metadata. Read it, do not write to it."""

State = Annotated[dict[str, Any], Injected("state")]
"""Hint of a parameter that gets the episode's own mutable dict, the same one at every call of the episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutput:
    """What a tool may return in place of a plain value."""

    content: str
    """Text for the model."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values for the episode file, never shown to the model."""
    ends_episode: bool | None = None
    """Whether this call ends the episode; None is "as the tool is declared"."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A declared tool. Callable like the function it wraps; as a method it binds like one."""

    function: Callable[..., Any]
    spec: ToolSpec
    arguments: Arguments
    injected: Mapping[str, Literal["metadata", "state"]]
    """Source by parameter name."""
    accepts_none: bool
    """Whether the return hint allows None."""
    timeout_s: float
    parallel_safe: bool
    """Calls of one message may run at the same time as others that are parallel-safe."""
    idempotent: bool
    """A repeated call has the same effect and result as one call."""
    ends_episode: bool
    """A successful call ends the episode."""
    needs_self: bool = False
    """A method that is not bound to an instance yet; a toolbox refuses it."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Tool:
        if instance is None or not self.needs_self:
            return self
        return replace(self, function=types.MethodType(self.function, instance), needs_self=False)

    def __repr__(self) -> str:
        return f"<tool {self.spec.name}({', '.join(self.arguments.names)})>"


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    timeout_s: float = 60.0,
    parallel_safe: bool = False,
    idempotent: bool = False,
    ends_episode: bool = False,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    timeout_s: float = 60.0,
    parallel_safe: bool = False,
    idempotent: bool = False,
    ends_episode: bool = False,
    name: str | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Declares a tool: `@tool` or `@tool(...)` on a sync or async function or method.

    The function returns text, a JSON value (dumped as JSON for the model), a pydantic model, a dataclass or a
    `ToolOutput`. It raises `ToolFailure` to tell the model why it failed.

    A sync function runs in a thread. At its deadline the result is thrown away and the model is told, but a thread
    cannot be killed: the function runs on to its end, side effects included. Write `async def` where that matters.

    Args:
        timeout_s: seconds of wall time a call may take.
        parallel_safe: calls may run at the same time as other parallel-safe calls of the same message.
        idempotent: calling twice does and gives the same as calling once.
        ends_episode: a successful call ends the episode.
        name: the name that the model sees; the function's name by default.

    Raises:
        ToolContractError: no docstring, a missing hint, `*args` or `**kwargs`, a bad name, a default that is no JSON
            value, a hint without JSON schema, a return hint that is no text or JSON value.
    """
    frame = inspect.currentframe()
    # Hints may name classes of the function or class body that the declaration stands in.
    local_names = dict(frame.f_back.f_locals) if frame is not None and frame.f_back is not None else {}

    def declare(function: Callable[..., Any]) -> Tool:
        shown = name if name is not None else getattr(function, "__name__", "?")
        _check_function(shown, function, timeout_s)
        documentation = parse_docstring(function.__doc__ or "")
        if not documentation.description:
            raise ToolContractError(f"tool {shown!r} has no docstring; its text is what the model reads of the tool")
        hints = _hints(shown, function, local_names)
        parameters = dict(inspect.signature(function).parameters)
        needs_self = next(iter(parameters), None) == "self" and "self" not in hints
        if needs_self:
            del parameters["self"]
        injected = {key: source for key in parameters if (source := _injected_source(hints.get(key))) is not None}
        visible: dict[str, tuple[Any, Any]] = {}
        for key, parameter in parameters.items():
            _check_parameter(shown, parameter, hints)
            if key not in injected:
                visible[key] = (hints[key], parameter.default)
        unknown = [key for key in documentation.parameters if key not in parameters]
        if unknown:
            raise ToolContractError(f"tool {shown!r}: the docstring describes {unknown[0]!r}, which is no parameter")
        _check_return(shown, hints)
        arguments = Arguments(shown, visible, documentation.parameters)
        return Tool(
            function=function,
            spec=ToolSpec(name=shown, description=documentation.description, parameters=arguments.schema),
            arguments=arguments,
            injected=injected,
            accepts_none=_accepts_none(hints["return"]),
            timeout_s=float(timeout_s),
            parallel_safe=parallel_safe,
            idempotent=idempotent,
            ends_episode=ends_episode,
            needs_self=needs_self,
        )

    return declare if function is None else declare(function)


def _check_function(name: str, function: Callable[..., Any], timeout_s: float) -> None:
    if isinstance(function, staticmethod | classmethod):
        raise ToolContractError(f"tool {name!r}: put @tool below @{type(function).__name__}, or use a plain method")
    if not inspect.isfunction(function):
        raise ToolContractError(f"@tool needs a function or method, got {type(function).__name__}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ToolContractError(f"tool {name!r} yields; a tool returns one result")
    if not _NAME.fullmatch(name):
        raise ToolContractError(f"bad tool name {name!r}: letters, digits and underscores, at most 64, no digit first")
    if not 0 < timeout_s < float("inf"):
        raise ToolContractError(f"tool {name!r}: timeout_s must be a positive number of seconds, got {timeout_s}")


def _hints(name: str, function: Callable[..., Any], local_names: dict[str, Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, localns=local_names, include_extras=True)
    except NameError as error:
        raise ToolContractError(
            f"tool {name!r}: a type hint cannot be resolved: {error}; import it at run time, not under TYPE_CHECKING"
        ) from error


def _injected_source(hint: Any) -> Literal["metadata", "state"] | None:
    if get_origin(hint) is Annotated:
        for item in get_args(hint)[1:]:
            if isinstance(item, Injected):
                return item.source
    return None


def _check_parameter(name: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> None:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
        raise ToolContractError(f"tool {name!r}: {stars}{parameter.name} has no schema; name every parameter")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise ToolContractError(f"tool {name!r}: parameter {parameter.name!r} is positional-only; calls go by name")
    if parameter.name not in hints:
        raise ToolContractError(f"tool {name!r}: parameter {parameter.name!r} has no type hint")


def _check_return(name: str, hints: Mapping[str, Any]) -> None:
    if "return" not in hints:
        raise ToolContractError(f"tool {name!r} has no return hint; most tools are `-> str`")
    if not _is_returnable(hints["return"]) or hints["return"] is type(None):
        raise ToolContractError(
            f"tool {name!r}: return hint {hints['return']!r} is neither text, a JSON value nor ToolOutput"
        )


def _is_returnable(hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_returnable(args[0])
    if origin in (Union, types.UnionType):
        return all(_is_returnable(item) for item in args)
    if origin is Literal:
        return all(item is None or isinstance(item, str | int | bool) for item in args)
    if origin in (list, tuple):
        return all(item is Ellipsis or _is_returnable(item) for item in args)
    if origin in (dict, Mapping):
        return args[0] is str and _is_returnable(args[1])
    if any(hint is simple for simple in (*_SIMPLE_RETURNS, list, dict, tuple, type(None), ToolOutput)):
        return True
    return isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint) or is_typeddict(hint))


def _accepts_none(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _accepts_none(get_args(hint)[0])
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType, Literal) else (hint,)
    return any(option is None or option is type(None) or option is Any or option is object for option in options)


__all__ = ["Injected", "Metadata", "State", "Tool", "ToolContractError", "ToolOutput", "tool"]
