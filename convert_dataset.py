"""Make a task file (docs/formats.md) of a data set.

    python convert_dataset.py data.csv --prompt question --answer gold --out tasks.jsonl
    python convert_dataset.py openai/gsm8k --subset main --prompt question --answer answer --out tasks.jsonl
    python convert_dataset.py pubmedqa FOLDER --split train --out tasks.jsonl --pages pages.jsonl
    python convert_dataset.py medbrowsecomp AIM-Harvard/MedBrowseComp --split 605 --out eval.jsonl

Exit codes: 0 all well, 2 the command is wrong, 4 the data is wrong. Nothing is written but after success.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

EXIT_OK, EXIT_USAGE, EXIT_DATA = 0, 2, 4
SHOWN_BAD_ROWS = 10


@dataclass
class Summary:
    """What a conversion did."""

    out: str
    tasks: int = 0
    pages: int = 0
    bad_rows: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first `SHOWN_BAD_ROWS` bad rows."""
    held_out: str | None = None
    """File of the entities that training on a part of a benchmark leaves out."""
    duration_s: float = 0.0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from envs.converters import names

    parser = argparse.ArgumentParser(
        prog="convert_dataset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="[CONVERTER] SOURCE",
        help="a CSV, TSV, JSON, JSONL or Parquet file, a folder with one, or a Hub data set's name; before it, where "
        f"the data set has one, the name of its converter: {', '.join(names())} (without a name: table)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the task file to write")
    parser.add_argument("--pages", metavar="FILE", help="also write the converter's web pages, for a page store")
    parser.add_argument("--prompt", metavar="COLUMN", help="column of the prompt, or a template: 'Q: {question}'")
    parser.add_argument("--answer", metavar="COLUMN", help='column of the expected answer; "NA" stays "NA"')
    parser.add_argument(
        "--metadata", metavar="A,B", action="append", help="columns to keep for the environment; may be repeated"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before every prompt")
    parser.add_argument("--split", metavar="NAME", help="split of the data set (Hub: train unless given)")
    parser.add_argument("--subset", metavar="NAME", help="configuration of a Hub data set")
    parser.add_argument(
        "--purpose",
        choices=("eval", "train", "held-out"),
        help="of a benchmark (medbrowsecomp): eval, its default; train on a part of it, measure on what is held out",
    )
    parser.add_argument(
        "--i-understand-this-is-a-test-set", action="store_const", const=True, help="needed by --purpose train"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="write that many tasks")
    parser.add_argument("--shuffle", action="store_true", help="shuffle; a limit then takes a random sample")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of --shuffle (0)")
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first bad row (default), or count them",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments = parser.parse_args(argv)
    if len(arguments.source) > 2:
        parser.error(f"wanted a source, or a converter and a source; found {' '.join(arguments.source)}")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from envs.converters import OptionError
    from envs.jsonl import TaskError

    try:
        summary = run(arguments)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (TaskError, OSError) as error:
        print(f"error: {error}\nnothing was written", file=sys.stderr)
        return EXIT_DATA
    if arguments.json:
        print(json.dumps(vars(summary)))
    else:
        report(summary)
    return EXIT_OK


def run(arguments: argparse.Namespace) -> Summary:
    """Convert, then put the files in their places.

    Raises:
        OptionError: an option that does not fit.
        TaskError: bad data.
        OSError: the disk's.
    """
    from envs.converters import OptionError, find, names
    from envs.dataset import raise_error
    from envs.jsonl import TaskError, atomic_file

    began = time.monotonic()
    name, source = arguments.source if len(arguments.source) == 2 else ("table", arguments.source[0])
    if len(arguments.source) == 1 and source in names() and not Path(source).exists():
        raise OptionError(
            f"{source!r} is a converter and needs a source: convert_dataset.py {source} SOURCE --out FILE"
        )
    converter = find(name)
    summary = Summary(out=arguments.out)

    def on_bad_row(error: TaskError) -> None:
        if arguments.on_bad_row == "fail":
            raise error
        summary.bad_rows += 1
        if len(summary.bad) < SHOWN_BAD_ROWS:
            summary.bad.append({"where": error.where, "message": error.message})

    if arguments.purpose in ("train", "held-out") and hasattr(converter, "held_out"):
        summary.held_out = f"{arguments.out}.held_out.json"
    for path in filter(None, (arguments.out, arguments.pages, summary.held_out)):
        check_target(path, source)
    tasks = converter.convert(source, on_bad_row=on_bad_row, **options(arguments, converter, name))
    if summary.held_out is not None:
        entities = converter.held_out(
            source, split=arguments.split, on_bad_row=lambda _: None
        )  # counted with the tasks
    with atomic_file(arguments.out) as out:
        lines = unique_lines(tasks, on_bad_row)
        if arguments.shuffle:
            summary.tasks = write_shuffled(out, lines, arguments.seed, arguments.limit)
        else:
            for line in islice(lines, arguments.limit):
                out.write(line)
                summary.tasks += 1
        if not summary.tasks:
            first = f"; the first: {summary.bad[0]['where']}: {summary.bad[0]['message']}" if summary.bad else ""
            raise TaskError(source, f"gave no task ({summary.bad_rows} bad rows{first})")
        if arguments.pages:
            # Whole as well, and before the tasks: a task file that is there has its pages.
            from tools.pages import write_pages

            skipped = raise_error if arguments.on_bad_row == "fail" else lambda _: None  # counted with the tasks
            summary.pages = write_pages(arguments.pages, converter.pages(source, on_bad_row=skipped))
        if summary.held_out is not None:
            with atomic_file(summary.held_out) as file:
                file.write((json.dumps(entities, indent=2) + "\n").encode())
    summary.duration_s = round(time.monotonic() - began, 3)
    return summary


def options(arguments: argparse.Namespace, converter: ModuleType, name: str) -> dict[str, Any]:
    """The flags that were given, as keyword arguments of the converter.

    Raises:
        OptionError: the converter has no such option.
    """
    from envs.converters import OptionError

    given: dict[str, Any] = {}
    taken = set(inspect.signature(converter.convert).parameters)
    for flag in (
        *("prompt", "answer", "metadata", "system", "split", "subset"),
        *("purpose", "i_understand_this_is_a_test_set"),
    ):
        value = getattr(arguments, flag)
        if value is None:
            continue
        if flag not in taken:
            raise OptionError(f"the converter {name} takes no --{flag.replace('_', '-')}")
        given[flag] = value
    if "metadata" in given:
        columns = [column.strip() for group in given["metadata"] for column in group.split(",")]
        given["metadata"] = [column for column in columns if column]
    if arguments.pages and not hasattr(converter, "pages"):
        raise OptionError(f"the converter {name} makes no pages")
    return given


def check_target(path: str, source: str) -> None:
    """
    Raises:
        OptionError: the file cannot be made, or is the source.
    """
    from envs.converters import OptionError

    target = Path(path)
    if not target.parent.is_dir():
        raise OptionError(f"{path}: there is no folder {target.parent}")
    if target.is_dir():
        raise OptionError(f"{path} is a folder; name a file")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise OptionError(f"{path} is the source itself; write to another file")


def unique_lines(tasks: Iterator[Any], on_bad_row: Callable[[Any], None]) -> Iterator[bytes]:
    """A line of the task file for each task; a second use of an id is a bad row."""
    from envs.dataset import UniqueIds, task_line
    from envs.jsonl import TaskError

    ids = UniqueIds()
    for number, task in enumerate(tasks, start=1):
        try:
            task = ids.claim(task, f"task {number}")
        except TaskError as error:
            on_bad_row(error)
            continue
        yield task_line(task)


def write_shuffled(out: BinaryIO, lines: Iterator[bytes], seed: int, limit: int | None) -> int:
    """A full shuffle in little memory: the lines go to a scratch file, 8 bytes a line are kept."""
    with tempfile.TemporaryFile(dir=Path(out.name).parent) as scratch:
        starts = array("Q")
        for line in lines:
            starts.append(scratch.tell())
            scratch.write(line)
        random.Random(seed).shuffle(starts)
        chosen = starts[:limit]
        for start in chosen:
            scratch.seek(start)
            out.write(scratch.readline())
    return len(chosen)


def report(summary: Summary) -> None:
    pages = f" and {summary.pages} pages" if summary.pages else ""
    print(f"{summary.out}: {summary.tasks} tasks{pages}, {summary.bad_rows} bad rows, {summary.duration_s:.1f} s")
    if summary.held_out is not None:
        print(f"  held out: {summary.held_out}")
    for row in summary.bad:
        print(f"  skipped {row['where']}: {row['message']}")
    if summary.bad_rows > len(summary.bad):
        print(f"  and {summary.bad_rows - len(summary.bad)} more")


if __name__ == "__main__":
    sys.exit(main())
