"""An endpoint plugin for stock vLLM 0.32: `POST /distill/score`, the log-probabilities of asked tokens, compactly.

vLLM's own reply to `prompt_logprobs` is JSON for every token of the prompt: 80 bytes a token at K = 0, 1.7 kB at
K = 20. This one is two base64 arrays for the asked rows only. vLLM loads it where this project is installed beside it
and `VLLM_PLUGINS=distill_score` is set (vllm/plugins/endpoint_plugins/interface.py); elsewhere the run scores without.

    {"model": "teacher", "token_ids": [5, 8, 2, 9], "rows": [2, 3], "top_k": 1}     or "start": 2 instead of "rows"
    {"rows": 2, "top_k": 1, "ids": base64 int32 [rows, 1 + top_k], "logprobs": base64 float32 [rows, 1 + top_k]}

Row p is token p given those before it: first the token itself, then the `top_k` likeliest, best first. Bytes are
little-endian.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.applications import Starlette
    from starlette.datastructures import State

PATH = "/distill/score"
NAME = "distill_score"


class Refused(Exception):
    """A request that cannot be answered. `status` is HTTP's: 4xx is the caller's mistake, 503 may pass."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A request that was checked."""

    model: str
    token_ids: list[int]
    """[L]"""
    rows: list[int]
    """[R] positions, each in 1 .. L - 1."""
    top_k: int


def read_request(body: Any, *, vocab_size: int, max_model_len: int, max_logprobs: int) -> ScoreRequest:
    """
    Raises:
        Refused: what is wrong with it.
    """
    if not isinstance(body, Mapping):
        raise Refused(400, "the body must be a JSON object")
    unknown = sorted(set(body) - {"model", "token_ids", "rows", "start", "top_k"})
    if unknown:
        raise Refused(400, f"unknown field {unknown[0]!r}; there are model, token_ids, rows or start, top_k")
    model, ids, top_k = body.get("model"), body.get("token_ids"), body.get("top_k", 0)
    if not isinstance(model, str) or not model:
        raise Refused(400, "model must be a name")
    if not _are_ints(ids) or len(ids) < 2:
        raise Refused(400, "token_ids must be a list of at least 2 integers")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise Refused(400, f"token_ids has an id outside of the vocabulary of {vocab_size}")
    if len(ids) >= max_model_len:  # one token is sampled after them
        raise Refused(
            400,
            f"This model's maximum context length is {max_model_len} tokens, and token_ids has {len(ids)}; scoring "
            "needs room for one more.",
        )
    most = vocab_size if max_logprobs == -1 else max_logprobs
    if type(top_k) is not int or not 0 <= top_k <= most:
        raise Refused(400, f"top_k is {top_k!r}, not 0 to {most} (the server's --max-logprobs)")
    if ("rows" in body) == ("start" in body):
        raise Refused(400, "give either rows or start")
    rows = body.get("rows")
    if "start" in body:
        start = body["start"]
        if type(start) is not int or not 1 <= start < len(ids):
            raise Refused(400, f"start is {start!r}, not 1 to {len(ids) - 1}")
        rows = list(range(start, len(ids)))
    elif not _are_ints(rows) or not rows or len(rows) > len(ids) or min(rows) < 1 or max(rows) >= len(ids):
        raise Refused(400, f"rows must be positions from 1 to {len(ids) - 1}")
    return ScoreRequest(model, list(ids), list(rows), top_k)


def _are_ints(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)


