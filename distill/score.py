"""`python -m distill.score EPISODES --teacher MODEL --out FILE`: another teacher's scores of stored episodes.

EPISODES is a file, a folder of files or a run; it is only read. What is written is the same episodes with the new
teacher's numbers, whole or not at all. Scores are cached: what a teacher has scored once, it is never asked again, so
that after an interruption the same command goes on where it stopped. An episode that the teacher cannot score keeps
the cause in its `error`. Exit code 5 where none could be scored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from distill.config_files import ConfigError
from distill.console import Console
from distill.failures import guarded

if TYPE_CHECKING:
    from agent_loop.types import Episode
    from distill.score_cache import CachedTeacher
    from distill.stored import Decode
    from distill.teacher import HttpTeacher
    from tools.types import ToolSpec

RETRY_S = 60.0
"""Seconds after which a server that does not answer is not tried again."""
AT_ONCE = 256
"""Episodes that are in memory and asked for together; `HttpTeacher` bounds the tokens in flight."""
KEPT = (".json", ".safetensors", ".jinja", ".txt")
"""Endings of the files that make a model folder what it is."""


@dataclass(slots=True)
class Totals:
    """What became of all episodes."""

    episodes: int = 0
    scored: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Episodes by why the teacher did not score them."""
    not_played: int = 0
    """Episodes that failed when they were played, or have no token to train on; they are written as they were."""
    tokens: int = 0
    """Of the loss masks, of what was to be scored."""
    scored_tokens: int = 0
    sent_tokens: int = 0
    log_ratio: float = 0.0
    """Sum over the scored tokens of sampling minus teacher log-probability, in nats."""

    @property
    def teacher_kl(self) -> float | None:
        """Mean log-ratio of a token between who sampled it and this teacher, in nats: an estimate of the reverse KL of
        the weights that played the episodes (docs/loss.md). None: nothing was scored."""
        return self.log_ratio / self.scored_tokens if self.scored_tokens else None

    @property
    def coverage(self) -> float | None:
        """Share of the trained tokens that have a score."""
        return self.scored_tokens / self.tokens if self.tokens else None


def score(source: Path, out: Path, arguments: argparse.Namespace, console: Console) -> Totals:
    """Score all episodes of `source` into `out`, which must not exist: a file for a file, a folder for anything else.

    Raises:
        ConfigError: `out` is there, or there is no such teacher.
        StoredError: a line is no episode, or its ids mean another text to the teacher.
        TeacherError: the server is not there; what it scored is kept.
    """
    from distill.stored import found_files

    if out.exists():
        raise ConfigError([f"{out} is there already; name a file or a folder that is not (scores are cached)"])
    files = found_files(source)
    building = out.with_name(f".{out.name}.part")
    _remove(building)
    building.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_file():
            pairs = [(source, building)]
        else:
            building.mkdir()
            pairs = [(file, building / file.name) for file in files]
        totals = asyncio.run(_score_files(pairs, arguments, console))
        building.rename(out)
    finally:
        _remove(building)
    return totals


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def _score_files(pairs: Sequence[tuple[Path, Path]], arguments: argparse.Namespace, console: Console) -> Totals:
    from distill.stored import check_text, read_file

    teacher, decode = _open(arguments, console)
    totals = Totals()
    try:
        for source, target in pairs:
            with target.open("x", encoding="utf-8") as file:
                chunk: list[Episode] = []
                for line, episode in read_file(source):
                    if decode is not None:
                        check_text(line, episode, decode, f"the teacher ({arguments.teacher})")
                    chunk.append(episode)
                    if len(chunk) == AT_ONCE:
                        await _score_and_write(chunk, file, teacher, totals)
                        chunk = []
                await _score_and_write(chunk, file, teacher, totals)
                file.flush()
                os.fsync(file.fileno())
            console.say(f"{source}: {totals.scored:,} of {totals.episodes:,} episodes scored so far")
        console.say(f"{teacher.num_asked:,} traces asked ({totals.sent_tokens:,} tokens), {teacher.num_known:,} cached")
    finally:
        await teacher.aclose()
    return totals


