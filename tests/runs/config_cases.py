"""How each file of `configs/` is trained for two steps on a machine of two cores, without GPUs and without network: in
which suite, and with what other than the file says. `tests/runs/test_configs.py` has the slow ones, `tests/vllm` those
on real vLLM servers, `tests/browser` the one on the web."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.config import RunConfig
from distill.config_load import leaves, load_config
from distill.models import resolve
from distill.rundir import evaluations, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs"

STEPS = 2
SHORT = {"steps": str(STEPS), "optim.warmup_steps": "0", "eval.num_tasks": "4"}
TINY = {"student.model": "student", "teacher.model": "teacher"}
"""The folders of `tiny_models`."""
FLOAT32 = {"student.server.dtype": "float32", "teacher.server.dtype": "float32"}
"""The trainer computes in float32 where there is no GPU, and a server takes 16 bits."""
ROWS = 24
"""Of an invented data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One file."""

    suite: Literal["slow", "vllm", "browser"]
    overrides: Mapping[str, str]
    """By key, all that is not as in the file."""
    prepare: Callable[[Path], None]
    """Puts into the working directory what the file, or an override, names."""


def tiny_models(folder: Path) -> None:
    """`student` and `teacher`: the built-in models with the context of a large one, which is a number in their
    configuration alone (rotary positions have no weights)."""
    for name in ("student", "teacher"):
        shutil.copytree(resolve(f"builtin:medbrowse-{name}"), folder / name)
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 32768}))


def papers(folder: Path) -> None:
    """Models, and invented papers in the form of PubMedQA, converted as the file says."""
    import convert_dataset

    tiny_models(folder)
    rows = {
        str(1000 + i): {
            "QUESTION": f"Does remedy {i} help against ailment {i}?",
            "CONTEXTS": [f"We gave remedy {i} to fifty patients.", f"Ailment {i} became rarer."],
            "LABELS": ["METHODS", "RESULTS"],
            "MESHES": ["Humans"],
            "YEAR": "2011",
            "final_decision": ("yes", "no", "maybe")[i % 3],
            "LONG_ANSWER": "Remedies help.",
        }
        for i in range(ROWS)
    }
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    tests = {pmid: row["final_decision"] for pmid, row in list(rows.items())[: ROWS // 3]}
    (folder / "test_ground_truth.json").write_text(json.dumps(tests))
    for split in ("train", "test"):
        pages = ["--pages", str(folder / "pubmedqa_pages.jsonl")] if split == "train" else []
        out = ["--split", split, "--out", str(folder / f"pubmedqa_{split}.jsonl")]
        assert convert_dataset.main(["pubmedqa", str(folder), *out, *pages]) == 0


def word_problems(folder: Path) -> None:
    """Models, and invented problems in the form of GSM8K."""
    tiny_models(folder)
    data = folder / "gsm8k"
    data.mkdir()
    for file, first in (("train.jsonl", 0), ("test.jsonl", ROWS)):
        rows = [
            {"question": f"Ann has {i} pens and buys 2. How many?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}
            for i in range(first, first + ROWS)
        ]
        (data / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def nothing(folder: Path) -> None:
    """The file makes what it names itself."""


CASES = {
    # Their own models are tiny. The second one's are made on first use: two times 900 steps of its pre-training.
    "medbrowse_cpu_hard": Case(suite="slow", overrides=SHORT, prepare=nothing),
    "pubmedqa_smollm2": Case(
        suite="slow",
        overrides=SHORT | {"student.model": "student"},
        prepare=papers,
    ),
    "gsm8k_smollm2": Case(
        suite="slow",
        overrides=SHORT | TINY | {"env_args.data": "gsm8k", "rollout.batch_size": "4"},
        prepare=word_problems,
    ),
    "medbrowse_vllm_cpu": Case(
        suite="vllm",
        overrides={"steps": "2", "optim.warmup_steps": "0", "student.model": "student"},
        prepare=tiny_models,
    ),
    # `gpus` stay: a machine without any divides its cores.
    "medbrowse_registry": Case(
        suite="vllm",
        overrides=SHORT | TINY | FLOAT32 | {"rollout.batch_size": "4"},
        prepare=tiny_models,
    ),
    "medbrowse_8gpu": Case(
        suite="vllm",
        overrides=SHORT
        | TINY
        | FLOAT32
        | {
            "rollout.batch_size": "4",
            # Two copies of each model instead of three and two over two GPUs each.
            "student.server.gpus": "1,2",
            "student.server.data_parallel": "2",
            "teacher.server.gpus": "4,5",
            "teacher.server.tensor_parallel": "1",
        },
        prepare=tiny_models,
    ),
    # Its servers are those of medbrowse_registry; what it has alone is the web, rendered in Chromium and recorded.
    "medbrowse": Case(
        suite="browser",
        overrides=SHORT
        | TINY
        | {
            "student.server": "none",
            "teacher.server": "none",
            "rollout.batch_size": "4",
            "rollout.max_turn_tokens": "64",
            # A site of this machine is the whole web, and no public interface is asked.
            "env_args.browse.open_addresses": '["{address}"]',
            "env_args.browse.requests_per_minute": '{"127.0.0.1" = 6000}',
            "env_args.browse.tools": "[]",
        },
        prepare=tiny_models,
    ),
}
WHOLE = ("medbrowse_cpu",)
"""Trained to their end on three seeds by tests/runs/test_cpu_default.py, with nothing changed but the models' seed."""


