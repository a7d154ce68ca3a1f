"""The part of vLLM's HTTP format that the gym uses: `POST /v1/completions` in and out, and errors.

Knows neither torch nor threads, so that `--help` is quick and the format can be tested by itself. What vLLM would
ignore without a word, a misspelt parameter for one, is refused here.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SEED = 2**63 - 1


class WireError(Exception):
    """A reply other than 200."""

    def __init__(self, message: str, status: int = 400, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.status}}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """One prompt, checked against the model's limits."""

    prompt_ids: list[int]
    max_tokens: int = 16
    temperature: float = 1.0
    """Below 1e-5 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    """What ends the completion, eos ids included."""
    logprobs: int | None = None
    """Candidates a sampled token, beside itself; None: no log-probabilities in the reply."""
    prompt_logprobs: int | None = None
    """Candidates a prompt token, beside itself; None: the prompt is not scored."""


@dataclass(slots=True, kw_only=True)
class TokenLogprobs:
    """One sampled token's entry: itself first, then the likeliest."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(slots=True, kw_only=True)
class PromptScores:
    """Entries of the prompt's tokens from the second on, flat: a list a token would cost more than the model."""

    width: int
    """Tokens an entry: the one that is there, then the likeliest."""
    token_ids: list[int] = field(default_factory=list)
    """[(N - 1) * width]"""
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """1 is the likeliest."""


@dataclass(slots=True, kw_only=True)
class CompletionResult:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    candidates: list[TokenLogprobs] = field(default_factory=list)
    """One a sampled token, where more than its own log-probability was asked for."""
    prompt_logprobs: PromptScores | None = None
    finish_reason: str = "length"
    stop_reason: int | None = None
    """The stop id that ended it, None for the model's own eos."""
    num_cached_tokens: int = 0
    weight_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request is checked against."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    """The first is the tokenizer's: a stop there has no `stop_reason`."""


