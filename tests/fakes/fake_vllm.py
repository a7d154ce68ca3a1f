"""A real HTTP server on loopback that speaks vLLM's format and can be told to misbehave.

Its model is invented but consistent: every prefix of ids has one distribution over the vocabulary, the same for
sampling and scoring and in every process, so replies can be checked number by number without a neural network.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from aiohttp import web

from tests.fakes.generate import as_generated, score_given_ids
from tests.fakes.invented import InventedModel, step

Fault = Literal[
    "minus_9999", "nan", "null", "short", "wrong_ids", "truncated_json", "http_500", "http_429", "stall", "html"
]
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came in."""

    path: str
    payload: dict[str, Any]
    authorization: str | None


@dataclass(slots=True)
class _Plan:
    """Which requests are answered badly, and how."""

    good: int
    fault: Fault
    only_scoring: bool
    until: int | None
    seen: int = 0


class FakeVllm:
    """`with FakeVllm("teacher", vocab_size=512) as server: ... server.base_url ...`

    Args:
        model: the only name that it knows.
        returns_ids: False: `return_token_ids` is ignored, as other servers do.
        scores: False: `prompt_logprobs` is ignored.
        generates: True: `/inference/v1/generate` is there, as with `--enable-scale-out`.
        scores_given_ids: True: and takes `prompt_logprob_token_ids`, as vLLM's GPU model runner does.
        cached_tokens: tokens of every prompt that the prefix cache holds, for requests that read it.
        weight_version: put into every reply; vLLM puts none there.
        chat_replies: messages that `/v1/chat/completions` answers with, in order. An item may hold `finish_reason`.
        port: on loopback; 0 is any that is free.
    """

    def __init__(
        self,
        model: str,
        vocab_size: int,
        *,
        max_model_len: int = 4096,
        returns_ids: bool = True,
        scores: bool = True,
        generates: bool = False,
        scores_given_ids: bool = False,
        cached_tokens: int = 0,
        weight_version: int | None = None,
        chat_replies: Iterable[Mapping[str, Any]] = (),
        port: int = 0,
    ) -> None:
        self.model = model
        self.invented = InventedModel(vocab_size)
        self.max_model_len = max_model_len
        self.returns_ids = returns_ids
        self.scores = scores
        self.generates = generates or scores_given_ids
        self.scores_given_ids = scores_given_ids
        self.cached_tokens = cached_tokens
        self.weight_version = weight_version
        self.received: list[Received] = []
        """Requests to `/v1/` and to those of other paths that are served, in the order in which they came."""
        self._chat_replies = iter(chat_replies)
        self._plan: _Plan | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._port = port
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30), "the fake server did not start within 30 s"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(30)

    def fault_after(
        self, requests: int, fault: Fault | str, *, only_scoring: bool = False, times: int | None = None
    ) -> None:
        """Answer `requests` completions well and those after them badly.

        Args:
            only_scoring: leave requests without `prompt_logprobs` alone, and do not count them.
            times: how many are answered badly before the server is well again; None: all.
        """
        if fault not in get_args(Fault):
            raise ValueError(f"unknown fault {fault!r}; there are {', '.join(get_args(Fault))}")
        self._plan = _Plan(requests, fault, only_scoring, None if times is None else requests + times)  # type: ignore[arg-type]

    async def _serve(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self._port)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._closing.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        self.received.append(Received(request.path, {}, request.headers.get("Authorization")))
        card = {"id": self.model, "object": "model", "owned_by": "vllm", "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        payload = await self._read(request)
        fault = self._fault_for(payload)
        if (refusal := self._before(fault)) is not None:
            return refusal
        if fault == "stall":
            await self._closing.wait()
        if (problem := self._problem(payload)) is not None:
            return _error(*problem)
        body = self._complete(payload)
        if fault is not None:
            _damage(body, fault)
        text = json.dumps(body)
        return web.Response(
            text=text[: len(text) // 2] if fault == "truncated_json" else text, content_type="application/json"
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self.generates:
            return _error(403, "This endpoint is disabled. Start the server with --enable-scale-out.")
        payload = await self._read(request)
        params = payload["sampling_params"]
        flat = {**params, "model": payload["model"], "prompt": payload["token_ids"], "return_token_ids": True}
        fault = self._fault_for(params)
        if (refusal := self._before(fault)) is not None:
            return refusal
        if fault == "stall":
            await self._closing.wait()
        if (problem := self._problem(flat)) is not None:
            return _error(*problem)
        body = self._complete(flat)
        if fault is not None:
            _damage(body, fault)
        body = as_generated(body)
        if params.get("prompt_logprob_token_ids") is not None:
            if not self.scores_given_ids:
                return _error(400, "prompt_logprob_token_ids requires the V2 model runner.")
            try:
                body["prompt_token_id_logprobs"] = score_given_ids(
                    self.invented, payload["token_ids"], params, cached_tokens=self.cached_tokens, fault=fault
                )
            except ValueError as error:
                return _error(400, str(error))
        text = json.dumps(body)
        return web.Response(
            text=text[: len(text) // 2] if fault == "truncated_json" else text, content_type="application/json"
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        payload = await self._read(request)
        fault = self._fault_for(payload)
        if (refusal := self._before(fault)) is not None:
            return refusal
        if fault == "stall":
            await self._closing.wait()
        if payload.get("model") != self.model:
            return _error(404, f"The model `{payload.get('model')}` does not exist.")
        reply = dict(next(self._chat_replies, {"content": "I have nothing more to say."}))
        finish = reply.pop("finish_reason", "tool_calls" if reply.get("tool_calls") else "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": None, **reply}, "finish_reason": finish}
        text = json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 0,
                "model": self.model,
                "choices": [choice],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
        )
        return web.Response(
            text=text[: len(text) // 2] if fault == "truncated_json" else text, content_type="application/json"
        )

    async def _read(self, request: web.Request) -> dict[str, Any]:
        payload = await request.json()
        self.received.append(Received(request.path, payload, request.headers.get("Authorization")))
        return dict(payload)

    def _fault_for(self, payload: Mapping[str, Any]) -> Fault | None:
        plan = self._plan
        scored = any(payload.get(key) is not None for key in ("prompt_logprobs", "prompt_logprob_token_ids"))
        if plan is None or (plan.only_scoring and not scored):
            return None
        plan.seen += 1
        bad = plan.seen > plan.good and (plan.until is None or plan.seen <= plan.until)
        return plan.fault if bad else None

    def _before(self, fault: Fault | None) -> web.Response | None:
        if fault == "http_500":
            return _error(500, "EngineCore encountered an issue.")
        if fault == "http_429":
            response = _error(429, "Too many requests.")
            response.headers["Retry-After"] = "0.01"
            return response
        if fault == "html":
            return web.Response(text="<html><body>Sign in to the proxy</body></html>", content_type="text/html")
        return None

    def _problem(self, payload: Mapping[str, Any]) -> tuple[int, str] | None:
        if payload.get("model") != self.model:
            return 404, f"The model `{payload.get('model')}` does not exist."
        ids, max_tokens = payload.get("prompt"), payload.get("max_tokens", 16)
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            return 400, "prompt must be a list of token ids"
        if outside := [i for i in ids if not 0 <= i < self.invented.vocab_size]:
            return 400, f"Token id {outside[0]} is out of vocabulary"
        if max_tokens < 1:
            return 400, f"max_tokens must be at least 1, got {max_tokens}."
        if len(ids) + max_tokens > self.max_model_len:
            return 400, (
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{max_tokens} output tokens and your prompt contains {len(ids)} input tokens."
            )
        return None

    def _complete(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        prompt, model = payload["prompt"], self.invented
        states = model.states(prompt)
        state, stops = states[-1], set(payload.get("stop_token_ids") or ())
        top_k = 1 if payload.get("temperature", 1.0) < GREEDY_BELOW else payload.get("top_k", 0)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < payload.get("max_tokens", 16) and not (ids and ids[-1] in stops):
            ids.append(model.draw(state, payload.get("seed"), top_k=top_k))
            logprobs.append(model.logprob(state, ids[-1]))
            state = step(state, ids[-1])
        with_ids = self.returns_ids and payload.get("return_token_ids")
        names = [f"token_id:{i}" for i in ids]
        scored = self.scores and payload.get("prompt_logprobs") is not None
        choice = {
            "index": 0,
            "text": "".join(f"<{i}>" for i in ids),
            "logprobs": None
            if payload.get("logprobs") is None
            else {
                "tokens": names,
                "token_logprobs": logprobs,
                "top_logprobs": [{n: p} for n, p in zip(names, logprobs, strict=True)],
            },
            "finish_reason": "stop" if ids[-1] in stops else "length",
            "stop_reason": ids[-1] if ids[-1] in stops else None,
            "token_ids": ids if with_ids else None,
            "prompt_token_ids": prompt if with_ids else None,
            "prompt_logprobs": self._scores(prompt, states, payload["prompt_logprobs"]) if scored else None,
        }
        body = {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
            },
        }
        return body if self.weight_version is None else {**body, "weight_version": self.weight_version}

    def _scores(self, ids: Sequence[int], states: Sequence[int], top_k: int) -> list[Any]:
        """vLLM's entries: nothing for the first token; else the token itself, then the likeliest."""
        rows: list[Any] = [None]
        for state, token_id in zip(states[1:], ids[1:], strict=False):
            shown = dict.fromkeys([token_id, *(self.invented.at_rank(state, rank) for rank in range(top_k))])
            rows.append(
                {
                    str(i): {
                        "logprob": self.invented.logprob(state, i),
                        "rank": self.invented.rank(state, i) + 1,
                        "decoded_token": None,
                    }
                    for i in shown
                }
            )
        return rows


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "Error", "param": None, "code": status}}
    return web.json_response(body, status=status)


def _damage(body: dict[str, Any], fault: Fault) -> None:
    """Spoil the numbers or ids of a good reply, in its prompt's scores if it has any."""
    choice = body["choices"][0]
    rows, sampled = choice["prompt_logprobs"], choice["logprobs"]
    values = {"minus_9999": -9999.0, "nan": math.nan, "null": None}
    if fault in values:
        for row in rows or ():
            for entry in (row or {}).values():
                entry["logprob"] = values[fault]
        if sampled is not None:
            sampled["token_logprobs"] = [values[fault]] * len(sampled["token_logprobs"])
    elif fault == "short":
        if rows:
            rows.pop()
        if sampled is not None:
            sampled["token_logprobs"].pop()
    elif fault == "wrong_ids":
        if rows:
            rows[1:] = [{str(int(i) + 1): entry for i, entry in row.items()} for row in rows[1:]]
        if choice["token_ids"]:
            choice["token_ids"] = [i + 1 for i in choice["token_ids"]]
