"""What the scoring plugin takes and what it makes of the engine's rows. tests/vllm has it inside a real server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent_loop.scorers import read_table
from distill.serving.vllm_plugin import Refused, ScoreRequest, read_request, write_reply

GOOD: dict[str, Any] = {"model": "m", "token_ids": [5, 8, 2, 9], "rows": [1, 3], "top_k": 2}


def read(**changes: Any) -> ScoreRequest:
    body = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return read_request(body, vocab_size=10, max_model_len=8, max_logprobs=4)


def test_a_good_request() -> None:
    assert read() == ScoreRequest("m", [5, 8, 2, 9], [1, 3], 2)
    assert read(rows=..., start=2).rows == [2, 3]
    assert read(top_k=...).top_k == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model must be a name"),
        ({"token_ids": [5]}, "at least 2"),
        ({"token_ids": "5 8"}, "list of at least 2 integers"),
        ({"token_ids": [5, 8.0]}, "integers"),
        ({"token_ids": [5, True]}, "integers"),
        ({"token_ids": [5, 10]}, "outside of the vocabulary of 10"),
        ({"token_ids": [-1, 5]}, "outside of the vocabulary"),
        ({"token_ids": [1] * 8}, "maximum context length is 8 tokens"),
        ({"rows": []}, "positions from 1 to 3"),
        ({"rows": [0]}, "positions from 1 to 3"),
        ({"rows": [4]}, "positions from 1 to 3"),
        ({"rows": [1] * 5}, "positions from 1 to 3"),
        ({"rows": ["1"]}, "positions from 1 to 3"),
        ({"start": 1}, "either rows or start"),
        ({"rows": ...}, "either rows or start"),
        ({"rows": ..., "start": 0}, "start is 0"),
        ({"rows": ..., "start": 4}, "start is 4, not 1 to 3"),
        ({"top_k": 5}, "top_k is 5, not 0 to 4"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.0}, "top_k is 1.0"),
        ({"temperature": 1}, "unknown field 'temperature'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        read(**changes)
    assert caught.value.status == 400
    with pytest.raises(Refused, match="JSON object"):
        read_request([], vocab_size=10, max_model_len=8, max_logprobs=4)


@dataclass
class Flat:
    """The fields of vLLM's `FlatLogprobs` that are read."""

    start_indices: list[int] = field(default_factory=lambda: [0, 0, 3, 6])
    end_indices: list[int] = field(default_factory=lambda: [0, 3, 6, 9])
    token_ids: list[int] = field(default_factory=lambda: [8, 8, 1, 2, 4, 2, 9, 0, 3])
    logprobs: list[float] = field(default_factory=lambda: [-1.0, -1.0, -2.0, -5.0, -0.5, -1.5, -3.0, -0.25, -1.0])


def test_the_client_reads_what_the_server_writes() -> None:
    scores = read_table(write_reply(read(), Flat()), GOOD["token_ids"], GOOD["rows"], 2)
    assert scores.logprobs == [None, -1.0, None, -3.0]
    assert scores.topk == [None, [(8, -1.0), (1, -2.0)], None, [(0, -0.25), (3, -1.0)]]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (Flat(start_indices=[0, 0, 3], end_indices=[0, 3, 6]), "scored 3 of 4 tokens"),
        (Flat(end_indices=[0, 2, 6, 9]), "rows of another size than 3"),
        (Flat(token_ids=[8, 8, 1, 2, 4, 2, 7, 0, 3]), "belong to other tokens"),
    ],
)
def test_rows_of_another_sequence_never_leave_the_server(flat: Flat, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        write_reply(read(), flat)
    assert caught.value.status == 503
