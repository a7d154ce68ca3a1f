"""Policies that sample token ids: a vLLM-compatible server, and a script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from agent_loop.scoring import IMPOSSIBLE, ROUNDING
from agent_loop.transport import Transport, TransportError
from agent_loop.types import Completion, FinishReason, PolicyError, SamplingParams

FINISH_REASONS: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}


Api = Literal["completions", "generate"]


class VllmPolicy:
    """A `Policy` over a server that takes and gives token ids.

    Two routes: `/v1/completions`, which any OpenAI-compatible server with `prompt: [ids]` and `return_token_ids` has
    (vLLM 0.10.2 and later, the embedded engine), and vLLM's `/inference/v1/generate`, which also says for each token
    which version of the weights sampled it. `probe` finds out.

    Args:
        transport: to the server.
        model: the name that it knows the model by now; with adapters it changes with each version.
        timeout_s: of one request, retries included.
    """

    def __init__(self, transport: Transport, model: str, *, timeout_s: float = 600.0, api: Api = "completions") -> None:
        self.model = model
        self.api: Api = api
        self.policy_version: int | None = None
        """Version of the served weights, where whoever publishes them says so and the server's replies do not."""
        self._transport = transport
        self._timeout_s = timeout_s

    async def probe(self) -> Api:
        """Take `/inference/v1/generate` if the server has it.

        Raises:
            PolicyError: the server does not answer.
        """
        payload = {"model": self.model, "token_ids": [1, 2], "sampling_params": {"max_tokens": 1, "logprobs": 0}}
        try:
            reply = await self._transport.post_json("/inference/v1/generate", payload, timeout_s=self._timeout_s)
            self.api = "generate" if reply["choices"][0]["weight_versions"] else "completions"
        except TransportError as error:
            if error.kind == "unavailable":
                raise PolicyError(str(error), error.kind) from error
            self.api = "completions"
        except (KeyError, IndexError, TypeError):
            self.api = "completions"
        return self.api

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, key: str = "") -> Completion:
        """Draw one completion; see `Policy`."""
        version = self.policy_version
        path, payload = (_generate if self.api == "generate" else _complete)(self.model, prompt_ids, params)
        try:
            reply = await self._transport.post_json(path, payload, timeout_s=self._timeout_s, key=key)
        except TransportError as error:
            raise PolicyError(str(error), error.kind) from error
        read = _read_generated if self.api == "generate" else _read_completed
        return _checked(read(reply), reply, prompt_ids, params, version)

    async def aclose(self) -> None:
        await self._transport.aclose()


def _complete(model: str, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[str, dict[str, Any]]:
    payload: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_ids),
        **_drawing(params),
        "logprobs": params.top_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }
    return "/v1/completions", payload


def _generate(model: str, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[str, dict[str, Any]]:
    # vLLM 0.32 cuts its list, the sampled token first, to what was asked: one more, or the last of the K is missing.
    asked = params.top_logprobs + 1 if params.top_logprobs else 0
    sampling = {**_drawing(params), "logprobs": asked, "detokenize": False}
    return "/inference/v1/generate", {"model": model, "token_ids": list(prompt_ids), "sampling_params": sampling}


def _drawing(params: SamplingParams) -> dict[str, Any]:
    """What both routes call by the same names."""
    drawing: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop_token_ids),
    }
    return drawing if params.seed is None else {**drawing, "seed": params.seed}


@dataclass(slots=True)
class _Sampled:
    """What a reply says, as it says it."""

    finish_reason: Any
    token_ids: Any
    logprobs: Any
    names: list[Any]
    """[N] the ids that the log-probabilities claim to be of; empty where they do not say."""
    candidates: list[dict[int, Any]]
    """[N] log-probability by id."""
    prompt_ids: Any
    versions: Any = None
    """Spans `{"version", "start", "end"}`."""


def _read_completed(reply: dict[str, Any]) -> _Sampled:
    """`/v1/completions`."""
    with _complete_reply():
        choice = reply["choices"][0]
        logprobs = choice["logprobs"]
        names = logprobs.get("tokens") or []
        rows = logprobs.get("top_logprobs") or []
        return _Sampled(
            finish_reason=choice["finish_reason"],
            token_ids=choice["token_ids"],
            logprobs=logprobs["token_logprobs"],
            names=[_id_of(name) for name in names] if isinstance(names, list) else [None],
            candidates=[{_id_of(name): value for name, value in row.items()} for row in rows],
            prompt_ids=choice.get("prompt_token_ids"),
        )


