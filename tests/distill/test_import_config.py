"""Configurations of prime-rl, rnow and verl, read as ours: the examples that their documentation prints, each kind of
key, and files that are broken on purpose."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distill.run
from distill.config import RunConfig
from distill.config_files import ConfigError
from distill.config_keys import all_keys
from distill.config_load import load_config
from distill.import_config import EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, main, read
from distill.migrate import prime_rl, rnow, source, verl, verl_keys
from distill.migrate.draft import Draft, Row
from distill.migrate.write import toml, toml_value

ROOT = Path(__file__).resolve().parents[2]

PRIME_SAME_MODEL = """\
teacher_gpu_ids = [2, 3]

[trainer.loss]
teacher_tau = 0.5
"""
PRIME_OTHER_MODEL = """\
teacher_gpu_ids = [2, 3]

[teacher_inference.model]
name = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"

[trainer.loss]
teacher_tau = 0.5
"""
PRIME_ELSEWHERE = """\
[trainer.loss]
teacher_tau = 0.5

[orchestrator.teacher_model.client]
base_url = ["http://teacher-server:8000/v1"]

[orchestrator.teacher_model.model]
name = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
"""
PRIME_PURE = """\
teacher_gpu_ids = [2, 3]

[trainer.loss]
teacher_tau = 1.0
adv_tau = 0.0

[orchestrator.buffer]
skip_verification = true
"""
PRIME_NEWER = """\
[model]
name = "Qwen/Qwen3-0.6B"

[orchestrator.algo]
type = "opd"

[orchestrator.algo.teacher]
name = "Qwen/Qwen3-8B"
base_url = "http://teacher:8000/v1"
"""
RNOW = """\
dataset_type: distill
data:
  train_file: train.jsonl
  batch_size: 4
  group_size: 4
model:
  path: Qwen/Qwen3-8B
  qlora_rank: 32
teacher:
  path: Qwen/Qwen3-32B
algorithm:
  loss_fn: ppo            # or importance_sampling
  adv_estimator: grpo
  kl_penalty_coef: 0.1
rollout:
  max_turns: 10
  max_tokens: 4096
  termination_policy: last_tool
"""
VERL = """\
python3 -m verl.trainer.main_ppo --config-name=distillation_trainer \\
  actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct \\
  actor_rollout_ref.ref.model.path=Qwen/Qwen2.5-7B-Instruct \\
  data.train_files=~/data/gsm8k/train.parquet data.val_files=~/data/gsm8k/test.parquet
"""
EXAMPLES = {
    "same.toml": PRIME_SAME_MODEL,
    "other.toml": PRIME_OTHER_MODEL,
    "elsewhere.toml": PRIME_ELSEWHERE,
    "pure.toml": PRIME_PURE,
    "newer.toml": PRIME_NEWER,
    "config.yml": RNOW,
    "run.sh": VERL,
}
TOOLS = '''"""One tool."""

from tools.tool import tool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
'''
REWARDS = """from envs.rewards import RewardArgs, reward


@reward
def right(args: RewardArgs, messages: list) -> float:
    return float(args.metadata.get("answer", "") in messages[-1]["content"])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def imported(file: str, *options: str) -> RunConfig:
    """What our loader reads from the file that the command writes."""
    out = Path(f"{file}.new.toml")
    out.unlink(missing_ok=True)
    assert main([file, "--out", str(out), "--env", "medbrowse", "--student", "S", *options]) == EXIT_OK
    return load_config([out]).config


def draft_of(text: str, name: str) -> Draft:
    return read(write(name, text))[1]


def row(draft: Draft, key: str) -> Row:
    found = [r for r in draft.rows if r.key == key]
    assert len(found) == 1, (key, draft.rows)
    return found[0]


