"""Opt-in for notebooks: `reset` and `step` inside the running loop of a cell.

    import envs.notebook
    envs.notebook.enable()

A notebook runs each cell inside an event loop, where a synchronous call that waits for another loop is refused by
default. `enable` applies nest_asyncio to the running loop. It patches asyncio for the whole process, so nothing else in
this project calls it, and training never needs it.
"""

from __future__ import annotations

_enabled = False


def enable() -> None:
    """Allow `reset` and `step` inside the running event loop of this process."""
    global _enabled
    import nest_asyncio

    nest_asyncio.apply()
    _enabled = True


def enabled() -> bool:
    return _enabled
