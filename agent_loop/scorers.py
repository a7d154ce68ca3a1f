"""Three ways to ask a server for the log-probabilities of given tokens; `choose_scorer` probes for the best one.

    fast    /inference/v1/generate  the ids to score go in, float32 comes out, from the first needed row on.
                                    vLLM >= 0.32 on its GPU model runner ("V2"), with --enable-scale-out.
    plugin  /distill/score          any vLLM 0.32 that loads our endpoint plugin (distill/serving/vllm_plugin.py).
    plain   `prompt_logprobs`       JSON for every token of the prompt, from any server of vLLM's format.

All give the same record and hold one rule: a number that is missing, misaligned, not finite or clamped is an error.

Replies are read on the event loop. Those of `fast` and `plugin` take milliseconds for 16,000 tokens. Those of `plain`
take 11 ms at K = 0 and 0.35 s at K = 20, in which no rollout goes on; a thread halves that, because `json.loads` holds
the interpreter lock, and only a process would end it (bench/README.md). The plugin ends it too, and spares the server.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agent_loop.scoring import PromptScores, ScoringError, checked, prompt_logprobs, read_scores
from agent_loop.transport import Transport, TransportError

if TYPE_CHECKING:
    import numpy as np

PROBE_IDS = (1, 2, 3)
"""Ids that every vocabulary has."""


class Scorer(Protocol):
    """One way to score. Raises `ScoringError`."""

    name: str
    reads_prefix_cache: bool
    """Whether sequences with a shared beginning are cheaper on one server, one after the other."""

    async def score(
        self,
        transport: Transport,
        model: str,
        ids: Sequence[int],
        rows: Sequence[int],
        *,
        top_k: int,
        timeout_s: float,
        key: str = "",
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> PromptScores:
        """
        Args:
            ids: [L] the sequence.
            rows: [R] positions of the tokens to score, rising, none of them 0.
            top_k: the model's own likeliest ids a position, beside the token itself.
            key: requests of one key go to one server.
            candidates: [R][K] ids to score a position, instead of the model's own; only `fast` can.
        """
        ...


class PlainScorer:
    """`prompt_logprobs`: every server of vLLM's format.

    Args:
        api: `generate` is /inference/v1/generate, which can leave out the detokenising.
    """

    reads_prefix_cache = False

    def __init__(self, api: Literal["completions", "generate"] = "completions") -> None:
        self.api = api
        self.name = f"plain ({api})"

    async def score(
        self,
        transport: Transport,
        model: str,
        ids: Sequence[int],
        rows: Sequence[int],
        *,
        top_k: int,
        timeout_s: float,
        key: str = "",
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> PromptScores:
        if candidates is not None:
            raise _no_candidates(self.name)
        if self.api == "completions":
            return await prompt_logprobs(
                transport, model, ids, top_k=top_k, timeout_s=timeout_s, key=key, positions=rows
            )
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k, "detokenize": False}
        payload = {"model": model, "token_ids": list(ids), "sampling_params": params}
        reply = await _post(transport, "/inference/v1/generate", payload, timeout_s, key)
        return await asyncio.to_thread(read_scores, reply.get("prompt_logprobs"), ids, top_k, rows)


class FastScorer:
    """`prompt_logprob_start` and `prompt_logprob_token_ids`: the head runs only where it must; 5 bytes an id.

    Awaits its first run on a GPU: vLLM's CPU build refuses the request, so it is tested against its wire format only
    (vllm/sampling_params.py and vllm/v1/worker/gpu/sample/prompt_logprob.py of 0.32.0).
    """

    name = "fast"
    reads_prefix_cache = True

    async def score(
        self,
        transport: Transport,
        model: str,
        ids: Sequence[int],
        rows: Sequence[int],
        *,
        top_k: int,
        timeout_s: float,
        key: str = "",
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> PromptScores:
        if top_k and candidates is None:
            raise ScoringError(f"{self.name}: this request scores given ids and cannot name the likeliest", "rejected")
        start = rows[0] - 1
        asked = [[-1] for _ in range(len(ids) - rows[0])]  # -1: a row that nobody needs
        for i, position in enumerate(rows):
            asked[position - rows[0]] = [ids[position], *(candidates[i] if candidates is not None else ())]
        params: dict[str, Any] = {
            "max_tokens": 1,
            "detokenize": False,
            "prompt_logprob_start": start,
            "prompt_logprob_token_ids": asked,
            # Prefixes that other episodes of the task left in the cache. Where one reaches past `start`, vLLM answers
            # null, and the whole sequence is computed.
            "skip_reading_prefix_cache": False,
        }
        payload = {"model": model, "token_ids": list(ids), "sampling_params": params}
        text = (await _post(transport, "/inference/v1/generate", payload, timeout_s, key)).get(FAST_FIELD)
        if text is None:
            params["skip_reading_prefix_cache"] = True
            text = (await _post(transport, "/inference/v1/generate", payload, timeout_s, key)).get(FAST_FIELD)
        table = read_npy(text, (len(asked), max(map(len, asked))))
        logprobs: list[float | None] = [None] * len(ids)
        topk: list[list[tuple[int, float]] | None] | None = [None] * len(ids) if candidates is not None else None
        values = table[[position - rows[0] for position in rows]].tolist()
        for position, found in zip(rows, values, strict=True):
            wanted = asked[position - rows[0]]
            numbers = [checked(value, position, token) for token, value in zip(wanted, found, strict=False)]
            logprobs[position] = numbers[0]
            if topk is not None:
                topk[position] = list(zip(wanted[1:], numbers[1:], strict=True))
        return PromptScores(logprobs, topk)


FAST_FIELD = "prompt_token_id_logprobs"


class PluginScorer:
    """Our endpoint plugin: only the asked rows come back, ids and numbers, four bytes each."""

    name = "plugin"
    reads_prefix_cache = False

    async def score(
        self,
        transport: Transport,
        model: str,
        ids: Sequence[int],
        rows: Sequence[int],
        *,
        top_k: int,
        timeout_s: float,
        key: str = "",
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> PromptScores:
        if candidates is not None:
            raise _no_candidates(self.name)
        payload = {"model": model, "token_ids": list(ids), "rows": list(rows), "top_k": top_k}
        reply = await _post(transport, "/distill/score", payload, timeout_s, key)
        return read_table(reply, ids, rows, top_k)


def read_table(reply: Mapping[str, Any], ids: Sequence[int], rows: Sequence[int], top_k: int) -> PromptScores:
    """The plugin's reply: two arrays [R, 1 + K], the token itself before the likeliest.

    Raises:
        ScoringError: another size, another token's row, a number that cannot be used.
    """
    import numpy as np

    shape = (len(rows), 1 + top_k)
    token_ids = _array(reply.get("ids"), np.dtype("<i4"), shape)
    values = _array(reply.get("logprobs"), np.dtype("<f4"), shape)
    logprobs: list[float | None] = [None] * len(ids)
    topk: list[list[tuple[int, float]] | None] | None = [None] * len(ids) if top_k else None
    for position, found, numbers in zip(rows, token_ids.tolist(), values.tolist(), strict=True):
        if found[0] != ids[position]:
            raise ScoringError(f"the reply has id {found[0]} for token {position} (id {ids[position]})", "protocol")
        entries = [(token, checked(value, position, token)) for token, value in zip(found, numbers, strict=True)]
        logprobs[position] = entries[0][1]
        if topk is not None:
            topk[position] = entries[1:]
    return PromptScores(logprobs, topk)


def read_npy(text: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Base64 of a float32 `.npy` file. The header is checked before anything of its size is made; nothing is unpickled.

    Raises:
        ScoringError: no such file, or one of another shape or type.
    """
    import numpy as np

    file = io.BytesIO(_bytes(text))
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, by_column, dtype = read(file)
    except ValueError as error:
        raise ScoringError(f"the scores are no .npy file: {error}", "protocol") from None
    if found != shape or by_column or dtype != np.dtype("<f4"):
        raise ScoringError(f"the scores are {dtype} {found}, not float32 {shape}", "protocol")
    return _reshape(file.read(), np.dtype("<f4"), shape)


