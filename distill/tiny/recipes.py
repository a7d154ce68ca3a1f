"""How the built-in tiny models are made.

    medbrowse-teacher               demonstrations without a fault
    medbrowse-student               the teacher, damaged: trained on with faulty demonstrations
    medbrowse-student-independent   another model of its own start and data, damaged in the same way

A student made from the teacher has the teacher's skill underneath: distillation restores what the damage took. It does
not show that distillation teaches a skill that was never there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.tiny.pretrain import Phase, build_model, examples, train
from distill.tiny.tokenizer import END, PAD, build_tokenizer

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One built-in model."""

    phases: tuple[Phase, ...]
    parent: str | None = None
    """The built-in model that the first phase starts from, of the same seed; None: a random start."""
    seed_offset: int = 0
    """Added to the seed, for a start and an order of data that no other recipe has."""


_SKILL = Phase(name="skill", data_seed="skill", num_steps=900, num_episodes=9000)
_DAMAGE = Phase(
    name="damage",
    data_seed="damage",
    num_steps=150,
    num_episodes=2400,
    error_rate=0.25,
    muon_lr=3e-3,
    adam_lr=2e-3,
    decay_share=1.0,
)

RECIPES = {
    "medbrowse-teacher": Recipe(phases=(_SKILL,)),
    "medbrowse-student": Recipe(phases=(_DAMAGE,), parent="medbrowse-teacher"),
    "medbrowse-student-independent": Recipe(phases=(_SKILL, _DAMAGE), seed_offset=1000),
}
NUM_THREADS = 1
"""Two gain a third on an idle machine of two cores and lose a factor of ten where another process runs beside them; and
one gives the same weights on every machine of a kind."""


def make(recipe: Recipe, folder: Path, *, parent: Path | None, seed: int, progress: Progress) -> None:
    """Train the recipe's model and save it with its tokenizer, as any model is saved.

    Args:
        parent: folder of the recipe's parent, if it has one.
    """
    from transformers import Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    pad_id, eos_id = tokenizer.convert_tokens_to_ids([PAD, END])
    seed += recipe.seed_offset
    with _settings():
        if parent is not None:
            model = Qwen3ForCausalLM.from_pretrained(parent, dtype=torch.float32)
        else:
            model = build_model(len(tokenizer), pad_id=pad_id, eos_id=eos_id, seed=seed)
        for phase in recipe.phases:
            progress(f"{phase.name}: writing {phase.num_episodes} demonstrations")
            data = examples(phase, tokenizer, tool_schemas(), seed=seed)
            train(model, data, phase, pad_id=pad_id, seed=seed, progress=progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def tool_schemas() -> list[dict[str, object]]:
    """The tools of the environment, as a chat template reads them."""
    from envs.medbrowse.env import MedBrowseEnv

    return [spec.to_openai() for spec in MedBrowseEnv().tool_specs]


@contextmanager
def _settings() -> Iterator[None]:
    """One thread and no bars of other libraries; both as before afterwards."""
    from transformers.utils import logging

    threads, had_bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(NUM_THREADS)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if had_bars:
            logging.enable_progress_bar()
