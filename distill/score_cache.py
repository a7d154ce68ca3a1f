"""What a teacher has been asked before is not asked again: its scores by what was sent, in one file a teacher.

    <cache folder>/scores/0f3a...c1.jsonl
        {"teacher": "org/model", "base_url": "http://host:8000/v1", "top_k": 0, ...}      who it is
        {"key":"9e1c...","logprobs":[-0.1,-2.4],"topk_ids":null,"topk_logprobs":null}     one scored trace a line

A line is written as soon as it is known, in one call: a run that is killed loses the requests in flight and nothing
else, and two runs may write the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from agent_loop.types import Episode, TokenTrace, TopK
from distill.teacher import HttpTeacher
from distill.types import TeacherScore

_HEAD = b'{"key":"'
_KEY_CHARS = 64


class ScoreCache:
    """The scores of one teacher.

    Args:
        folder: of all caches; made if it is not there.
        identity: everything that decides a score beside the tokens: another identity is another file.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(dict(identity), sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._places: dict[str, tuple[int, int]] = {}
        """Offset and size of a line by its key; the last one written counts."""
        end, torn = self._index()
        if not end:
            os.write(self._file, text.encode() + b"\n")
        elif torn:
            os.write(self._file, b"\n")

    def _index(self) -> tuple[int, bool]:
        """Find all lines; the file's size, and whether a crash tore its last line."""
        offset, raw = 0, b"\n"
        with self.path.open("rb") as file:
            for raw in file:
                if raw.startswith(_HEAD) and raw.endswith(b"}\n"):
                    key = raw[len(_HEAD) : len(_HEAD) + _KEY_CHARS].decode(errors="replace")
                    self._places[key] = (offset, len(raw))
                offset += len(raw)
        return offset, not raw.endswith(b"\n")

    def get(self, key: str, trace: TokenTrace, top_k: int) -> TeacherScore | None:
        """The score of a trace; None where it is not there, or not whole."""
        if key not in self._places:
            return None
        offset, size = self._places[key]
        try:
            entry = json.loads(os.pread(self._file, size, offset))
            score = _laid_on(trace, entry if entry["key"] == key else {}, top_k)
            # As strict as where the numbers came from: lengths, finite, at most 0.
            dataclasses.replace(trace, teacher_logprobs=score.logprobs, teacher_topk=score.topk)
        except (ValueError, KeyError, TypeError):
            return None
        return score

    def put(self, key: str, trace: TokenTrace, score: TeacherScore) -> None:
        """Keep a score.

        Raises:
            OSError: the disk refused.
        """
        rows = [i for i, trained in enumerate(trace.loss_mask) if trained]
        topk = score.topk
        entry = {
            "key": key,
            "logprobs": [score.logprobs[i] for i in rows],
            "topk_ids": None if topk is None else [topk.token_ids[i] for i in rows],
            "topk_logprobs": None if topk is None else [topk.logprobs[i] for i in rows],
        }
        raw = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        os.write(self._file, raw)
        self._places[key] = (os.lseek(self._file, 0, os.SEEK_CUR) - len(raw), len(raw))

    def close(self) -> None:
        os.close(self._file)


def _laid_on(trace: TokenTrace, entry: Mapping[str, Any], top_k: int) -> TeacherScore:
    """The numbers of an entry at the trained tokens of the trace.

    Raises:
        ValueError, KeyError, TypeError: they do not fit.
    """
    rows = [i for i, trained in enumerate(trace.loss_mask) if trained]
    logprobs: list[float | None] = [None] * len(trace)
    for i, value in zip(rows, entry["logprobs"], strict=True):
        logprobs[i] = float(value)
    if not top_k:
        return TeacherScore(logprobs=logprobs)
    topk = TopK(token_ids=[None] * len(trace), logprobs=[None] * len(trace))
    for i, ids, values in zip(rows, entry["topk_ids"], entry["topk_logprobs"], strict=True):
        if not len(ids) == len(values) == top_k:
            raise ValueError(f"{len(ids)} candidates, not {top_k}")
        topk.token_ids[i], topk.logprobs[i] = list(map(int, ids)), list(map(float, values))
    return TeacherScore(logprobs=logprobs, topk=topk)


class CachedTeacher:
    """A `TeacherScorer` that asks the teacher only what the cache does not know.

    Args:
        make: opens the teacher and leaves what closes it on the stack; called when something has to be asked.
        top_k: candidates a position.
        sees_task: the teacher's prompt is made from the task's messages (a system prompt of its own).
    """

    def __init__(
        self, make: Callable[[AsyncExitStack], HttpTeacher], cache: ScoreCache, *, top_k: int, sees_task: bool
    ) -> None:
        self._make = make
        self._cache = cache
        self._top_k = top_k
        self._sees_task = sees_task
        self._stack = AsyncExitStack()
        self._teacher: HttpTeacher | None = None
        self.num_known = 0
        """Traces that the cache knew."""
        self.num_asked = 0

    async def score(
        self, episode: Episode, *, on_sent: Callable[[int], None] = lambda _: None
    ) -> Sequence[TeacherScore]:
        """See `TeacherScorer`."""
        scores: dict[int, TeacherScore] = {}
        keys = [self._key(episode, trace) for trace in episode.traces]
        for i, trace in enumerate(episode.traces):
            if not trace.num_trained:
                scores[i] = TeacherScore(logprobs=[None] * len(trace))
            elif (known := self._cache.get(keys[i], trace, self._top_k)) is not None:
                scores[i] = known
                self.num_known += 1
        asked = [i for i in range(len(episode.traces)) if i not in scores]
        if asked:
            if self._teacher is None:
                self._teacher = self._make(self._stack)
            part = dataclasses.replace(episode, traces=[episode.traces[i] for i in asked])
            self.num_asked += len(asked)
            for i, score in zip(asked, await self._teacher.score(part, on_sent=on_sent), strict=True):
                self._cache.put(keys[i], episode.traces[i], score)
                scores[i] = score
        return [scores[i] for i in range(len(episode.traces))]

    def _key(self, episode: Episode, trace: TokenTrace) -> str:
        rows = [i for i, trained in enumerate(trace.loss_mask) if trained]
        asked: list[Any] = [trace.token_ids[: rows[-1] + 1] if rows else [], rows]
        if self._sees_task:
            asked += [list(episode.task.messages), episode.task.tools]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    async def aclose(self) -> None:
        await self._stack.aclose()
        self._cache.close()