def flags(name: str, **places: str) -> list[str]:
    """The command line of a case.

    Args:
        places: of what the test started: `address` of a site.
    """
    words = ["--config", name, "--run-id", "run"]
    for key, value in CASES[name].overrides.items():
        for place, text in places.items():
            value = value.replace(f"{{{place}}}", text)
        words += [f"--{key}", value]
    return words


def train(name: str, folder: Path, *, timeout_s: float, **places: str) -> list[dict[str, Any]]:
    """The run of a case in the folder that it has prepared, in a process of its own; see `flags` and `check_run`."""
    done = subprocess.run(
        [sys.executable, "-m", "distill.run", *flags(name, **places)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return check_run(folder / "runs" / "run", name)


def check_run(path: Path, name: str) -> list[dict[str, Any]]:
    """What every configuration has to show: two real steps, a checkpoint, its evaluations, and no setting that is not
    the file's or the table's.

    Returns:
        The lines of `metrics.jsonl`.
    """
    case, file = CASES[name], load_config([FOLDER / f"{name}.toml"]).config
    assert json.loads((path / "run.json").read_text())["status"] == "finished"
    lines = check_steps(path, STEPS)
    written, used = dict(leaves(file)), dict(leaves(RunConfig.model_validate_json((path / "config.json").read_text())))
    changed = {key for key in {*written, *used} - {"run_id"} if written.get(key) != used.get(key)}
    assert not [key for key in changed if not any(_same(key, other) for other in case.overrides)]
    assert not [key for key in case.overrides if not any(_same(key, other) for other in changed)], "changes nothing"
    names = ["student"] * file.eval.at_start + ["student"] * file.eval.at_end
    names += ["teacher"] * (file.eval.at_start and file.eval.teacher)
    assert sorted(line["name"] for line in evaluations(path)) == sorted(names)
    return lines


def _same(key: str, other: str) -> bool:
    """One is the other, or a table with the other in it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def check_steps(path: Path, count: int) -> list[dict[str, Any]]:
    """`count` steps that trained something, and the last one's checkpoint."""
    lines = read_jsonl(path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, count + 1))
    for line in lines:
        assert math.isfinite(line["teacher_kl"])
        assert math.isfinite(line["loss"])
        assert 0 < line["grad_norm"] < math.inf
        assert line["train/tokens"] > 0
        assert line["train/episodes"] > 0
        assert line["teacher/coverage"] == 1.0
        assert line["publish/canary"] is not None
    assert (path / "checkpoints" / f"step_{count:06}" / "MANIFEST.json").is_file()
    return lines
