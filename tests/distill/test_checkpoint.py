"""A checkpoint is whole or passed over, and a run continued from it is the run that was not interrupted."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import make_episodes, run_config, tiny_model, weights_of
from transformers import AutoModelForCausalLM

from distill.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    find_latest,
    open_checkpoint,
    rng_state,
    save_checkpoint,
    set_aside_after,
)
from distill.config import LoraConfig
from distill.student import Student

LORA = LoraConfig(rank=4, alpha=8.0)


def make_student(lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Student:
    return Student(tiny_model(seed).to(dtype), run_config(optim={"schedule": "cosine"}, lora=lora))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("lora", "dtype"), [(None, torch.float32), (LORA, torch.float32), (None, torch.bfloat16), (LORA, torch.bfloat16)]
)
def test_continued_equals_uninterrupted(tmp_path: Path, lora: LoraConfig | None, dtype: torch.dtype) -> None:
    def steps(student: Student, first: int, last: int) -> list[float]:
        """The episodes depend on the global generators, as everything that is drawn without a seed would."""
        losses = []
        for step in range(first, last + 1):
            draw = int(torch.randint(1000, ())) + int(np.random.randint(1000)) + random.randrange(1000)
            loss = student.train_step(make_episodes(3, seed=draw), step=step)["loss"]
            assert loss is not None
            losses.append(loss)
        return losses

    whole = make_student(lora, dtype)
    steps(whole, 1, 3)
    save_checkpoint(tmp_path, 3, whole, cursor=42, keep_last=2)
    wanted = steps(whole, 4, 6)

    torch.manual_seed(99)
    other = make_student(lora, dtype, seed=0 if lora else 5)
    checkpoint = find_latest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.cursor) == (3, 42)
    other.restore(checkpoint)
    assert steps(other, 4, 6) == wanted
    assert all(torch.equal(weights_of(whole)[n], t) for n, t in weights_of(other).items())


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_model_in_it_opens_by_itself(tmp_path: Path, lora: LoraConfig | None) -> None:
    student = make_student(lora)
    for step in (1, 2):
        student.train_step(make_episodes(3), step=step)
    path = save_checkpoint(tmp_path, 2, student, cursor=0, keep_last=1)
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    ids = list(range(1, 30))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert student.logprobs(ids)[1:] == pytest.approx([logprobs[i - 1, ids[i]].item() for i in range(1, 29)], abs=1e-5)


def truncate(path: Path) -> None:
    data = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(data[:-1])


def flip_a_byte(path: Path) -> None:
    file = path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def break_json(path: Path) -> None:
    (path / MANIFEST).write_text('{"files": ')


def point_outside(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(manifest))


def state_of_another_version(path: Path) -> None:
    (path / "state.json").write_text('{"step": 2}')
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["state.json"] = {
        "size": 11,
        "sha256": hashlib.sha256((path / "state.json").read_bytes()).hexdigest(),
    }
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"optimizer\.safetensors: has \d+ bytes"),
        (flip_a_byte, r"model\.safetensors: is not what was written"),
        (lambda path: (path / MANIFEST).unlink(), r"MANIFEST\.json: is missing"),
        (lambda path: (path / "state.json").unlink(), r"state\.json: is missing"),
        (lambda path: (path / MANIFEST).write_text("{}"), "does not list the files"),
        (break_json, "cannot be read"),
        (point_outside, "outside of the checkpoint"),
        (lambda path: (path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04."), "may hold pickled code"),
        (lambda path: (path / "model" / "chat_template.jinja").write_text("{{ x }}"), "is not of this checkpoint"),
        (state_of_another_version, "has no 'cursor'"),
    ],
)
def test_a_damaged_one_is_passed_over_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    student = make_student()
    for step in (1, 2):
        student.train_step(make_episodes(1), step=step)
        save_checkpoint(tmp_path, step, student, cursor=step, keep_last=2)
    damage(tmp_path / "step_000002")
    said: list[str] = []
    checkpoint = find_latest(tmp_path, report=said.append)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(said) == 1
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "step_000002")

    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole"):
        find_latest(tmp_path, report=said.append)
    save_checkpoint(tmp_path, 2, student, cursor=2, keep_last=2)
    assert open_checkpoint(tmp_path / "step_000002").cursor == 2


def test_old_ones_and_leftovers_go(tmp_path: Path) -> None:
    student = make_student()
    (tmp_path / ".building_000001" / "model").mkdir(parents=True)
    (tmp_path / "step_000002").mkdir()  # no manifest: not whole
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 3, 4, 5):
        save_checkpoint(tmp_path, step, student, cursor=0, keep_last=2)
    assert names(tmp_path) == ["notes.txt", "step_000004", "step_000005"]


def test_every_nth_one_stays(tmp_path: Path) -> None:
    student = make_student()
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, student, cursor=0, keep_last=1, keep_every=3)
    assert names(tmp_path) == ["step_000003", "step_000006", "step_000007"]


def test_a_step_to_keep_stays_until_another_is(tmp_path: Path) -> None:
    student = make_student()
    for step, keep in ((1, ()), (2, (2,)), (3, (2,)), (4, (2,)), (5, (5,)), (6, (5,)), (7, (5,))):
        save_checkpoint(tmp_path, step, student, cursor=0, keep_last=1, keep=keep)
        assert names(tmp_path) == sorted({f"step_{n:06d}" for n in (step, *keep)})


def test_generators_of_each_rank(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(rng_state())
    checkpoint = Checkpoint(path=tmp_path, step=1, cursor=0, rng=states)
    for rank, seed in ((0, 1), (1, 2)):
        wanted = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        checkpoint.restore_rng(rank)
        assert torch.equal(torch.rand(3), wanted)
    torch.manual_seed(3)
    checkpoint.restore_rng(2)  # a rank that was not there
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, make_student(), cursor=0, keep_last=3)
    assert [p.name for p in set_aside_after(tmp_path, 1)] == ["rewound_000002", "rewound_000003"]
    checkpoint = find_latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "nowhere") is None
    assert find_latest(tmp_path) is None


def test_a_disk_that_refuses_leaves_the_old_one(tmp_path: Path) -> None:
    student = make_student()
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, student, cursor=0, keep_last=1)
    (folder / ".building_000002").write_text("a file where a folder has to be")
    with pytest.raises(CheckpointError, match=r"step_000002: cannot be written.*needs about .* MiB, .* MiB are free"):
        save_checkpoint(folder, 2, student, cursor=0, keep_last=1)
    checkpoint = find_latest(folder)
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, make_student(), cursor=0, keep_last=1)
    checkpoint = find_latest(tmp_path)
    assert checkpoint is not None
    for other in (Student(tiny_model(vocab_size=99), run_config()), make_student(LORA)):
        weights = weights_of(other)
        with pytest.raises(CheckpointError, match="does not fit this student"):
            other.restore(checkpoint)
        assert all(torch.equal(weights[n], t) for n, t in weights_of(other).items())
