"""GSM8K with SmolLM2-135M: the teacher's demonstrations, what answers look like, and the plot of docs/gsm8k.md.

python -m bench.gsm8k demos --data FOLDER --out demos [--num 400]     # the data set's own solutions, as episodes
python -m bench.gsm8k table EPISODES [EPISODES ...]                   # success, form and length of played answers
python -m bench.gsm8k plot RUN --out docs/img/gsm8k.png               # curves of a run
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

from agent_loop.episodes import EpisodeWriter, read_episodes
from agent_loop.types import AssistantMessage, Episode, Turn
from envs.converters.gsm8k import convert
from envs.converters.rows import iter_rows
from envs.reasoning import SYSTEM, answer_of, grade_answer, number_of
from envs.types import StopReason

FORM = re.compile(r"####\s*-?\$?\d[\d,]*(?:\.\d+)?\s*$")
"""An answer in the form that the task asks for: its last line is #### and a number."""
_STEP = re.compile(r"<<[^<>]*>>")
"""The data set's calculator notes, which no answer needs."""


def demos(data: Path, out: Path, num: int) -> int:
    """Write the first `num` training problems with the data set's own solutions as episodes for `distill.sft`; how
    many were written.

    Raises:
        TaskError: a row is no problem.
    """
    tasks = convert(str(data / "train.jsonl"), system=SYSTEM)
    rows = iter_rows(str(data / "train.jsonl"), split=None, subset=None)
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    with closing(EpisodeWriter(out / "episodes.jsonl")) as writer:
        for task, row in islice(zip(tasks, rows, strict=True), num):
            text = _STEP.sub("", str(row.values["answer"]))
            message = AssistantMessage(content=text, reasoning=None, tool_calls=(), finished=True)
            episode = Episode(
                id=f"0/{task.id}/0",
                env_id="gsm8k",
                task=task,
                turns=[Turn(index=0, message=message, text=text)],
                traces=[],
                stop_reason=StopReason.LAST_TOOL,
                reward=1.0,
                rewards={"success": 1.0},
            )
            writer.append(episode)
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class Share:
    """A share of episodes, or another mean of theirs, with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Share:
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a file of played episodes says of a model."""

    episodes: int
    success: Share
    """By the environment's grader."""
    chance: float
    """Share that would be right, had each answer been given to another of the problems (mean over all pairs)."""
    form: Share
    """Answers that end in `#### number`."""
    success_in_form: Share
    """Right and in the form."""
    finished: Share
    """Answers that came to their end within the turn's budget."""
    tokens: Share
    """Sampled tokens an answer."""


def answers(episodes: Sequence[Episode]) -> Answers:
    """
    Raises:
        ValueError: there are none.
    """
    if not episodes:
        raise ValueError("no episodes")
    texts = [episode.turns[-1].message.content if episode.turns else "" for episode in episodes]
    right = [grade_answer(e.task, {}, [t.message.to_message() for t in e.turns])["success"] for e in episodes]
    said = Counter(number for text in texts if (number := answer_of(text)) is not None)
    wanted = Counter(number_of(str(episode.task.metadata["answer"])) for episode in episodes)
    pairs = sum(count * wanted[number] for number, count in said.items())
    form = [float(FORM.search(text) is not None) for text in texts]
    return Answers(
        episodes=len(episodes),
        success=Share.of(right),
        chance=(pairs - sum(right)) / max(1, len(episodes) * (len(episodes) - 1)),
        form=Share.of(form),
        success_in_form=Share.of([a * b for a, b in zip(right, form, strict=True)]),
        finished=Share.of([float(e.stop_reason is StopReason.LAST_TOOL) for e in episodes]),
        tokens=Share.of([float(e.num_sampled) for e in episodes]),
    )


def percent(share: Share) -> str:
    return f"{100 * share.mean:.1f} ± {100 * share.error:.1f} %"


def table(named: dict[str, Answers]) -> str:
    """One row a file: shares in percent, with standard errors."""
    lines = [
        "| played by | episodes | right | chance | form `#### number` | right and in form | finished | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in named.items():
        shares = (found.form, found.success_in_form, found.finished)
        cells = [percent(found.success), f"{100 * found.chance:.1f} %", *map(percent, shares)]
        length = f"{found.tokens.mean:.0f} ± {found.tokens.error:.0f}"
        lines.append(f"| {name} | {found.episodes} | {' | '.join(cells)} | {length} |")
    return "\n".join(lines)


def read(path: Path) -> list[Episode]:
    """The episodes of a file, or of a folder with `episodes.jsonl`; failed ones are left out."""
    file = path / "episodes.jsonl" if path.is_dir() else path
    return [item for item in read_episodes(file) if isinstance(item, Episode) and item.error is None]


def plot(run: Path, out: Path) -> None:
    """Three panels over the steps: the KL, the answers' length, and what the step's own answers look like."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    played = [answers(read(run / "episodes" / f"step_{step:06d}.jsonl")) for step in steps]
    figure, (kl, length, form) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    kl.plot(steps, [line["teacher_kl"] for line in lines], marker=".", label="teacher_kl")
    kl.plot(steps, [line["entropy"] for line in lines], color="0.6", label="entropy")
    kl.set(title="nats a token", xlabel="step", yscale="log")
    kl.legend(loc="center right")
    length.plot(steps, [line["rollout/sampled_tokens_per_episode"] for line in lines], marker=".")
    length.set(title="sampled tokens an answer", xlabel="step", ylim=(0, None))
    form.plot(steps, [100 * found.form.mean for found in played], marker=".", label="in the form")
    form.plot(steps, [100 * found.finished.mean for found in played], color="0.6", label="finished")
    form.plot(steps, [100 * found.success.mean for found in played], color="tab:green", label="right")
    form.set(title="training answers of the step, %", xlabel="step", ylim=(0, 119))
    form.legend(loc="upper center", ncols=3, fontsize="small")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gsm8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("demos", help="write the data set's solutions as episodes")
    add.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with train.jsonl")
    add.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    add.add_argument("--num", type=int, default=320, metavar="N")
    add = commands.add_parser("table", help="what played answers look like")
    add.add_argument("episodes", type=Path, nargs="+", metavar="EPISODES")
    add = commands.add_parser("plot", help="curves of a run")
    add.add_argument("run", type=Path)
    add.add_argument("--out", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    if arguments.command == "demos":
        print(f"{demos(arguments.data, arguments.out, arguments.num)} episodes in {arguments.out}")
    elif arguments.command == "table":
        named = {str(path): answers(read(path)) for path in arguments.episodes}
        print(table(named))
        print(json.dumps({name: asdict(found) for name, found in named.items()}))
    else:
        plot(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
