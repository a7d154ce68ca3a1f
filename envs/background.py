"""One background thread with an event loop, for Gymnasium's synchronous `reset` and `step`.

The loop lives as long as the process. Environments may share connections and browsers on it.
"""

from __future__ import annotations

import asyncio
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
    return asyncio.run_coroutine_threadsafe(work, _background_loop()).result()


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="envs-background", daemon=True).start()
        return _loop
