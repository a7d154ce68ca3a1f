"""Environments: list them, check one, write a new one.

    python -m envs list
    python -m envs check medbrowse
    python -m envs check ./my_env --episodes 1000
    python -m envs new my_env

Exit codes: 0 all well; 1 findings (something is broken, and what to do about it); 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXIT_OK, EXIT_FINDINGS, EXIT_USAGE = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; argparse leaves with 2 by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m envs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | check | new")
    listing = commands.add_parser("list", help="all environments by name: built in and of installed plug-ins")
    listing.add_argument("--verify", action="store_true", help="import each one, and say which are broken and why")
    listing.add_argument("--json", action="store_true", help="one JSON array on standard output")
    checking = commands.add_parser("check", help="does an environment keep the contract?")
    checking.add_argument("name", help="a name of the list, or the path of a folder")
    checking.add_argument("--episodes", type=_count, default=100, metavar="N", help="fuzzed episodes (default 100)")
    checking.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    checking.add_argument(
        "--tasks", type=Path, metavar="FILE", help="task file in place of the environment's own tasks"
    )
    checking.add_argument("--json", action="store_true", help="the report as one JSON object on standard output")
    writing = commands.add_parser("new", help="write a folder with a small environment that works")
    writing.add_argument("name", help="name of the folder and the environment")
    writing.add_argument("--dir", type=Path, default=Path(), help="where to write it (default: here)")
    arguments = parser.parse_args(argv)
    # A message may quote what a model wrote, lone surrogates among it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if arguments.command == "list":
        return _list(verify=arguments.verify, as_json=arguments.json)
    if arguments.command == "check":
        return _check(arguments)
    return _new(arguments.name, arguments.dir)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _list(*, verify: bool, as_json: bool) -> int:
    from envs.registry import RegistryError, list_envs, load

    rows = []
    for entry in list_envs():
        problem = entry.problem
        if verify and not problem:
            try:
                load(entry)
            except RegistryError as error:
                problem = str(error)
        rows.append({"id": entry.id, "source": entry.source, "entry_point": entry.entry_point, "problem": problem})
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        widths = [max(len(row[key]) for row in rows) for key in ("id", "source")]
        for row in rows:
            print(f"{row['id']:{widths[0]}}  {row['source']:{widths[1]}}  {row['entry_point']}")
            if row["problem"]:
                print(f"{'':{widths[0]}}  broken: {row['problem']}")
    return EXIT_FINDINGS if any(row["problem"] for row in rows) else EXIT_OK


def _check(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from envs.check import check_environment
    from envs.registry import RegistryError, exists

    try:
        exists(arguments.name)
    except RegistryError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.tasks is not None and not arguments.tasks.is_file():
        print(f"error: --tasks {arguments.tasks}: no such file", file=sys.stderr)
        return EXIT_USAGE
    report = check_environment(
        arguments.name, num_episodes=arguments.episodes, seed=arguments.seed, tasks=arguments.tasks
    )
    if arguments.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        stops = ", ".join(f"{name} {count}" for name, count in report.stop_reasons.items())
        print(f"{report.env}: {report.num_tasks} tasks; tools: {', '.join(report.tools) or 'none'}")
        print(f"checks: {', '.join(report.checks) or 'none'}")
        print(f"fuzzed episodes: {report.num_episodes} ({stops or 'none'})")
        for finding in report.findings:
            print(finding)
        print("ok" if not report.findings else f"{len(report.findings)} findings")
    return EXIT_FINDINGS if report.findings else EXIT_OK


def _new(name: str, parent: Path) -> int:
    from envs.new import NewError, write_environment

    try:
        folder = write_environment(name, parent)
    except (NewError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    shown = str(folder) if folder.is_absolute() else f"./{folder.as_posix()}"
    print(f"wrote {shown}: {', '.join(sorted(file.name + '/' * file.is_dir() for file in folder.iterdir()))}")
    print("next:")
    print(f"  python -m envs check {shown}")
    print(f"  python -m pytest {shown}")
    print(f"  python -m distill.run --env {shown} --student.model MODEL --teacher.model LARGER_MODEL")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
