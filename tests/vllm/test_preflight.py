"""The checks of how servers were started, against real vLLM: one started well and one started wrong in every way."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_loop.transport import HttpTransport, TransportError
from distill import check, check_servers, check_versions, check_vllm
from distill.build import Parts, build
from distill.check_servers import Probe
from distill.config import RunConfig
from distill.console import Console
from distill.endpoints import Endpoint
from distill.findings import Finding
from distill.serving.fleet import Fleet
from tests.runs.conftest import TOOLS, save_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

READY_S = 240.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "student", seed=1)


@contextmanager
def serving(model: Path, *flags: str, log: Path, **environment: str) -> Iterator[tuple[str, str]]:
    """A vLLM server on this machine: its address and its key."""
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_hex(8)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "student", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--enable-prompt-tokens-details", "--api-key", key, *flags]
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    wanted |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | wanted, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}/v1", key
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import http.client

    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()
    raise AssertionError(f"vLLM was not ready after {READY_S:g} s: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    flags = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "30", "--max-model-len", "512"]
    flags += ["--generation-config", "vllm", "--enable-lora", "--max-lora-rank", "16"]
    log = tmp_path_factory.mktemp("good") / "log"
    with serving(model, *flags, log=log, VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        yield server


@pytest.fixture(scope="module")
def bad(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """No dev mode, no adapters, raw log-probabilities, few candidates, a short context, no prefix cache."""
    flags = ["--max-logprobs", "5", "--max-model-len", "256", "--no-enable-prefix-caching"]
    with serving(model, *flags, log=tmp_path_factory.mktemp("bad") / "log") as server:
        yield server


@pytest.fixture
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    """The servers of the fixture that the test names."""
    base_url, key = request.getfixturevalue(request.param)
    fleet = Fleet.given("student", [base_url], key, max_outage_s=10)
    await fleet.start()
    yield fleet
    await fleet.aclose()


@pytest.fixture
async def parts(tmp_path: Path, model: Path, fleet: Fleet) -> AsyncIterator[Parts]:
    """A trainer whose student and teacher are what the server serves; the student's weights are those."""
    env = tmp_path / "adding"
    env.mkdir()
    (env / "tools.py").write_text(TOOLS)
    row = {"id": "t1", "messages": [{"role": "user", "content": "add the numbers 1 and 4"}], "metadata": {}}
    (env / "train.jsonl").write_text(json.dumps(row) + "\n")
    values = {
        "env": str(env),
        "student": {"model": str(model), "dtype": "float32"},
        "teacher": {"model": str(model), "dtype": "float32", "top_k": 20},
        "loss": {"type": "topk"},
        "rollout": {"max_turn_tokens": 12, "max_episode_tokens": 300},
        "check": {"max_self_difference": 1e-3, "max_mismatch_kl": 1e-3},
    }
    parts = build(RunConfig.model_validate(values), Console(quiet=True), tmp_path / "run")
    embedded = [parts.student_endpoint, parts.teachers[""].endpoint]
    endpoint = Endpoint(transport=fleet, model="student", path=model, fleet=fleet)
    from agent_loop.policy import VllmPolicy

    yield dataclasses.replace(
        parts,
        student_endpoint=endpoint,
        teachers={"": dataclasses.replace(parts.teachers[""], endpoint=endpoint)},
        policy=VllmPolicy(fleet, "student"),
    )
    for old in embedded:
        await old.aclose()


def having(parts: Parts, **changes: Any) -> Parts:
    values = parts.config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return dataclasses.replace(parts, config=RunConfig.model_validate(values))


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings if finding.level != "ok"}


@pytest.mark.parametrize("fleet", ["good"], indirect=True)
async def test_a_server_that_was_started_well_passes(parts: Parts) -> None:
    findings = await check.check_parts(parts)
    assert levels(findings) == {"teacher_scores": "warning"}, list(map(str, findings))
    said = {finding.name: finding.message for finding in findings}
    assert "nothing to learn" in said["teacher_scores"], "the teacher here is the student"
    assert said["prefix_cache"] == "on"
    assert said["server_versions"].startswith("vLLM 0.")
    assert "/collective_rpc" in said["weight_routes"]
    assert "plain" in said["teacher_scorer"], "the CPU build has no other, without the plugin"


@pytest.mark.parametrize("fleet", ["good"], indirect=True)
async def test_adapters_and_temperature_on_it_pass(parts: Parts) -> None:
    adapters = having(parts, student__lora={"rank": 16})
    assert levels(await check_vllm.weight_routes(adapters)) == {}
    assert [f.message for f in await check_vllm.lora_rank(adapters)] == ["rank 16 fits"]
    wide = await check_vllm.lora_rank(having(parts, student__lora={"rank": 17}))
    assert levels(wide) == {"lora_rank": "error"}
    assert "--max-lora-rank 32" in wide[0].remedy
    assert levels(await check_vllm.logprobs_mode(having(parts, rollout__temperature=0.7))) == {}


@pytest.mark.parametrize("fleet", ["bad"], indirect=True)
async def test_every_way_in_which_it_was_started_wrong_is_named(parts: Parts) -> None:
    by_name = {finding.name: finding for finding in await check.check_parts(parts)}
    assert by_name["student_server"].level == "error"
    assert "--max-model-len 301" in by_name["student_server"].remedy
    parts = having(parts, rollout__max_episode_tokens=200)
    by_name = {finding.name: finding for finding in await check.check_parts(parts)}
    assert levels(list(by_name.values())).items() >= {
        ("weight_routes", "error"),
        ("max_logprobs", "error"),
        ("prefix_cache", "warning"),
    }
    assert "VLLM_SERVER_DEV_MODE=1" in by_name["weight_routes"].remedy
    assert "--max-logprobs 20" in by_name["max_logprobs"].remedy
    assert "--no-enable-prefix-caching" in by_name["prefix_cache"].remedy


@pytest.mark.parametrize("fleet", ["bad"], indirect=True)
async def test_no_adapters_and_raw_log_probabilities_are_named(parts: Parts) -> None:
    adapters = having(parts, student__lora={"rank": 8})
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in (await check_vllm.weight_routes(adapters))[0].remedy
    assert "not known" in (await check_vllm.lora_rank(adapters))[0].message
    raw = await check_vllm.logprobs_mode(having(parts, rollout__temperature=0.7))
    assert levels(raw) == {"logprobs_mode": "error"}
    assert levels(await check_versions.server_versions(parts)) == {}


@pytest.mark.parametrize("fleet", ["bad"], indirect=True)
async def test_too_few_candidates_fail_the_teachers_scores_too(parts: Parts) -> None:
    probes: list[Probe] = []
    await check_servers.student_sampling(parts, probes)
    found = await check_servers.teacher_scores(parts, parts.teachers[""], probes[0])
    assert levels(found) == {"teacher_scores": "error"}
    assert "max allowed: 5" in found[0].message


async def test_a_wrong_key_is_told_from_a_server_that_is_away(bad: tuple[str, str]) -> None:
    transport = HttpTransport(bad[0], api_key="wrong", retry_deadline_s=1)
    with pytest.raises(TransportError) as refused:
        await transport.get_json("/v1/models", timeout_s=5)
    assert refused.value.status == 401
    await transport.aclose()
