"""Runs as forked processes: `distill.run.main` in a real process that can be killed at an exact point.

A server process imports torch once and forks, which makes a run take one second instead of five. What a child does
beside its run is of Python's, torch's and the kernel's own means: audit hooks, optimiser hooks, resource limits.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "distill.build",
    "distill.check",
    "distill.report",
    "distill.run",
    "distill.serving.worker",
    "distill.step",
    "matplotlib.pyplot",
    "transformers.models.qwen3.modeling_qwen3",
]
Prepare = Callable[..., None]


def context() -> ForkServerContext:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


def start(
    folder: Path, *flags: str, prepare: Prepare | None = None, arguments: tuple[Any, ...] = ()
) -> ForkServerProcess:
    """`python -m distill.run --config run.toml FLAGS` in `folder`, in a process of its own; stderr goes to
    `stderr.txt`. With `--resume` the run has a configuration: no file is named.

    Args:
        prepare: a function of this module, called in the child with `arguments` before the run.
    """
    process = context().Process(target=_child, args=(folder, flags, prepare, arguments))
    process.start()
    return process


def run(folder: Path, *flags: str, prepare: Prepare | None = None, arguments: tuple[Any, ...] = ()) -> int:
    """The same, to its end.

    Returns:
        The exit code; -9 if it was killed.
    """
    process = start(folder, *flags, prepare=prepare, arguments=arguments)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the run did not end:\n{said(folder)[-3000:]}")
    return process.exitcode


def said(folder: Path) -> str:
    return (folder / "stderr.txt").read_text()


def _child(folder: Path, flags: tuple[str, ...], prepare: Prepare | None, arguments: tuple[Any, ...]) -> None:
    os.chdir(folder)
    log = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server's children ignore it
    if prepare is not None:
        prepare(*arguments)
    from distill.run import main

    config = [] if "--resume" in flags else ["--config", "run.toml"]
    sys.exit(main([*config, *flags]))


# What happens to a child


def kill_at_event(folder: Path, number: int) -> None:
    """SIGKILL just before the `number`-th file operation in `folder` (open, rename, mkdir, remove). What Python does
    with files is announced to audit hooks before it happens."""
    count = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if _touches(event, details, folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def record_events(folder: Path, log: Path) -> None:
    """Write one line for each file operation that `kill_at_event` counts."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if _touches(event, details, folder):
            os.write(out, f"{event} {details[0]}\n".encode())

    sys.addaudithook(hook)


def _touches(event: str, details: tuple[Any, ...], folder: Path) -> bool:
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        return False
    try:
        path = os.path.abspath(os.fsdecode(details[0]))
    except TypeError:  # a descriptor
        return False
    return path.startswith(f"{folder}{os.sep}")


def kill_in_append(file: Path, opening: int) -> None:
    """The kernel ends the process in the middle of what it writes after it opened `file` for the `opening`-th time
    (RLIMIT_FSIZE and SIGXFSZ, which Python ignores otherwise)."""
    limit_when_opened(file, opening, 100)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_when_opened(file: Path, opening: int, more: int) -> None:
    """From the `opening`-th time that `file` is opened, no file may grow beyond its size then and `more` bytes: EFBIG
    from the kernel, as from a quota."""
    count = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and _touches(event, details, file.parent) and os.path.abspath(details[0]) == str(file):
            count += 1
            if count == opening:
                size = file.stat().st_size if file.exists() else 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, resource.RLIM_INFINITY))

    sys.addaudithook(hook)


def kill_in_optimizer(step: int, where: str) -> None:
    """SIGKILL `before` or `after` torch's optimiser applies the gradients of `step`, in the middle of our update."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    (register_optimizer_step_pre_hook if where == "before" else register_optimizer_step_post_hook)(hook)


def poison_gradient(step: int) -> None:
    """One number of one gradient becomes NaN in the backward pass of `step`, by torch's own hook of all modules."""
    import torch
    from torch.nn.modules.module import register_module_full_backward_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1

    def hook(module: Any, grad_input: Any, grad_output: Any) -> Any:
        if made == step - 1 and type(module).__name__ == "Qwen3MLP":
            poisoned = grad_input[0].clone()
            poisoned.view(-1)[0] = torch.nan
            return (poisoned,)
        return None

    register_optimizer_step_post_hook(count)
    register_module_full_backward_hook(hook)


def out_of_memory(step: int) -> None:
    """The second decoder layer of the trainer's forward pass in `step` finds no memory, once: torch's own error."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1

    def hook(module: Any, inputs: Any) -> None:
        is_training = torch.is_grad_enabled() and module.training
        if made == step - 1 and is_training and getattr(module, "layer_idx", None) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    register_optimizer_step_post_hook(count)
    register_module_forward_pre_hook(hook)


def jumping_clock() -> None:
    """The wall clock goes back an hour each time that it is read,
    as after a bad NTP answer; the monotonic one does not."""
    real, reads = time.time, 0

    def jumping() -> float:
        nonlocal reads
        reads += 1
        return real() - 3600.0 * reads

    time.time = jumping


def shorten_when_opened(trigger: Path, opening: int, file: Path) -> None:
    """At the `opening`-th time that `trigger` is opened, `file` loses its last line, as if somebody edited it."""
    count = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and _touches(event, details, trigger.parent) and os.path.abspath(details[0]) == str(trigger):
            count += 1
            if count == opening:
                kept = file.read_text().splitlines(keepends=True)[:-1]
                file.write_text("".join(kept))

    sys.addaudithook(hook)
