"""Several data sets and teachers of prime-rl and verl, read as sources and teachers of ours."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from distill.config import RunConfig
from distill.config_load import load_config
from distill.import_config import EXIT_OK, main, read
from distill.migrate.draft import Draft
from distill.migrate.several import table_name

PRIME = """\
max_steps = 20
[model]
name = "Qwen/Qwen3-4B"
[orchestrator]
batch_size = 64
rollouts_per_example = 4
[[orchestrator.train.env]]
id = "primeintellect/math-env"
ratio = 0.75
algo = { type = "opd", teacher = { name = "Qwen/Qwen3-32B", base_url = ["http://big/v1"], api_key_var = "BIG_KEY" } }
[[orchestrator.train.env]]
id = "primeintellect/wiki-search"
name = "wiki"
ratio = 0.25
args = { max_turns = 3 }
algo = { type = "opd", teacher = { name = "Qwen/Qwen3-8B", base_url = "http://small:8000/v1" } }
"""
VERL = """\
python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=S distillation.enabled=True \\
  distillation.teacher_key=data_source data.train_files=[a.parquet,b.parquet] \\
  +distillation.teacher_models.gsm8k.key=openai/gsm8k \\
  +distillation.teacher_models.gsm8k.model_path=T1 \\
  +distillation.teacher_models.gsm8k.num_replicas=2 \\
  +distillation.teacher_models.gsm8k.inference.name=vllm \\
  +distillation.teacher_models.gsm8k.inference.enforce_eager=True \\
  +distillation.teacher_models.geo.key=hiyouga/geometry3k \\
  +distillation.teacher_models.geo.model_path=T2 \\
  +distillation.teacher_models.geo.inference.gpu_memory_utilization=0.7
"""


def written(folder: Path, name: str, text: str, *options: str, code: int = EXIT_OK) -> RunConfig:
    (folder / name).write_text(text)
    assert main([str(folder / name), "--out", str(folder / "new.toml"), *options]) == code
    tomllib.loads((folder / "new.toml").read_text())
    return load_config([folder / "new.toml"]).config


def rows(draft: Draft, verdict: str) -> dict[str, str]:
    return {row.key: row.words for row in draft.rows if row.verdict == verdict}


def test_environments_of_prime_rl_are_sources_with_their_shares_and_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIG_KEY", "x")
    config = written(tmp_path, "rl.toml", PRIME, "--env", "reasoning")
    assert {n: (s.share, s.teacher, s.env) for n, s in config.sources.items()} == {
        "math_env": (0.75, "math_env", None),
        "wiki": (0.25, "wiki", None),
    }
    big, small = config.teachers["math_env"], config.teachers["wiki"]
    assert (big.model, big.base_url, big.api_key_env) == ("Qwen/Qwen3-32B", ("http://big/v1",), "BIG_KEY")
    assert (small.model, small.base_url, small.api_key_env) == ("Qwen/Qwen3-8B", ("http://small:8000/v1",), None)
    assert (config.loss.teacher_tau, config.loss.adv_tau, config.skip_verification) == (1.0, 0.0, True)
    assert (config.rollout.batch_size, config.rollout.group_size) == (16, 4)
    _, draft, _ = read(str(tmp_path / "rl.toml"))
    mapped, impossible = rows(draft, "mapped"), rows(draft, "impossible")
    assert mapped["orchestrator.train.env[0]"] == (
        '[sources.math_env], share 0.75, teacher "Qwen/Qwen3-32B" as [teachers.math_env]'
    )
    assert "sources.NAME.env" in impossible["orchestrator.train.env"]
    assert impossible["orchestrator.train.env[1]"] == "args: give the environment's as sources.wiki.env_args"


def test_an_environment_with_another_algorithm_is_no_source_to_distil(tmp_path: Path) -> None:
    (tmp_path / "rl.toml").write_text(
        PRIME.replace('type = "opd", teacher = { name = "Qwen/Qwen3-8B"', 'type = "grpo", x = { y = "z"')
    )
    _, draft, _ = read(str(tmp_path / "rl.toml"))
    assert 'algo "grpo" for one environment alone' in rows(draft, "impossible")["orchestrator.train.env[1]"]
    assert "teachers.wiki.model" not in draft.settings


def test_the_newer_tables_of_sources_are_read_too(tmp_path: Path) -> None:
    text = PRIME.replace("orchestrator.train.env", "orchestrator.train.source").replace("id =", "env.taskset.id =")
    config = written(tmp_path, "rl.toml", text, "--env", "reasoning")
    assert {name: source.teacher for name, source in config.sources.items()} == {"math_env": "math_env", "wiki": "wiki"}
    _, draft, _ = read(str(tmp_path / "rl.toml"))
    assert (
        "(primeintellect/math-env, primeintellect/wiki-search)"
        in rows(draft, "impossible")["orchestrator.train.source"]
    )


def test_teachers_of_verl_are_teachers_of_sources(tmp_path: Path) -> None:
    config = written(tmp_path, "run.sh", VERL)
    assert {n: s.teacher for n, s in config.sources.items()} == {"gsm8k": "gsm8k", "geo": "geo"}
    first, second = config.teachers["gsm8k"], config.teachers["geo"]
    assert (first.model, second.model) == ("T1", "T2")
    assert first.server is not None
    assert first.server.data_parallel == 2
    assert second.server is not None
    assert second.server.memory == 0.7
    _, draft, _ = read(str(tmp_path / "run.sh"))
    impossible = rows(draft, "impossible")
    assert "sources.gsm8k.tasks" in impossible["distillation.teacher_models.gsm8k.key"]
    assert "sources.NAME.tasks" in impossible["data.train_files"]
    assert "teacher" not in impossible


def test_one_teacher_of_verl_by_the_new_name_is_the_teacher(tmp_path: Path) -> None:
    text = (
        "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=S "
        "distillation.teacher_models.teacher_model.model_path=T "
        "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=2 data.train_files=a.jsonl\n"
    )
    config = written(tmp_path, "run.sh", text)
    assert (config.teacher.model, config.sources, config.teachers) == ("T", {}, {})
    assert config.teacher.server is not None
    assert config.teacher.server.tensor_parallel == 2
    assert config.tasks.train == "a.jsonl"


def test_what_verl_itself_leaves_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(VERL.replace("teacher_models.geo.", "teacher_models.teacher_model."))
    _, draft, _ = read(str(tmp_path / "run.sh"))
    refused = rows(draft, "impossible")["distillation.teacher_models.teacher_model.model_path"]
    assert "leaves out" in refused
    assert draft.value("teacher.model") == "T1"  # the one that is left


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("org/math-env", "math_env"), ("p50", "set_p50"), ("9 to 5", "set_9_to_5"), ("é", "set"), ("a", "a_2")],
)
def test_names_of_tables(name: str, wanted: str) -> None:
    assert table_name(name, ["a"]) == wanted