async def _score_and_write(episodes: Sequence[Episode], file: TextIO, teacher: CachedTeacher, totals: Totals) -> None:
    """Score all at once, and write them in their order.

    Raises:
        TeacherError: the server is not there; any other failure is its episode's own.
    """
    from agent_loop.episodes import episode_to_json

    try:
        async with asyncio.TaskGroup() as group:
            for episode in episodes:
                group.create_task(_score_one(episode, teacher, totals))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the first: the others are its consequence or its like
    for episode in episodes:
        file.write(json.dumps(episode_to_json(episode), allow_nan=False, separators=(",", ":")) + "\n")


async def _score_one(episode: Episode, teacher: CachedTeacher, totals: Totals) -> None:
    from agent_loop.types import EpisodeError
    from distill.types import TeacherError
    from envs.types import StopReason

    totals.episodes += 1
    trained = sum(trace.num_trained for trace in episode.traces)
    elsewhere = episode.error is not None and episode.error.boundary != "teacher"
    if episode.stop_reason is StopReason.ERROR or elsewhere or not trained:
        totals.not_played += 1
        return
    totals.tokens += trained

    def sent(tokens: int) -> None:
        totals.sent_tokens += tokens

    for trace in episode.traces:
        trace.teacher_logprobs = trace.teacher_topk = None
    try:
        scores = await teacher.score(episode, on_sent=sent)
    except TeacherError as error:
        if error.kind == "unavailable":
            raise
        episode.error = EpisodeError(boundary="teacher", kind=error.kind, message=str(error)[:2000])
        totals.failed[f"{error.kind}: {str(error)[:200]}"] += 1
        return
    episode.error = None
    for trace, found in zip(episode.traces, scores, strict=True):
        trace.teacher_logprobs, trace.teacher_topk = found.logprobs, found.topk
        trace.check()
        for is_trained, sampled, scored in zip(trace.loss_mask, trace.sampling_logprobs, found.logprobs, strict=True):
            if is_trained and sampled is not None and scored is not None:
                totals.log_ratio += sampled - scored
                totals.scored_tokens += 1
    totals.scored += 1


# The teacher


def _open(arguments: argparse.Namespace, console: Console) -> tuple[CachedTeacher, Decode | None]:
    """The teacher behind its cache, and its tokenizer where it is known."""
    from agent_loop.renderer import load_renderer
    from distill import models
    from distill.endpoints import api_key
    from distill.score_cache import CachedTeacher, ScoreCache
    from distill.teacher_context import TeacherContext

    base_url, embedded = _address(arguments.base_url), arguments.base_url is None
    try:
        path = models.resolve(arguments.teacher, progress=console.say) if embedded else arguments.teacher
    except models.ModelNameError as error:
        raise ConfigError([f"--teacher: {error}"]) from error
    if embedded and not isinstance(path, Path):
        raise ConfigError(
            [
                f"--teacher {arguments.teacher}: no such folder, and no builtin: name. Give --base-url of the server "
                "that has it, or the folder of its files"
            ]
        )
    tokenizer = arguments.tokenizer or (path if embedded else None)
    if tokenizer is not None:
        tokenizer = models.resolve(tokenizer, progress=console.say)
    else:
        console.say("the vocabulary is not checked: --tokenizer FOLDER would, episode by episode")
    system_prompt = renderer = None
    tools: list[ToolSpec] = []
    if arguments.system_prompt is not None:
        system_prompt = arguments.system_prompt.read_text(encoding="utf-8")
        if tokenizer is None:
            raise ConfigError(["--system-prompt needs --tokenizer: the prompt is rendered here"])
        renderer = load_renderer(tokenizer)
        tools = list(_tools_of(arguments.env))
    context = (
        None if renderer is None else TeacherContext(renderer=renderer, tool_specs=tools, system_prompt=system_prompt)
    )
    key = api_key(arguments.api_key_env)
    dtype, device = _placed()
    identity: dict[str, Any] = {"teacher": str(path), "base_url": base_url, "top_k": arguments.top_k}
    if isinstance(path, Path):
        identity |= {"teacher": str(path.resolve()), "files": _stats(path), "dtype": dtype, "device": device}
    if renderer is not None:
        specs = [tool.to_openai() for tool in tools]
        identity |= {"system_prompt": system_prompt, "tokenizer": renderer.fingerprint, "tools": specs}

    def make(stack: AsyncExitStack) -> HttpTeacher:
        import transformers

        from agent_loop.transport import AsgiTransport, HttpTransport, Transport
        from distill.serving.embedded import EmbeddedEngine
        from distill.teacher import HttpTeacher

        transport: Transport
        if base_url is not None:
            transport, name = HttpTransport(base_url, key, retry_deadline_s=RETRY_S), arguments.teacher
        else:
            transformers.utils.logging.disable_progress_bar()
            engine = EmbeddedEngine.from_pretrained(
                path, name="teacher", dtype=dtype, device=device, max_logprobs=max(20, arguments.top_k)
            )
            stack.push_async_callback(engine.aclose)
            transport, name = AsgiTransport(engine.app), "teacher"
        teacher = HttpTeacher(
            transport,
            name,
            top_k=arguments.top_k,
            context_of=lambda _task: context,
        )
        stack.push_async_callback(teacher.aclose)
        return teacher

    cache = ScoreCache((arguments.cache or models.cache_folder()) / "scores", identity)
    teacher = CachedTeacher(make, cache, top_k=arguments.top_k, sees_task=system_prompt is not None)
    return teacher, None if tokenizer is None else _decoder(tokenizer)


