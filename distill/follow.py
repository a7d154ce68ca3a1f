"""A process of the trainer that is not rank 0: it holds its share of the student and does what the leader calls."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distill.failures import EXIT_OK, exit_code_of

if TYPE_CHECKING:
    from distill.fsdp import SeveralRanks
    from distill.student import Student

EXIT_BUG = 1


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether torchrun started this process as another one than rank 0."""
    return world_size() > 1 and os.environ.get("RANK", "0") != "0"


def leave(code: int) -> NoReturn:
    """End this process. Where there are several ranks, without the interpreter's own end: a thread that still waits in
    gloo for a partner's last word would bring the process down there, with SIGABRT and after all is done."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def follow() -> int:
    """Obey until the leader is done; the exit code. Nothing is printed but a bug's traceback: the leader speaks."""
    from distill.fsdp import SeveralRanks

    ranks = SeveralRanks()
    try:
        name, arguments = ranks.next_call()
        if name == "build":
            obey(_build(arguments, ranks), ranks)
    except BaseException as error:
        code = exit_code_of(error)
        if code is None and not isinstance(error, RuntimeError):  # a connection that broke is not this rank's failure
            traceback.print_exc(file=sys.stderr)
        ranks.report(error, EXIT_BUG if code is None else code)
        return EXIT_BUG if code is None else code
    finally:
        ranks.close()
    return EXIT_OK


def _build(arguments: dict[str, Any], ranks: SeveralRanks) -> Student:
    """The same student as the leader's, from the leader's configuration."""
    from distill import models
    from distill.build import load_student
    from distill.config import RunConfig

    config = RunConfig.model_validate_json(json.dumps(arguments["config"]))
    quiet: Any = lambda _line: None  # noqa: E731
    student_path = models.resolve(config.student.model, progress=quiet)
    return load_student(config, student_path, models.resolve(config.teacher_model, progress=quiet), ranks)


def obey(student: Student, ranks: SeveralRanks) -> None:
    """Call on this rank's part of the student what the leader calls on its own, until it says stop."""
    from distill.checkpoint import CheckpointError
    from distill.student import NumericError

    while (call := ranks.next_call())[0] != "stop":
        with contextlib.suppress(NumericError, CheckpointError):  # the leader has the same, and decides
            _obey(student, *call)


def _obey(student: Student, name: str, arguments: dict[str, Any]) -> None:
    from agent_loop.episodes import episode_from_json
    from distill.checkpoint import Checkpoint

    nowhere = Path()  # only the leader writes
    match name:
        case "train_step":
            student.train_step([episode_from_json(e) for e in arguments["episodes"]], step=arguments["step"])
        case "logprobs":
            student.logprobs(arguments["ids"])
        case "state_dict_for_serving":
            student.state_dict_for_serving()
        case "save_adapter":
            student.save_adapter(nowhere)
        case "save":
            student.save(nowhere)
        case "rng_states":
            student.rng_states()
        case "restore":
            student.restore(Checkpoint(path=Path(arguments["path"]), step=0, cursor=0, rng=arguments["rng"]))
        case "restore_weights":
            student.restore_weights(Checkpoint(path=Path(arguments["path"]), step=0, cursor=0, rng=[]))
        case _:
            raise ValueError(f"a rank knows no call {name!r}")
