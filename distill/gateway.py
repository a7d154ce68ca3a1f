"""The run's own HTTP door for its rollout workers: token ids in, a completion out.

Workers in other processes ask the run, and the run asks the student's servers through the same policy as without
workers. So whatever a policy knows stays in one place: which server is up and has the present weights, where an episode
sticks to, the model's present name, the keys. An embedded engine needs no port of its own.

    POST /sample/NAME   {"prompt_ids": [..], "params": {..}, "key": ".."} -> {"completion": {..}} or {"error": {..}}

The address is a free loopback port unless one is asked for, under a key that is drawn anew each time.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agent_loop.transport import MAX_BODY_BYTES, HttpTransport, TransportError
from agent_loop.types import Completion, Policy, PolicyError, SamplingParams

if TYPE_CHECKING:
    from aiohttp import web

REQUEST_S = 604_800.0
"""For one completion, with all outages that it waits through: the episode's own clock is the one that ends it."""
LOOPBACK = "127.0.0.1"


class Gateway:
    """Serves policies of this process to whoever has the key.

    Args:
        host: address of this machine to listen on.
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        self.key = secrets.token_urlsafe(32)
        self.base_url = ""
        """Set by `start`."""
        self._host = host
        self._policies: dict[str, Policy] = {}
        self._num_offered = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on a free port.

        Raises:
            OSError: `host` is no address of this machine.
        """
        from aiohttp import web

        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/sample/{name}", self._answer)
        # A worker whose episode is over hangs up; then the server need not go on sampling, either.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, 0).start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.base_url = f"http://{host}:{self._runner.addresses[0][1]}"

    def offer(self, policy: Policy) -> str:
        """Serve a policy; returns the name that workers ask it by."""
        self._num_offered += 1
        name = f"policy-{self._num_offered}"
        self._policies[name] = policy
        return name

    def withdraw(self, name: str) -> None:
        """Serve it no more."""
        del self._policies[name]

    async def aclose(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        from aiohttp import web

        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return web.json_response({"error": "Unauthorized"}, status=401)
        policy = self._policies.get(request.match_info["name"])
        if policy is None:
            return web.json_response({"error": f"no policy {request.match_info['name']}"}, status=404)
        asked = await request.json()
        params = SamplingParams(**{**asked["params"], "stop_token_ids": tuple(asked["params"]["stop_token_ids"])})
        try:
            completion = await policy.sample(asked["prompt_ids"], params, key=asked["key"])
        except Exception as error:  # what an episode says of it must not depend on where the episode is played
            kind = error.kind if isinstance(error, PolicyError) else type(error).__name__
            return web.json_response({"error": {"kind": kind, "message": str(error)}})
        return web.json_response({"completion": asdict(completion)}, dumps=_dumps)


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class GatewayPolicy:
    """A `Policy` of another process, asked through its gateway.

    Args:
        transport: to the gateway (`connect`); policies of one gateway share it.
        name: what `Gateway.offer` said.
    """

    def __init__(self, transport: HttpTransport, name: str) -> None:
        self._transport = transport
        self._path = f"/sample/{name}"

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        """Draw one completion; see `Policy`. Waits as long as the student's servers are away."""
        payload = {"prompt_ids": list(prompt_ids), "params": asdict(params), "key": key}
        try:
            reply = await self._transport.post_json(self._path, payload, timeout_s=REQUEST_S)
        except TransportError as error:
            raise PolicyError(f"the run itself did not answer: {error}", error.kind) from error
        if "error" in reply:
            raise PolicyError(reply["error"]["message"], reply["error"]["kind"])
        return _completion(reply["completion"])

    async def aclose(self) -> None:
        """The transport is not this policy's own."""


def connect(base_url: str, key: str) -> HttpTransport:
    """The way to a gateway."""
    return HttpTransport(base_url, key)


def _completion(value: dict[str, Any]) -> Completion:
    """`asdict(Completion)`, read back from JSON."""
    tuples = {name: tuple(value[name]) for name in ("token_ids", "logprobs", "token_versions")}
    topk = tuple(tuple((token_id, logprob) for token_id, logprob in row) for row in value["topk"])
    return Completion(**{**value, **tuples, "topk": topk})
