"""Whole training steps: ours beside TRL's on-policy distillation trainer, on the same models, tasks and episodes.

    single    random weights (student width 64, 4 layers; teacher width 256, 6 layers), one turn of up to 128 tokens
    tools     the trained tiny models on one invented registry: up to four tool turns and a reply of up to 64 tokens

A step is everything: episodes, the teacher, the update, and for us the publication of the weights. Each way is a
process of its own, float32, all cores, the same learning rate; the first two steps are left out. Trained tokens are the
sampled ones, tool output masked, on both sides. Training alone is a step without its episodes and without the teacher:
the student's forward and backward pass, loss and optimiser. TRL has to be installed (`pip install trl`), or ours
stands alone.

python -m bench.trainer [--steps 8] [--episodes 32] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

CASES = {"single": {"turns": 1, "tokens": 128}, "tools": {"turns": 5, "tokens": 64}}
WARM_UP = 2
LR = 1e-4


def prepare(folder: Path, case: str) -> None:
    """Models and tasks of a case, as both ways read them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from distill import models
    from distill.tiny.tokenizer import build_tokenizer
    from envs.dataset import task_to_row
    from envs.medbrowse.tasks import QUESTION_TYPES, make_task

    tokenizer = build_tokenizer()
    for name, width, layers in (("student", 64, 4), ("teacher", 256, 6)):
        if case == "tools":
            (folder / name).symlink_to(models.resolve(f"builtin:medbrowse-{name}"))
            continue
        torch.manual_seed(width)
        shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": 32}
        heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
        config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=2048, **shape, **heads)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [task_to_row(make_task("bench", kind=kind)) | {"id": str(kind)} for kind in QUESTION_TYPES]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder: Path, case: str, steps: int, episodes: int) -> dict[str, float]:
    from distill.run import main

    flags = {
        "env": "medbrowse", "run_id": "run", "output_dir": str(folder), "steps": steps,
        "tasks.train": str(folder / "tasks.jsonl"),
        "student.model": str(folder / "student"), "student.dtype": "float32",
        "teacher.model": str(folder / "teacher"), "teacher.dtype": "float32", "optim.lr": LR, "checkpoint.every": 10**6,
        "rollout.batch_size": episodes, "rollout.group_size": 1, "rollout.max_concurrent": episodes,
        "rollout.max_turns": CASES[case]["turns"], "rollout.max_turn_tokens": CASES[case]["tokens"],
        "rollout.max_parse_errors": 100, "loss.type": "sampled", "teacher.top_k": 0,
        "eval.at_start": "false", "eval.at_end": "false",
    }  # fmt: skip
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if code := main(arguments):
        raise SystemExit(code)
    lines = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return {
        "tokens_per_s": sum(line["train/tokens"] for line in lines) / sum(line["time/step"] for line in lines),
        "seconds": median(line["time/step"] for line in lines),
        "train_seconds": median(line["time/train"] for line in lines),
        "train_tokens_per_s": sum(line["train/tokens"] for line in lines) / sum(line["time/train"] for line in lines),
        "tokens": median(line["train/tokens"] for line in lines),
    }


