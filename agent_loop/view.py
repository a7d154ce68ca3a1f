"""Reads the episodes of a run in the terminal.

    python -m agent_loop.view runs/ID                    # list: one line an episode
    python -m agent_loop.view runs/ID EPISODE            # one episode: the dialogue, turn by turn
    python -m agent_loop.view runs/ID EPISODE --tokens   # every token: mask, student, teacher, difference

EPISODE is an id (`12/task/0`) or its number in the list. RUN is a run directory, a folder of episode files or one file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from agent_loop.types import Episode, SegmentSource, TokenTrace


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters and escape sequences are spelled out."""
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def files_of(run: Path, step: int | None) -> list[Path]:
    """The episode files of a run, in order.

    Raises:
        FileNotFoundError: none there.
    """
    if run.is_file():
        return [run]
    folder = run / "episodes" if (run / "episodes").is_dir() else run
    pattern = "*.jsonl" if step is None else f"*_{step:06d}.jsonl"
    found = sorted(path for path in folder.glob(pattern) if path.name not in ("metrics.jsonl", "evals.jsonl"))
    if not found:
        raise FileNotFoundError(f"no episode files ({pattern}) in {folder}")
    return found


def numbered(files: list[Path]) -> Iterator[tuple[int, Path, Episode]]:
    """Episodes with their number; lines that cannot be read are reported and counted, never silently left out."""
    from agent_loop.episodes import BadLine, read_episodes

    number = 0
    for file in files:
        for item in read_episodes(file):
            number += 1
            if isinstance(item, BadLine):
                print(f"{file}:{item.line_number}: not an episode: {visible(item.reason)}", file=sys.stderr)
            else:
                yield number, file, item


def kl_of(episode: Episode) -> float | None:
    """Mean over the trained tokens of sampling minus teacher log-probability; None where no teacher scored."""
    gaps = [gap for trace in episode.traces for gap in gaps_of(trace) if gap is not None]
    return fmean(gaps) if gaps else None


def gaps_of(trace: TokenTrace) -> list[float | None]:
    if trace.teacher_logprobs is None:
        return [None] * len(trace)
    return [
        s - t if m and s is not None and t is not None else None
        for s, t, m in zip(trace.sampling_logprobs, trace.teacher_logprobs, trace.loss_mask, strict=True)
    ]


def show_list(files: list[Path]) -> None:
    print(f"{'no.':>5}  {'episode':24} {'turns':>5} {'sampled':>7} {'kl':>8} {'reward':>6}  stopped")
    for number, _, episode in numbered(files):
        kl = kl_of(episode)
        reward = "-" if episode.reward is None else f"{episode.reward:.2f}"
        stop = episode.stop_reason.value + (
            f" ({episode.error.boundary}: {episode.error.kind})" if episode.error else ""
        )
        shown = "-" if kl is None else f"{kl:.3f}"
        print(
            f"{number:5}  {visible(episode.id):24} {len(episode.turns):5} {episode.num_sampled:7}"
            f" {shown:>8} {reward:>6}  {visible(stop)}"
        )


def show_episode(episode: Episode) -> None:
    print(f"episode {visible(episode.id)} of {visible(episode.env_id)}, policy version {episode.policy_version}")
    for message in episode.task.messages:
        print(f"\n[{message['role']}]\n{visible(message['content'])}")
    for turn in episode.turns:
        gaps = turn_gaps(episode, turn.index)
        kl = f", kl {fmean(gaps):.3f} a token" if gaps else ""
        size = (
            f"{turn.end - turn.start} tokens" if turn.start is not None and turn.end is not None else "tokens not known"
        )
        print(f"\n[assistant, turn {turn.index}: {size}{kl}]\n{visible(turn.text)}")
        for result in turn.tool_results:
            failed = f", {result.error.kind.value}" if result.error else ""
            print(
                f"\n[tool {visible(result.name)}, {result.duration_s * 1000:.1f} ms{failed}]\n{visible(result.content)}"
            )
    print(f"\nstopped: {episode.stop_reason.value}; reward: {'-' if episode.reward is None else episode.reward}")
    if episode.error:
        print(f"error at {episode.error.boundary}: {episode.error.kind}: {visible(episode.error.message)}")


def turn_gaps(episode: Episode, turn: int) -> list[float]:
    gaps: list[float] = []
    for trace in episode.traces:
        values = gaps_of(trace)
        for segment in trace.segments:
            if segment.turn == turn and segment.source is SegmentSource.ASSISTANT:
                gaps += [gap for gap in values[segment.start : segment.end] if gap is not None]
    return gaps


def show_tokens(episode: Episode) -> None:
    """One line a token. `#` is trained on, `.` is not; `-` means that there is no number."""
    for index, trace in enumerate(episode.traces):
        print(f"trace {index}: {len(trace)} tokens, {trace.num_trained} trained")
        print(f"{'pos':>6} {'id':>7} m {'student':>9} {'teacher':>9} {'kl':>8}  segment")
        gaps = gaps_of(trace)
        for segment in trace.segments:
            for i in range(segment.start, segment.end):
                student, gap = trace.sampling_logprobs[i], gaps[i]
                teacher = trace.teacher_logprobs[i] if trace.teacher_logprobs is not None else None
                numbers = " ".join(
                    f"{'-' if v is None else f'{v:.4f}':>{w}}" for v, w in ((student, 9), (teacher, 9), (gap, 8))
                )
                label = f"{segment.source.value} {segment.turn}" if i == segment.start else ""
                print(f"{i:6} {trace.token_ids[i]:7} {'#' if trace.loss_mask[i] else '.'} {numbers}  {label}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m agent_loop.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("episode", nargs="?", help="id or number of one episode")
    parser.add_argument("--step", type=int, help="only the episodes of this step")
    parser.add_argument("--tokens", action="store_true", help="show every token of the episode")
    arguments = parser.parse_args(argv)
    try:
        files = files_of(arguments.run, arguments.step)
        if arguments.episode is None:
            show_list(files)
            return 0
        for number, _, episode in numbered(files):
            if arguments.episode in (episode.id, str(number)):
                (show_tokens if arguments.tokens else show_episode)(episode)
                return 0
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 0
    print(
        f"error: no episode {arguments.episode!r}; list them with python -m agent_loop.view {arguments.run}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
