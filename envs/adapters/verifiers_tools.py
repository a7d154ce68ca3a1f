"""The toolsets of a verifiers environment, called in this process.

verifiers serves each toolset as an MCP server in a process of its own, one an episode. Here the same object is
registered with the same MCP class, which makes the schemas, validates the arguments and shapes the results, without the
wire between. What a call changes in `self.state` changes the trace's state at once.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import verifiers.v1 as vf
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import ValidationError
from verifiers.v1.mcp.server import _call_state
from verifiers.v1.state import state_cls

from envs.tool_env import EnvSetupError
from tools.schema import ToolContractError
from tools.types import ToolErrorKind, ToolFailure


@dataclass(frozen=True, slots=True)
class Declared:
    """One tool, as the model is told of it."""

    name: str
    description: str
    schema: dict[str, Any]
    """JSON schema of its arguments."""
    server: int
    """Which of the servers has it: the task's first, then the task set's."""
    raw_name: str
    """Its name on its server."""


def declared(taskset: vf.Taskset) -> tuple[Declared, ...]:
    """All tools that the tasks of a task set have.

    Raises:
        EnvSetupError: a toolset that cannot be called here, or two tools of one name.
    """
    task_class = type(taskset).task_type()
    found: dict[str, Declared] = {}
    for index, toolset in enumerate(_toolsets(taskset)):
        where = f"toolset {type(toolset).__name__}"
        if toolset.config.url:
            raise EnvSetupError(f"{where} is served at {toolset.config.url}: only toolsets of this process are called")
        if toolset.config.runtime.type != "subprocess":
            kind = toolset.config.runtime.type
            raise EnvSetupError(f"{where} runs in a {kind!r} runtime: containers and sandboxes are not started here")
        if not issubclass(state_cls(task_class), toolset._state_cls):
            raise EnvSetupError(
                f"{where} keeps a {toolset._state_cls.__name__}, its tasks a {state_cls(task_class).__name__}; "
                "make the task's state a subclass of the toolset's"
            )
        server = _registered(toolset)
        with ThreadPoolExecutor(1) as thread:  # a loop may be running here
            listed = thread.submit(lambda server=server: asyncio.run(server.list_tools())).result()  # type: ignore[misc]
        for tool in listed:
            name = f"{toolset.server_name}_{tool.name}" if toolset.server_name else tool.name
            if name in found:
                raise EnvSetupError(f"two tools are called {name!r}; give a toolset another TOOL_PREFIX")
            found[name] = Declared(name, tool.description or "", dict(tool.input_schema), index, tool.name)
    return tuple(found.values())


def _toolsets(taskset: vf.Taskset) -> list[vf.Toolset]:
    task_class = type(taskset).task_type()
    return [*task_class.toolsets(taskset.config.task), *type(taskset).toolsets(taskset.config)]


class Servers:
    """The toolsets of one episode."""

    def __init__(self, servers: Sequence[MCPServer], state: vf.State) -> None:
        self._servers, self._state = servers, state

    @classmethod
    async def enter(cls, taskset: vf.Taskset, task: vf.Task, trace: vf.Trace, stack: AsyncExitStack) -> Servers:
        """The task's toolsets, set up for it, and the task set's, which all episodes of an event loop share."""
        servers = []
        for toolset in type(task).toolsets(task.config):
            await stack.enter_async_context(toolset._exit_stack)
            await toolset.setup()
            await toolset.setup_task(task.data)
            servers.append(_registered(toolset))
        return cls([*servers, *await _shared(taskset)], trace.state)

    async def call(self, tool: Declared, arguments: dict[str, Any]) -> str:
        """What the tool answers, as text.

        Raises:
            ToolFailure: it refuses the arguments, or raised.
        """
        token = _call_state.set(self._state)
        try:
            result = await self._servers[tool.server].call_tool(tool.raw_name, arguments)
        except ToolError as error:
            bad = isinstance(error.__cause__, ValidationError)
            kind = ToolErrorKind.INVALID_ARGUMENTS if bad else ToolErrorKind.EXECUTION
            raise ToolFailure(str(error), kind) from error
        finally:
            _call_state.reset(token)
        parts = getattr(result, "content", None)
        if parts is None or any(part.type != "text" for part in parts):
            raise ToolContractError(f"tool {tool.name!r} gave something that is no text, which cannot be played")
        text = "\n".join(part.text for part in parts) if parts else str(parts)
        if result.is_error:
            raise ToolFailure(text)
        return text


_SHARED: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Future[list[MCPServer]]]] = WeakKeyDictionary()
"""Of a loop, by the identity of the task set, which lives as long as the process (`verifiers.load`)."""


async def _shared(taskset: vf.Taskset) -> list[MCPServer]:
    """A task set's own toolsets: what they load, they load once."""
    loop = asyncio.get_running_loop()
    known = _SHARED.setdefault(loop, {})
    if id(taskset) not in known:
        known[id(taskset)] = asyncio.ensure_future(_set_up(taskset))
    try:
        return await asyncio.shield(known[id(taskset)])
    except Exception:
        known.pop(id(taskset), None)  # the next episode tries again
        raise


async def _set_up(taskset: vf.Taskset) -> list[MCPServer]:
    toolsets = type(taskset).toolsets(taskset.config)
    for toolset in toolsets:
        await toolset.setup()
    return [_registered(toolset) for toolset in toolsets]


def _registered(toolset: vf.Toolset) -> MCPServer:
    """An MCP server that has the toolset's tools and is not served."""
    lock = asyncio.Lock()

    def in_process(function: Callable[..., Any]) -> Callable[..., Any]:
        """In place of what exchanges the state over HTTP: `_call_state` holds it already."""
        if inspect.iscoroutinefunction(function):
            return function

        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            async with lock:  # one at a time, as on the toolset's own loop
                return await asyncio.to_thread(function, *args, **kwargs)

        call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return call

    toolset._with_state = in_process
    server = MCPServer(toolset.server_name or type(toolset).__name__)
    toolset.register(server)
    return server