def write_reply(request: ScoreRequest, scores: Any) -> dict[str, Any]:
    """Cut the asked rows out of vLLM's `FlatLogprobs` of a sequence (vllm/logprobs.py).

    Raises:
        Refused: the engine's rows are not those of the sequence.
    """
    if len(scores.start_indices) != len(request.token_ids):
        # Aborted on the way: new weights, or the server is closing.
        raise Refused(503, f"the engine scored {len(scores.start_indices)} of {len(request.token_ids)} tokens")
    starts = np.asarray(scores.start_indices)[request.rows]
    width = 1 + request.top_k
    if (np.asarray(scores.end_indices)[request.rows] - starts != width).any():
        raise Refused(503, f"the engine's scores have rows of another size than {width}")
    index = starts[:, None] + np.arange(width)
    ids = np.asarray(scores.token_ids, "<i4")[index]
    if ids[:, 0].tolist() != [request.token_ids[row] for row in request.rows]:
        raise Refused(503, "the engine's scores belong to other tokens")
    return {
        "rows": len(request.rows),
        "top_k": request.top_k,
        "ids": base64.b64encode(ids.tobytes()).decode(),
        "logprobs": base64.b64encode(np.asarray(scores.logprobs, "<f4")[index].tobytes()).decode(),
    }


class ScorePlugin:
    """What the entry point `distill_score` of the group `vllm.endpoint_plugins` names."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        # Imported here: where a later vLLM has moved them, it logs that and serves without this route.
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
        from vllm.entrypoints.serve.utils.api_utils import with_cancellation
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._authentication = AuthenticationMiddleware
        self._with_cancellation = with_cancellation
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._sampling_params = SamplingParams
        self._tokens_input = tokens_input
        self._engine: Any = None
        self._models: Any = None
        self._guard: Any = None

    def attach_router(self, app: Starlette) -> None:
        """Called by vLLM once, before the engine is there."""
        app.add_route(PATH, self._handle, methods=["POST"])

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Called by vLLM once, with the engine."""
        import vllm.envs

        self._engine = engine_client
        self._models = state.openai_serving_models
        # vLLM's --api-key guards /v1, /v2, /inference and /cohere only; this route asks for the same keys.
        keys = [key for key in (args.api_key or [vllm.envs.VLLM_API_KEY]) if key]
        self._guard = self._authentication(None, keys) if keys else None

    async def _handle(self, request: Request) -> Response:
        if self._guard is not None and not self._guard.verify_token(request.headers):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        body = await request.body()
        reply = await self._with_cancellation(self._answer)(body, request)
        return reply if reply is not None else Response(status_code=499)  # the caller has gone

    async def _answer(self, body: bytes, _: Request) -> Response:
        try:
            try:
                asked = json.loads(body)
            except (ValueError, RecursionError):
                raise Refused(400, "the body is no JSON") from None
            return JSONResponse(await self._score(asked))
        except Refused as error:
            problem = {"message": str(error), "type": "Error", "param": None, "code": error.status}
            return JSONResponse({"error": problem}, status_code=error.status)

    async def _score(self, body: Any) -> Any:
        if self._engine is None:
            raise Refused(503, "the engine is not there")
        config = self._engine.model_config
        request = read_request(
            body,
            vocab_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
            max_logprobs=config.max_logprobs,
        )
        adapter = self._models.lora_requests.get(request.model)
        if adapter is None and not self._models.is_base_model(request.model):
            raise Refused(404, f"The model `{request.model}` does not exist.")
        params = self._sampling_params(
            max_tokens=1,
            prompt_logprobs=request.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final_only,
            # Said, though it is the default: with a prefix from the cache, the V1 runner leaves the rows inside it
            # uninitialised (vllm/v1/outputs.py) and nothing in the output tells them from scores.
            skip_reading_prefix_cache=True,
        )
        final: Any = None
        prompt = self._tokens_input(request.token_ids)
        try:
            async for output in self._engine.generate(
                prompt, params, f"{NAME}-{uuid.uuid4().hex}", lora_request=adapter
            ):
                final = output
        except ValueError as error:  # vLLM's own checks of a request
            raise Refused(400, str(error)) from error
        flat = final.prompt_logprobs if final is not None else None
        if not flat:
            raise Refused(503, "the engine ended the request without scores")
        return write_reply(request, flat)
