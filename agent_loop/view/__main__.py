"""Shows the episodes of a run in the browser.

    python -m agent_loop.view runs/ID                        # the pages, on 127.0.0.1
    python -m agent_loop.view runs/ID runs/OTHER             # two runs, to compare
    python -m agent_loop.view runs/ID --follow               # while training goes on
    python -m agent_loop.view runs/ID --export out.html --query "kl>1" # one file to send
    python -m agent_loop.view --text runs/ID [EPISODE] [--tokens]      # in the terminal; see --text --help
    python -m agent_loop.view runs/ID --tui                  # in the terminal, as screens to walk through

RUN is a run directory, a folder of episode files or one file. From another machine: `ssh -L 8765:127.0.0.1:8765`.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_loop.view.index import Index
    from agent_loop.view.pieces import Pieces

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
    parser.add_argument("--cache", type=Path, help="folder of the index (default: in the user's cache)")
    parser.add_argument("--tui", action="store_true", help="screens in this terminal; needs the extra `tui`")
    parser.add_argument("--text", action="store_true", help="plain text in the terminal instead")
    options = parser.parse_args(arguments)
    if options.host not in LOOPBACK:
        print(f"error: --host {options.host}: episodes are shown on loopback only; use ssh -L", file=sys.stderr)
        return 2
    try:
        return show(options)
    except (FileNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(options: argparse.Namespace) -> int:
    from agent_loop.view.index import Index, cache_folder
    from agent_loop.view.pieces import pieces_of

    runs = [run for run in (options.run, options.other) if run is not None]
    index = Index(runs, options.cache or cache_folder())
    try:
        pieces = [pieces_of(run, options.tokenizer) for run in index.roots]
        if options.export is not None:
            return export(options, index, pieces)
        if not index.rows() and not options.follow:
            print(f"error: no episodes in {options.run}", file=sys.stderr)
            return 2
        return screens(options, index, pieces) if options.tui else serve(options, index, pieces)
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


def serve(options: argparse.Namespace, index: Index, pieces: list[Pieces | None]) -> int:
    import uvicorn

    from agent_loop.view.server import app_of

    family = socket.AF_INET6 if options.host == "::1" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen(128)  # who reads the line below may connect at once
        port = listener.getsockname()[1]
        name = f"[{options.host}]" if options.host == "::1" else options.host
        print(f"{len(index.rows())} episodes on http://{name}:{port}/", flush=True)
        app = app_of(index, index.roots, pieces, port=port, follow_s=0.5 if options.follow else None)
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
