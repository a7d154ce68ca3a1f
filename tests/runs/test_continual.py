"""The documents and questions of `bench.continual`: what is asked was taught, and in other words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent_loop.renderer import load_renderer
from bench.continual import Lab, Sizes, made
from bench.continual_data import write
from distill.documents import read_data
from distill.tiny.tokenizer import build_tokenizer
from envs.dataset import read_tasks


def test_each_question_is_answered_in_the_documents_and_worded_as_none_of_them(tmp_path: Path) -> None:
    files = write(tmp_path, num_ships=6, seed=1)
    episodes = list(read_data([files.documents], load_renderer(build_tokenizer()), max_tokens=None))
    asked = {message["content"] for episode in episodes for message in episode.task.messages}
    taught = {episode.turns[0].message.content for episode in episodes if episode.task.messages}
    texts = " ".join(episode.turns[0].text for episode in episodes if not episode.task.messages)
    tasks = read_tasks(files.questions)
    assert (len(tasks), len(asked)) == (12, 60)
    for task in tasks:
        assert task.messages[0]["content"] not in asked
        assert task.metadata["answer"] in taught
        assert task.metadata["answer"] in texts


@pytest.mark.slow
def test_the_recipe_runs(tmp_path: Path) -> None:
    few = {
        "num_ships": 2,
        "num_replayed": 4,
        "epochs": 1,
        "warmup": 0,
        "steps": 4,
        "every": 4,
        "num_tasks": 4,
        "samples": 1,
    }
    lab = Lab(tmp_path, 0, Sizes(**few))
    points = made(lab, "recipe")["points"]
    assert [(point["line"], point["step"]) for point in points] == [("original", 0), ("distilled", 0), ("distilled", 4)]
    assert points[0]["skill"] > 0.5 > points[0]["knowledge"]
    lines = [json.loads(line) for line in (tmp_path / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["teacher_kl/old"] is not None and line["teacher_kl/new"] is not None for line in lines)
