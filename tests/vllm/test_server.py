"""A real vLLM server of a run: it is started, killed, started again, and ended with all its processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from distill.config import ServerConfig
from distill.serving.fleet import Fleet, Replica
from distill.serving.vllm import Machine, launches
from tests.conformance.models import save, tiny_qwen3

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(280)]


def processes() -> dict[int, str]:
    """Command lines of all that this process started, and of what those started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
        except OSError:
            continue
    found, added = {os.getpid()}, True
    while added:
        added = {pid for pid, parent in parents.items() if parent in found} - found
        found |= added
    return {pid: command_line(pid) for pid in found - {os.getpid()}}


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def lives(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def ask(fleet: Fleet) -> list[int]:
    payload = {"model": "student", "prompt": [7, 8, 9], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    reply = await fleet.post_json("/v1/completions", payload, timeout_s=30.0)
    ids: list[int] = reply["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("victim", ["api_server", "EngineCore"])
async def test_a_killed_server_is_started_again_and_nothing_of_it_is_left(tmp_path: Path, victim: str) -> None:
    (launch,) = launches(
        "student",
        save(tiny_qwen3(), tmp_path / "model"),
        ServerConfig(dtype="float32"),
        log_dir=tmp_path / "logs",
        machine=Machine.this(),
        first_share=0,
        num_shares=1,
        max_model_len=256,
        trainable=True,
    )
    fleet = Fleet.launched("student", [launch], max_outage_s=150.0, max_restarts=1)
    returned: list[str] = []

    async def on_return(replica: Replica) -> None:
        returned.append(replica.base_url)

    fleet.on_return = on_return
    before = set(processes())
    try:
        await fleet.start()
        first, url = await ask(fleet), fleet.replicas[0].base_url
        old = {pid: line for pid, line in processes().items() if pid not in before}
        (pid,) = [pid for pid, line in old.items() if victim in line and "keeper" not in line]
        os.kill(pid, signal.SIGKILL)
        assert await ask(fleet) == first, "the same weights, from a new server"
        assert returned == [fleet.replicas[0].base_url] != [url]
        assert fleet.num_restarts == 1
        assert not [line for pid, line in old.items() if lives(pid)]
        new = set(processes()) - before
    finally:
        began = time.monotonic()
        await fleet.aclose()
    assert time.monotonic() - began < 15
    await asyncio.sleep(0)
    assert not [pid for pid in new if lives(pid)]
