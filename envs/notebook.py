"""Opt-in for notebooks: `reset` and `step` inside the running loop of a cell.

    import envs.notebook
    envs.notebook.enable()

A notebook runs each cell inside an event loop, where a synchronous call that waits for another loop is refused by
default. `enable` applies nest_asyncio to the running loop. It patches asyncio for the whole process, so nothing else in
this project calls it, and training never needs it.
"""

from __future__ import annotations

import asyncio

_enabled = False


def enable() -> None:
    """Allow `reset` and `step` inside the running event loop of this process.

    Raises:
        RuntimeError: no event loop runs: outside a notebook `reset` and `step` need nothing.
    """
    global _enabled
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "envs.notebook.enable() belongs into a notebook cell: no event loop runs here, so reset/step need nothing"
        ) from None
    import nest_asyncio

    nest_asyncio.apply(loop)
    _enabled = True


def enabled() -> bool:
    return _enabled
