"""`POST /v1/completions` and its neighbours, as docs/serving.md promises them of every engine.

Requests and expectations follow what was observed of vLLM 0.32; nothing here is particular to one engine.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from tests.conformance.conftest import Server
from tests.conformance.models import reference, token_logprobs

SAMPLE: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "logprobs": 0,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "ignore_eos": True,
}


def prompt(seed: int, length: int = 24) -> list[int]:
    return random.Random(seed).choices(range(1, 512), k=length)


async def test_the_model_says_its_name_and_context_length(server: Server) -> None:
    card = (await server.get("/v1/models")).body["data"][0]
    assert card["id"] == server.model
    assert card["max_model_len"] == server.max_model_len


async def test_health_and_version(server: Server) -> None:
    assert (await server.get("/health")).status == 200
    assert isinstance((await server.get("/version")).body["version"], str)


async def test_an_unknown_route_is_404(server: Server) -> None:
    assert (await server.get("/v1/nothing")).status == 404


async def test_ids_in_ids_out(server: Server) -> None:
    body = await server.complete(prompt=prompt(0), max_tokens=12, **SAMPLE)
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == prompt(0)
    assert len(choice["token_ids"]) == 12
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert body["usage"]["prompt_tokens"] == 24
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == 36
    assert body["model"] == server.model


async def test_sampling_logprobs_are_those_of_a_plain_forward(server: Server) -> None:
    choice = (await server.complete(prompt=prompt(1), max_tokens=40, **SAMPLE))["choices"][0]
    expected = token_logprobs(server.reference, prompt(1) + choice["token_ids"])[23:]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=server.tolerance)


async def test_prompt_logprobs_of_what_was_sampled_are_the_sampling_logprobs(server: Server) -> None:
    sampled = (await server.complete(prompt=prompt(2), max_tokens=40, **SAMPLE))["choices"][0]
    ids = prompt(2) + sampled["token_ids"]
    body = await server.complete(prompt=ids, max_tokens=1, prompt_logprobs=0)
    entries = body["choices"][0]["prompt_logprobs"]
    scored = [entry[str(i)]["logprob"] for i, entry in zip(ids[24:], entries[24:], strict=True)]
    assert scored == pytest.approx(sampled["logprobs"]["token_logprobs"], abs=server.tolerance)


async def test_prompt_logprobs_0_has_the_actual_token_alone(server: Server) -> None:
    ids = prompt(3)
    entries = (await server.complete(prompt=ids, max_tokens=1, prompt_logprobs=0))["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert [list(entry) for entry in entries[1:]] == [[str(i)] for i in ids[1:]]
    logprobs = reference(server.reference, ids)
    for position, entry in enumerate(entries[1:]):
        value = entry[str(ids[position + 1])]
        assert value["logprob"] == pytest.approx(float(logprobs[position, ids[position + 1]]), abs=server.tolerance)
        better = int((logprobs[position] > logprobs[position, ids[position + 1]]).sum())
        assert value["rank"] == better + 1
        assert "decoded_token" in value


async def test_prompt_logprobs_k_has_the_actual_token_first_and_the_best_k(server: Server) -> None:
    ids = prompt(4)
    entries = (await server.complete(prompt=ids, max_tokens=1, prompt_logprobs=5))["choices"][0]["prompt_logprobs"]
    best = reference(server.reference, ids).topk(5)
    for position, entry in enumerate(entries[1:]):
        assert len(entry) in (5, 6)
        assert next(iter(entry)) == str(ids[position + 1])
        for token_id, logprob in zip(best.indices[position].tolist(), best.values[position].tolist(), strict=True):
            assert entry[str(token_id)]["logprob"] == pytest.approx(logprob, abs=server.tolerance)


async def test_logprobs_k_has_the_sampled_token_and_the_best_k(server: Server) -> None:
    choice = (await server.complete(prompt=prompt(5), max_tokens=8, **{**SAMPLE, "logprobs": 3}))["choices"][0]
    best = reference(server.reference, prompt(5) + choice["token_ids"])[23:-1].topk(3)
    logprobs = choice["logprobs"]
    for n, candidates in enumerate(logprobs["top_logprobs"]):
        assert len(candidates) in (3, 4)
        assert candidates[logprobs["tokens"][n]] == pytest.approx(logprobs["token_logprobs"][n], abs=1e-6)
        for token_id, logprob in zip(best.indices[n].tolist(), best.values[n].tolist(), strict=True):
            assert candidates[f"token_id:{token_id}"] == pytest.approx(logprob, abs=server.tolerance)


async def test_temperature_0_takes_the_likeliest(server: Server) -> None:
    choice = (await server.complete(prompt=prompt(6), max_tokens=16, **{**SAMPLE, "temperature": 0}))["choices"][0]
    best = reference(server.reference, prompt(6) + choice["token_ids"])[23:-1].argmax(-1)
    assert choice["token_ids"] == best.tolist()


async def test_a_stop_id_ends_the_completion_and_is_part_of_it(server: Server) -> None:
    greedy = {**SAMPLE, "temperature": 0}
    whole = (await server.complete(prompt=prompt(7), max_tokens=16, **greedy))["choices"][0]["token_ids"]
    stop = whole[3]
    first = whole.index(stop)
    choice = (await server.complete(prompt=prompt(7), max_tokens=16, stop_token_ids=[stop], **greedy))["choices"][0]
    assert choice["token_ids"] == whole[: first + 1]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert len(choice["logprobs"]["token_logprobs"]) == first + 1


async def test_a_seed_fixes_the_draw(server: Server) -> None:
    bodies = [await server.complete(prompt=prompt(8), max_tokens=24, seed=5, **SAMPLE) for _ in range(2)]
    others = [await server.complete(prompt=prompt(8), max_tokens=24, seed=s, **SAMPLE) for s in (6, 7)]
    drawn = [body["choices"][0]["token_ids"] for body in (*bodies, *others)]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) == 3


async def test_top_k_and_top_p_leave_out_the_rest(server: Server) -> None:
    best = reference(server.reference, prompt(9))[-1].sort(descending=True)
    top_p = float(best.values[:4].exp().sum()) - 1e-4
    requests = [
        server.complete(prompt=prompt(9), max_tokens=1, seed=s, **{**SAMPLE, **cut})
        for s in range(40)
        for cut in ({"top_k": 3}, {"top_p": top_p})
    ]
    bodies = await asyncio.gather(*requests)
    drawn = [body["choices"][0]["token_ids"][0] for body in bodies]
    assert set(drawn[0::2]) <= set(best.indices[:3].tolist())
    assert set(drawn[1::2]) <= set(best.indices[:4].tolist())
    assert len(set(drawn)) > 1


async def test_requests_of_all_kinds_at_once_do_not_disturb_each_other(server: Server) -> None:
    async def sample(n: int) -> None:
        ids = prompt(100 + n, 5 + 3 * n)
        choice = (await server.complete(prompt=ids, max_tokens=4 + n % 7, seed=n, **SAMPLE))["choices"][0]
        expected = token_logprobs(server.reference, ids + choice["token_ids"])[len(ids) - 1 :]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=server.tolerance)

    async def score(n: int) -> None:
        ids = prompt(200 + n, 3 + 7 * n)
        entries = (await server.complete(prompt=ids, max_tokens=1, prompt_logprobs=0))["choices"][0]["prompt_logprobs"]
        scored = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], entries[1:], strict=True)]
        assert scored == pytest.approx(token_logprobs(server.reference, ids), abs=server.tolerance)

    await asyncio.gather(*(sample(n) for n in range(24)), *(score(n) for n in range(24)))


async def test_a_dialogue_that_grows_turn_by_turn(server: Server) -> None:
    ids = prompt(10)
    for turn in range(4):
        choice = (await server.complete(prompt=ids, max_tokens=12, seed=turn, **SAMPLE))["choices"][0]
        longer = ids + choice["token_ids"]
        expected = token_logprobs(server.reference, longer)[len(ids) - 1 :]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=server.tolerance)
        ids = longer + prompt(20 + turn, 9)


async def test_several_prompts_answer_in_order(server: Server) -> None:
    prompts = [prompt(30, 9), prompt(31, 3), prompt(32, 20)]
    body = await server.complete(prompt=prompts, max_tokens=5, **SAMPLE)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == prompts


async def test_a_prompt_of_text(server: Server) -> None:
    body = await server.complete(prompt="w5 w6 w7", max_tokens=3, **{**SAMPLE, "return_tokens_as_token_ids": False})
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert choice["logprobs"]["tokens"] == [f"w{i}" for i in choice["token_ids"]]


@pytest.mark.parametrize(
    ("payload", "status", "word"),
    [
        ({"prompt": [1, 2], "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": [1] * 300, "max_tokens": 1}, 400, "maximum context length"),
        ({"prompt": [], "max_tokens": 1}, 400, "prompt"),
        ({"prompt": [1, 512], "max_tokens": 1}, 400, "out of vocabulary"),
        ({"prompt": [1, 2], "max_tokens": 1, "logprobs": 21}, 400, "logprobs"),
        ({"prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 21}, 400, "logprobs"),
        ({"prompt": [1, 2], "max_tokens": 1, "temperature": -1}, 400, "temperature"),
        ({"prompt": [1, 2], "max_tokens": 1, "top_p": 0}, 400, "top_p"),
        ({"prompt": [1, 2], "max_tokens": 1, "model": "another"}, 404, "another"),
    ],
)
async def test_a_bad_request_is_refused_in_words(server: Server, payload: Any, status: int, word: str) -> None:
    reply = await server.refuse(**payload)
    assert reply.status == status
    assert word in reply.body["error"]["message"]
    assert reply.body["error"]["code"] == status


async def test_a_completion_that_may_not_fit_is_cut_or_refused(server: Server) -> None:
    """The embedded engine refuses it; vLLM 0.32 answers as far as its context goes. A run asks for what fits."""
    payload = {"model": server.model, "prompt": [1] * 250, "max_tokens": 20, "ignore_eos": True}
    reply = await server.request("POST", "/v1/completions", payload)
    if reply.status == 200:
        assert reply.body["usage"]["total_tokens"] <= server.max_model_len
        assert reply.body["choices"][0]["finish_reason"] == "length"
    else:
        assert (reply.status, "maximum context length" in reply.body["error"]["message"]) == (400, True)


async def test_draws_follow_the_distribution(server: Server) -> None:
    """Total variation between 1,000 seeded draws and the model, over its ten likeliest tokens and the rest."""
    probs = reference(server.reference, prompt(11))[-1].exp()
    bodies = await asyncio.gather(
        *(server.complete(prompt=prompt(11), max_tokens=1, seed=s, return_token_ids=True) for s in range(1000))
    )
    drawn = torch.tensor([body["choices"][0]["token_ids"][0] for body in bodies])
    frequency = torch.bincount(drawn, minlength=server.vocab_size) / len(drawn)
    best = probs.topk(10).indices
    distance = 0.5 * ((frequency[best] - probs[best]).abs().sum() + (frequency[best].sum() - probs[best].sum()).abs())
    assert float(distance) < 0.06
