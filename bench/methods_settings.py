"""The settings of `bench.methods`, and what they were chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EPISODES = 64
"""Of a gradient step, whatever the method."""

Flags = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How one of the methods is run."""

    steps: int
    eval_every: int
    flags: Flags
    """Of `distill.run` or, for "sft", of `distill.sft`, without their dashes."""
    sweep: Sequence[Flags] = ()
    """What was tried on `SWEEP_SEED`, on top of `flags`."""
    sweep_steps: int = 12


def in_groups(size: int) -> Flags:
    """A step's episodes in groups of one task."""
    return {"rollout.batch_size": EPISODES // size, "rollout.group_size": size}


REWARDED: Flags = {"skip_verification": "false"}
METHODS = {
    "distill": Method(
        steps=24,
        eval_every=2,
        flags={**in_groups(1), "optim.lr": 2e-3},
        sweep=[{"optim.lr": lr} for lr in (1e-3, 2e-3, 4e-3)],
    ),
    "distill8": Method(
        steps=24,
        eval_every=2,
        flags={**in_groups(8), "optim.lr": 2e-3},
    ),
    "mix": Method(
        steps=24,
        eval_every=2,
        flags={**REWARDED, **in_groups(2), "loss.adv_tau": 0.3, "optim.lr": 2e-3},
        sweep=[
            *(
                {**in_groups(8), "loss.adv_tau": tau, "optim.lr": lr}
                for tau, lr in ((0.3, 1e-3), (1, 1e-3), (0.3, 2e-3), (1, 2e-3), (0.3, 4e-3))
            ),
            in_groups(4),
            in_groups(2),
        ],
    ),
    "sft": Method(
        steps=24,
        eval_every=2,
        flags={"batch-size": EPISODES, "epochs": 1, "optim.lr": 1e-3},
        sweep=[{"optim.lr": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3)],
        sweep_steps=24,
    ),
    "grpo": Method(
        steps=96,
        eval_every=4,
        flags={
            **REWARDED,
            **in_groups(8),
            "loss.type": "sampled",
            "loss.teacher_tau": 0,
            "loss.adv_tau": 1,
            "optim.lr": 1e-3,
        },
        sweep=[
            *({"optim.lr": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
            {"loss.adv_norm": "std"},
            {"loss.surrogate": "ppo", "optim.epochs": 2},
            in_groups(4),
            in_groups(2),
        ],
        sweep_steps=24,
    ),
}
