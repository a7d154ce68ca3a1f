"""Episodes on disk that are scored or trained on: found, checked line by line, read one at a time.

Nothing here imports torch, and a scan keeps no episode: 100,000 of them are an index of a few MB.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agent_loop.episodes import BadLine, read_line
from agent_loop.types import Episode, TokenTrace
from distill.rundir import episode_files
from envs.types import StopReason

if TYPE_CHECKING:
    from distill.config import RunConfig

Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens visible: `Renderer.decode`."""


class StoredError(Exception):
    """Stored episodes that cannot be used as asked; the message names file and line."""


def found_files(path: Path) -> list[Path]:
    """`episode_files`, which must be there.

    Raises:
        StoredError: there is none.
    """
    files = episode_files(path)
    if not files:
        raise StoredError(f"{path}: no episodes; name a JSONL file, a folder of them, or a run (runs/<id>)")
    return files


@dataclass(frozen=True, slots=True)
class Line:
    """Where an episode is."""

    file: Path
    number: int
    """From 1."""
    offset: int
    """Of its first byte."""
    size: int
    """In bytes, with its newline."""
    sha256: bytes

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"

    def read(self) -> Episode:
        """
        Raises:
            StoredError: the line is not the one that was scanned.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                raw = file.read(self.size)
        except OSError as error:
            raise StoredError(f"{self}: {error}") from error
        if hashlib.sha256(raw).digest() != self.sha256:
            raise StoredError(f"{self} has changed since it was read; nobody may write there while it is trained on")
        return _parsed(self, raw)


def read_file(file: Path) -> Iterator[tuple[Line, Episode]]:
    """All episodes of a file, in order.

    Raises:
        StoredError: a line is no episode.
    """
    offset = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = Line(file, number, offset, len(raw), hashlib.sha256(raw).digest())
            offset += len(raw)
            if raw.strip():
                yield line, _parsed(line, raw)


def _parsed(line: Line, raw: bytes) -> Episode:
    found = read_line(raw, line.number)
    if isinstance(found, BadLine):
        raise StoredError(f"{line}: {found.reason}. Take this line out: an episode is used whole or not at all")
    return found


def check_text(line: Line, episode: Episode, decode: Decode, whose: str) -> None:
    """Do the ids of the episode mean to this tokenizer what they meant to the one that it was played with?

    Args:
        whose: tokenizer it is, for the message.

    Raises:
        StoredError: a turn's ids are another text.
    """
    for turn in episode.turns:
        if turn.trace is None or turn.start is None:
            continue
        text = decode(episode.traces[turn.trace].token_ids[turn.start : turn.end])
        if text != turn.text:
            raise StoredError(
                f"{line}: turn {turn.index} of {episode.id!r} was {turn.text[:80]!r}, but to the tokenizer of {whose} "
                f"its ids are {text[:80]!r}. Log-probabilities are of ids: take a model of the same vocabulary"
            )


@dataclass(slots=True, kw_only=True)
class StoredEpisodes:
    """What a scan found."""

    source: Path
    files: list[Path]
    lines: list[Line] = field(default_factory=list)
    """Of the episodes that can be trained on."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The others by cause."""
    num_dropped: int = 0
    """Of those, episodes that played and that the teacher did not score."""
    num_trained: int = 0
    """Tokens of the loss masks."""
    largest_id: int = 0


def scan(
    source: Path, *, top_k: int, max_dropped_fraction: float, check: Callable[[Line, Episode], None]
) -> StoredEpisodes:
    """Read all that there is once, and check that it can be trained on.

    Args:
        top_k: candidates that every trained token must have; 0: none are needed.
        max_dropped_fraction: share of the played episodes that may have no score because the teacher failed on them.
        check: called with each episode that can be trained on.

    Raises:
        StoredError: a line is no episode, a trained token has no score, or nothing is left.
    """
    found = StoredEpisodes(source=source, files=found_files(source))
    for file in found.files:
        for line, episode in read_file(file):
            if (cause := _cause_to_leave_out(episode)) is not None:
                found.left_out[cause] += 1
                found.num_dropped += episode.error is not None and episode.stop_reason is not StopReason.ERROR
                continue
            for index, trace in enumerate(episode.traces):
                if (problem := unscored(trace, top_k)) is not None:
                    raise StoredError(
                        f"{line}: trace {index} of {episode.id!r}: {problem}. Score it first: python -m distill.score "
                        f"{file} --teacher MODEL{f' --top-k {top_k}' if top_k else ''} --out FILE"
                    )
                found.largest_id = max(found.largest_id, *trace.token_ids)
            check(line, episode)
            found.lines.append(line)
            found.num_trained += sum(trace.num_trained for trace in episode.traces)
    causes = "".join(f"\n  {n} x {cause}" for cause, n in found.left_out.most_common(3))
    if not found.lines:
        raise StoredError(f"{source}: none of its episodes can be trained on:{causes or ' it has none'}")
    share = found.num_dropped / (len(found.lines) + found.num_dropped)
    if share > max_dropped_fraction:
        raise StoredError(
            f"{source}: {share:.0%} of the episodes have no teacher score "
            f"(teacher.max_dropped_fraction = {max_dropped_fraction:g}):{causes}"
        )
    return found


def scan_for(config: RunConfig, check: Callable[[Line, Episode], None] = lambda line, episode: None) -> StoredEpisodes:
    """The episodes of `config.episodes`, scanned for the loss that is asked for."""
    assert config.episodes is not None
    return scan(
        Path(config.episodes),
        top_k=config.teacher.top_k if config.loss.type == "topk" else 0,
        max_dropped_fraction=config.teacher.max_dropped_fraction,
        check=check,
    )


def summary(stored: StoredEpisodes) -> str:
    """What there is, and what is left out, in words."""
    files = "1 file" if len(stored.files) == 1 else f"{len(stored.files)} files"
    left_out = "".join(f"\n  left out: {n} x {cause}" for cause, n in stored.left_out.most_common(5))
    return (
        f"{len(stored.lines)} stored episodes of {stored.source} ({files}), {stored.num_trained:,} tokens to train on"
        f"{left_out}"
    )


def _cause_to_leave_out(episode: Episode) -> str | None:
    if episode.error is not None:
        return f"{episode.error.boundary}/{episode.error.kind}: {episode.error.message[:200]}"
    if episode.stop_reason is StopReason.ERROR:
        return "the episode failed"
    if not episode.traces:
        return "no token ids (played over messages alone)"
    return None if any(trace.num_trained for trace in episode.traces) else "no token to train on"


def unscored(trace: TokenTrace, top_k: int) -> str | None:
    """What a trained token of the trace lacks, in words; None: nothing."""
    if not trace.num_trained:
        return None
    if trace.loss_mask[0]:
        return "token 0 is to be trained on, but nothing predicts it"
    if trace.teacher_logprobs is None:
        return "the teacher has not scored it"
    for i, trained in enumerate(trace.loss_mask):
        if trained and trace.teacher_logprobs[i] is None:
            return f"token {i} is to be trained on but has no teacher log-probability"
        if trained and top_k:
            row = trace.teacher_topk.token_ids[i] if trace.teacher_topk is not None else None
            if row is None or len(row) != top_k:
                return f"token {i} has {len(row or ())} candidates of the teacher; teacher.top_k is {top_k}"
    return None
