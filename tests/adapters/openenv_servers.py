"""Two small OpenEnv servers: `python openenv_servers.py typed|mcp PORT`. Runs in an environment with `openenv` alone.

typed   find a number: guess, or give up; the reward of a right guess is 1, of a wrong one -0.25
mcp     tools by MCP: add, and one that fails
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import uvicorn
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field


class GuessAction(Action):
    """Guess the hidden number."""

    number: int = Field(ge=0, le=9, description="the guess")
    note: str | None = None


class Clue(Observation):
    clue: str


class Numbers(Environment[GuessAction, Clue, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._hidden, self._state = 0, State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Clue:
        self._hidden, self._state = (seed or 0) % 10, State(episode_id=episode_id)
        return Clue(clue=f"It is {'even' if self._hidden % 2 == 0 else 'odd'}.")

    def step(self, action: GuessAction, timeout_s: float | None = None, **kwargs: Any) -> Clue:
        self._state.step_count += 1
        if action.note == "raise":
            raise RuntimeError("the environment stumbled")
        if action.number == self._hidden:
            return Clue(clue="Right.", done=True, reward=1.0)
        return Clue(clue="Higher." if self._hidden > action.number else "Lower.", reward=-0.25)

    @property
    def state(self) -> State:
        return self._state


class Sums(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        from fastmcp import FastMCP

        server = FastMCP("sums")

        @server.tool()
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        @server.tool()
        def fail(kind: Literal["soft", "hard"]) -> str:
            """Always fails."""
            raise ValueError(f"{kind} failure")

        super().__init__(server)
        self._state = State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        return Observation()

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        return Observation()

    @property
    def state(self) -> State:
        return self._state


def main(kind: str, port: int, most: int) -> None:
    types: dict[str, Any] = {"typed": (Numbers, GuessAction, Clue), "mcp": (Sums, CallToolAction, CallToolObservation)}
    app = create_fastapi_app(*types[kind], max_concurrent_envs=most)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
