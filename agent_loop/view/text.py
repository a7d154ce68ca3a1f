"""Reads the episodes of a run in the terminal.

    python -m agent_loop.view --text runs/ID                    # list: one line an episode
    python -m agent_loop.view --text runs/ID EPISODE            # one episode: the dialogue, turn by turn
    python -m agent_loop.view --text runs/ID EPISODE --tokens   # every token: mask, student, teacher, difference

EPISODE is an id (`12/task/0`) or its number in the list. RUN is a run directory, a folder of episode files or one file.
On a terminal, tokens that are not trained on are dim, and those that the teacher likes less are yellow (by 0.5 nats) or
red (by 2).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from agent_loop.summary import gaps_of
from agent_loop.types import Episode, SegmentSource, TokenTrace
from agent_loop.view import WANTED

PLAIN, DIM, YELLOW, RED = "\x1b[0m", "\x1b[2m", "\x1b[33m", "\x1b[31m"
NOTABLE, BAD = 0.5, 2.0
"""Nats that a sampled token is likelier to the student than to the teacher."""


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters and escape sequences are spelled out."""
    return "".join(c if c == "\n" or c.isprintable() else spelled(c) for c in text)


def spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n")


def files_of(run: Path, step: int | None) -> list[Path]:
    """The episode files of a run, in order.

    Raises:
        FileNotFoundError: none there.
    """
    if not run.exists():
        raise FileNotFoundError(f"there is no run at {run}: {WANTED}")
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
                print(f"{file}:{item.line_number}: not an episode: {one_line(item.reason)}", file=sys.stderr)
            else:
                yield number, file, item


def show_list(files: list[Path]) -> None:
    print(f"{'no.':>5}  {'episode':24} {'turns':>5} {'sampled':>7} {'kl':>8} {'reward':>6}  stopped")
    for number, _, episode in numbered(files):
        gaps = [gap for trace in episode.traces for gap in gaps_of(trace) if gap is not None]
        reward = "-" if episode.reward is None else f"{episode.reward:.2f}"
        cause = f" ({episode.error.boundary}: {episode.error.kind})" if episode.error else ""
        kl = f"{fmean(gaps):.3f}" if gaps else "-"
        print(
            f"{number:5}  {one_line(episode.id):24} {len(episode.turns):5} {episode.num_sampled:7}"
            f" {kl:>8} {reward:>6}  {episode.stop_reason.value}{one_line(cause)}"
        )


def show_episode(episode: Episode) -> None:
    print(f"episode {one_line(episode.id)} of {one_line(episode.env_id)}, policy version {episode.policy_version}")
    for message in episode.task.messages:
        print(f"\n[{message['role']}]\n{visible(message['content'])}")
    for turn in episode.turns:
        gaps = turn_gaps(episode, turn.index)
        kl = f", kl {fmean(gaps):.3f} a token" if gaps else ""
        known = turn.start is not None and turn.end is not None
        size = f"{(turn.end or 0) - (turn.start or 0)} tokens" if known else "tokens not known"
        print(f"\n[assistant, turn {turn.index}: {size}{kl}]\n{visible(turn.text)}")
        if not known:  # the text of a message API leaves out what it returns in fields of its own
            for call in turn.message.tool_calls:
                print(f"call: {visible(call.raw)}")
        for result in turn.tool_results:
            failed = f", {result.error.kind.value}" if result.error else ""
            print(f"\n[tool {one_line(result.name)}, {result.duration_s * 1000:.1f} ms{failed}]")
            print(visible(result.content))
        for message in turn.observation:
            if message["role"] != "tool":
                print(f"\n[{message['role']}]\n{visible(message['content'])}")
    print(f"\nstopped: {episode.stop_reason.value}; reward: {'-' if episode.reward is None else episode.reward}")
    if episode.error:
        print(f"error at {episode.error.boundary}: {one_line(episode.error.kind)}: {visible(episode.error.message)}")


def turn_gaps(episode: Episode, turn: int) -> list[float]:
    gaps: list[float] = []
    for trace in episode.traces:
        values = gaps_of(trace)
        for segment in trace.segments:
            if segment.turn == turn and segment.source is SegmentSource.ASSISTANT:
                gaps += [gap for gap in values[segment.start : segment.end] if gap is not None]
    return gaps


def show_tokens(episode: Episode, decode: Callable[[int], str] | None, *, coloured: bool) -> None:
    """One line a token. `#` is trained on, `.` is not; `-` means that there is no number."""
    for index, trace in enumerate(episode.traces):
        print(f"trace {index}: {len(trace)} tokens, {trace.num_trained} trained")
        print(f"{'pos':>6} {'id':>7} m {'student':>9} {'teacher':>9} {'kl':>8}  segment")
        gaps = gaps_of(trace)
        for segment in trace.segments:
            for i in range(segment.start, segment.end):
                label = f"{segment.source.value} {segment.turn}" if i == segment.start else ""
                text = f"  '{one_line(decode(trace.token_ids[i]))}'" if decode is not None else ""
                line = f"{token_line(trace, i, gaps[i])}  {label:12}{text}".rstrip()
                print(f"{colour_of(trace, i, gaps[i])}{line}{PLAIN}" if coloured else line)


class UnknownTokenizer(Exception):
    """`--tokenizer` names none."""


def decoder(tokenizer: str) -> Callable[[int], str]:
    from agent_loop.renderer import RendererError, load_renderer

    try:
        renderer = load_renderer(tokenizer)
    except RendererError as error:
        raise UnknownTokenizer(str(error)) from error
    return lambda token_id: renderer.decode([token_id])


def token_line(trace: TokenTrace, i: int, gap: float | None) -> str:
    teacher = None if trace.teacher_logprobs is None else trace.teacher_logprobs[i]
    cells = ((trace.sampling_logprobs[i], 9), (teacher, 9), (gap, 8))
    numbers = " ".join(f"{'-' if value is None else f'{value:.4f}':>{width}}" for value, width in cells)
    return f"{i:6} {trace.token_ids[i]:7} {'#' if trace.loss_mask[i] else '.'} {numbers}"


def colour_of(trace: TokenTrace, i: int, gap: float | None) -> str:
    if not trace.loss_mask[i]:
        return DIM
    return PLAIN if gap is None or gap < NOTABLE else YELLOW if gap < BAD else RED


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 nothing of that name."""
    parser = argparse.ArgumentParser(
        prog="python -m agent_loop.view --text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("episode", nargs="?", help="id or number of one episode")
    parser.add_argument("--step", type=int, help="only the episodes of this step")
    parser.add_argument("--tokens", action="store_true", help="show every token of the episode")
    parser.add_argument("--tokenizer", help="folder or hub id: show the text of each token too")
    arguments = parser.parse_args(argv)
    try:
        code = show(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
        return code
    except (FileNotFoundError, UnknownTokenizer) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`: what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def show(arguments: argparse.Namespace) -> int:
    files = files_of(arguments.run, arguments.step)
    if arguments.episode is None:
        show_list(files)
        return 0
    decode = decoder(arguments.tokenizer) if arguments.tokenizer else None
    for number, _, episode in numbered(files):
        if arguments.episode in (episode.id, str(number)):
            if arguments.tokens or decode is not None:
                show_tokens(episode, decode, coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
            else:
                show_episode(episode)
            return 0
    listing = f"python -m agent_loop.view --text {arguments.run}"
    print(f"error: no episode {arguments.episode!r}; list them with {listing}", file=sys.stderr)
    return 2
