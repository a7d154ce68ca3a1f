"""What is refused of a Ray before one is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill.config_load import load_config
from distill.ray_cluster import WorkersError, check_installed, elsewhere

FLAGS = {"env": "medbrowse", "student.model": "nowhere", "teacher.model": "nowhere"}


def test_without_ray_the_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from distill.build import build
    from distill.console import Console

    monkeypatch.setitem(sys.modules, "ray", None)  # what Python itself writes down for a package that is not there
    config = load_config(overrides=FLAGS | {"rollout.executor": "ray"}).config
    with pytest.raises(WorkersError, match=r"pip install -e '\.\[ray\]'"):
        build(config, Console(quiet=True), tmp_path)  # before it looks for a model: there is none of that name


def test_in_process_ray_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    check_installed(load_config(overrides=FLAGS).config)


def test_machines_other_than_this_one() -> None:
    def node(address: str, alive: bool = True) -> dict[str, object]:
        return {"NodeManagerAddress": address, "Alive": alive}

    assert elsewhere([node("10.0.0.1"), node("10.0.0.1")], "10.0.0.1") == []
    assert elsewhere([node("10.0.0.1"), node("10.0.0.3", alive=False)], "10.0.0.1") == []
    assert elsewhere([node("10.0.0.3"), node("10.0.0.1"), node("10.0.0.2")], "10.0.0.1") == ["10.0.0.2", "10.0.0.3"]


def test_less_room_than_episodes_is_noted() -> None:
    config = load_config(overrides=FLAGS | {"rollout.executor": "ray", "rollout.ray.workers": 1}).config
    assert any("rollout.ray has room for 1 x 32 episodes" in note for note in config.notes())
    roomy = load_config(overrides=FLAGS | {"rollout.executor": "ray"}).config
    assert not any("rollout.ray" in note for note in roomy.notes())
