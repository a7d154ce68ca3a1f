"""Scoring by a real vLLM, with the plugin and without, against plain `transformers` in float32."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import aiohttp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from agent_loop.scorers import PlainScorer, PluginScorer, choose_scorer
from agent_loop.scoring import ScoringError
from agent_loop.transport import HttpTransport
from bench.scoring import KEY, vllm_server
from tests.conformance.models import reference, save, tiny_llama, tiny_qwen3

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3
"""Nats, float32 on both sides."""
MAX_MODEL_LEN = 256
IDS = random.Random(0).choices(range(512), k=100)
ROWS = [1, 2, 3, 50, 51, 99]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """The base model and an adapter on it, by the names under which they are served."""
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    return {"teacher": tiny_llama(), "adapter": adapted.eval()}


@pytest.fixture(scope="module")
def servers(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses: a Llama with the plugin and an adapter, and a stock Qwen3 with tied embeddings."""
    folder = tmp_path_factory.mktemp("scoring")
    save(models["teacher"], folder / "llama")
    models["adapter"].save_pretrained(folder / "adapter")
    # Batches shorter than a sequence: each is scored in several chunks.
    chunks = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    common = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), *chunks)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={folder / 'adapter'}")
    with ExitStack() as stack:
        with_plugin, _ = stack.enter_context(vllm_server(folder / "llama", *common, *lora))
        stock, _ = stack.enter_context(vllm_server(save(tiny_qwen3(), folder / "qwen"), *common, plugin=False))
        yield {"plugin": with_plugin, "stock": stock}


@pytest.fixture
async def transport(servers: dict[str, str]) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(servers["plugin"], KEY, retry_deadline_s=5.0)
    yield transport
    await transport.aclose()


@pytest.mark.parametrize("model", ["teacher", "adapter"])
@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize("scorer", [PlainScorer(), PlainScorer("generate"), PluginScorer()], ids=lambda s: s.name)
async def test_scores_are_those_of_transformers(
    transport: HttpTransport, models: dict[str, PreTrainedModel], scorer: Any, top_k: int, model: str
) -> None:
    scores = await scorer.score(transport, model, IDS, ROWS, top_k=top_k, timeout_s=120.0)
    expected = reference(models[model], IDS)
    assert [i for i, value in enumerate(scores.logprobs) if value is not None] == ROWS
    for row in ROWS:
        assert scores.logprobs[row] == pytest.approx(float(expected[row - 1, IDS[row]]), abs=TOLERANCE)
    if top_k == 0:
        assert scores.topk is None
        return
    assert scores.topk is not None
    for row in ROWS:
        found = scores.topk[row] or []
        best = expected[row - 1].topk(top_k)
        assert [value for _, value in found] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert [float(expected[row - 1, i]) for i, _ in found] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


async def test_the_adapter_differs_from_its_base(models: dict[str, PreTrainedModel]) -> None:
    base, adapted = (reference(models[name], IDS) for name in ("teacher", "adapter"))
    assert float((base - adapted).abs().max()) > 0.1


async def test_scores_do_not_depend_on_what_the_cache_holds(transport: HttpTransport) -> None:
    """Rows inside a cached prefix would be uninitialised memory: the plugin never reads the cache."""
    first = await PluginScorer().score(transport, "teacher", IDS, range(1, 100), top_k=8, timeout_s=120.0)
    prompt = {"model": "teacher", "prompt": IDS, "max_tokens": 4, "temperature": 0.0}
    await transport.post_json("/v1/completions", prompt, timeout_s=120.0)
    again = await PluginScorer().score(transport, "teacher", IDS, range(1, 100), top_k=8, timeout_s=120.0)
    assert again.logprobs[1:] == pytest.approx(first.logprobs[1:], abs=TOLERANCE)


@pytest.mark.parametrize("top_k", [0, 8])
async def test_the_probe_takes_the_plugin_where_it_is(servers: dict[str, str], top_k: int) -> None:
    for server, name in (("plugin", "plugin"), ("stock", "plain (generate)")):
        transport = HttpTransport(servers[server], KEY)
        assert (await choose_scorer(transport, "teacher", top_k=top_k)).name == name
        with pytest.raises(ScoringError, match=r"loss\.candidates .* V2 model runner"):
            await choose_scorer(transport, "teacher", top_k=top_k, given_ids=True)
        await transport.aclose()


async def test_a_stock_server_with_tied_embeddings(servers: dict[str, str]) -> None:
    transport = HttpTransport(servers["stock"], KEY)
    scores = await PlainScorer("generate").score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=120.0)
    expected = reference(tiny_qwen3(), IDS)
    for row in ROWS:
        assert scores.logprobs[row] == pytest.approx(float(expected[row - 1, IDS[row]]), abs=TOLERANCE)
    await transport.aclose()


@pytest.mark.parametrize("scorer", [PlainScorer(), PlainScorer("generate"), PluginScorer()], ids=lambda s: s.name)
async def test_refusals_have_their_kind(transport: HttpTransport, scorer: Any) -> None:
    for model, ids, top_k, kind in (
        ("someone", IDS, 0, "rejected"),
        ("teacher", IDS * 3, 0, "context_overflow"),
        ("teacher", [1, 2, 512], 0, "rejected"),
        ("teacher", IDS, 21, "rejected"),
    ):
        with pytest.raises(ScoringError) as caught:
            await scorer.score(transport, model, ids, [1, 2], top_k=top_k, timeout_s=60.0)
        assert caught.value.kind == kind, (model, len(ids), top_k, str(caught.value))


@pytest.mark.parametrize("key", [None, "another"])
async def test_the_plugin_asks_for_the_servers_key(servers: dict[str, str], key: str | None) -> None:
    transport = HttpTransport(servers["plugin"], key)
    with pytest.raises(ScoringError, match="answered 401"):
        await PluginScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=10.0)
    await transport.aclose()


async def test_a_caller_that_leaves_does_no_harm(servers: dict[str, str], transport: HttpTransport) -> None:
    address = servers["plugin"].removesuffix("/v1") + "/distill/score"
    body = {"model": "teacher", "token_ids": IDS, "start": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await session.post(address, json=body, timeout=aiohttp.ClientTimeout(total=0.001))
        async with session.post(address, json=body) as reply:
            assert (reply.status, (await reply.json())["rows"]) == (200, 99)
        async with session.post(address, data=b"[1, ") as reply:
            assert reply.status == 400
    await PluginScorer().score(transport, "teacher", IDS, ROWS, top_k=0, timeout_s=60.0)
