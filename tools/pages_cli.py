"""`python -m tools.pages`: looks after stored pages. A store is a folder or a page file (NAME.jsonl).

Exit codes: 0 all well; 2 the command is wrong; 4 a store is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tools.page_folder import PageFolder
from tools.pages import TOOL_SCHEME, Page, PageStoreError, answer_hash, checked_key, index_row, write_pages
from tools.store import PageStore, open_pages

EXIT_OK, EXIT_DATA = 0, 4
NUM_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (PageStoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA


def verify(arguments: argparse.Namespace) -> int:
    """Reads every page and checks every hash."""
    pages = open_pages(arguments.store, write=False)
    count = sum(1 for _ in pages)
    if isinstance(pages, PageFolder):
        unnamed = pages.object_names() - pages.named_objects().keys()
        if unnamed:  # of a process that died, or lost the race for a key
            print(f"note: {len(unnamed)} objects that the index does not name; export leaves them out")
    manifest = PageStore(arguments.store).manifest_hash
    print(f"{arguments.store}: {count} pages, all as they were stored; manifest {manifest}")
    return EXIT_OK


def stats(arguments: argparse.Namespace) -> int:
    """Counts what is there."""
    store = PageStore(arguments.store)
    hosts: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    types: Counter[str] = Counter()
    times: list[str] = []
    num_bytes = 0
    for page in store:
        hosts[_host(page)] += 1
        statuses[page.error.kind if page.error else str(page.status)] += 1
        types[page.content_type if page.error is None else "none"] += 1
        num_bytes += len(page.body.encode()) + len((page.text or "").encode())
        times += [page.fetched_at] if page.fetched_at else []
    summary = {
        "pages": len(store),
        "manifest": store.manifest_hash,
        "bytes": num_bytes,
        "bytes_on_disk": _size(Path(arguments.store)),
        "first_fetched": min(times, default=""),
        "last_fetched": max(times, default=""),
        "statuses": dict(statuses.most_common()),
        "content_types": dict(types.most_common()),
        "hosts": dict(hosts.most_common()),
    }
    if arguments.json:
        print(json.dumps(summary))
        return EXIT_OK
    for name, value in summary.items():
        if isinstance(value, dict):
            shown = [f"{key} {count}" for key, count in list(value.items())[:NUM_SHOWN]]
            more = f", {len(value) - NUM_SHOWN} more" if len(value) > NUM_SHOWN else ""
            print(f"{name:14} {', '.join(shown)}{more}")
        else:
            print(f"{name:14} {value:,}" if isinstance(value, int) else f"{name:14} {value}")
    return EXIT_OK


def export(arguments: argparse.Namespace) -> int:
    """Writes a store anew."""
    pages = iter(open_pages(arguments.store, write=False))
    if arguments.without_failures:
        pages = (page for page in pages if page.error is None)
    count = _write(arguments.out, pages)
    print(f"{arguments.out}: {count} pages; manifest {PageStore(arguments.out).manifest_hash}")
    return EXIT_OK


def merge(arguments: argparse.Namespace) -> int:
    """Writes several stores as one. The first page of a key stays; every other one that answers otherwise is told."""
    chosen: dict[str, tuple[str, bytes]] = {}
    conflicts: list[str] = []

    def pages() -> Iterator[Page]:
        for source in arguments.stores:
            for page in open_pages(source, write=False):
                key, answer = checked_key(page.url), answer_hash(index_row(page))
                if key not in chosen:
                    chosen[key] = source, answer
                    yield page
                    continue
                first = chosen[key]
                if first[1] != answer:
                    conflicts.append(
                        f"conflict: {key}: {source} answers otherwise than {first[0]}, whose page was kept"
                    )

    count = _write(arguments.out, pages())
    for conflict in conflicts:
        print(conflict, file=sys.stderr)
    manifest = PageStore(arguments.out).manifest_hash
    print(f"{arguments.out}: {count} pages, {len(conflicts)} conflicts; manifest {manifest}")
    return EXIT_OK


def _write(out: str, pages: Iterable[Page]) -> int:
    """A page file or a folder, by the name."""
    if Path(out).exists():
        raise PageStoreError(f"{out} is there already: name a new file or folder")
    if out.endswith(".jsonl"):
        return write_pages(out, pages)
    folder = PageFolder(Path(out), write=True)
    for page in pages:
        folder.add(page)
    return len(folder)


def _host(page: Page) -> str:
    return page.url.partition("?")[0] if page.url.startswith(TOOL_SCHEME) else urlsplit(page.url).netloc


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (verify, stats, export):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("store", metavar="STORE", help="a folder, or a page file NAME.jsonl")
        command.set_defaults(run=function)
        if function is stats:
            command.add_argument("--json", action="store_true", help="one JSON object")
        if function is export:
            command.add_argument(
                "--without-failures", action="store_true", help="a recording into the new store asks for these again"
            )
            command.add_argument("--out", required=True, help="a new NAME.jsonl with the bodies in it, or a new folder")
    command = commands.add_parser("merge", help=merge.__doc__)
    command.add_argument("stores", nargs="+", metavar="STORE", help="folders and page files; earlier ones go first")
    command.add_argument("--out", required=True, help="a new NAME.jsonl, or a new folder")
    command.set_defaults(run=merge)
    return parser
