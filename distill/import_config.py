"""`python -m distill.import_config FILE`: a configuration of prime-rl, rnow or verl as ours.

    python -m distill.import_config rl.toml --out new.toml
    python -m distill.import_config my_project/config.yml --out new.toml
    python -m distill.import_config run.sh --env ./gsm8k --out new.toml
    python -m distill.import_config -- actor_rollout_ref.model.path=A actor_rollout_ref.ref.model.path=B

Every key of the source is listed: mapped, dropped with the reason, impossible with what to do instead, or not known.
docs/migration.md has the tables. Exit codes: 0 the new file loads; 1 it was written and something is missing in it;
2 the source cannot be read, and nothing was written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.config_files import ConfigError, shown
from distill.migrate import prime_rl, rnow, verl
from distill.migrate.draft import Draft, Verdict
from distill.migrate.source import MAX_BYTES, Entry, overrides, read_command, read_text, read_toml, read_yaml

EXIT_OK, EXIT_INCOMPLETE, EXIT_USAGE = 0, 1, 2
_ORDER: tuple[Verdict, ...] = ("mapped", "dropped", "impossible", "not known", "added")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; argparse leaves with 2 by itself."""
    given = list(sys.argv[1:] if argv is None else argv)
    words = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(
        prog="python -m distill.import_config",
        usage="python -m distill.import_config [FILE] [--out NEW.toml] [--env ENV] [--student MODEL] [-- OVERRIDE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="prime-rl's TOML, rnow's config.yml, verl's YAML or a script with its command line; - is standard input",
    )
    parser.add_argument("--out", type=Path, metavar="NEW.toml", help="where to write; without it, standard output")
    parser.add_argument("--env", help="the environment, where the source names none that is known here")
    parser.add_argument("--student", metavar="MODEL", help="the student's model, where the source names none")
    arguments = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    if arguments.file is None and not words:
        parser.error("name a file, - for standard input, or give verl's overrides after --")
    try:
        return _import(arguments.file, words, arguments)
    except (ConfigError, OSError) as error:
        messages = error.messages if isinstance(error, ConfigError) else [str(error)]
        print("\n".join(f"error: {message}" for message in messages), file=sys.stderr)
        return EXIT_USAGE


def _import(file: str | None, words: Sequence[str], arguments: argparse.Namespace) -> int:
    from distill.config_load import load_config
    from distill.migrate.write import table, toml

    out: Path | None = arguments.out
    if out is not None and out.exists():
        raise ConfigError([f"{out} exists already; nothing was written"])
    system, draft, name = read(file, words)
    for key, value, option in (("env", arguments.env, "--env"), ("student.model", arguments.student, "--student")):
        if value is not None:
            draft.settings.pop(key, None)
            draft.add(key, value, option)
    draft.close()
    text = toml(draft.settings, f"Imported from {name} ({system}) by python -m distill.import_config.")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise ConfigError([f"{name} has a text that is not valid Unicode (a lone surrogate)"]) from None
    report = sys.stderr if out is None else sys.stdout
    print(f"{name}: a configuration of {system}\n\n{table(draft.rows)}", file=report)
    problems: Sequence[str] = ()
    try:
        notes = load_config([], {key: setting.value for key, setting in draft.settings.items()}).config.notes()
        print("".join(f"\nnote: {note}" for note in notes), file=report)
    except ConfigError as error:
        problems = error.messages
        print("\nstill to do:\n" + "\n".join(f"  {problem}" for problem in problems), file=report)
    if out is None:
        print(text, end="")
    else:
        with out.open("xb") as stream:
            stream.write(encoded)
        print(f"\nwrote {out}. Next: python -m distill.run --config {out} --dry-run", file=report)
    return EXIT_INCOMPLETE if problems else EXIT_OK


def read(file: str | None, words: Sequence[str] = ()) -> tuple[str, Draft, str]:
    """Read a source and convert it.

    Args:
        file: path, `-`, or None where there are only words.
        words: overrides of verl, over the file's.

    Returns:
        The system's name, what it became, and the source's name.

    Raises:
        ConfigError: not to be read, or of no system that is known.
    """
    name, system = "arguments", verl.NAME
    entries: list[Entry] = []
    folder: Path | None = None
    if file is not None:
        if file == "-":
            name, data = "standard input", sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            path = Path(file)
            if path.is_dir():
                raise ConfigError([f"{file} is a folder; name the file in it"])
            name, folder = shown(path), path.parent
            with path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        entries, system = _parse(read_text(data, name), name, Path(file).suffix)
    if words:
        if system != verl.NAME:
            raise ConfigError([f"{name} is {system}'s; overrides after -- are verl's"])
        entries += overrides([(word, f"argument {number}") for number, word in enumerate(words, start=1)])
    draft = Draft(entries)
    if system == prime_rl.NAME:
        prime_rl.convert(draft)
    elif system == rnow.NAME:
        rnow.convert(draft, folder)
    else:
        verl.convert(draft)
    draft.rows.sort(key=lambda row: _ORDER.index(row.verdict))
    return system, draft, name


def _parse(text: str, name: str, suffix: str) -> tuple[list[Entry], str]:
    if suffix == ".toml":
        return _recognised(read_toml(text, name), name), prime_rl.NAME
    if suffix in (".yml", ".yaml"):
        entries = read_yaml(text, name)
        return entries, _yaml_system(entries, name)
    if re.search(r"^[^#\n]*(\bverl[./]\w|\bactor_rollout_ref\.\S+=)", text, re.MULTILINE):
        return read_command(text, name), verl.NAME
    if re.search(r"^\s*(\[|[\w.]+\s*=)", text, re.MULTILINE):
        return _recognised(read_toml(text, name), name), prime_rl.NAME
    entries = read_yaml(text, name)
    return entries, _yaml_system(entries, name)


def _recognised(entries: list[Entry], name: str) -> list[Entry]:
    tops = {entry.key.partition(".")[0] for entry in entries}
    if tops & {key.partition(".")[0] for key in prime_rl.RULES}:
        if tops & {"student", "rollout", "loss"}:
            raise ConfigError([f"{name} is a configuration of this project already: python -m distill.run --config"])
        return entries
    apart = "the keys of a file for one part alone have to stand under [trainer] or [orchestrator]"
    raise ConfigError([f"{name} has no key of prime-rl's (trainer, orchestrator, teacher_gpu_ids ...); {apart}"])


def _yaml_system(entries: Sequence[Entry], name: str) -> str:
    tops = {entry.key.partition(".")[0] for entry in entries}
    if tops & {"actor_rollout_ref", "distillation"}:
        return verl.NAME
    if "dataset_type" in tops or {"data", "model"} <= tops:
        return rnow.NAME
    raise ConfigError([f"{name} is neither rnow's (dataset_type, data, model ...) nor verl's (actor_rollout_ref ...)"])


if __name__ == "__main__":
    sys.exit(main())