def _address(base_url: str | None) -> str | None:
    """As the configuration takes one: no password in it, no slash at its end."""
    from pydantic import ValidationError

    from distill.config import TeacherConfig

    if base_url is None:
        return None
    try:
        urls = TeacherConfig(base_url=(base_url,)).base_url
    except ValidationError as error:
        raise ConfigError([f"--base-url: {found['msg']}" for found in error.errors()]) from error
    return urls[0] if urls else None


def _placed() -> tuple[str, str]:
    """Number format and device of a teacher in this process."""
    import torch

    return ("bfloat16", "cuda") if torch.cuda.is_available() else ("float32", "cpu")


def _stats(folder: Path) -> list[list[Any]]:
    """Name, size and time of change of the files of a model: another model in the same folder is another teacher."""
    files = sorted(file for file in folder.iterdir() if file.suffix in KEPT)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _decoder(tokenizer: str | Path) -> Decode:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(backend.decode(list(ids), skip_special_tokens=False))

    return decode


def _tools_of(env: str | None) -> Sequence[ToolSpec]:
    """The tools that stand in the episodes' prompts."""
    if env is None:
        return ()
    import envs

    return envs.make(env, skip_verification=True).tool_specs


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: docs/concepts.md, "Failures"."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.score",
        description="Score stored episodes by another teacher; train on them with `python -m distill.run --episodes`.",
    )
    parser.add_argument("episodes", metavar="EPISODES", type=Path, help="a JSONL file, a folder of them, or a run")
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL", help="folder or builtin: name; with --base-url, the served name"
    )
    parser.add_argument("--base-url", metavar="URL", help="of a vLLM server, with its /v1; default: in this process")
    parser.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="candidates a token too, for loss.type topk")
    parser.add_argument("--system-prompt", type=Path, metavar="FILE", help="text that the teacher alone sees")
    parser.add_argument("--env", metavar="ENV", help="environment of the episodes' tools; with --system-prompt alone")
    parser.add_argument("--tokenizer", metavar="MODEL", help="of a served teacher, to compare the vocabulary")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of all scores; default: the user's cache")
    parser.add_argument("--out", required=True, type=Path, help="new file (EPISODES is a file) or folder")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.top_k <= 1024:
        parser.error("--top-k: 0 to 1024")
    console = Console()
    totals: list[Totals] = []
    code = guarded(lambda: totals.append(score(arguments.episodes, arguments.out, arguments, console)))
    return code or _report(totals[0], arguments.out, console)


def _report(totals: Totals, out: Path, console: Console) -> int:
    from distill.failures import EXIT_OK, EXIT_SERVER

    kl = "not computed" if totals.teacher_kl is None else f"{totals.teacher_kl:.4f} nats a token"
    coverage = "not computed" if totals.coverage is None else f"{totals.coverage:.1%}"
    print(
        f"{out}: {totals.scored} of {totals.episodes} episodes scored, {totals.failed.total()} failed, "
        f"{totals.not_played} with nothing to score\n"
        f"teacher_kl {kl} over {totals.scored_tokens:,} tokens, coverage {coverage}"
    )
    for cause, count in totals.failed.most_common(5):
        console.say(f"failed: {count} x {cause}")
    return EXIT_SERVER if totals.failed and not totals.scored else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
