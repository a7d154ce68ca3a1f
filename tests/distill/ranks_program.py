"""What the tests of several ranks run under torchrun: `ranks_program.py FOLDER SCENARIO ...`.

Rank 0 plays each scenario and writes what it found to `FOLDER/<scenario>.json`; the others obey it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_cases import make_episodes, of_sources, run_config, tiny_model, weights_of

from distill.checkpoint import find_latest, save_checkpoint
from distill.config import LoraConfig, RunConfig, TauScheduleConfig
from distill.follow import leave, obey
from distill.fsdp import SeveralRanks
from distill.ranks import Ranks, join
from distill.student import NumericError, Student

LORA = LoraConfig(rank=4, alpha=8.0)
Lead = Callable[[Student, Path], dict[str, Any]]


def student_of(name: str, ranks: Ranks) -> Student:
    """`lora` and `bf16`, `checkpointing`, `untied`, `topk`, `full`, `sources`: each a part of the scenario's name."""
    torch.manual_seed(ranks.rank)  # adapters are drawn from it
    model = tiny_model(5 * ranks.rank, tied="untied" not in name)  # the leader's weights are the ones that count
    student = Student(model.to(torch.bfloat16 if "bf16" in name else torch.float32), config_of(name), ranks=ranks)
    if "full" in name:
        student.set_teacher(tiny_model(9))
    return student


def config_of(name: str) -> RunConfig:
    loss: dict[str, Any] = {"type": "topk" if "topk" in name else "full" if "full" in name else "sampled"}
    if "sources" in name:
        loss |= {"source_balance": 0.7, "teacher_tau_schedule": TauScheduleConfig(end=0.2, over=3)}
    return run_config(
        loss=loss,
        optim={"max_grad_norm": 0.5, "schedule": "cosine", "micro_batch_tokens": 60, "weight_decay": 0.1},
        lora=LORA if "lora" in name else None,
        gradient_checkpointing="checkpointing" in name,
    )


def train(student: Student, folder: Path) -> dict[str, Any]:
    """Three steps; the second one has a single trace, so that all ranks but one have nothing to do."""
    steps = []
    for step in (1, 2, 3):
        episodes = of_sources(make_episodes(1 if step == 2 else 7, seed=step, top_k=3), *student.config.all_sources)
        steps.append(student.train_step(episodes, step=step))
    save_file({n: t.contiguous() for n, t in weights_of(student).items()}, folder / "weights.safetensors")
    save_checkpoint(folder / "checkpoints", 3, student, cursor=11, keep_last=1)
    if student.has_lora:
        student.save_adapter(folder / "adapter")
    copy = student.serving_copy()
    ids = list(range(1, 30))
    with torch.no_grad():
        served = copy(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return {
        "steps": steps,
        "logprobs": student.logprobs(ids)[1:],
        "served": [served[i - 1, ids[i]].item() for i in range(1, len(ids))],
    }


def resume(student: Student, folder: Path) -> dict[str, Any]:
    """A fourth step, from the checkpoint of `train` in the same folder."""
    checkpoint = find_latest(folder / "checkpoints")
    assert checkpoint is not None
    student.restore(checkpoint)
    return {
        "step": student.train_step(of_sources(make_episodes(7, seed=4, top_k=3), *student.config.all_sources), step=4),
        "num_rng": len(checkpoint.rng),
        "logprobs": student.logprobs(list(range(1, 30)))[1:],
    }


def poisoned(student: Student, folder: Path) -> dict[str, Any]:
    """The last rank's loss is not a number in the first step (`spoil`); the second step is as if it had not been."""
    before = weights_of(student)
    message = ""
    try:
        student.train_step(make_episodes(7), step=1)
    except NumericError as error:
        message = str(error)
    unchanged = all(torch.equal(before[n], t) for n, t in student.state_dict_for_serving().items())
    moments = len(student.optimizer.state())
    return {
        "message": message,
        "unchanged": unchanged,
        "moments": moments,
        "step": student.train_step(make_episodes(7), step=1),
    }


def cut_off(student: Student, folder: Path) -> dict[str, Any]:
    """No gradient reaches any weight (`spoil`)."""
    try:
        student.train_step(make_episodes(7), step=1)
    except NumericError as error:
        return {"message": str(error)}
    return {"message": ""}


def killed(student: Student, folder: Path) -> dict[str, Any]:
    """Rank 1 dies in the middle of a step (`spoil`)."""
    student.train_step(make_episodes(7), step=1)
    return {}


def spoil(student: Student, name: str, ranks: Ranks) -> None:
    """What goes wrong on a rank, by the scenario's name."""
    last = ranks.rank == ranks.size - 1
    if name.startswith("poisoned") and last:

        def once(_module: Any, _inputs: Any, output: Any) -> Any:
            handle.remove()
            return output[0] * torch.nan, output[1]

        handle = student.rows.register_forward_hook(once)
    if name.startswith("cut_off"):
        for parameter in student.parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    if name.startswith("killed") and last:
        student.rows.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if name.startswith("broken") and last:

        def fail(*_: Any) -> None:
            raise TypeError("a bug of this rank")

        student.rows.register_forward_hook(fail)
    if name.startswith("leaderless") and ranks.leads:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        threading.Event().wait()


SCENARIOS: dict[str, Lead] = {
    "train": train,
    "resume": resume,
    "poisoned": poisoned,
    "cut_off": cut_off,
    "killed": killed,
    "broken": killed,
    "leaderless": killed,
}


def main(folder: Path, names: list[str]) -> int:
    """Scenarios are `WHAT-DETAILS`; `resume-...` works in the folder of `train-...` with the same details."""
    from distill.failures import guarded

    ranks = join()

    def work() -> None:
        for name in names:
            student = student_of(name, ranks)
            spoil(student, name, ranks)
            if not ranks.leads:
                assert isinstance(ranks, SeveralRanks)
                obey(student, ranks)
                continue
            what, _, details = name.partition("-")
            place = folder / details if details else folder
            place.mkdir(parents=True, exist_ok=True)
            found = SCENARIOS[what](student, place)
            (folder / f"{name}.json").write_text(json.dumps(found))
            with ranks.call("stop"):
                pass

    try:
        if ranks.leads:
            return guarded(work)
        work()
    except BaseException as error:
        if ranks.leads:
            raise
        assert isinstance(ranks, SeveralRanks)
        ranks.report(error, 1)
        return 1
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2:]))
