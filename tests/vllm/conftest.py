"""A real vLLM on this machine, started as a run starts its servers (distill/serving/vllm.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill.config import ServerConfig
from distill.serving.vllm import Machine, Server, launches
from tests.conformance.models import save, tiny_qwen3

MAX_MODEL_LEN = 256


@contextmanager
def serving(model: Path, log_dir: Path) -> Iterator[Server]:
    """A trainable student in float32 under the name `student`; its log stays in `log_dir`."""
    [launch] = launches(
        "student",
        model,
        ServerConfig(dtype="float32"),
        log_dir=log_dir,
        machine=Machine.this(),
        first_share=0,
        num_shares=1,
        max_model_len=MAX_MODEL_LEN,
        trainable=True,
    )
    server = Server(launch)
    with ThreadPoolExecutor(1) as thread:  # a loop of its own: the test that asks for the server may run one
        try:
            thread.submit(lambda: asyncio.run(server.wait_ready())).result()
            yield server
        finally:
            thread.submit(lambda: asyncio.run(server.aclose())).result()


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied embeddings."""
    return save(tiny_qwen3(), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def student_server(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(student_folder, tmp_path_factory.mktemp("logs")) as server:
        yield server