def _array(text: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return _reshape(_bytes(text), dtype, shape)


def _reshape(raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    import numpy as np

    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if len(raw) != expected:
        raise ScoringError(f"{len(raw)} bytes of scores came back, not {expected} for {shape} numbers", "protocol")
    return np.frombuffer(raw, dtype).reshape(shape)


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ScoringError(f"the reply has {_short(text)} where base64 scores belong", "protocol") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


async def _post(
    transport: Transport, path: str, payload: Mapping[str, Any], timeout_s: float, key: str
) -> dict[str, Any]:
    try:
        return await transport.post_json(path, payload, timeout_s=timeout_s, key=key)
    except TransportError as error:
        raise ScoringError(str(error), error.kind) from error


def _no_candidates(name: str) -> ScoringError:
    return ScoringError(
        f"{name}: the server gives its own likeliest ids and cannot score given ones. Only vLLM >= 0.32 on a GPU with "
        '--enable-scale-out can; take loss.candidates = "teacher"',
        "rejected",
    )


async def choose_scorer(
    transport: Transport, model: str, *, top_k: int = 0, given_ids: bool = False, timeout_s: float = 120.0
) -> Scorer:
    """The best way that the server answers, found by scoring three tokens.

    Args:
        top_k: candidates a position that will be asked for; `fast` cannot name the likeliest.
        given_ids: they will be given; nothing but `fast` can score those.

    Raises:
        ScoringError: the server is not there, or `given_ids` and it cannot.
    """
    tried: list[Scorer] = []
    if given_ids or not top_k:
        tried.append(FastScorer())
    if not given_ids:
        tried += [PluginScorer(), PlainScorer("generate")]
    reason = ""
    for scorer in tried:
        rows = range(1, len(PROBE_IDS))
        candidates = [list(range(max(1, top_k)))] * len(rows) if given_ids else None
        k = 0 if given_ids else top_k
        try:
            await scorer.score(
                transport, model, PROBE_IDS, rows, top_k=k, timeout_s=timeout_s, key="", candidates=candidates
            )
        except ScoringError as error:
            if error.kind == "unavailable":
                raise
            reason = str(error)
        else:
            return scorer
    if given_ids:
        raise ScoringError(
            'loss.candidates = "student" needs a teacher that scores given ids, which is vLLM >= 0.32 on a GPU with '
            f'--enable-scale-out; take "teacher". This one: {reason}',
            "rejected",
        )
    return PlainScorer()  # whose errors say what is wrong, if it cannot either