def trl(folder: Path, case: str, steps: int, episodes: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.chat_template_utils import qwen3_template

    from envs.dataset import read_tasks

    tasks = read_tasks(folder / "tasks.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.response_template = qwen3_template
    models = [AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32) for n in ("student", "teacher")]
    counted: list[int] = []
    ends: list[float] = []

    others: list[float] = []  # seconds of a step that are not training: its episodes, its teacher

    class Counting(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            counted.append(int(output["num_items_in_batch"]))
            others.append(time.perf_counter() - began)
            return output

        def _get_last_hidden_state(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            hidden = super()._get_last_hidden_state(*arguments, **options)
            if not torch.is_grad_enabled():  # the teacher's
                others[-1] += time.perf_counter() - began
            return hidden

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    tools = tool_functions(tasks[0]) if case == "tools" else None
    prompts = [[dict(message) for message in tasks[i % len(tasks)].messages] for i in range(episodes * steps)]
    arguments = DistillationConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=episodes, max_steps=steps, learning_rate=LR,
        beta=1.0, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=10**6, disable_tqdm=True, lr_scheduler_type="constant",
        max_completion_length=CASES[case]["tokens"] if tools is None else 700,
        max_tool_calling_iterations=None if tools is None else CASES[case]["turns"] - 1,
    )  # fmt: skip
    trainer = Counting(
        model=models[0],
        teacher_model=models[1],
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        tools=tools,
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    tokens, rest = counted[WARM_UP:], others[WARM_UP:]
    training = [whole - other for whole, other in zip(seconds, rest, strict=True)]
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "seconds": median(seconds),
        "train_seconds": median(training),
        "train_tokens_per_s": sum(tokens) / sum(training),
        "tokens": median(tokens),
    }


def tool_functions(task: Any) -> list[Callable[..., str]]:
    """The tools of the registry as the plain functions that TRL takes."""
    from envs.medbrowse.env import registry_of, registry_pages
    from envs.medbrowse.registry import SITE
    from tools.web import WebTools

    store, index = registry_pages(registry_of(task))
    web = WebTools(store, index, page_chars=8000, base_url=SITE)
    state: dict[str, Any] = {}

    def run(call: Any) -> str:
        output = asyncio.run(call)
        return output if isinstance(output, str) else output.content

    def search(query: str) -> str:
        """Search the web.

        Args:
            query: words to look for
        """
        return run(web.search(query))

    def browse(url: str) -> str:
        """Open a page.

        Args:
            url: of the page
        """
        return run(web.browse(url, state=state))

    def submit_answer(answer: str) -> str:
        """Submit the answer.

        Args:
            answer: the answer
        """
        return "submitted"

    return [search, browse, submit_answer]


def measure(way: str, case: str, steps: int, episodes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, case)
        found = (ours if way == "ours" else trl)(folder, case, steps, episodes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=32, help="a step")
    parser.add_argument("--quick", action="store_true", help="4 steps of 10 episodes")
    parser.add_argument("--way", choices=("ours", "trl"), help="measure this one only, in this process")
    parser.add_argument("--case", choices=tuple(CASES))
    arguments = parser.parse_args()
    steps, episodes = (4, 10) if arguments.quick else (arguments.steps, arguments.episodes)
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.case, steps, episodes)))
        return
    import importlib.util

    ways = ("ours", "trl") if importlib.util.find_spec("trl") else ("ours",)
    if len(ways) == 1:
        print("TRL is not installed (pip install trl): ours alone")
    result: dict[str, Any] = {"bench": "trainer", "steps": steps, "episodes": episodes}
    print(f"{'':8}{'':6}{'seconds a step':>16}{'trained tokens':>16}{'tokens/s':>10}{'training s':>12}", end="")
    print(f"{'tokens/s of it':>16}{'peak MiB':>10}")
    for case in CASES:
        for way in ways:
            command = [sys.executable, "-m", "bench.trainer", "--way", way, "--case", case]
            command += ["--steps", str(steps), "--episodes", str(episodes)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr[-3000:]}")
            found = result[f"{case}_{way}"] = {
                k: round(v, 3) for k, v in json.loads(done.stdout.splitlines()[-1]).items()
            }
            print(
                f"{case:8}{way:6}{found['seconds']:16.2f}{found['tokens']:16.0f}{found['tokens_per_s']:10.0f}"
                f"{found['train_seconds']:12.3f}{found['train_tokens_per_s']:16.0f}{found['peak_mib']:10.0f}"
            )
        if len(ways) == 2:
            for name in ("tokens_per_s", "train_tokens_per_s"):
                ratio = result[f"{case}_ours"][name] / result[f"{case}_trl"][name]
                result[f"{name}_vs_trl_{case}"] = round(ratio, 2)
            print(
                f"{case:8}ours / TRL, trained tokens a second: {result[f'tokens_per_s_vs_trl_{case}']} of whole steps, "
                f"{result[f'train_tokens_per_s_vs_trl_{case}']} of their training alone"
            )
    if len(ways) == 2:
        for name in ("tokens_per_s_vs_trl", "train_tokens_per_s_vs_trl"):
            result[name] = min(result[f"{name}_{case}"] for case in CASES)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
