"""Weights that reach a real vLLM: whole ones, adapters, and new ones in the middle of a request."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from agent_loop.scoring import prompt_logprobs
from distill.config import LoraConfig, LossConfig, RunConfig, ServerConfig, StudentConfig, TeacherConfig
from distill.publish import Canary, Control, DiskPublisher, PublishError
from distill.serving.fleet import Fleet
from distill.serving.vllm import Machine, launches
from distill.student import Student
from tests.conformance.models import save, tiny_llama, tiny_qwen3, token_logprobs

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3
"""Nats, float32 on both sides."""
CANARY = random.Random(0).choices(range(1, 512), k=64)
Start = Callable[[PreTrainedModel, LoraConfig | None], Awaitable[tuple[Student, Fleet, DiskPublisher]]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """A student, one server of its untrained model, and what publishes from one to the other."""
    fleets: list[Fleet] = []

    async def start(model: PreTrainedModel, lora: LoraConfig | None) -> tuple[Student, Fleet, DiskPublisher]:
        path = save(model, tmp_path / "model")
        config = RunConfig(
            env="none",
            steps=1,
            skip_verification=True,
            student=StudentConfig(model="student", lora=lora),
            teacher=TeacherConfig(model="teacher"),
            loss=LossConfig(type="sampled"),
        )
        started = launches(
            "student",
            path,
            ServerConfig(dtype="float32"),
            log_dir=tmp_path / "logs",
            machine=Machine.this(),
            first_share=0,
            num_shares=1,
            max_model_len=1024,
            lora_rank=lora.rank if lora else None,
            trainable=lora is None,
        )
        fleets.append(Fleet.launched("student", started, max_outage_s=60.0, max_restarts=0))
        await fleets[0].start()
        canary = Canary(CANARY, TOLERANCE)
        publisher = DiskPublisher(fleets[0], tmp_path / "weights", "student", canary, lora=lora is not None)
        return Student(model, config), fleets[0], publisher

    yield start
    for fleet in fleets:
        await fleet.aclose()


def train(student: Student, seed: int) -> None:
    """As a step would, but far enough for the canary to see it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in student.parameters.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)


def far(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


async def scores(fleet: Fleet, model: str) -> list[float]:
    found = await prompt_logprobs(fleet, model, CANARY, top_k=0, timeout_s=60.0)
    return [value for value in found.logprobs if value is not None]


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama])
async def test_whole_weights(start: Start, make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    student, fleet, publisher = await start(make(), None)
    untrained = token_logprobs(student.model, CANARY)
    for version in (1, 2):
        train(student, version)
        began = time.monotonic()
        difference = await publisher.publish(student, version)
        print(f"\n{make.__name__}: published in {time.monotonic() - began:.3f} s, canary {difference:.2g}")
        assert difference < TOLERANCE
    trained = token_logprobs(student.model, CANARY)
    assert far(trained, untrained) > 0.1, "else the canary would not see old weights"
    assert (await fleet.get_json("/weight_info", timeout_s=10.0))["weight_version"] == "2"

    # What the worker's extension is for: without it a tied output head stays the old one, and the canary sees it.
    train(student, 3)
    student.save_weights(tmp_path / "third")
    control, canary = Control(fleet.replicas[0].transport), Canary(CANARY, TOLERANCE)
    await canary.measure(student)
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "third")}}
    await control.post("/pause?mode=keep&clear_cache=true", {})
    await control.post("/collective_rpc", reload)
    await control.post("/resume", {})
    if student.model.config.tie_word_embeddings and not torch.cuda.is_available():
        with pytest.raises(PublishError, match="disagree"):
            await canary.verify(fleet, "student")
        await control.post("/collective_rpc", {"method": "distill_repack_head"})
        await fleet.post_json("/reset_prefix_cache", {}, timeout_s=10.0)
    assert await canary.verify(fleet, "student") < TOLERANCE


async def test_new_weights_in_the_middle_of_a_request(start: Start) -> None:
    student, fleet, publisher = await start(tiny_qwen3(), None)
    train(student, 1)
    await publisher.publish(student, 1)
    models = {"1": copy.deepcopy(student.model)}
    sampling = {
        "max_tokens": 900,
        "ignore_eos": True,
        "temperature": 1.0,
        "logprobs": 0,
        "seed": 1,
        "detokenize": False,
    }
    request = {"model": "student", "token_ids": CANARY, "sampling_params": sampling}
    reply = asyncio.ensure_future(fleet.post_json("/inference/v1/generate", request, timeout_s=120.0))
    await asyncio.sleep(0.5)
    train(student, 2)
    await publisher.publish(student, 2)
    assert not reply.done(), "nothing waits for requests that run"
    models["2"] = student.model
    choice: Any = (await reply)["choices"][0]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["1", "2"]
    said = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    for span in spans:  # each token was drawn from the weights that it claims, and over their cache
        true = token_logprobs(models[span["version"]], CANARY + choice["token_ids"])[len(CANARY) - 1 :]
        assert far(said[span["start"] : span["end"]], true[span["start"] : span["end"]]) < TOLERANCE


async def test_adapters(start: Start) -> None:
    base = tiny_llama()
    untrained = token_logprobs(base, CANARY)
    student, fleet, publisher = await start(base, LoraConfig(rank=8, alpha=16.0))
    names = []
    for version in (1, 2, 3):
        train(student, version)
        began = time.monotonic()
        difference = await publisher.publish(student, version)
        print(f"\nadapter: published in {time.monotonic() - began:.3f} s, canary {difference:.2g}")
        assert difference < TOLERANCE
        names.append(publisher.model)
        cards = (await fleet.get_json("/v1/models", timeout_s=10.0))["data"]
        assert [card["id"] for card in cards] == ["student", names[-1]]
    assert far(await scores(fleet, names[-1]), untrained) > 0.1
    assert far(await scores(fleet, "student"), untrained) < TOLERANCE, "the base answers beside it, as it was"
    await publisher.push_to(fleet.replicas[0])
