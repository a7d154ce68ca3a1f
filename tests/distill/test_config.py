"""The configuration's models: defaults, bounds, and rules between settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.config import RunConfig
from distill.config_keys import all_keys, documentation
from distill.config_rules import looks_secret
from envs.types import Limits

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {"env": "e", "student": {"model": "s"}, "teacher": {"model": "t"}}


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        BASE | {k: {**BASE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}
    )


def test_defaults_are_pure_on_policy_distillation() -> None:
    run = config()
    assert run.skip_verification
    assert (run.loss.type, run.loss.teacher_tau, run.loss.adv_tau) == ("sampled", 1.0, 0.0)
    assert (run.rollout.temperature, run.rollout.top_p, run.rollout.top_k) == (1.0, 1.0, 0)
    assert run.notes() == []
    assert config(teacher={"model": None, "system_prompt": "p"}).teacher_model == "s"


def test_the_environment_has_the_same_default_budgets() -> None:
    assert config().rollout.limits() == Limits()


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        config().loss.rho = 3.0  # type: ignore[misc]


def test_every_key_has_a_sentence() -> None:
    for key in all_keys().values():
        assert key.doc.endswith((".", ")")), key.name
        assert len(key.doc) > 10, key.name
        assert key.type_text, key.name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"model": None}}, "the teacher would be the student itself"),
        ({"loss": {"type": "topk"}}, 'teacher.top_k: is 0, but loss.type "topk" needs'),
        ({"loss": {"type": "full"}, "teacher": {"base_url": "http://h/v1"}}, '"full" needs the whole distribution'),
        ({"loss": {"adv_tau": 0.5}}, "there is no reward to take an advantage from"),
        ({"loss": {"teacher_tau": 0.0}}, "nothing would be learnt"),
        ({"student": {"max_context": 2048}, "rollout": {"max_episode_tokens": 4096}}, "more than student.max_context"),
        ({"student": {"max_context": 1024}}, "no room is left for a prompt"),
        ({"rollout": {"max_episode_tokens": 512}}, "more than rollout.max_episode_tokens"),
        ({"optim": {"warmup_steps": 101}}, "more than the run has steps (100)"),
        ({"teacher": {"api_key_env": "KEY"}}, "there is no teacher.base_url to send it to"),
        ({"student": {"model": "sk-proj-abcdefghijklmnop1234"}}, "student.model: looks like a key"),
        ({"env_args": {"a": {"b": ["hf_abcdefghijklmnopqrstuvwxyz"]}}}, "env_args.a.b: looks like a key"),
        ({"tasks": {"train": "${TASKS}"}}, "environment variables are not expanded"),
    ],
)
def test_settings_that_cannot_hold_together(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature is 0.7"),
        ({"rollout": {"top_p": 0.9}}, "cut the distribution"),
        ({"teacher": {"top_k": 5}}, "does not use the candidates"),
        ({"teacher": {"model": "s"}}, "the KL is 0"),
        ({"teacher": {"base_url": "http://h:8000"}}, "does not end in /v1"),
        ({"loss": {"adv_tau": 1.0}, "skip_verification": False, "rollout": {"group_size": 1}}, "always 0"),
    ],
)
def test_what_is_seldom_meant_is_noted(changes: dict[str, Any], says: str) -> None:
    (note,) = config(**changes).notes()
    assert says in note


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"base_url": "localhost:8000/v1"}},
        {"teacher": {"base_url": "ftp://h/v1"}},
        {"teacher": {"base_url": "http://user:secret@h/v1"}},
        {"teacher": {"base_url": "http://h:99999/v1"}},
        {"teacher": {"base_url": "http://h/v1?key=1"}},
        {"teacher": {"base_url": "http://h/v1", "api_key_env": "sk-not-a-name"}},
        {"run_id": "../escape"},
        {"rollout": {"temperature": 0.0}},
        {"optim": {"lr": float("nan")}},
        {"steps": True},
        {"steps": 2.0},
        {"seed": 10**30},
        {"skip_verification": 1},
    ],
)
def test_values_out_of_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


def test_ipv6_and_trailing_slash() -> None:
    assert config(teacher={"base_url": "http://[::1]:8000/v1/"}).teacher.base_url == ("http://[::1]:8000/v1",)


def test_secrets_have_a_shape_and_model_names_do_not() -> None:
    for secret in (
        "sk-proj-abcdefghijklmnop1234",
        "hf_abcdefghijklmnopqrstuvwxyz",
        "Bearer abcdefghijk",
        "AKIAABCDEFGHIJKLMNOP",
    ):
        assert looks_secret(f"x {secret} y")
    for harmless in (
        "Qwen/Qwen3-32B",
        "builtin:medbrowse-teacher",
        "risk-adjusted-mortality-rates",
        "TEACHER_API_KEY",
        "task-abcdefghijklmnopqrst",
    ):
        assert not looks_secret(harmless)


def test_the_documentation_is_current() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == documentation(), "run: python -m distill.config docs > docs/configuration.md"
    for key in all_keys().values():
        assert f"`{key.name}`" in text or f"`[{key.name}]`" in text


def test_importing_it_is_light() -> None:
    heavy = ("torch", "transformers", "numpy", "aiohttp")
    code = f"import sys, distill.config_load; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