IGNORED = {
    "model",
    "prompt",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "add_special_tokens",
    "user",
    "request_id",
    "cache_salt",
    "priority",
    "detokenize",
}
"""Keys with a meaning of their own elsewhere, or none for the numbers."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "stop": ("", []),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "response_format": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
}
"""What vLLM has and this engine has not, with the values that ask for nothing."""

OWN = {
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
}


def parse_completion(
    payload: Any, limits: Limits, encode: Callable[[str], list[int]] | None
) -> list[CompletionRequest]:
    """The requests of one body, one a prompt.

    Args:
        encode: text to ids; None where the server has no tokenizer.

    Raises:
        WireError: 400, naming the parameter.
    """
    if not isinstance(payload, dict):
        raise WireError(f"the body must be a JSON object, got {type(payload).__name__}")
    for key, value in payload.items():
        if key in NEUTRAL:
            if value is not None and value not in NEUTRAL[key]:
                raise WireError(f"{key}={value!r} is not supported by the embedded engine; leave {key!r} out")
        elif key not in IGNORED and key not in OWN:
            raise WireError(f"unknown parameter {key!r}; the embedded engine knows {', '.join(sorted(OWN | IGNORED))}")

    max_tokens = _integer(payload, "max_tokens", 16)
    if max_tokens < 1:
        raise WireError(f"max_tokens must be at least 1, got {max_tokens}.")
    temperature = _number(payload, "temperature", 1.0)
    if temperature < 0:
        raise WireError(f"temperature must be non-negative, got {temperature}.")
    top_p = _number(payload, "top_p", 1.0)
    if not 0 < top_p <= 1:
        raise WireError(f"top_p must be in (0, 1], got {top_p}.")
    top_k = _integer(payload, "top_k", 0)
    if top_k < -1:
        raise WireError(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    seed = None if payload.get("seed") is None else _integer(payload, "seed", 0)
    if seed is not None and abs(seed) > MAX_SEED:
        raise WireError(f"seed must fit in 64 bits, got {seed}.")
    counts: dict[str, int | None] = {}
    for key in ("logprobs", "prompt_logprobs"):
        counts[key] = None if payload.get(key) is None else _integer(payload, key, 0)
        if (count := counts[key]) is not None and not 0 <= count <= limits.max_logprobs:
            raise WireError(
                f"Requested {key} of {count}, which is greater than max allowed: {limits.max_logprobs}"
                if count > 0
                else f"{key} must be non-negative, got {count}."
            )
    stop = payload.get("stop_token_ids") or []
    _check_ids("stop_token_ids", stop, limits.vocab_size)
    eos = () if _boolean(payload, "ignore_eos") else limits.eos_token_ids

    requests = []
    for ids in _prompts(payload.get("prompt"), encode):
        if not ids:
            raise WireError("The decoder prompt cannot be empty: prompt has no token ids.")
        _check_ids("prompt", ids, limits.vocab_size)
        if len(ids) + max_tokens > limits.max_model_len:
            raise WireError(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
                f"{max_tokens} output tokens and your prompt contains {len(ids)} input tokens, for a total of "
                f"{len(ids) + max_tokens} tokens. Please reduce the length of the input prompt or the number of "
                "requested output tokens."
            )
        requests.append(
            CompletionRequest(
                prompt_ids=ids,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=max(top_k, 0),
                seed=seed,
                stop_token_ids=frozenset((*stop, *eos)),
                logprobs=counts["logprobs"],
                prompt_logprobs=counts["prompt_logprobs"],
            )
        )
    return requests


def completion_body(
    results: Sequence[tuple[CompletionRequest, CompletionResult]],
    *,
    payload: Mapping[str, Any],
    model: str,
    decode: Callable[[Sequence[int]], str] | None,
) -> dict[str, Any]:
    """The reply, choices in the order of the prompts. Token strings are `token_id:<id>` where the request asks for
    it or there is no tokenizer."""
    ids_as_strings = decode is None or bool(payload.get("return_tokens_as_token_ids"))

    def token(token_id: int) -> str:
        return f"token_id:{token_id}" if ids_as_strings or decode is None else decode([token_id])

    with_ids = bool(payload.get("return_token_ids"))
    choices = []
    for index, (request, result) in enumerate(results):
        prompt_logprobs = None
        if result.prompt_logprobs is not None:
            prompt_logprobs = _prompt_entries(result.prompt_logprobs, decode)
        choices.append(
            {
                "index": index,
                "text": "" if decode is None else decode(result.token_ids),
                "logprobs": None if request.logprobs is None else _legacy_logprobs(result, token),
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
                "token_ids": result.token_ids if with_ids else None,
                "prompt_logprobs": prompt_logprobs,
                "prompt_token_ids": request.prompt_ids if with_ids else None,
            }
        )
    num_prompt = sum(len(request.prompt_ids) for request, _ in results)
    num_sampled = sum(len(result.token_ids) for _, result in results)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + num_sampled,
            "completion_tokens": num_sampled,
            "prompt_tokens_details": {"cached_tokens": sum(result.num_cached_tokens for _, result in results)},
        },
        "weight_version": min(result.weight_version for _, result in results),
    }


def _legacy_logprobs(result: CompletionResult, token: Callable[[int], str]) -> dict[str, Any]:
    tokens = [token(i) for i in result.token_ids]
    if result.candidates:
        top = [dict(zip(map(token, c.token_ids), c.logprobs, strict=True)) for c in result.candidates]
    else:
        top = [{t: logprob} for t, logprob in zip(tokens, result.logprobs, strict=True)]
    offsets, offset = [], 0
    for t in tokens:
        offsets.append(offset)
        offset += len(t)
    return {"tokens": tokens, "token_logprobs": result.logprobs, "top_logprobs": top, "text_offset": offsets}


def _prompt_entries(scores: PromptScores, decode: Callable[[Sequence[int]], str] | None) -> list[Any]:
    flat = [
        (str(token_id), {"logprob": logprob, "rank": rank, "decoded_token": decode and decode([token_id])})
        for token_id, logprob, rank in zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True)
    ]
    if scores.width == 1:
        return [None, *({key: value} for key, value in flat)]
    return [None, *(dict(flat[i : i + scores.width]) for i in range(0, len(flat), scores.width))]


def _prompts(prompt: Any, encode: Callable[[str], list[int]] | None) -> list[list[int]]:
    if isinstance(prompt, str):
        if encode is None:
            raise WireError("prompt is text, but this server has no tokenizer: send token ids")
        return [encode(prompt)]
    if not isinstance(prompt, list):
        raise WireError("prompt must be text, a list of token ids, or a list of those")
    if not prompt:
        raise WireError("The decoder prompt cannot be empty: prompt is [].")
    if isinstance(prompt[0], (str, list)):
        if not all(isinstance(p, type(prompt[0])) for p in prompt):
            raise WireError("prompt mixes text and token ids; send one kind")
        return [ids for p in prompt for ids in _prompts(p, encode)] if isinstance(prompt[0], str) else list(prompt)
    return [prompt]


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, list):
        raise WireError(f"{name} must be a list of token ids, got {type(ids).__name__}")
    # The quick test first: this runs over every prompt of every turn.
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return
    for i, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise WireError(f"{name}[{i}] is {token_id!r}, not a token id")
        if not 0 <= token_id < vocab_size:
            raise WireError(f"Token id {token_id} is out of vocabulary: {name}[{i}], vocabulary of {vocab_size} ids")


def _integer(payload: Mapping[str, Any], key: str, default: int) -> int:
    value = payload.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise WireError(f"{key} must be an integer, got {value!r}")
    return value


def _number(payload: Mapping[str, Any], key: str, default: float) -> float:
    value = payload.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise WireError(f"{key} must be a finite number, got {value!r}")
    return float(value)


def _boolean(payload: Mapping[str, Any], key: str) -> bool:
    value = payload.get(key)
    if value is not None and type(value) is not bool:
        raise WireError(f"{key} must be true or false, got {value!r}")
    return bool(value)
