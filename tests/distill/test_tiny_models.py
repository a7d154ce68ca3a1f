"""Built-in models: names, cache, and what they can do."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import models
from distill.models import ModelNameError, builtin_names, cache_folder, resolve
from distill.tiny.muon import orthogonalise
from distill.tiny.pretrain import Phase
from distill.tiny.recipes import Recipe, make


def test_names_that_are_not_built_in_stand_as_they_are(tmp_path: Path) -> None:
    assert resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_unknown_built_in_names_are_refused_with_those_there_are() -> None:
    assert "builtin:medbrowse-teacher" in builtin_names()
    with pytest.raises(ModelNameError, match="builtin:medbrowse-student"):
        resolve("builtin:medbrowse-techer")
    with pytest.raises(ModelNameError, match="whole number"):
        resolve("builtin:medbrowse-teacher@one")


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "distill-gym"


SHORT = Recipe(phases=(Phase(name="short", data_seed="short", num_steps=12, num_episodes=48),))


def test_a_recipe_makes_the_same_model_twice_and_its_child_another(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines: list[str] = []
    folders = [tmp_path / name for name in ("a", "b", "other", "child")]
    for folder, seed in zip(folders, (0, 0, 1, 0), strict=True):
        parent = tmp_path / "a" if folder.name == "child" else None
        make(SHORT, folder, parent=parent, seed=seed, progress=lines.append)
    a, b, other, child = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert a.config.model_type == "qwen3"
    assert sum(p.numel() for p in a.parameters()) < 250_000
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    for different in (other, child):
        assert not torch.equal(a.model.embed_tokens.weight, different.model.embed_tokens.weight)
    assert len(AutoTokenizer.from_pretrained(folders[0])) == a.config.vocab_size
    assert any("step 12/12, loss" in line for line in lines)
    assert not list(tmp_path.rglob("*.bin"))


def test_orthogonalise() -> None:
    for shape in ((3, 64, 192), (2, 128, 64)):
        matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert values.min() > 0.3
        assert values.max() < 1.5


def _lock_and_note(folder: str, name: str) -> None:
    path = Path(folder)
    with models._locked(path / "one.lock", lambda line: None):
        taken = path / "taken"
        taken.touch(exist_ok=False)  # raises if the other process is inside
        (path / name).touch()
        taken.unlink()


def test_one_process_at_a_time_makes_a_model(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_lock_and_note, args=(str(tmp_path), f"n{i}")) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {path.name for path in tmp_path.glob("n*")} == {"n0", "n1", "n2"}


async def success(folder: Path, *, num_tasks: int = 500) -> float:
    """Share of held-out tasks solved at temperature 1, through renderer, engine and environment."""
    import envs
    from agent_loop.conversation import Sampling, TokenActor
    from agent_loop.policy import VllmPolicy
    from agent_loop.renderer import load_renderer
    from agent_loop.rollout import EpisodeJob, run_episodes
    from agent_loop.transport import AsgiTransport
    from distill.serving.embedded import EmbeddedEngine
    from envs.types import Limits

    limits = Limits(max_turns=8, max_turn_tokens=48)
    engine = EmbeddedEngine.from_pretrained(folder, name="tiny")
    renderer = load_renderer(folder)
    policy = VllmPolicy(AsgiTransport(engine.app), "tiny")

    def make_env() -> Any:
        return envs.make("medbrowse", limits=limits, skip_verification=False)

    tasks = make_env().default_tasks(split="eval", num_tasks=num_tasks)
    jobs = [EpisodeJob(task=task, seed=0) for task in tasks]
    try:
        episodes = await run_episodes(
            jobs,
            make_env=make_env,
            make_actor=lambda: TokenActor(renderer, policy, Sampling(temperature=1.0)),
            max_concurrent=128,
        )
    finally:
        await policy.aclose()
        await engine.aclose()
    assert all(episode.error is None for episode in episodes)
    assert all(len(episode.traces) == 1 for episode in episodes)
    return sum(episode.reward or 0.0 for episode in episodes) / len(episodes)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_the_teacher_can_and_the_student_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    student = Path(resolve("builtin:medbrowse-student", progress=lines.append))
    made = len(lines)
    teacher = Path(resolve("builtin:medbrowse-teacher", progress=lines.append))
    assert len(lines) == made  # made for the student, then cached
    assert await success(teacher) >= 0.95
    assert 0.10 <= await success(student) <= 0.40
