"""Shows the episodes of a run in the browser.

    python -m agent_loop.view runs/ID                        # the pages, on 127.0.0.1
    python -m agent_loop.view runs/ID runs/OTHER             # two runs, to compare
    python -m agent_loop.view runs/ID --follow               # while training goes on
    python -m agent_loop.view runs/ID --export out.html --query "kl>1" # one file to send
    python -m agent_loop.view runs/ID --what-if --model FOLDER         # and play forks of episodes (docs/viewer.md)
    python -m agent_loop.view --text runs/ID [EPISODE] [--tokens]      # in the terminal; see --text --help
    python -m agent_loop.view runs/ID --tui                  # in the terminal, as screens to walk through

RUN is a run directory, a folder of episode files or one file. From another machine: `ssh -L 8765:127.0.0.1:8765`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from agent_loop.view import WANTED

if TYPE_CHECKING:
    from agent_loop.view.index import Index
    from agent_loop.view.pieces import Pieces
    from agent_loop.view.whatif import WhatIf

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 nothing of that name, or an address that is not this machine's own."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--text" in arguments:
        from agent_loop.view.text import main as text_main

        return text_main([argument for argument in arguments if argument != "--text"])
    parser = argparse.ArgumentParser(
        prog="python -m agent_loop.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("other", type=Path, nargs="?", metavar="RUN2", help="a second run, to compare with")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address; no other is served")
    parser.add_argument("--port", type=int, default=8765, help="0: any free one (default: 8765)")
    parser.add_argument("--follow", action="store_true", help="show episodes as they are appended")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write FILE.html, or one FILE.atif.json, and stop")
    parser.add_argument("--query", default="", help="with --export: which episodes, as in the search field")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json, where the run does not have it")
    parser.add_argument("--what-if", action="store_true", help="let the pages play forks of episodes (docs/viewer.md)")
    parser.add_argument(
        "--model",
        help="samples on: a model folder, or a name on --base-url; without it an edited turn is the last",
    )
    parser.add_argument("--base-url", metavar="URL", help="server of --model, with /v1")
    parser.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    parser.add_argument("--env", help="environment of forks, where the run's is a folder: its code will run")
    parser.add_argument("--cache", type=Path, help="folder of the index (default: in the user's cache)")
    parser.add_argument("--tui", action="store_true", help="screens in this terminal; needs the extra `tui`")
    parser.add_argument("--text", action="store_true", help="plain text in the terminal instead")
    options = parser.parse_args(arguments)
    if not options.what_if and (options.base_url or options.model or options.env or options.api_key_env):
        parser.error("--model, --base-url, --api-key-env and --env are for --what-if")
    if options.what_if and (options.export or options.tui):
        parser.error("only the pages play forks: leave out --what-if")
    if (options.base_url or options.api_key_env) and not (options.base_url and options.model):
        parser.error("--base-url wants --model, the name that the server knows the model by")
    if options.model and not options.base_url and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no model folder (no config.json); for a server's model add --base-url")
    if options.api_key_env and options.api_key_env not in os.environ:
        parser.error(f"--api-key-env: the environment has no variable {options.api_key_env}")
    if options.host not in LOOPBACK:
        print(f"error: --host {options.host}: episodes are shown on loopback only; use ssh -L", file=sys.stderr)
        return 2
    try:
        return show(options)
    except (FileNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(options: argparse.Namespace) -> int:
    from agent_loop.view.fork import ForkError
    from agent_loop.view.index import Index, cache_folder
    from agent_loop.view.pieces import pieces_of

    runs = [run for run in (options.run, options.other) if run is not None]
    for run in runs:
        if not run.exists():
            print(f"error: there is no run at {run}: {WANTED}", file=sys.stderr)
            return 2
    index = Index(runs, options.cache or cache_folder())
    try:
        pieces = [pieces_of(run, options.tokenizer) for run in index.roots]
        if options.export is not None:
            return export(options, index, pieces)
        if not index.rows() and not options.follow:
            print(f"error: no episodes in {options.run}: {WANTED}", file=sys.stderr)
            return 2
        if options.tui:
            return screens(options, index, pieces)
        if not options.what_if:
            return serve(options, index, pieces, None)
        with ExitStack() as opened:
            return serve(options, index, pieces, forks_of(options, index, pieces, opened))
    except ForkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        index.close()


def export(options: argparse.Namespace, index: Index, pieces: list[Pieces | None]) -> int:
    from agent_loop.view.export import write_html
    from agent_loop.view.search import BadQuery, find
    from agent_loop.view.server import MOST_EXPORTED

    try:
        rows = find(index, options.query).rows
    except BadQuery as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    atif = options.export.name.endswith(".atif.json")
    if not 1 <= len(rows) <= (1 if atif else MOST_EXPORTED):
        wanted = "one" if atif else f"1 to {MOST_EXPORTED}"
        print(f"error: {len(rows)} episodes; name {wanted} with --query, id:12/task/0 say", file=sys.stderr)
        return 2
    try:
        text = atif_of(index.raw(rows[0])) if atif else write_html(index, index.roots, pieces, rows)
    except (ValueError, RecursionError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.export.write_text(text, encoding="utf-8")
    print(f"{options.export}: {len(rows)} episodes, {options.export.stat().st_size / 1e6:.1f} MB")
    return 0


def forks_of(options: argparse.Namespace, index: Index, pieces: list[Pieces | None], opened: ExitStack) -> list[WhatIf]:
    """What plays forks, one a run; the engine of a model folder runs until `opened` is closed.

    Raises:
        ForkError: a run's configuration, tokenizer or the model is not fit for it.
    """
    from agent_loop.view.engine import engine
    from agent_loop.view.fork import ForkError
    from agent_loop.view.pieces import pieces_of
    from agent_loop.view.whatif import Model, WhatIf

    model = None
    if options.base_url:
        key = os.environ[options.api_key_env] if options.api_key_env else None
        model = Model(options.base_url, options.model, key)
    what_ifs = [
        WhatIf(run, found.folder if found else None, model=model, env=options.env)
        for run, found in zip(index.roots, pieces, strict=True)
    ]
    if options.model and model is None:
        folder = Path(options.model)
        own = pieces_of(folder, folder)
        for run, found in zip(index.roots, pieces, strict=True):
            if own is not None and found is not None and not own.same_ids(found):
                raise ForkError(f"the model in {folder} has another vocabulary than {run}: its ids mean other words")
        print(f"starting the embedded engine with {folder}", file=sys.stderr, flush=True)
        model = opened.enter_context(engine(folder))
        for what_if in what_ifs:
            what_if.model = model
    return what_ifs


def serve(options: argparse.Namespace, index: Index, pieces: list[Pieces | None], what_ifs: list[WhatIf] | None) -> int:
    import uvicorn

    from agent_loop.view.server import app_of

    family = socket.AF_INET6 if options.host == "::1" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen(128)  # who reads the line below may connect at once
        port = listener.getsockname()[1]
        name = f"[{options.host}]" if options.host == "::1" else options.host
        token = secrets.token_urlsafe(32)
        fragment = f"#/what-if/{token}" if what_ifs is not None else ""
        print(f"{len(index.rows())} episodes on http://{name}:{port}/{fragment}", flush=True)
        follow_s = 0.5 if options.follow else None
        app = app_of(index, index.roots, pieces, port=port, follow_s=follow_s, what_ifs=what_ifs, token=token)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=5)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def atif_of(line: bytes) -> str:
    from agent_loop.view.rows import exact

    try:
        from agent_loop.view.trajectory import trajectory_json
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ATIF needs the package atif: pip install -e '.[atif]' ({error})") from None
    return trajectory_json(exact(line))


def screens(options: argparse.Namespace, index: Index, pieces: list[Pieces | None]) -> int:
    try:
        from agent_loop.view.tui import Viewer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        print("error: --tui needs textual: pip install -e '.[tui]'; --text reads without it", file=sys.stderr)
        return 2
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("error: --tui needs a terminal; --text writes to a pipe as well", file=sys.stderr)
        return 2
    viewer = Viewer(index, pieces, follow=options.follow)
    viewer.run()
    return viewer.return_code or 0


if __name__ == "__main__":
    sys.exit(main())
