"""One background thread with an event loop, for Gymnasium's synchronous `reset` and `step`.

The loop lives as long as the process. Environments may share connections and browsers on it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run_in_background(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop and wait for its result.

    Raises:
        RuntimeError: when called from inside a running event loop, where waiting would stop that loop: there, `await
            env.areset()` and `await env.astep()`, or call `envs.notebook.enable()` once in a notebook.
    """
    from envs import notebook

    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not None and (running is _loop or not notebook.enabled()):
        work.close()
        raise RuntimeError(
            "reset/step were called from inside a running event loop. Use `await env.areset()` and "
            "`await env.astep()`, or, in a notebook, call envs.notebook.enable() once."
        )
    future = asyncio.run_coroutine_threadsafe(work, _background_loop())
    try:
        if running is None:
            return future.result()
        # A notebook: nest_asyncio lets its loop serve other work while this waits.
        return running.run_until_complete(asyncio.wrap_future(future, loop=running))
    except BaseException:  # such as Ctrl-C: the step must not run on behind the caller's back
        future.cancel()
        raise


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="envs-background", daemon=True).start()
        return _loop


def _forget_loop() -> None:
    """A forked child has the loop's memory but not its thread: it starts a loop of its own."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
