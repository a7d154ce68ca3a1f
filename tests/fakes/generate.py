"""The format of vLLM's `/inference/v1/generate`, and the scores of given ids that only its GPU model runner answers.

Written from vllm 0.32.0: entrypoints/scale_out/token_in_token_out/protocol.py, sampling_params.py,
v1/engine/input_processor.py, v1/worker/gpu/sample/prompt_logprob.py, utils/serial_utils.py.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.fakes.invented import InventedModel


def as_generated(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A reply of `/v1/completions` in the other endpoint's words."""
    choice = completion["choices"][0]
    ids, sampled = choice["token_ids"] or [], choice["logprobs"]
    version = str(completion.get("weight_version", "default"))
    content = [
        {"token_id": i, "logprob": p, "rank": 1, "top_logprobs": [{"token_id": i, "logprob": p, "rank": 1}]}
        for i, p in zip(ids, sampled["token_logprobs"] if sampled else (), strict=False)
    ]
    return {
        "request_id": "generate-tokens-1",
        "model": completion["model"],
        "usage": completion["usage"],
        "prompt_logprobs": choice["prompt_logprobs"],
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": choice["prompt_token_ids"],
        "output_mode": "tokens",
        "choices": [
            {
                "index": 0,
                "finish_reason": choice["finish_reason"],
                "stop_reason": choice["stop_reason"],
                "token_ids": ids,
                "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
                "logprobs": {"content": content} if sampled else None,
            }
        ],
    }


def score_given_ids(
    model: InventedModel, ids: Sequence[int], params: Mapping[str, Any], *, cached_tokens: int, fault: str | None
) -> str | None:
    """Base64 of a float32 .npy [rows, K]: row i scores the ids given for prompt token `prompt_logprob_start + i + 1`.
    None where the cached prefix reaches past the first row.

    Raises:
        ValueError: what vLLM answers 400 to.
    """
    asked, start = params["prompt_logprob_token_ids"], params.get("prompt_logprob_start") or 0
    if len(asked) != len(ids) - 1 - start:
        raise ValueError(
            f"prompt_logprob_token_ids has {len(asked)} rows, but the prompt has {len(ids) - 1 - start} scored rows "
            "(prompt_len - 1 - prompt_logprob_start)."
        )
    if outside := [i for row in asked for i in row if not -1 <= i < model.vocab_size]:
        raise ValueError(f"prompt_logprob_token_ids contain out-of-vocab token ids: {outside[0]}")
    if fault == "null" or (params.get("skip_reading_prefix_cache") is False and cached_tokens > start):
        return None
    states = model.states(ids)
    table = np.full((len(asked), max(map(len, asked))), -math.inf, np.float32)
    for i, row in enumerate(asked):
        for k, token_id in enumerate(row):
            if token_id >= 0:
                table[i, k] = model.logprob(states[start + i + 1], token_id)
    if fault in ("minus_9999", "nan"):
        table[:] = -9999.0 if fault == "minus_9999" else math.nan
    if fault == "short":
        table = table[:-1]
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()
