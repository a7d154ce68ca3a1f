"""Policies that sample token ids: a vLLM-compatible server, and a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agent_loop.scoring import IMPOSSIBLE, ROUNDING
from agent_loop.transport import Transport, TransportError
from agent_loop.types import Completion, FinishReason, PolicyError, SamplingParams

FINISH_REASONS: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}


class VllmPolicy:
    """A `Policy` over `/v1/completions` with token ids both ways.

    Works with any OpenAI-compatible server that takes `prompt: [ids]` and honours `return_token_ids`: vLLM 0.10.2 and
    later, and the embedded engine.

    Args:
        transport: to the server.
        model: the name that it knows the model by.
        timeout_s: of one request, retries included.
    """

    def __init__(self, transport: Transport, model: str, *, timeout_s: float = 600.0) -> None:
        self._transport = transport
        self._model = model
        self._timeout_s = timeout_s
        self.policy_version: int | None = None
        """Version of the served weights, where whoever publishes them says so and the server's replies do not."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        """Draw one completion; see `Policy`."""
        payload: dict[str, Any] = {
            "model": self._model,
            "prompt": list(prompt_ids),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "stop_token_ids": list(params.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        if params.seed is not None:
            payload["seed"] = params.seed
        try:
            reply = await self._transport.post_json("/v1/completions", payload, timeout_s=self._timeout_s)
        except TransportError as error:
            raise PolicyError(str(error), error.kind) from error
        return self._read(reply, prompt_ids, params)

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _read(self, reply: dict[str, Any], prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Check a reply against itself and against what was asked; nothing that contradicts itself is trained on."""
        try:
            choice = reply["choices"][0]
            if (
                choice["finish_reason"] == "abort"
            ):  # paused, shut down, or out of memory; what there is, is cut anywhere
                raise PolicyError("the server aborted the request", "unavailable")
            ids = choice["token_ids"]
            logprobs = choice["logprobs"]["token_logprobs"]
            tokens = choice["logprobs"].get("tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise PolicyError(
                f"the server's reply lacks {error}: it must honour return_token_ids and logprobs", "protocol"
            ) from error
        finish = FINISH_REASONS.get(choice["finish_reason"])
        if finish is None:
            raise PolicyError(f"the server ended the turn with finish_reason {choice['finish_reason']!r}", "protocol")
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise PolicyError("the server returned no token ids; it must honour return_token_ids", "protocol")
        if not isinstance(logprobs, list) or len(logprobs) != len(ids):
            raise PolicyError(f"{len(ids)} token ids came with {_size(logprobs)} log-probabilities", "protocol")
        if len(ids) > params.max_tokens:
            raise PolicyError(f"{len(ids)} tokens came back, {params.max_tokens} were asked for", "protocol")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(prompt_ids):
            raise PolicyError("the server says that it sampled from another prompt than it was given", "protocol")
        if not isinstance(tokens or [], list) or (tokens and len(tokens) != len(ids)):
            raise PolicyError(f"{len(ids)} token ids came with {_size(tokens)} names of tokens", "protocol")
        for index, token in enumerate(tokens or ()):
            if str(token).startswith("token_id:") and token != f"token_id:{ids[index]}":
                raise PolicyError(
                    f"token {index} has id {ids[index]} but its log-probability is of {token}", "protocol"
                )
        for index, value in enumerate(logprobs):
            if not isinstance(value, int | float) or not IMPOSSIBLE < value <= ROUNDING:  # false for NaN too
                raise PolicyError(f"the log-probability of sampled token {index} is {value!r}", "protocol")
        version = reply.get("weight_version")
        try:
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        except (KeyError, TypeError):
            cached = None
        return Completion(
            token_ids=tuple(ids),
            logprobs=tuple(min(float(value), 0.0) for value in logprobs),
            finish_reason=finish,
            policy_version=version if type(version) is int else self.policy_version,
            num_cached_tokens=cached if type(cached) is int else None,
        )


def _size(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else type(value).__name__


class ScriptedPolicy:
    """A `Policy` that says what it was told to, in order: for tests and for replaying experts.

    Args:
        completions: token ids of each turn; a stop id at the end makes a finished turn.
        stop_token_ids: ids that end a turn.
        logprob: of every token.
    """

    def __init__(
        self, completions: Iterable[Sequence[int]], *, stop_token_ids: Sequence[int], logprob: float = -1.0
    ) -> None:
        self._completions = iter(completions)
        self._stop = frozenset(stop_token_ids)
        self._logprob = logprob

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        """The next completion, cut to `max_tokens`.

        Raises:
            PolicyError: the script has come to its end.
        """
        scripted = next(self._completions, None)
        if scripted is None:
            raise PolicyError("the script has no more turns", "rejected")
        ids = tuple(scripted)[: params.max_tokens]
        finish: FinishReason = "stop" if ids and ids[-1] in self._stop else "length"
        return Completion(token_ids=ids, logprobs=(self._logprob,) * len(ids), finish_reason=finish, policy_version=0)

    async def aclose(self) -> None:
        """Nothing is open."""
