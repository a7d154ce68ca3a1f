"""`openenv:URL`: an OpenEnv server, played over its WebSocket.

    python -m distill.run --env openenv:http://127.0.0.1:8000
    python -m envs check openenv:http://127.0.0.1:8000

OpenEnv (https://github.com/huggingface/OpenEnv, packages `openenv` and `openenv-core`) runs an environment as a server
with `reset`, `step` and `state`. Its client is not needed here: an episode is one WebSocket on `/ws`, JSON both ways.
It is the user who starts the server, in a container or not.

An action type is a tool, its fields the arguments; a union of actions is a tool each. A server that offers MCP tools
has these instead. `done` ends the episode, and the rewards of the steps add up to `reward`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx

from envs.adapters.foreign import foreign_tool
from envs.tool_env import OPEN_LIMITS, EnvSetupError, Grader, ToolEnv
from envs.types import Limits, Message, Task
from tools.schema import ToolContractError
from tools.tool import Tool, ToolOutput
from tools.types import ToolErrorKind, ToolFailure

ASK_TIMEOUT_S = 10.0
NUM_TASKS = 100
FIRST_EVAL_SEED = 1_000_000
"""Evaluation draws its seeds from here on, training from 0: they never meet."""
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MCP_TITLES = ("Action", "CallToolAction", "ListToolsAction")
"""Action schemas that say only that the server speaks MCP."""
_MCP_ERRORS = {
    "invalid_args": ToolErrorKind.INVALID_ARGUMENTS,
    "timeout": ToolErrorKind.TIMEOUT,
    "tool_not_found": ToolErrorKind.NOT_FOUND,
}


class OpenEnvError(ToolContractError):
    """The server is gone, is full, or speaks otherwise than OpenEnv 0.3 to 0.10. It ends the episode, and no model is
    told of it."""


class OpenEnvEnv(ToolEnv):
    """An environment behind an OpenEnv server.

    Args:
        base_url: of the server, http or https.
        prompt: what the first message says before the observation of `reset`; None is the server's own description.
        system: the system message; "" for none.
        timeout_s: seconds a step may take.
        limits, tasks, skip_verification: as in `ToolEnv`. A task's `metadata.reset` goes to the server's `reset`.

    Raises:
        EnvSetupError: no server there, or actions that cannot be told to a model.
    """

    def __init__(
        self,
        *,
        base_url: str,
        prompt: str | None = None,
        system: str = "",
        timeout_s: float = 60.0,
        limits: Limits = OPEN_LIMITS,
        tasks: Sequence[Task] | str | Path | None = None,
        skip_verification: bool = True,
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https"):
            raise EnvSetupError(f"openenv:{base_url}: wanted the URL of a server, openenv:http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._system = system
        self._prompt = prompt if prompt is not None else _description(self.base_url)
        self._session: _Session | None = None
        super().__init__(limits=limits, tasks=tasks, skip_verification=skip_verification)

    def tools(self) -> Sequence[Tool]:
        action = _schema(self.base_url)
        make = partial(foreign_tool, timeout_s=self._timeout_s)
        if action.get("title") in _MCP_TITLES:
            found = _mcp_tools(self.base_url)
            if not found:
                raise EnvSetupError(f"openenv:{self.base_url}: the server offers no MCP tools")
            return [
                make(item["name"], item.get("description") or "", _input(item), partial(self._call, item["name"]))
                for item in found
            ]
        return [
            make(*_tool_of(name, schema), partial(self._act, _constants(schema)))
            for name, schema in _actions(self.base_url, action)
        ]

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        """One task a seed of the server's `reset`; the first message is completed by its observation."""
        first = 0 if split == "train" else FIRST_EVAL_SEED
        system: tuple[Message, ...] = ({"role": "system", "content": self._system},) if self._system else ()
        return [
            Task(
                id=f"{split}-{seed}",
                messages=(*system, {"role": "user", "content": self._prompt}),
                metadata={"reset": {"seed": seed}},
            )
            for seed in range(first, first + (NUM_TASKS if num_tasks is None else num_tasks))
        ]

    async def on_reset(self, task: Task) -> None:
        await self.aclose()  # a session an episode: what one leaves behind on the server, another never sees
        try:
            self._session = await _Session.open(self.base_url)
            seen = await self._session.exchange("reset", dict(task.metadata.get("reset", {})))
        except OpenEnvError as error:  # no tool's fault
            raise ConnectionError(str(error)) from error
        if seen.get("done"):
            raise ConnectionError(f"openenv:{self.base_url}: reset gave an episode that is over already")
        self.state["reward"] = float(seen.get("reward") or 0.0)
        if text := _text(seen["observation"]):
            last = self.messages[-1]
            self.messages[-1] = {**last, "content": f"{last['content']}\n\n{text}".strip()}

    def grader(self) -> Grader:
        return _grade

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()

    async def _act(self, constants: dict[str, Any], arguments: dict[str, Any]) -> ToolOutput:
        """An action as the server types it."""
        seen = await self._step({**arguments, **constants})
        return self._output(seen, _text(seen["observation"]))

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolOutput:
        """An MCP tool, through `step`, where the server counts and rewards it."""
        seen = await self._step({"type": "call_tool", "tool_name": name, "arguments": arguments})
        observation = seen["observation"]
        if error := observation.get("error"):
            self._count(seen)
            kind = _MCP_ERRORS.get(str(error.get("error_type")), ToolErrorKind.EXECUTION)
            raise ToolFailure(str(error.get("message") or "no reason given"), kind)
        result = observation.get("result")
        if isinstance(result, dict) and isinstance(result.get("content"), list):
            parts = [part.get("text", "") for part in result["content"] if part.get("type") == "text"]
            if result.get("is_error") or result.get("isError"):
                self._count(seen)
                raise ToolFailure("\n".join(parts) or "no reason given")
            return self._output(seen, "\n".join(parts))
        return self._output(seen, result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))

    async def _step(self, action: dict[str, Any]) -> dict[str, Any]:
        if self._session is None:
            raise OpenEnvError(f"openenv:{self.base_url}: the session is lost")
        return await self._session.exchange("step", action)

    def _count(self, seen: dict[str, Any]) -> None:
        self.state["reward"] += float(seen.get("reward") or 0.0)

    def _output(self, seen: dict[str, Any], text: str) -> ToolOutput:
        self._count(seen)
        told = {"reward": seen.get("reward"), "done": bool(seen.get("done"))}
        return ToolOutput(content=text, metadata=told, ends_episode=told["done"])


