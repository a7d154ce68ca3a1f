"""`python -m distill.sft --episodes FOLDER --student MODEL --out RUN`: supervised fine-tuning on recorded episodes.

    python -m distill.sft --episodes collected/ --student Qwen/Qwen3-0.6B --out runs/sft --optim.lr 1e-5
    python -m distill.sft --data documents.jsonl --student Qwen/Qwen3-0.6B --out runs/sft --optim.lr 1e-5
    python -m distill.run --env medbrowse --student.model runs/sft/checkpoints/step_000120/model

The student learns to say what was said: the loss is the mean of -log p_student over a step's trained tokens, which are
those of the assistant's turns, their close tokens included. For teachers that give no log-probabilities, and for the
time before on-policy distillation. `--data` takes dialogues and plain documents, of which every token is trained on.
Keys of a run's student, optim, checkpoint and seed are taken as flags (`--student.lora.rank 16`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config_load import ConfigError, load_config
from distill.console import Console, fail
from distill.failures import EXIT_USAGE, guarded
from distill.tasks import TaskSource

if TYPE_CHECKING:
    from agent_loop.types import Episode
    from distill.config import RunConfig
    from distill.demonstrations import Demonstrations, ToolsOf

KEYS = ("--student.", "--optim.", "--checkpoint.", "--seed")
"""What of a run's configuration has a meaning here."""


