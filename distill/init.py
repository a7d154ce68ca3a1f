"""`python -m distill.init FOLDER --template medbrowse|reasoning|tools`: a project folder that trains at once.

    medbrowse   tasks in the research environment that comes with this package
    reasoning   single turns without tools: any prompts with answers
    tools       multi-turn episodes with your own tools in tools.py

It holds config.toml, tasks, a README with the commands and, where the template has tools of its own, tools.py. Its
models are tiny ones that this package makes on first use; their names stand in config.toml, to be replaced.
Exit codes: 0 written; 2 nothing was written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.config_files import shown

EXIT_OK, EXIT_USAGE = 0, 2
NUM_EVAL = 10
NUM_MEDBROWSE = 8

_MODELS = """\
[student]
model = "builtin:medbrowse-student"    # tiny, to see that everything runs. Then yours: "Qwen/Qwen3-0.6B"
dtype = "float32"                      # then leave it out

[teacher]
model = "builtin:medbrowse-teacher"    # then a larger model of the same family: "Qwen/Qwen3-4B"
dtype = "float32"
"""

_FOLDER_CONFIG = """\
# python -m distill.run --config {config}     every key: docs/configuration.md
env = {env}    # this folder: {files}
steps = 50

{models}top_k = 8

[loss]
type = "topk"           # exact over the teacher's 8 likeliest tokens

[rollout]
batch_size = 8          # tasks a step
group_size = 2          # episodes of each
max_turns = {max_turns}
max_turn_tokens = 64    # real models want 512 and more

[optim]
lr = 3e-4               # real models: 1e-5, or 1e-4 with [student.lora]

[eval]
num_tasks = 10
at_start = true
at_end = true
"""

_MEDBROWSE_CONFIG = """\
# python -m distill.run --config {config}     every key: docs/configuration.md
env = "medbrowse"
steps = 36

[tasks]
# train = {tasks}    # your own questions; without it, the environment invents its own
num_train = 3000
num_eval = 500

{models}top_k = 8

[loss]
type = "topk"           # exact over the teacher's 8 likeliest tokens

[rollout]
batch_size = 64
group_size = 1
max_turns = 10
max_turn_tokens = 64

[optim]
lr = 2e-3
warmup_steps = 3
schedule = "linear"

[eval]
num_tasks = 100
at_start = true
at_end = true
"""

_README = """\
# {name}

{what}

    python -m distill.run --config {config} --dry-run    # check, and print the plan
    python -m distill.check --config {config}            # would this train wrong?
    python -m distill.run --config {config}              # train; --steps 2 for a first look
    python -m agent_loop.view runs/RUN                   # read the episodes

Run them where this folder was made: paths in config.toml are relative to there. {next}
"""

_TEXTS = {
    "medbrowse": (
        "Research in an invented medical registry: search, browse, answer.",
        "On the real web: python -m distill.run --config medbrowse (docs/medbrowse.md). Tasks: docs/formats.md.",
    ),
    "reasoning": (
        "Single-turn questions with answers. The model thinks, then answers; the teacher scores every token.",
        "Put your questions into train.jsonl (python convert_dataset.py --help), your models into config.toml.",
    ),
    "tools": (
        "Multi-turn episodes with the tools in tools.py.",
        "Change tools.py (docs/write_an_env.md), then python -m envs check on this folder; models: config.toml.",
    ),
}
"""By template: what it is, and what to do next."""
TEMPLATES = tuple(_TEXTS)


class InitError(Exception):
    """The folder cannot be written; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; argparse leaves with 2 by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.init",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to be made; may be there if it is empty")
    parser.add_argument("--template", choices=TEMPLATES, required=True, help="what kind of project")
    arguments = parser.parse_args(argv)
    try:
        files = write_project(arguments.folder, arguments.template)
    except (InitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(f"wrote {arguments.folder}: {', '.join(files)}")
    print(f"next: python -m distill.run --config {_path(arguments.folder)}/config.toml --dry-run")
    return EXIT_OK


def write_project(folder: Path, template: str) -> list[str]:
    """Write the folder. All of it appears at once, or nothing.

    Args:
        template: one of `TEMPLATES`.

    Returns:
        The names of its files.

    Raises:
        InitError: a bad name, or something is there already.
    """
    from distill.migrate.write import toml_value
    from envs.new import NAME, NewError, write_environment

    folder = Path(os.path.abspath(folder))
    if not NAME.fullmatch(folder.name):
        raise InitError(f"bad name {folder.name!r}: a letter, then letters, digits, '_' and '-', at most 64 in all")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InitError(f"{folder} is there and not empty; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = building / folder.name
        if template == "tools":
            try:
                write_environment(folder.name, building)
            except NewError as error:
                raise InitError(str(error)) from error
        else:
            made.mkdir()
            _write_tasks(made, template)
        path = _path(folder)
        names = {"config": f"{path}/config.toml", "models": _MODELS, "env": toml_value(path)}
        names["tasks"] = toml_value(f"{path}/tasks.jsonl")
        files = "tools.py, train.jsonl, eval.jsonl" if template == "tools" else "train.jsonl, eval.jsonl"
        form = _MEDBROWSE_CONFIG if template == "medbrowse" else _FOLDER_CONFIG
        config = form.format(**names, files=files, max_turns=6 if template == "tools" else 1)
        what, following = _TEXTS[template]
        (made / "config.toml").write_text(config, encoding="utf-8")
        readme = _README.format(name=folder.name, what=what, next=following, config=names["config"])
        (made / "README.md").write_text(readme, encoding="utf-8")
        os.rename(made, folder)  # over an empty folder, too
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())


def _path(folder: Path) -> str:
    """A path that is taken for one of a folder: with ./ or from the root."""
    relative = shown(folder)
    return relative if Path(relative).is_absolute() else f"./{relative}"


def _write_tasks(folder: Path, template: str) -> None:
    from envs.dataset import write_tasks

    if template == "medbrowse":
        import envs

        write_tasks(folder / "tasks.jsonl", envs.make("medbrowse").default_tasks(num_tasks=NUM_MEDBROWSE))
        return
    rows = list(_reasoning_rows())
    for name, part in (("train.jsonl", rows[:-NUM_EVAL]), ("eval.jsonl", rows[-NUM_EVAL:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _reasoning_rows() -> Iterator[dict[str, Any]]:
    """Task rows (docs/formats.md): questions of two steps, each with another answer than its neighbours."""
    for number in range(5):
        for name, thing, price in (
            ("Ada", "pens", 3),
            ("Ben", "apples", 2),
            ("Cleo", "cards", 4),
            ("Dan", "books", 7),
            ("Eve", "tickets", 9),
            ("Finn", "stamps", 1),
            ("Gina", "lamps", 8),
            ("Hugo", "plants", 5),
            ("Ida", "shirts", 6),
            ("Jon", "bags", 11),
        ):
            count, paid = number + 2, 100
            yield {
                "messages": [
                    {"role": "system", "content": "Think step by step. End with the answer, a number."},
                    {
                        "role": "user",
                        "content": f"{name} buys {count} {thing} at {price} each and pays with {paid}. "
                        "How much is given back?",
                    },
                ],
                "metadata": {"answer": str(paid - count * price)},
                "id": f"{thing}-{count}",
            }


if __name__ == "__main__":
    sys.exit(main())
