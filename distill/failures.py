"""Exit codes: which failure ends the program how. A failure that is not listed is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable

from distill.console import fail

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_CHECK = 3
EXIT_DATA = 4
EXIT_SERVER = 5
EXIT_NUMERIC = 6
EXIT_STORAGE = 7
EXIT_OUTAGE = 8
EXIT_MEMORY = 9
EXIT_RANK = 10
EXIT_INTERRUPT = 130


class Interrupted(Exception):
    """The user asked the run to stop; the step in hand is finished and saved."""


def exit_code_of(error: BaseException) -> int | None:
    """None: not a known failure, but a bug."""
    from agent_loop.evaluate import UsageError
    from agent_loop.renderer import RendererError
    from agent_loop.scoring import ScoringError
    from agent_loop.transport import TransportError
    from agent_loop.types import PolicyError
    from distill.build import BuildError
    from distill.check import CheckFailed
    from distill.checkpoint import CheckpointError
    from distill.config_load import ConfigError
    from distill.endpoints import EndpointError
    from distill.export import ExportError
    from distill.models import ModelNameError
    from distill.publish import PublishError
    from distill.ranks import RankError
    from distill.ray_cluster import WorkersError
    from distill.resume import DataChanged
    from distill.rundir import RunDirError
    from distill.serving.fleet import ServerLost
    from distill.serving.vllm import LaunchError
    from distill.step import TooManyDropped
    from distill.stored import StoredError
    from distill.student import NumericError, OutOfMemory
    from distill.types import TeacherError
    from distill.watch import AlarmStop
    from envs.dataset import TaskError
    from envs.registry import RegistryError
    from tools.pages import PageStoreError

    if isinstance(error, RankError):
        return error.code
    codes: list[tuple[tuple[type[BaseException], ...], int]] = [
        (
            (
                ConfigError,
                UsageError,
                BuildError,
                EndpointError,
                ExportError,
                ModelNameError,
                WorkersError,
                RegistryError,
                RendererError,
            ),
            EXIT_USAGE,
        ),
        ((CheckFailed,), EXIT_CHECK),
        ((TaskError, PageStoreError, DataChanged, StoredError), EXIT_DATA),
        ((OutOfMemory,), EXIT_MEMORY),
        ((ServerLost,), EXIT_OUTAGE),
        ((LaunchError, TooManyDropped, TransportError, ScoringError, PolicyError, TeacherError), EXIT_SERVER),
        ((AlarmStop, NumericError, PublishError), EXIT_NUMERIC),
        ((RunDirError, CheckpointError, OSError), EXIT_STORAGE),
        ((Interrupted, KeyboardInterrupt), EXIT_INTERRUPT),
    ]
    for kinds, code in codes:
        if isinstance(error, kinds):
            return code
    return None


def guarded(work: Callable[[], None]) -> int:
    """Run `work`; a known failure becomes a message and an exit code, a bug stays a traceback."""
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        fail(str(error) or "interrupted")
        return code
    return EXIT_OK