NOT_KNOWN = 10**9
"""Steps of a configuration before the episodes are counted: more than any warm-up."""


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: docs/concepts.md, "Failures"."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--episodes", type=Path, nargs="+", default=[], metavar="PATH",
        help="folders of distill.collect or agent_loop.rollout, runs, or episode files",
    )  # fmt: skip
    add(
        "--data", type=Path, nargs="+", default=[], metavar="FILE",
        help='JSONL of documents {"text": ...} and dialogues {"messages": [...]}; with --episodes both are mixed',
    )  # fmt: skip
    add("--student", required=True, metavar="MODEL", help="folder, Hub name or builtin: name of the model to train")
    add("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    add("--env", help="environment that has the episodes' tools (default: the one that the episodes name)")
    add("--epochs", type=int, default=1, metavar="N", help="passes over the episodes (default: 1)")
    add("--batch-size", type=int, default=16, metavar="N", help="episodes a step (default: 16)")
    add("--only-success", action="store_true", help="only episodes whose reward is 1")
    add("--lr", metavar="RATE", help="short for --optim.lr")
    arguments, rest = parser.parse_known_args(argv)
    if min(arguments.epochs, arguments.batch_size) < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    if not arguments.episodes and not arguments.data:
        parser.error("nothing to train on: give --episodes, --data or both")
    try:
        config = configuration(arguments, rest)
    except ConfigError as error:
        fail(str(error))
        return EXIT_USAGE
    return guarded(lambda: fine_tune(arguments, config, Console()))


def configuration(arguments: argparse.Namespace, rest: Sequence[str]) -> RunConfig:
    """The configuration of a run with this student, as `distill.export` and `distill.run` read it; its `steps` are
    `NOT_KNOWN` until the episodes are read.

    Raises:
        ConfigError: a flag is none, or has no meaning here.
    """
    odd = [flag for flag in rest if flag.startswith("--") and not flag.startswith(KEYS)]
    if odd or (rest and not rest[0].startswith("--")):
        raise ConfigError([f"{(odd or rest)[0]}: no flag of distill.sft; of a run's keys it takes {', '.join(KEYS)}"])
    flags = ["--env", arguments.env or "recorded", "--student.model", arguments.student]
    flags += ["--teacher.model", "recorded", "--steps", str(NOT_KNOWN)]  # nothing is scored
    flags += ["--optim.lr", arguments.lr] if arguments.lr is not None else []
    config = load_config([], [*flags, *rest]).config
    served = [key for key in ("base_url", "server") if getattr(config.student, key) is not None]
    if served:
        raise ConfigError([f"student.{served[0]}: nothing is served in supervised training"])
    if config.optim.epochs != 1:
        raise ConfigError(["optim.epochs: is about one batch of on-policy episodes; take --epochs"])
    return config


def fine_tune(arguments: argparse.Namespace, config: RunConfig, console: Console) -> None:
    """Read and render the episodes, train, and save.

    Raises:
        TaskError: no episodes, or none to train on; saying why.
        RendererError: the student's tokenizer or template cannot be used.
        ConfigError: the warm-up is longer than the run.
        RunDirError, CheckpointError, NumericError, OutOfMemory: as `distill.run`.
    """
    from agent_loop.renderer import load_renderer
    from distill import models
    from distill.build import load_student
    from distill.checkpoint import save_checkpoint
    from distill.demonstrations import demonstrations, recorded
    from distill.documents import read_data
    from distill.ranks import Ranks
    from distill.rundir import SUPERVISED, RunDir

    path = models.resolve(config.student.model, progress=console.say)
    renderer = load_renderer(path, enable_thinking=config.student.enable_thinking)
    max_tokens = config.student.max_context or longest_of(path, config)
    found = demonstrations(
        chain(recorded(arguments.episodes), read_data(arguments.data, renderer, max_tokens=max_tokens)),
        renderer,
        tools_from(arguments),
        only_success=arguments.only_success,
        max_tokens=max_tokens,
    )
    console.say(str(found))
    steps = number_of_steps(found, arguments)
    if config.optim.warmup_steps > steps:
        raise ConfigError(
            [f"optim.warmup_steps: is {config.optim.warmup_steps}, more than the run has steps ({steps}): "
             f"{len(found.episodes)} episodes, --batch-size {arguments.batch_size}, --epochs {arguments.epochs}"]
        )  # fmt: skip
    config = config.model_copy(update={"steps": steps})
    run = RunDir.create(arguments.out, config.model_dump(mode="json"))
    status = "failed"
    try:
        run.note(kind=SUPERVISED, **record(arguments, found), tokenizer=renderer.fingerprint)
        student = load_student(config, path, path, Ranks())
        student.supervise()
        with console.phase("supervised steps", steps) as phase:
            for step, (epoch, batch) in enumerate(batches(found.episodes, arguments, config.seed), start=1):
                metrics = student.train_step(batch, step=step)
                run.append_metrics({"step": step, "epoch": epoch, **metrics})
                phase.advance()
                if step % config.checkpoint.every == 0 or step == steps:
                    console.say(
                        f"step {step}/{steps}  nll {metrics['nll']:.4f}  trained {metrics['train/tokens']:,} tok"
                    )
                    saved = save_checkpoint(
                        run.path / "checkpoints",
                        step,
                        student,
                        cursor=0,
                        keep_last=config.checkpoint.keep_last,
                        keep_every=config.checkpoint.keep_every,
                    )
        status = "finished"
        console.say(f"train on from it: python -m distill.run ... --student.model {saved / 'model'}")
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.close(status)


def number_of_steps(found: Demonstrations, arguments: argparse.Namespace) -> int:
    """
    Raises:
        TaskError: there is nothing to train on.
    """
    from envs.jsonl import TaskError

    if not found.episodes:
        raise TaskError(", ".join(map(str, (*arguments.episodes, *arguments.data))), f"nothing to train on: {found}")
    return int(arguments.epochs) * -(-len(found.episodes) // int(arguments.batch_size))


def batches(
    episodes: Sequence[Episode], arguments: argparse.Namespace, seed: int
) -> Iterator[tuple[int, Sequence[Episode]]]:
    """(epoch, episodes of a step); the order of each epoch is its own and depends on the seed alone."""
    source = TaskSource(episodes, seed=seed, cursor=len(episodes))  # epochs count from 1 here
    for epoch in range(1, arguments.epochs + 1):
        for start in range(0, len(episodes), arguments.batch_size):
            yield epoch, source.take(min(arguments.batch_size, len(episodes) - start))


def tools_from(arguments: argparse.Namespace) -> ToolsOf:
    """The tools of the episodes' environments; each environment is made once, and only where an episode is rendered.

    Raises:
        RegistryError: (when called) the environment cannot be made.
    """
    import envs
    from distill.demonstrations import origin_of
    from distill.documents import ENV_ID

    origins = [origin_of(path) for path in arguments.episodes]
    args_of: dict[str, Mapping[str, Any]] = {o["env"]: o.get("env_args", {}) for o in origins if "env" in o}
    # The name in an episode of a folder environment is the folder's; `collect.json` has its path.
    path_of = {Path(name).resolve().name: name for name in args_of}
    specs: dict[str, Sequence[Any]] = {}

    def tools_of(episode: Episode) -> Sequence[Any]:
        if episode.env_id == ENV_ID:
            return ()
        name = arguments.env or path_of.get(episode.env_id, episode.env_id)
        if name not in specs:
            specs[name] = envs.make(name, skip_verification=True, **args_of.get(name, {})).tool_specs
        allowed = episode.task.tools
        return [spec for spec in specs[name] if allowed is None or spec.name in allowed]

    return tools_of


def longest_of(path: Path | str, config: RunConfig) -> int | None:
    """Tokens that the model's configuration says it takes; None where it does not say."""
    from transformers import AutoConfig

    options = {} if config.student.revision is None or Path(path).is_dir() else {"revision": config.student.revision}
    return getattr(AutoConfig.from_pretrained(path, **options), "max_position_embeddings", None)


def record(arguments: argparse.Namespace, found: Demonstrations) -> dict[str, Any]:
    """What `run.json` says of the data."""
    return {
        "student": arguments.student,
        "episodes": [str(path) for path in arguments.episodes],
        "data": [str(path) for path in arguments.data],
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "only_success": arguments.only_success,
        "num_episodes": len(found.episodes),
        "num_exact": found.num_exact,
        "num_masked_turns": found.num_masked,
        "num_cut_turns": found.num_cut,
        "left_out": dict(found.left_out),
    }


if __name__ == "__main__":
    sys.exit(main())
