"""Whole training runs at their smallest: a folder environment, random Qwen3 models, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOOLS = '''"""One tool, for tests."""

from tools.tool import tool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: first.
        b: second.
    """
    return a + b
'''


def save_tokenizer(path: Path, extra_tokens: tuple[str, ...] = ()) -> Any:
    """A tokenizer trained in process, with a ChatML template; the same one for the same `extra_tokens`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra_tokens]
    corpus = ["add the numbers 12 and 7 system user assistant tool", '{"name": "add", "arguments": {"a": 1, "b": 2}}']
    raw.train_from_iterator(
        corpus * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def save_model(path: Path, *, seed: int, extra_tokens: tuple[str, ...] = ()) -> Path:
    """A random two-layer Qwen3 with the tokenizer of `save_tokenizer`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = save_tokenizer(path, extra_tokens)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Workplace:
    """A folder with an environment, two models and a configuration, and the command that trains there."""

    path: Path

    def run(self, *flags: str, check: bool = False, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`python -m distill.run` to its end."""
        done = subprocess.run(
            self.command(*flags), cwd=self.path, env=self.environment(), capture_output=True, text=True, timeout=timeout
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        with (self.path / "stderr.txt").open("ab") as log:
            return subprocess.Popen(
                self.command(*flags), cwd=self.path, env=self.environment(), stdout=subprocess.DEVNULL, stderr=log
            )

    def command(self, *flags: str) -> list[str]:
        return [sys.executable, "-m", "distill.run", "--config", str(self.path / "run.toml"), *flags]

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def lines(self, run_id: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        text = (self.path / "runs" / run_id / file).read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, `teacher` (same tokenizer) and `stranger` (one more token in front: every id shifted)."""
    path = tmp_path_factory.mktemp("models")
    save_model(path / "student", seed=1)
    save_model(path / "teacher", seed=2)
    save_model(path / "stranger", seed=3, extra_tokens=("<|other|>",))
    return path


@pytest.fixture
def workplace(tmp_path: Path, models: Path) -> Workplace:
    return make_workplace(tmp_path, models)


def make_workplace(path: Path, models: Path, **changes: str) -> Workplace:
    env = path / "adding"
    env.mkdir()
    (env / "tools.py").write_text(TOOLS)
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": f"add the numbers {i} and {i + 3}"}], "metadata": {}}
        for i in range(10)
    ]
    (env / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "env": f'"{env}"',
        "steps": "3",
        "student.model": f'"{models / "student"}"',
        "teacher.model": f'"{models / "teacher"}"',
        "rollout.batch_size": "3",
        "rollout.group_size": "2",
        "rollout.max_turns": "3",
        "rollout.max_turn_tokens": "12",
        "optim.lr": "1e-3",
        "checkpoint.every": "1",
        "eval.num_tasks": "4",
        **changes,
    }
    (path / "run.toml").write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return Workplace(path)


@pytest.fixture
def make(tmp_path: Path, models: Path) -> Callable[..., Workplace]:
    return lambda **changes: make_workplace(tmp_path, models, **changes)
