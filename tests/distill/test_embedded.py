"""What is particular to the embedded engine: batching, its cache, weights, cancellation, failure."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from distill.serving.embedded import EmbeddedEngine
from distill.serving.slots import slot_attention
from tests.conformance.conftest import Server, Serving, in_process
from tests.conformance.models import save, tiny_llama, tiny_mistral, tiny_qwen3, token_logprobs

Start = Callable[..., tuple[EmbeddedEngine, Server]]
SAMPLE: dict[str, Any] = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    engines: list[EmbeddedEngine] = []

    def start(make: Callable[..., PreTrainedModel] = tiny_qwen3, **options: Any) -> tuple[EmbeddedEngine, Server]:
        engine = EmbeddedEngine(make(), None, name="tiny", **options)
        engines.append(engine)
        limit = engine.limits.max_model_len
        return engine, Server(in_process(engine.app), model="tiny", reference=make(), max_model_len=limit)

    yield start
    for engine in engines:
        await engine.aclose()


def prompt(seed: int, length: int = 24) -> list[int]:
    return random.Random(seed).choices(range(1, 512), k=length)


def assert_true_logprobs(server: Server, ids: list[int], body: Any) -> list[int]:
    choice = body["choices"][0]
    expected = token_logprobs(server.reference, ids + choice["token_ids"])[len(ids) - 1 :]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    return [*ids, *choice["token_ids"]]


def cached(body: Any) -> int:
    return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_mistral])
async def test_dialogues_join_and_leave_at_any_time(start: Start, make: Callable[..., PreTrainedModel]) -> None:
    """Ragged episodes over more slots than the batch has, so that they wait, overtake and evict each other."""
    _, server = start(make, max_batch=6)

    async def dialogue(n: int) -> None:
        rng = random.Random(n)
        ids = prompt(n, rng.randint(2, 60))
        for turn in range(4):
            await asyncio.sleep(rng.random() * 0.02)
            body = await server.complete(prompt=ids, max_tokens=rng.randint(1, 30), seed=n, **SAMPLE)
            ids = assert_true_logprobs(server, ids, body) + prompt(1000 * n + turn, rng.randint(1, 20))

    await asyncio.gather(*(dialogue(n) for n in range(20)))


async def test_the_next_turn_computes_only_what_is_new(start: Start) -> None:
    _, server = start()
    ids = prompt(0)
    body = await server.complete(prompt=ids, max_tokens=10, **SAMPLE)
    assert cached(body) == 0
    ids = assert_true_logprobs(server, ids, body)
    # The last sampled token was never fed.
    body = await server.complete(prompt=[*ids, *prompt(1)], max_tokens=10, **SAMPLE)
    assert cached(body) == len(ids) - 1
    assert_true_logprobs(server, [*ids, *prompt(1)], body)


async def test_a_shared_beginning_is_copied_and_its_owner_keeps_it(start: Start) -> None:
    _, server = start()
    system = prompt(0, 100)
    first = await server.complete(prompt=[*system, 5], max_tokens=10, **SAMPLE)
    second = await server.complete(prompt=[*system, 9, 9], max_tokens=10, **SAMPLE)
    assert cached(second) == 100
    assert_true_logprobs(server, [*system, 9, 9], second)
    ids = assert_true_logprobs(server, [*system, 5], first)
    assert cached(await server.complete(prompt=[*ids, 3], max_tokens=2, **SAMPLE)) == 110


async def test_a_group_of_one_prompt_computes_it_once(start: Start) -> None:
    _, server = start()
    ids = prompt(0, 200)
    bodies = await asyncio.gather(
        *(server.complete(prompt=ids, max_tokens=8, seed=s, **SAMPLE) for s in range(8)),
    )
    assert sorted(map(cached, bodies)) == [0] + [199] * 7
    for body in bodies:
        assert_true_logprobs(server, ids, body)


async def test_a_prefix_is_not_read_for_scoring(start: Start) -> None:
    _, server = start()
    ids = prompt(0)
    await server.complete(prompt=ids, max_tokens=1, **SAMPLE)
    body = await server.complete(prompt=ids, max_tokens=1, prompt_logprobs=0)
    assert cached(body) == 0
    assert len(body["choices"][0]["prompt_logprobs"]) == len(ids)


async def test_scoring_and_a_long_completion_in_one_request(start: Start) -> None:
    _, server = start()
    ids = prompt(0)
    body = await server.complete(prompt=ids, max_tokens=9, prompt_logprobs=0, **SAMPLE)
    assert_true_logprobs(server, ids, body)
    entries = body["choices"][0]["prompt_logprobs"]
    scored = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], entries[1:], strict=True)]
    assert scored == pytest.approx(token_logprobs(server.reference, ids), abs=1e-4)


async def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(start: Start) -> None:
    _, server = start()
    options = {"max_tokens": 30, "temperature": 0.8, "top_p": 0.9, "top_k": 50, **SAMPLE}

    async def draw(n: int) -> list[int]:
        body = await server.complete(prompt=prompt(n, 10 + n), seed=n, **options)
        return list(body["choices"][0]["token_ids"])

    alone = [await draw(n) for n in range(12)]
    others = [server.complete(prompt=prompt(900 + n, 50), max_tokens=40, **SAMPLE) for n in range(20)]
    neighbours = asyncio.gather(*others)
    assert list(await asyncio.gather(*map(draw, range(12)))) == alone
    await neighbours


async def test_logprobs_are_of_the_distribution_drawn_from(start: Start) -> None:
    _, server = start()
    ids = prompt(0)
    options = {"temperature": 0.5, "top_k": 3, "seed": 1, **SAMPLE, "logprobs": 5}
    body = await server.complete(prompt=ids, max_tokens=20, **options)
    choice = body["choices"][0]
    with torch.no_grad():
        logits = server.reference(torch.tensor([ids + choice["token_ids"]])).logits[0, len(ids) - 1 : -1] / 0.5
    kept = logits.topk(3)
    for n, (values, tokens) in enumerate(zip(kept.values.log_softmax(-1).tolist(), kept.indices.tolist(), strict=True)):
        expected = {f"token_id:{t}": v for t, v in zip(tokens, values, strict=True)}
        assert choice["logprobs"]["top_logprobs"][n] == pytest.approx(expected, abs=1e-4)


async def test_top_p_keeps_the_fewest_tokens_that_reach_it(start: Start) -> None:
    _, server = start()
    with torch.no_grad():
        probs = server.reference(torch.tensor([prompt(3)])).logits[0, -1].softmax(-1).sort(descending=True).values
    top_p = float(probs[:3].sum()) + 1e-4
    body = await server.complete(prompt=prompt(3), max_tokens=1, top_p=top_p, **{**SAMPLE, "logprobs": 20})
    assert len(body["choices"][0]["logprobs"]["top_logprobs"][0]) == 4


async def test_the_models_own_eos_ends_a_completion_without_a_stop_reason(start: Start) -> None:
    engine, server = start(lambda: tiny_qwen3(eos_token_id=list(range(512))))
    assert engine.limits.eos_token_ids == tuple(range(512))
    options = {"prompt": prompt(0), "max_tokens": 9, "return_token_ids": True}
    choice = (await server.complete(**options))["choices"][0]
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (1, "stop")
    choice = (await server.complete(**options, ignore_eos=True))["choices"][0]
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (9, "length")


# Weights.


async def test_new_weights_answer_from_then_on_and_drop_the_cache(start: Start) -> None:
    engine, server = start()
    ids = prompt(0)
    body = await server.complete(prompt=ids, max_tokens=10, **SAMPLE)
    assert body["weight_version"] == 0
    ids = assert_true_logprobs(server, ids, body)
    new = tiny_qwen3(seed=1)
    await engine.load_weights(new.state_dict(), 7)
    body = await server.complete(prompt=ids, max_tokens=10, **SAMPLE)
    assert body["weight_version"] == 7
    assert cached(body) == 0
    expected = token_logprobs(new, ids + body["choices"][0]["token_ids"])[len(ids) - 1 :]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert (await server.get("/weight_info")).body == {"weight_version": 7}


async def test_weights_change_between_completions_and_never_inside_one(start: Start) -> None:
    engine, server = start()
    models = {0: tiny_qwen3(), 1: tiny_qwen3(seed=1)}

    async def sample(n: int) -> int:
        await asyncio.sleep(0.002 * n)
        ids = prompt(n)
        body = await server.complete(prompt=ids, max_tokens=40, **SAMPLE)
        expected = token_logprobs(models[body["weight_version"]], ids + body["choices"][0]["token_ids"])[23:]
        assert body["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        return int(body["weight_version"])

    async def update() -> None:
        await asyncio.sleep(0.02)
        await engine.load_weights(models[1].state_dict(), 1)

    versions, _ = await asyncio.gather(asyncio.gather(*(sample(n) for n in range(20))), update())
    assert set(versions) == {0, 1}


async def test_weights_from_a_folder(start: Start, tmp_path: Path) -> None:
    engine, server = start()
    new = save(tiny_qwen3(seed=2), tmp_path)
    await engine.load_weights(new, 3)
    body = await server.complete(prompt=prompt(0), max_tokens=5, **SAMPLE)
    expected = token_logprobs(tiny_qwen3(seed=2), prompt(0) + body["choices"][0]["token_ids"])[23:]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


async def test_a_tied_head_may_be_left_out_but_not_contradict(start: Start) -> None:
    engine, _ = start()
    weights = {name: tensor.clone() for name, tensor in tiny_qwen3(seed=1).state_dict().items()}
    head = weights.pop("lm_head.weight")
    await engine.load_weights(weights, 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
        await engine.load_weights({**weights, "lm_head.weight": head + 1}, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"'model\.norm\.weight' is missing"),
        (lambda w: w.update({"base_model.x": torch.zeros(1)}), r"no parameter 'base_model\.x'"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"shape \[3\], not \[64\]"),
        (lambda w: w["model.norm.weight"].fill_(float("nan")), r"not finite"),
    ],
)
async def test_wrong_weights_change_nothing(start: Start, change: Callable[[Any], Any], message: str) -> None:
    engine, server = start()
    weights = {name: tensor.clone() for name, tensor in tiny_qwen3(seed=1).state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=message):
        await engine.load_weights(weights, 1)
    body = await server.complete(prompt=prompt(0), max_tokens=5, **SAMPLE)
    assert body["weight_version"] == 0
    assert_true_logprobs(server, prompt(0), body)


async def test_an_empty_folder_is_no_weights(start: Start, tmp_path: Path) -> None:
    engine, _ = start()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        await engine.load_weights(tmp_path, 1)


# Clients that go, and things that break.


async def test_a_cancelled_request_frees_its_slot(start: Start) -> None:
    _, server = start(max_batch=1)
    began = time.perf_counter()
    await server.complete(prompt=prompt(0), max_tokens=900, **SAMPLE)
    whole = time.perf_counter() - began
    # With one slot, a request cannot begin before the one that runs has ended.
    long = asyncio.ensure_future(server.complete(prompt=prompt(0), max_tokens=900, **SAMPLE))
    queued = asyncio.ensure_future(server.complete(prompt=prompt(1), max_tokens=900, **SAMPLE))
    await asyncio.sleep(0.02)
    began = time.perf_counter()
    long.cancel()
    queued.cancel()
    body = await server.complete(prompt=prompt(2), max_tokens=5, **SAMPLE)
    assert time.perf_counter() - began < whole / 2
    assert_true_logprobs(server, prompt(2), body)
    for task in (long, queued):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_client_that_hangs_up_frees_its_slot(start: Start) -> None:
    engine, server = start(max_batch=1)
    began = time.perf_counter()
    await server.complete(prompt=prompt(0), max_tokens=900, **SAMPLE)
    whole = time.perf_counter() - began
    with Serving(engine.app) as url:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=whole / 8)) as session:
            payload = {"model": "tiny", "prompt": prompt(0), "max_tokens": 900, **SAMPLE}
            began = time.perf_counter()
            with pytest.raises(asyncio.TimeoutError):
                await session.post(f"{url}/v1/completions", json=payload)
        await server.complete(prompt=prompt(2), max_tokens=5, **SAMPLE)
        assert time.perf_counter() - began < whole / 2


async def test_logits_that_are_not_finite_are_an_error_and_never_a_number(start: Start) -> None:
    def broken() -> PreTrainedModel:
        model = tiny_llama()
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = float("nan")
        return model

    _, server = start(broken)
    good = [i if i != 7 else 8 for i in prompt(0)]
    for payload in ({"max_tokens": 4, **SAMPLE}, {"max_tokens": 1, "prompt_logprobs": 0}):
        reply, body = await asyncio.gather(
            server.refuse(prompt=[1, 7, 3], **payload), server.complete(prompt=good, max_tokens=4, **SAMPLE)
        )
        assert reply.status == 500
        assert "not finite" in reply.body["error"]["message"]
        # Its neighbour, and whoever gets the slot next, are none the worse.
        assert all(value <= 0 for value in body["choices"][0]["logprobs"]["token_logprobs"])


async def test_a_crash_in_the_engine_fails_what_is_in_flight_and_no_more(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def fragile() -> PreTrainedModel:
        model = tiny_qwen3()

        def refuse_13(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            if (args[0] == 13).any():
                raise RuntimeError("out of memory")

        model.get_input_embeddings().register_forward_pre_hook(refuse_13)
        return model

    engine = EmbeddedEngine(fragile(), None, name="tiny")
    server = Server(in_process(engine.app), model="tiny", reference=tiny_qwen3(), max_model_len=1024)
    for payload in ({"max_tokens": 4}, {"max_tokens": 1, "prompt_logprobs": 0}):
        reply = await server.refuse(prompt=[1, 13, 2], **payload)
        assert reply.status == 500
        assert "out of memory" in reply.body["error"]["message"]
    assert "engine failed" in caplog.text
    body = await server.complete(prompt=[1, 2, 3], max_tokens=1, **SAMPLE)
    assert_true_logprobs(server, [1, 2, 3], body)
    assert (await server.get("/health")).status == 200
    await engine.aclose()


async def test_a_closed_engine_says_so(start: Start) -> None:
    engine, server = start()
    pending = asyncio.ensure_future(server.refuse(prompt=prompt(0), max_tokens=900, ignore_eos=True))
    await asyncio.sleep(0.02)
    await engine.aclose()
    assert (await pending).status == 503
    assert (await server.refuse(prompt=prompt(0), max_tokens=1)).status == 503
    assert (await server.get("/health")).status == 503


# Limits.


async def test_requests_wait_for_the_cache_to_have_room(start: Start) -> None:
    # 2 layers, keys and values, 2 heads of 32 in float32: 1 KiB a token; a quarter MiB holds 256 tokens.
    _, server = start(kv_cache_gib=256 / 2**20)
    assert server.max_model_len == 256

    async def sample(n: int) -> None:
        ids = prompt(n, 20 + 10 * n)
        assert_true_logprobs(server, ids, await server.complete(prompt=ids, max_tokens=30, **SAMPLE))

    await asyncio.gather(*(sample(n) for n in range(20)))
    await sample(1)


def test_a_context_that_the_cache_cannot_hold_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="max_model_len=512"):
        EmbeddedEngine(tiny_qwen3(), None, name="tiny", max_model_len=512, kv_cache_gib=256 / 2**20)


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"n": 2}, "n=2"),
        ({"echo": True}, "echo"),
        ({"stream": True}, "stream"),
        ({"stop": ["x"]}, "stop"),
        ({"min_p": 0.1}, "min_p"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": [512]}, "stop_token_ids[0]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1, 2.0]}, "prompt[1]"),
        ({"prompt": [[1], "w1"]}, "mixes"),
        ({"prompt": [[1], []]}, "empty"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "text"}, "no tokenizer"),
    ],
)
async def test_what_it_has_not_is_refused_by_name(start: Start, payload: Any, word: str) -> None:
    _, server = start()
    reply = await server.refuse(**{"prompt": [1, 2], "max_tokens": 1, **payload})
    assert reply.status == 400
    assert word in reply.body["error"]["message"]


async def test_a_body_that_is_no_request(start: Start) -> None:
    engine, server = start()
    assert (await server.request("POST", "/v1/completions", [1])).status == 400
    assert (await server.request("DELETE", "/v1/completions", None)).status == 405
    with Serving(engine.app) as url:
        async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", data=b"{") as response:
            assert response.status == 400
            assert "not JSON" in (await response.json())["error"]["message"]


async def test_the_key_is_asked_for_on_v1() -> None:
    engine = EmbeddedEngine(tiny_qwen3(), None, name="tiny", api_key="secret")
    with Serving(engine.app) as url:
        async with aiohttp.ClientSession() as session:
            for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 200)):
                async with session.get(f"{url}/v1/models", headers=headers) as response:
                    assert response.status == status
            async with session.get(f"{url}/health") as response:
                assert response.status == 200
    await engine.aclose()


def test_a_model_with_other_state_than_keys_and_values_is_refused() -> None:
    model = tiny_qwen3()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        EmbeddedEngine(model, None, name="tiny")


async def test_bfloat16(start: Start) -> None:
    _, server = start(lambda: tiny_qwen3().to(torch.bfloat16))
    ids = prompt(0)
    choice = (await server.complete(prompt=ids, max_tokens=20, **SAMPLE))["choices"][0]
    expected = token_logprobs(server.reference, ids + choice["token_ids"])[23:]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=0.3)


# The command.


def test_the_command_serves(tmp_path: Path) -> None:
    folder = save(tiny_qwen3(), tmp_path)
    command = [sys.executable, "-m", "distill.serving.embedded", "--model", str(folder), "--port", "0"]
    with subprocess.Popen(
        [*command, "--served-model-name", "tiny", "--api-key-env", "KEY"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KEY": "k", "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "Uvicorn running on" in line)
            url = next(word for word in line.split() if word.startswith("http://"))

            async def models() -> Any:
                session = aiohttp.ClientSession(headers={"Authorization": "Bearer k"})
                async with session, session.get(f"{url}/v1/models") as response:
                    return await response.json()

            assert asyncio.run(models())["data"][0]["id"] == "tiny"
        finally:
            process.terminate()
            process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--host", "0.0.0.0"], "loopback"), (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE")],
)
def test_the_command_refuses(arguments: list[str], word: str) -> None:
    command = [sys.executable, "-m", "distill.serving.embedded", "--model", "x", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert word in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json, distill.serving.embedded as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout.splitlines()[-1]))


def test_a_decode_step_of_grouped_heads_is_plain_attention() -> None:
    """Six heads on two of keys, one query: what each head sees and says is its own."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(3, n, t, 8, generator=generator) for n, t in ((6, 1), (2, 5), (2, 5)))
    mask = torch.where(torch.arange(5) <= torch.tensor([0, 2, 4])[:, None, None, None], 0.0, float("-inf"))
    out, _ = slot_attention(torch.nn.Module(), query, keys, values, mask, scaling=0.3)
    for row, head in product(range(3), range(6)):
        scores = 0.3 * query[row, head] @ keys[row, head // 3].T + mask[row, 0]
        torch.testing.assert_close(out[row, 0, head], (scores.softmax(-1) @ values[row, head // 3])[0])