def _read_generated(reply: dict[str, Any]) -> _Sampled:
    """`/inference/v1/generate`."""
    with _complete_reply():
        choice = reply["choices"][0]
        content = choice["logprobs"]["content"]
        return _Sampled(
            finish_reason=choice["finish_reason"],
            token_ids=choice["token_ids"],
            logprobs=[entry["logprob"] for entry in content],
            names=[entry["token_id"] for entry in content],
            candidates=[{c["token_id"]: c["logprob"] for c in entry["top_logprobs"]} for entry in content],
            prompt_ids=reply.get("prompt_token_ids"),
            versions=choice["weight_versions"],
        )


@contextmanager
def _complete_reply() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"the server's reply lacks {error}: it must honour return_token_ids and logprobs", "protocol"
        ) from error


def _id_of(name: Any) -> Any:
    """`token_id:7` is 7; any other name is no claim about an id."""
    text = str(name)
    return int(text[9:]) if text.startswith("token_id:") and text[9:].isdecimal() else None


def _checked(
    said: _Sampled, reply: dict[str, Any], prompt_ids: Sequence[int], params: SamplingParams, version: int | None
) -> Completion:
    """Check a reply against itself and against what was asked; nothing that contradicts itself is trained on."""
    ids, logprobs = said.token_ids, said.logprobs
    if said.finish_reason == "abort":  # paused, shut down, or out of memory; what there is, is cut anywhere
        raise PolicyError("the server aborted the request", "unavailable")
    finish = FINISH_REASONS.get(said.finish_reason)
    if finish is None:
        raise PolicyError(f"the server ended the turn with finish_reason {said.finish_reason!r}", "protocol")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise PolicyError("the server returned no token ids; it must honour return_token_ids", "protocol")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise PolicyError(f"{len(ids)} token ids came with {_size(logprobs)} log-probabilities", "protocol")
    if len(ids) > params.max_tokens:
        raise PolicyError(f"{len(ids)} tokens came back, {params.max_tokens} were asked for", "protocol")
    if said.prompt_ids is not None and said.prompt_ids != list(prompt_ids):
        raise PolicyError("the server says that it sampled from another prompt than it was given", "protocol")
    if said.names and len(said.names) != len(ids):
        raise PolicyError(f"{len(ids)} token ids came with {len(said.names)} names of tokens", "protocol")
    if said.names and len(said.names) != len(ids):
        raise PolicyError(f"{len(ids)} token ids came with {len(said.names)} names of tokens", "protocol")
    for index, name in enumerate(said.names):
        if name is not None and name != ids[index]:
            raise PolicyError(
                f"token {index} has id {ids[index]} but its log-probability is of token_id:{name}", "protocol"
            )
    for index, value in enumerate(logprobs):
        if not isinstance(value, int | float) or not IMPOSSIBLE < value <= ROUNDING:  # false for NaN too
            raise PolicyError(f"the log-probability of sampled token {index} is {value!r}", "protocol")
    told = reply.get("weight_version")
    versions = _versions(said.versions, len(ids), version)
    try:
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    except (KeyError, TypeError):
        cached = None
    known = [v for v in versions if v is not None]
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(min(float(value), 0.0) for value in logprobs),
        finish_reason=finish,
        policy_version=min(known) if known else told if type(told) is int else version,
        token_versions=versions,
        topk=_candidates(said, params.top_logprobs),
        num_cached_tokens=cached if type(cached) is int else None,
    )


def _versions(spans: Any, size: int, version: int | None) -> tuple[int | None, ...]:
    """[N] version of each token from vLLM's spans; a label that is no number (an adapter's base) is `version`."""
    if spans is None:
        return ()
    found: list[int | None] = []
    with _complete_reply():
        for span in spans:
            if span["start"] != len(found):
                raise PolicyError(f"the spans of weight versions have a hole at token {len(found)}", "protocol")
            label = str(span["version"])
            found += [int(label) if label.isdecimal() else version] * (span["end"] - span["start"])
    if len(found) != size:
        raise PolicyError(f"{size} token ids came with {len(found)} weight versions", "protocol")
    return tuple(found)


def _candidates(said: _Sampled, top_k: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """[N][K] best first."""
    if not top_k:
        return ()
    rows = []
    for index, row in enumerate(said.candidates):
        if not all(
            type(i) is int and isinstance(v, int | float) and IMPOSSIBLE < v <= ROUNDING for i, v in row.items()
        ):
            raise PolicyError(f"the candidates of sampled token {index} are not log-probabilities by id", "protocol")
        best = sorted(((i, min(float(v), 0.0)) for i, v in row.items()), key=lambda pair: -pair[1])[:top_k]
        if len(best) < top_k:
            raise PolicyError(f"{len(best)} of {top_k} candidates came for sampled token {index}", "protocol")
        rows.append(tuple(best))
    if len(rows) != len(said.token_ids):
        raise PolicyError(f"{len(said.token_ids)} token ids came with candidates for {len(rows)}", "protocol")
    return tuple(rows)


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
