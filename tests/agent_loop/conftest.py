"""Three tokenizers: one trained in process, SmolLM2's, and the real Qwen3's."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_loop.renderer import Renderer, load_renderer
from bench.smollm2 import default_folder
from tests.runs.conftest import save_tokenizer

NAMES = ("tiny", "smollm2", "qwen3")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session", params=NAMES)
def renderer(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Renderer:
    if request.param == "tiny":
        return load_renderer(tiny_tokenizer)
    if request.param == "qwen3":
        return load_renderer(request.getfixturevalue("shared_data") / "tokenizers" / "qwen3")
    if not (default_folder() / "tokenizer.json").is_file():
        pytest.skip("SmolLM2's tokenizer is not there: python -m bench.smollm2")
    return load_renderer(default_folder())