def _grade(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
    """`reward` is the sum of the steps' rewards; `success` the same, cut to [0, 1]."""
    return {"reward": state["reward"], "success": min(1.0, max(0.0, state["reward"]))}


# One episode on the server


class _Session:
    """One WebSocket, which is one environment of the server's."""

    def __init__(self, url: str, client: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._url, self._client, self._socket = url, client, socket
        self._whole = True

    @classmethod
    async def open(cls, base_url: str) -> _Session:
        client = aiohttp.ClientSession()
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                socket = await client.ws_connect(f"{base_url}/ws", max_msg_size=MAX_MESSAGE_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await client.close()
            raise OpenEnvError(f"openenv:{base_url}: no session: {error or type(error).__name__}") from error
        except BaseException:
            await client.close()
            raise
        return cls(base_url, client, socket)

    async def exchange(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Send one message and wait for the observation that answers it.

        Raises:
            ToolFailure: the server refuses this action, or the environment raised over it.
            OpenEnvError: the session is over.
        """
        if not self._whole:  # an answer that nobody waited for would be taken for the next one's
            raise OpenEnvError(f"openenv:{self._url}: the session is lost: a step was given up")
        self._whole = False
        try:
            await self._socket.send_json({"type": kind, "data": data})
            answer = json.loads(await self._socket.receive_str())
        except (aiohttp.ClientError, ConnectionError, TypeError, ValueError) as error:
            raise OpenEnvError(f"openenv:{self._url}: the session is lost: {error}") from error
        self._whole = True
        told = answer.get("data") or {}
        if answer.get("type") == "observation" and isinstance(told.get("observation"), dict):
            return dict(told)
        if answer.get("type") == "error" and kind == "step":
            match told.get("code"):
                case "VALIDATION_ERROR":
                    raise ToolFailure(_complaints(told), ToolErrorKind.INVALID_ARGUMENTS)
                case "EXECUTION_ERROR":
                    raise ToolFailure(str(told.get("message")))
        full = "; start it with max_concurrent_envs above rollout.max_concurrent"
        more = full if told.get("code") == "CAPACITY_REACHED" else ""
        found = f"{told.get('code')}: {told.get('message')}" if answer.get("type") == "error" else str(answer)[:200]
        raise OpenEnvError(f"openenv:{self._url}: {kind}: {found}{more}")

    async def aclose(self) -> None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await self._socket.close()
        except TimeoutError:
            pass
        finally:
            await self._client.close()


def _complaints(told: dict[str, Any]) -> str:
    """What pydantic said on the server, by field."""
    errors = told.get("errors") or ()
    lines = [f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}" for error in errors]
    return "; ".join(lines) or str(told.get("message"))


def _text(observation: dict[str, Any]) -> str:
    """An observation for a model: its fields as JSON, without what is empty."""
    told = {key: value for key, value in observation.items() if not (key == "metadata" and not value)}
    return json.dumps(told, ensure_ascii=False) if told else ""


# What the server says of itself: asked once a process and URL


@lru_cache(maxsize=64)
def _ask(base_url: str, path: str, body: str | None = None) -> Any:
    try:
        with httpx.Client(timeout=ASK_TIMEOUT_S, trust_env=False) as client:
            url = f"{base_url}{path}"
            answer = client.get(url) if body is None else client.post(url, content=body)
            answer.raise_for_status()
            return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise EnvSetupError(
            f"openenv:{base_url}: no OpenEnv server answers {path} ({error or type(error).__name__}); start it first"
        ) from error


def _description(base_url: str) -> str:
    told = _ask(base_url, "/metadata")
    return str(told.get("description") or told.get("name") or "")


def _schema(base_url: str) -> dict[str, Any]:
    action = _ask(base_url, "/schema").get("action")
    if not isinstance(action, dict):
        raise EnvSetupError(f"openenv:{base_url}: /schema says nothing of actions")
    return action


def _mcp_tools(base_url: str) -> list[dict[str, Any]]:
    answer = _ask(base_url, "/mcp", json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}))
    if "error" in answer:
        raise EnvSetupError(f"openenv:{base_url}: tools/list: {answer['error'].get('message')}")
    return list(answer["result"]["tools"])


def _input(tool: dict[str, Any]) -> dict[str, Any]:
    return dict(tool.get("inputSchema") or tool.get("input_schema") or {})


def _actions(base_url: str, action: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The members of a union of actions, or the one action that there is, by title."""
    definitions = action.get("$defs", {})
    members = action.get("oneOf") or action.get("anyOf") or [action]
    found = []
    for member in members:
        name = str(member.get("$ref", "")).removeprefix("#/$defs/")
        schema = dict(definitions.get(name, member))
        if not isinstance(schema.get("properties"), dict):
            raise EnvSetupError(f"openenv:{base_url}: action {schema.get('title', name)!r} has no named fields")
        found.append((str(schema.get("title") or name or "Step"), {**schema, "$defs": definitions}))
    return found


def _tool_of(title: str, schema: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Name, description and arguments: `MovePieceAction` is `move_piece`; the base class's `metadata` is not shown."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", title.removesuffix("Action") or title).lower()
    name = re.sub(r"[^a-z0-9_]+", "_", words)
    hidden = {"metadata", *_constants(schema)}
    shown = {key: value for key, value in schema["properties"].items() if key not in hidden}
    required = [key for key in schema.get("required", ()) if key in shown]
    description = " ".join(str(schema.get("description") or f"Take the action {title}.").split())
    return name, description, {**schema, "properties": shown, "required": required}


def _constants(schema: dict[str, Any]) -> dict[str, Any]:
    """Fields with one possible value, such as the discriminator of a union."""
    return {key: value["const"] for key, value in schema["properties"].items() if "const" in value}
