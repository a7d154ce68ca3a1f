"""`python -m distill.export RUN --out FOLDER`: a trained student as a model folder that anybody can open.

Takes the newest whole checkpoint of a run, or the one named. Adapters are merged, or with `--adapter` written in PEFT's
format, which vLLM loads beside the base model. What was written is opened again and compared before the command ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.console import Console
from distill.failures import guarded

if TYPE_CHECKING:
    import torch

    from distill.checkpoint import Checkpoint
    from distill.config import RunConfig
    from distill.student import Student

PROBE = 32
"""Token ids that the exported and the trained model are compared on."""
TOLERANCE = 1e-3
"""Largest difference of a log-probability, in nats, between the model in memory and the files, both in float32."""


class ExportError(Exception):
    """Nothing was exported; the message says why."""


def export(source: Path, out: Path, *, adapter: bool, dtype: str, console: Console, best: bool = False) -> float:
    """Write the student of a checkpoint into `out`, which must not exist.

    Args:
        source: a run, or one of its checkpoints.
        adapter: PEFT's format instead of merged weights.
        dtype: of merged weights: float32 or bfloat16. Adapters stay as they are.
        best: of a run, the checkpoint of the best evaluation instead of the newest.

    Returns:
        The largest difference of a log-probability between the files and the model they were written from, in nats.

    Raises:
        ExportError: no run, no checkpoint, no adapters, `out` is there, or the written model differs.
        CheckpointError: no whole checkpoint, or not of this configuration.
    """
    import torch

    from distill import models

    if out.exists():
        raise ExportError(f"{out} is there already; name a folder that is not")
    checkpoint, config = _checkpoint_of(source, console, best=best)
    if adapter and config.student.lora is None:
        raise ExportError(f"{checkpoint.path} was trained whole: it has no adapters (leave out --adapter)")
    student = _load(checkpoint, config, console)
    base = models.resolve(config.student.model, progress=console.say) if adapter else None
    building = out.with_name(f".{out.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    try:
        if adapter:
            student.save_adapter(building)
            written = student.model
        else:
            written = student.serving_copy()
            for parameter in written.parameters():  # `.to` would round the rotary frequencies as well
                parameter.data = parameter.data.to(getattr(torch, dtype))
            written.config.dtype = getattr(torch, dtype)
            written.save_pretrained(building)
            if student.tokenizer is not None:
                student.tokenizer.save_pretrained(building)
        difference = float((_logprobs(_open(building, base)) - _logprobs(written)).abs().max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"what was written differs from what was trained by {difference:.3g} nats (allowed: {TOLERANCE:g}); "
                "nothing was exported"
            )
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return difference


def _checkpoint_of(source: Path, console: Console, *, best: bool) -> tuple[Checkpoint, RunConfig]:
    from distill.checkpoint import find_latest, open_checkpoint
    from distill.config import RunConfig
    from distill.rundir import best_step

    run = source if (source / "config.json").exists() else source.parent.parent
    try:
        config = RunConfig.model_validate_json((run / "config.json").read_bytes())
    except OSError:
        raise ExportError(f"{source} is neither a run nor a checkpoint of one (no config.json)") from None
    except ValueError as error:
        raise ExportError(f"{run / 'config.json'}: {error}") from None
    if best:
        step = best_step(run) if run == source else None
        source = run / "checkpoints" / f"step_{step or 0:06d}"
        if not source.exists():
            found = f"step {step}, of which there is no checkpoint" if step else "no graded evaluation, or no run"
            raise ExportError(f"{run}: --best finds {found}; checkpoint.keep_best keeps it while a run goes on")
    checkpoint = find_latest(run / "checkpoints", report=console.say) if run == source else open_checkpoint(source)
    if checkpoint is None:
        raise ExportError(f"{run} has no checkpoint yet")
    return checkpoint, config


def _load(checkpoint: Checkpoint, config: RunConfig, console: Console) -> Student:
    """The trained model in float32 and unquantised: adapters are merged into what they will be used with."""
    from distill import models
    from distill.student import Student

    section = config.student.model_copy(update={"dtype": "float32"})
    base: Path | str = checkpoint.path / "model"
    if section.lora is not None:
        section = section.model_copy(update={"lora": section.lora.model_copy(update={"quantization": "none"})})
        base = models.resolve(config.student.model, progress=console.say)
    student = Student.load(base, config.model_copy(update={"student": section}))
    student.restore_weights(checkpoint)
    return student


def _open(folder: Path, base: Path | str | None) -> Any:
    """What was written, as its users open it: by itself, or as an adapter on the base model."""
    import torch
    from transformers import AutoModelForCausalLM

    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    return PeftModel.from_pretrained(model, folder)


def _logprobs(model: Any) -> torch.Tensor:
    import torch

    model = model.float().eval()
    size = model.get_input_embeddings().weight.shape[0]
    ids_L = 7 * torch.arange(PROBE, device=model.device) % size
    with torch.no_grad():
        logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
    return logits_LV.log_softmax(-1).gather(-1, ids_L[1:, None])[:, 0].cpu()


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: docs/concepts.md, "Failures"."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Write a trained student as a model folder that opens with from_pretrained and with vLLM.",
    )
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="a run, or one of its checkpoints (RUN/checkpoints/...)"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="must not exist")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter in PEFT's format instead of all weights"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of all weights (bfloat16)"
    )
    parser.add_argument("--best", action="store_true", help="the step with the best evaluation instead of the newest")
    arguments = parser.parse_args(argv)
    console = Console()

    def run() -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        difference = export(
            arguments.source,
            arguments.out,
            adapter=arguments.adapter,
            dtype=arguments.dtype,
            console=console,
            best=arguments.best,
        )
        console.say(f"{arguments.out}: opened again, log-probabilities agree within {difference:.2g} nats")

    return guarded(run)


if __name__ == "__main__":
    from distill.export import main as imported  # so that its `ExportError` is the one that `failures` knows

    sys.exit(imported())