def mistake(file: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(file)
    return "\n".join(caught.value.messages)


# The printed examples


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_imports_and_every_key_of_it_has_a_row(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No key is lost; what has no effect of its own here is the data, which is converted by the command that the report
    prints, and the file of tasks, which is not there (`test_import_runs.py` has them)."""
    draft = draft_of(EXAMPLES[name], name)
    text = EXAMPLES[name]
    keys = {"toml": source.read_toml, "yml": source.read_yaml, "sh": source.read_command}[name.rpartition(".")[2]]
    assert {e.key for e in keys(text, name)} <= {r.key for r in draft.rows}
    assert not [r for r in draft.rows if r.verdict == "not known"]
    assert {r.key for r in draft.rows if r.verdict == "impossible"} <= {
        "data.train_file", "data.train_files", "data.val_files"
    }  # fmt: skip
    config = imported(name)
    assert config.env == "medbrowse"
    assert config.student.model == "S"
    assert distill.run.main(["--config", f"{name}.new.toml", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "environment   medbrowse: " in planned
    assert f"loss          {config.loss.type}, teacher_tau {config.loss.teacher_tau:g}" in planned


def test_the_command_writes_a_file_that_a_dry_run_takes(place: Path) -> None:
    write("rl.toml", PRIME_PURE)
    command = [sys.executable, "-m", "distill.import_config", "rl.toml", "--out", "new.toml"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == EXIT_INCOMPLETE, done.stderr
    assert "mapped      teacher_gpu_ids = [2, 3]  (rl.toml:1)" in done.stdout
    assert "env is not set" in done.stdout
    dry = [sys.executable, "-m", "distill.run", "--config", "new.toml", "--dry-run"]
    refused = subprocess.run(dry, capture_output=True, text=True, env=environment, timeout=60)
    assert refused.returncode == 2
    assert "student.model is not set" in refused.stderr
    dry += ["--env", "medbrowse", "--student.model", "S"]
    taken = subprocess.run(dry, capture_output=True, text=True, env=environment, timeout=60)
    assert taken.returncode == 0, taken.stderr
    assert "teacher_tau 1, adv_tau 0" in taken.stdout
    assert "2 vLLM server(s) of this run on GPU 2, 3" in taken.stdout


def test_prime_rl_defaults_are_made_explicit_and_the_teacher_is_the_students_model(place: Path) -> None:
    config = imported(write("a.toml", PRIME_SAME_MODEL))
    assert (config.loss.teacher_tau, config.loss.adv_tau, config.skip_verification) == (0.5, 1.0, False)
    assert config.teacher.model is None
    assert config.teacher_model == "S"
    assert config.teacher.server is not None
    assert config.teacher.server.gpus == (2, 3)
    assert config.teacher.server.data_parallel == 2
    assert config.student.server is not None
    assert config.student.server.gpus == (0,)
    draft = draft_of("[trainer.optim]\nlr = 1e-6\n", "b.toml")
    assert "CUDA_VISIBLE_DEVICES=1" in row(draft, "trainer_gpu_ids").words
    assert draft.value("loss.teacher_tau") == 0.0


def test_prime_rl_teachers(place: Path) -> None:
    name = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert imported(write("a.toml", PRIME_OTHER_MODEL)).teacher.model == name
    elsewhere = imported(write("b.toml", PRIME_ELSEWHERE)).teacher
    assert (elsewhere.model, elsewhere.base_url, elsewhere.server) == (name, ("http://teacher-server:8000/v1",), None)
    pure = imported(write("c.toml", PRIME_PURE))
    assert (pure.loss.teacher_tau, pure.loss.adv_tau, pure.skip_verification) == (1.0, 0.0, True)
    newer = imported(write("d.toml", PRIME_NEWER))
    assert (newer.loss.teacher_tau, newer.loss.adv_tau) == (1.0, 0.0)
    assert newer.teacher.base_url == ("http://teacher:8000/v1",)


def test_a_teacher_spread_over_gpus(place: Path) -> None:
    text = "teacher_gpu_ids = [2, 3, 4, 5]\n[teacher_inference.parallel]\ntp = 2\n"
    server = imported(write("a.toml", text)).teacher.server
    assert server is not None
    assert (server.tensor_parallel, server.data_parallel) == (2, 2)
    odd = draft_of(text.replace("[2, 3, 4, 5]", "[2, 3, 4]"), "b.toml")
    assert row(odd, "teacher_gpu_ids").verdict == "impossible"
    assert "teacher.server.gpus" not in odd.settings


def test_prime_rl_counts_episodes_and_we_count_tasks(place: Path) -> None:
    draft = draft_of("[orchestrator]\nbatch_size = 128\nrollouts_per_example = 16\n", "a.toml")
    assert (draft.value("rollout.batch_size"), draft.value("rollout.group_size")) == (8, 16)
    odd = draft_of("[orchestrator]\nbatch_size = 100\nrollouts_per_example = 16\n", "b.toml")
    assert "no whole number of tasks" in row(odd, "orchestrator.batch_size").words


@pytest.mark.parametrize(
    ("text", "key", "verdict", "words"),
    [
        ("max_steps = 7", "max_steps", "mapped", "steps"),
        ("[weight_broadcast]\ntype = 'nccl'", "weight_broadcast.type", "mapped", "student.weight_sync"),
        ("[weight_broadcast]\ntype = 'nixl'", "weight_broadcast.type", "impossible", "filesystem, nccl"),
        ("max_async_level = 2", "max_async_level", "mapped", "rollout.max_staleness"),
        ("[trainer.loss]\ntoken_mask_low = 0.1", "trainer.loss.token_mask_low", "dropped", "loss.rho"),
        ("[trainer.loss]\nkl_tau = 0", "trainer.loss.kl_tau", "dropped", "0"),
        ("[trainer.loss]\nkl_tau = 0.1", "trainer.loss.kl_tau", "impossible", "no such setting"),
        ("[trainer.optim]\nlr = 'fast'", "trainer.optim.lr", "impossible", "wanted a number"),
        ("[[orchestrator.env]]\nid = 'wordle'", "orchestrator.env", "impossible", "(wordle)"),
        ("[orchestrator.buffer]\neasy_threshold = 0.9", "orchestrator.buffer.easy_threshold", "impossible", "no such"),
        ("trainer_gpu_ids = [1]", "trainer_gpu_ids", "dropped", "CUDA_VISIBLE_DEVICES=1"),
        ("trainer_gpu_ids = [0, 1]", "trainer_gpu_ids", "dropped", "--nproc-per-node 2"),
        ("teacher_gpu_idz = [1]\nmax_steps = 1", "teacher_gpu_idz", "not known", "did you mean teacher_gpu_ids?"),
        ("max_steps = 1\nquantum = true", "quantum", "not known", "no key"),
        ("[orchestrator.algo]\ntype = 'grpo'", "orchestrator.algo.type", "impossible", "no teacher"),
    ],
)
def test_a_kind_of_prime_rl_key(text: str, key: str, verdict: str, words: str, place: Path) -> None:
    found = row(draft_of(text, "a.toml"), key)
    assert found.verdict == verdict
    assert words in found.words
    assert found.origin == f"a.toml:{1 + text[: text.index(key.rpartition('.')[2].split(' ')[0])].count(chr(10))}" or (
        key == "orchestrator.env" and found.origin == "a.toml:1"
    )


def test_weights_and_biases_of_prime_rl(place: Path) -> None:
    tracking = imported(write("a.toml", '[wandb]\nproject = "p"\nname = "n"\nshared = true\n')).tracking
    assert (tracking.to, tracking.project, tracking.name) == (("wandb",), "p", "n")
    assert imported(write("b.toml", "max_steps = 1\n[wandb]\n")).tracking.to == ("wandb",)
    draft = draft_of('[wandb]\nproject = "p"\n[trainer.wandb]\nproject = "q"\n', "c.toml")
    assert row(draft, "trainer.wandb.project").verdict == "impossible"


def test_two_names_for_one_key_that_differ_are_told(place: Path) -> None:
    draft = draft_of('[model]\nname = "A"\n[inference.model]\nname = "B"\n', "a.toml")
    assert draft.value("student.model") == "A"
    assert "model.name says" in row(draft, "inference.model.name").words
    assert row(draft, "inference.model.name").verdict == "impossible"


# rnow


def test_rnow_with_its_folder(place: Path) -> None:
    write("my/config.yml", RNOW + "trainer:\n  num_epochs: 3\n  learning_rate: 2e-4\n")
    write("my/tools.py", TOOLS)
    write("my/rewards.py", REWARDS)
    write(
        "my/train.jsonl",
        "".join(json.dumps({"messages": [{"role": "user", "content": str(i)}]}) + "\n" for i in range(10)),
    )
    assert main(["my/config.yml", "--out", "new.toml"]) == EXIT_OK
    config = load_config(["new.toml"]).config
    assert config.env == "./my"
    assert not config.skip_verification
    assert config.steps == 8  # ceil(3 x 10 / 4)
    assert config.optim.lr == 2e-4  # text to YAML 1.1
    lora = config.student.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.quantization) == (32, 64.0, "nf4")
    assert (config.loss.teacher_tau, config.loss.adv_tau, config.loss.type) == (0.1, 0.0, "sampled")
    assert (config.rollout.batch_size, config.rollout.group_size, config.rollout.max_turns) == (4, 4, 10)
    assert (config.rollout.max_turn_tokens, config.rollout.termination_policy) == (4096, "last_tool")
    dry = subprocess.run(
        [sys.executable, "-m", "distill.run", "--config", "new.toml", "--dry-run"],
        capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=60,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert "1 tools (add)" in dry.stdout


def test_rnow_files_that_need_a_hand_are_told_with_their_line(place: Path) -> None:
    write("my/config.yml", RNOW)
    write("my/tools.py", "from rnow.core import tool\nfrom rnow.models import ToolArgs\n\n\n@tool(sandbox=True)\n"
          'def f(args: ToolArgs) -> str:\n    """F."""\n    return ""\n')  # fmt: skip
    write("my/train.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [], "docker": "x"}\n')
    write("my/rewards.py", "from rnow.models import get_response\n")
    rows = read("my/config.yml")[1].rows
    told = {(r.origin, r.verdict) for r in rows}
    assert {(f"my/tools.py:{line}", "impossible") for line in (1, 2, 5, 6)} <= told
    assert ("my/train.jsonl:2", "impossible") in told
    assert ("my/train.jsonl", "mapped") in told
    assert next(r.words for r in rows if r.origin == "my/rewards.py:1").endswith("read messages[-1]")


def test_rnow_reads_nothing_outside_of_its_folder(place: Path) -> None:
    write("secret.jsonl", "{}\n")
    write("my/config.yml", RNOW.replace("train.jsonl", "../secret.jsonl"))
    found = row(read("my/config.yml")[1], "data.train_file")
    assert (found.verdict, "in the folder" in found.words) == ("impossible", True)


def test_rnow_where_little_is_said(place: Path) -> None:
    text = "dataset_type: distill\nmodel: {path: A/B}\nteacher: {path: C/D}\ndata: {batch_size: 2}\n"
    config = imported(write("config.yml", text))
    assert (config.loss.teacher_tau, config.rollout.max_turns, config.rollout.group_size) == (1.0, 1, 4)
    sft = draft_of(text.replace("distill", "sft") + "trainer: {num_epochs: 3}\n", "sft.yml")
    found = row(sft, "dataset_type")
    assert found.verdict == "impossible"
    assert "python -m distill.collect --env ENV --model TEACHER" in found.words
    command = found.words.partition("distill.sft ")[2].partition(". What")[0]
    assert command == "--episodes collected --student A/B --batch-size 2 --epochs 3 --lr 0.0001 --out runs/sft"
    mcp = draft_of(text + "rollout: {mcp_url: 'http://x', reasoning_mode: disabled, tool_timeout: 9}\n", "mcp.yml")
    assert row(mcp, "rollout.mcp_url").verdict == "impossible"
    assert mcp.value("student.enable_thinking") is False


# verl


def test_verl_defaults_and_parquet(place: Path) -> None:
    draft = draft_of(VERL, "run.sh")
    assert draft.value("rollout.temperature") == 0.6
    assert draft.value("loss.teacher_tau") == 1.0
    assert draft.value("optim.lr") == 1e-5
    assert draft.value("rollout.max_turns") == 1
    command = "python convert_dataset.py ~/data/gsm8k/train.parquet --prompt prompt --answer reward_model.ground_truth"
    assert command in row(draft, "data.train_files").words
    assert row(draft, "data.train_files").origin == "run.sh:4"
    assert "forward KL" in row(draft, "loss.type").words
    assert draft.value("env") == "reasoning"
    assert main(["run.sh", "--out", "new.toml"]) == EXIT_OK  # no option is needed
    assert '# train = "train.jsonl"    # REQUIRED' in Path("new.toml").read_text()
    config = load_config(["new.toml"]).config
    assert config.teacher.model == "Qwen/Qwen2.5-7B-Instruct"
    assert any("temperature" in note for note in config.notes())


@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [("mse", "mapped", "reverse KL"), ("kl", "impossible", "no expected gradient"),
     ("low_var_kl", "impossible", "forward KL"), ("entropic", "impossible", "not known")],
)  # fmt: skip
def test_what_a_kl_type_of_verl_optimises(kind: str, verdict: str, words: str, place: Path) -> None:
    draft = draft_of(f"actor_rollout_ref.actor.kl_loss_type={kind}\n", "run.txt")
    found = row(draft, "actor_rollout_ref.actor.kl_loss_type")
    assert found.verdict == verdict
    assert words in found.words
    assert draft.value("loss.type") == "sampled"


def test_arguments_after_two_dashes_and_updates_of_one_batch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["actor_rollout_ref.model.path=A", "actor_rollout_ref.ref.model.path=B", "data.train_batch_size=64",
             "actor_rollout_ref.actor.ppo_mini_batch_size=16", "+trainer.total_training_steps=10",
             "data.max_prompt_length=100", "data.max_response_length=200", "actor_rollout_ref.rollout.n=4",
             "actor_rollout_ref.rollout.top_k=-1", "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1",
             "actor_rollout_ref.actor.kl_loss_coef=0.5", "actor_rollout_ref.rollout.name=vllm",
             "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_rank=16"]  # fmt: skip
    assert main(["--env", "medbrowse", "--out", "new.toml", "--", *words]) == EXIT_OK
    config = load_config(["new.toml"]).config
    assert (config.rollout.batch_size, config.steps, config.rollout.group_size) == (16, 40, 4)
    assert (config.rollout.max_turn_tokens, config.rollout.max_episode_tokens) == (200, 300)
    assert (config.optim.warmup_steps, config.loss.teacher_tau, config.rollout.top_k) == (4, 0.5, 0)
    assert config.student.server is not None
    assert config.student.lora is not None
    assert config.student.lora.rank == 16
    assert "set again at argument 14" in capsys.readouterr().out


def test_a_script_with_variables_and_a_yaml_with_overrides(place: Path) -> None:
    script = (
        "#!/bin/bash\nset -x\nexport MODEL=Qwen/Qwen3-0.6B\nTEACHER=${BIG:-Qwen/Qwen3-8B}\n"
        'PYTHONUNBUFFERED=1 python3 -m verl.trainer.main_ppo \\\n  actor_rollout_ref.model.path="$MODEL" \\\n'
        "  actor_rollout_ref.ref.model.path=${TEACHER} \\\n  data.train_files=$DATA/train.parquet $@ 2>&1 | tee log\n"
    )
    draft = draft_of(script, "run.sh")
    assert draft.value("student.model") == "Qwen/Qwen3-0.6B"
    assert draft.value("teacher.model") == "Qwen/Qwen3-8B"
    assert "write the value" in row(draft, "data.train_files").words
    assert row(draft, "$@").verdict == "not known"
    assert not [r for r in draft.rows if r.key in ("2>&1", "tee")]
    text = "actor_rollout_ref:\n  model:\n    path: A\n  ref: {model: {path: '${x.y}'}}\n  actor: {optim: {lr: 1e-6}}\n"
    _, merged, _ = read(write("verl.yaml", text), ["actor_rollout_ref.actor.optim.lr=2e-6"])
    assert merged.value("optim.lr") == 2e-6
    assert row(merged, "actor_rollout_ref.ref.model.path").verdict == "impossible"
    assert row(merged, "teacher").verdict == "impossible"  # none is left


@pytest.mark.parametrize(
    ("loggers", "verdict", "to", "words"),
    [
        ('["console","wandb"]', "mapped", ["wandb"], ""),
        ('["wandb","mlflow"]', "mapped", ["wandb"], "not to be had: mlflow"),
        ("tensorboard", "mapped", ["tensorboard"], ""),
        ('["swanlab"]', "impossible", None, "swanlab"),
        ('["console"]', "dropped", None, "metrics.jsonl"),
    ],
)
def test_loggers_of_verl(loggers: str, verdict: str, to: list[str] | None, words: str, place: Path) -> None:
    text = f"trainer: {{logger: {loggers}, project_name: p}}\nactor_rollout_ref: {{model: {{path: S}}}}\n"
    draft = draft_of(text, "v.yaml")
    found = row(draft, "trainer.logger")
    assert (found.verdict, draft.value("tracking.to")) == (verdict, to)
    assert words in found.words
    assert draft.value("tracking.project") == "p"


def test_newer_verl(place: Path) -> None:
    text = (
        "distillation:\n  enabled: true\n  teacher_model: {model_path: T}\n"
        "  distillation_loss: {loss_mode: forward_kl_topk, topk: 16, use_policy_loss: true}\n"
        "actor_rollout_ref: {model: {path: S}}\n"
    )
    draft = draft_of(text, "v.yaml")
    assert (draft.value("loss.type"), draft.value("teacher.top_k")) == ("topk", 16)
    assert row(draft, "distillation.distillation_loss.loss_mode").verdict == "impossible"
    assert row(draft, "distillation.distillation_loss.use_policy_loss").verdict == "impossible"
    assert imported("v.yaml").teacher.model == "T"


# Files that are wrong


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "x = [1,\n", "a.toml:"),
        ("a.toml", "a = 1\n", "no key of prime-rl's"),
        ("a.toml", 'trainer = {}\n[student]\nmodel = "x"\n', "of this project already"),
        ("a.yml", "a: [1\nb: 2\n", "a.yml:2"),
        ("a.yml", "a: &x [1]\nb: *x\n", "a.yml:2: the YAML alias *x"),
        ("a.yml", "data: 1\ndata: 2\n", "a.yml:2: 'data' is set twice"),
        ("a.yml", "dataset_type: !!python/object/apply:os.system ['true']\n", "a.yml:1"),
        ("a.yml", "- 1\n", "mapping"),
        ("a.yml", "a: 1\n---\nb: 2\n", "a.yml:2"),
        ("a.yml", "x: " + "[" * 5000, "nested more than 20 deep"),
        ("a.yml", "x: 2024-99-99\n", "not YAML"),
        ("a.yml", "x: 1\n", "neither rnow's"),
        ("a.sh", "python -m verl.trainer.main_ppo 'a=b\n", "a.sh:1"),
        ("a.sh", "python -m verl.trainer.main_ppo\n", "no override"),
        ("a.toml", b"\xff\xfe", "not UTF-8"),
        ("a.toml", b"a = 1\nb = '\0'", "a.toml:2: holds a NUL"),
        ("a.toml", "#" * 300_000, "larger than 256 KiB"),
        ("a.toml", "".join(f"trainer.x{i} = 1\n" for i in range(6000)), "more than 5000 keys"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_place(name: str, text: str | bytes, words: str, place: Path) -> None:
    write(name, text)
    assert words in mistake(name)
    assert main([name, "--out", "new.toml"]) == EXIT_USAGE
    assert not Path("new.toml").exists()


def test_nothing_is_overwritten_and_nothing_secret_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("new.toml", "mine")
    write("a.toml", "max_steps = 1\n")
    assert main(["a.toml", "--out", "new.toml"]) == EXIT_USAGE
    assert Path("new.toml").read_text() == "mine"
    secret = "sk-" + "a1" * 20
    write("b.toml", f'max_steps = 1\n[wandb]\nkey = "{secret}"\n')
    main(["b.toml"])
    captured = capsys.readouterr()
    assert "(not shown)" in captured.err
    assert secret not in captured.out + captured.err


def test_standard_input_and_standard_output(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, system in ((PRIME_PURE, "prime-rl"), (RNOW, "rnow"), (VERL, "verl")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(["-", "--env", "medbrowse", "--student", "S"]) == EXIT_OK
        captured = capsys.readouterr()
        assert f"standard input: a configuration of {system}" in captured.err
        write("new.toml", captured.out)
        assert load_config(["new.toml"]).config.env == "medbrowse"


# The whole


def test_every_key_that_a_rule_names_is_ours(place: Path) -> None:
    """A rule that names a key that we do not have would write a file that does not load."""
    samples: tuple[Any, ...] = (1, 0.5, "x", True, [1], ["x"], {}, "linear", "nccl", "constant", "last_tool", "low")
    names = set(all_keys())
    written: set[str] = set()
    for rules in (prime_rl.RULES, rnow.RULES, verl_keys.RULES):
        for key, rule in rules.items():
            for value in samples:
                entry = source.Entry(key.replace("*", "x"), value, "here")
                draft = Draft([entry])
                try:
                    rule(draft, entry)
                except (ValueError, TypeError):
                    continue
                written |= set(draft.settings)
    assert len(written) > 50
    assert written <= names


def test_the_tables_of_the_documentation_name_keys_that_there_are() -> None:
    rules = [*prime_rl.RULES, *rnow.RULES, *verl_keys.RULES]
    rows = re.findall(
        r"^\| `([\w.]+)` \| (?:`([\w.]+)` )?\| ", (ROOT / "docs" / "migration.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 60
    for theirs, ours in rows:
        assert any(fnmatchcase(theirs, rule) for rule in rules), theirs
        assert not ours or ours in all_keys(), ours


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(NUMBERS | st.booleans() | st.text() | st.lists(st.text()))
def test_a_value_is_written_as_it_is_read(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}


@pytest.mark.parametrize("system", [prime_rl, rnow, verl], ids=lambda system: system.NAME)
@given(st.data())
def test_any_values_of_known_keys_become_one_row_each(system: Any, data: st.DataObject) -> None:
    rules = verl_keys.RULES if system is verl else system.RULES
    keys = st.sampled_from([key.replace("*", "x") for key in rules])
    values = st.none() | NUMBERS | st.booleans() | st.text(max_size=5) | st.sampled_from(["opd", "kl", "topk", "vllm"])
    pairs = data.draw(st.lists(st.tuples(keys, values | st.lists(values, max_size=3)), max_size=12))
    draft = Draft([source.Entry(key, value, str(i)) for i, (key, value) in enumerate(pairs)])
    rnow.convert(draft, None) if system is rnow else system.convert(draft)
    draft.close()
    assert sorted(row.origin for row in draft.rows if row.origin) == sorted(map(str, range(len(pairs))))
    assert "loss" in tomllib.loads(toml(draft.settings, "title"))


@given(st.text())
def test_no_text_breaks_a_reader(text: str) -> None:
    for reader in (source.read_toml, source.read_yaml, source.read_command):
        try:
            found: list[Any] = list(reader(text, "x"))
        except ConfigError as error:
            found = list(error.messages)
        assert all(isinstance(one, source.Entry) or one.startswith("x") for one in found)
