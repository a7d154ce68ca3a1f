"""Environments: tasks, the Gymnasium contract, the registry. Messages only.

import envs
envs.register("my_env", "my_package:MyEnv")
env = envs.make("my_env")

To write an environment: `ToolEnv`, `tool`, `Task`, `Limits`, `AssistantMessage` and `StopReason` are here too.
"""

from __future__ import annotations

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.registry import list_envs as list_envs
    from envs.registry import make as make
    from envs.registry import register as register
    from envs.registry import spec as spec
    from envs.tool_env import ToolEnv as ToolEnv
    from envs.types import AssistantMessage as AssistantMessage
    from envs.types import Limits as Limits
    from envs.types import StopReason as StopReason
    from envs.types import Task as Task
    from tools.tool import tool as tool

_tools = _find_spec("tools")
if _tools is not None and _tools.submodule_search_locations is None:
    raise ImportError(
        f"{_tools.origin} hides the package `tools`: run this from another folder, such as the one above. "
        "(Python looks into the working folder first.)"
    )

_PUBLIC = {
    "AssistantMessage": "envs.types",
    "Limits": "envs.types",
    "StopReason": "envs.types",
    "Task": "envs.types",
    "ToolEnv": "envs.tool_env",
    "list_envs": "envs.registry",
    "make": "envs.registry",
    "register": "envs.registry",
    "spec": "envs.registry",
    "tool": "tools.tool",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import envs` stays cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'envs' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
