"""A trained student as a folder that others open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import make_episodes, run_config, tiny_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from distill.checkpoint import save_checkpoint
from distill.config import LoraConfig
from distill.export import main
from distill.rundir import best_step
from distill.student import Student

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def trained(folder: Path, lora: LoraConfig | None, model: Any = None) -> tuple[Path, list[float | None]]:
    """A run directory with a checkpoint, and what the trained student says of `IDS`."""
    model = model or tiny_model(tied=lora is None)
    model.save_pretrained(folder / "base")
    served = {"base_url": "http://localhost:8000/v1"} if lora and lora.quantization != "none" else {}
    config = run_config(lora=lora, optim={"lr": 1e-2}, **served)
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": str(folder / "base")})})
    student = Student.load(folder / "base", config)
    before = student.logprobs(IDS)
    for step in (1, 2):
        student.train_step(make_episodes(4), step=step)
    run = folder / "run"
    save_checkpoint(run / "checkpoints", 2, student, cursor=0, keep_last=1)
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    after = student.logprobs(IDS)
    assert max(abs(a - b) for a, b in zip(after[1:], before[1:], strict=True) if a and b) > 0.01
    return run, after


def logprobs_of(model: Any) -> list[float]:
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logprobs = model.float()(ids).logits[0, :-1].log_softmax(-1)
    return [float(v) for v in logprobs.gather(-1, ids[0, 1:, None])[:, 0]]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8.0)])
def test_merged_weights_are_the_trained_ones(tmp_path: Path, lora: LoraConfig | None) -> None:
    run, wanted = trained(tmp_path, lora)
    assert main([str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert logprobs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == pytest.approx(wanted[1:], abs=1e-4)
    source = run / "checkpoints" / "step_000002"
    assert main([str(source), "--out", str(tmp_path / "narrow")]) == 0
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert narrow.dtype == torch.bfloat16
    assert logprobs_of(narrow) == pytest.approx(wanted[1:], abs=0.2)


def test_the_adapter_by_itself(tmp_path: Path) -> None:
    from peft import PeftModel

    run, wanted = trained(tmp_path, LoraConfig(rank=4, alpha=8.0))
    assert main([str(run), "--out", str(tmp_path / "out"), "--adapter"]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert logprobs_of(model) == pytest.approx(wanted[1:], abs=1e-4)


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained(tmp_path, None)
    cases = [
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "a")], "neither a run nor a checkpoint"),
        ([str(run), "--out", str(run)], "is there already"),
        ([str(run), "--out", str(tmp_path / "b"), "--adapter"], "has no adapters"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    weights = run / "checkpoints" / "step_000002" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main([str(run), "--out", str(tmp_path / "c")]) == 7
    assert "SHA-256" in capsys.readouterr().err
    assert not any(tmp_path.glob("*c*part*"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["distill.export", "nowhere", "--out", "out"], "error: nowhere is neither a run nor a checkpoint"),
        (["distill.run", "--env", "medbrowse", "--student.model", "builtin:nope"], "error: no built-in model"),
    ],
)
def test_a_wrong_name_is_one_line_and_no_traceback(command: list[str], message: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_best_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained(tmp_path, None)
    command = [str(run), "--out", str(tmp_path / "out"), "--best"]
    assert main(command) == 2
    assert "no graded evaluation" in capsys.readouterr().err

    def evaluated(*lines: tuple[str, int, float | None]) -> None:
        rows = [{"name": n, "step": s, "episodes": 1, "metrics": {"reward/success": v}} for n, s, v in lines]
        (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    evaluated(("teacher", 0, 1.0), ("student", 0, 0.9), ("student", 1, 0.5), ("student", 2, None))
    assert main(command) == 2
    assert "step 1, of which there is no checkpoint" in capsys.readouterr().err
    evaluated(("student", 1, 0.5), ("student", 2, 0.7), ("student", 3, 0.7))
    assert best_step(run) == 2
    assert main(command) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_qlora_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        trained(tmp_path, LoraConfig(rank=4, quantization="nf4"))


@pytest.mark.gpu
def test_qlora(tmp_path: Path) -> None:
    """Real 4-bit weights under the adapters; a checkpoint has the adapters alone, and export merges them."""
    pytest.importorskip("bitsandbytes")
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    run, wanted = trained(tmp_path, LoraConfig(rank=4, alpha=8.0, quantization="nf4"), Qwen3ForCausalLM(config))
    checkpoint = run / "checkpoints" / "step_000002"
    assert not (checkpoint / "model").exists()
    assert (checkpoint / "adapter.safetensors").exists()
    assert main([str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    found = logprobs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    # 4 bits are 4 bits: the merged model is near, the untrained one further.
    base = logprobs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    error = [abs(a - b) for a, b in zip(found, wanted[1:], strict=True) if b is not None]
    moved = [abs(a - b) for a, b in zip(base, wanted[1:], strict=True) if b is not None]
    assert sum(error) < sum(moved)
