"""What trackers and alarms cost a step (F20): the CPU default with each tracker, and with one that hangs.

The ways take turns, `--rounds` times, because the machine may be shared; the first two steps of a run are left out. The
work that alarms and trackers do in the trainer's process is timed by itself too.

python -m bench.trackers [--steps 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

WAYS = ("none", "tensorboard", "trackio", "wandb", "hangs")
WARM_UP = 2


def run(folder: Path, way: str, name: str, steps: int) -> list[float]:
    """Seconds of each step of one run."""
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    flags = []
    if way != "none":
        flags = ["--tracking.to", "wandb" if way == "hangs" else way, "--tracking.offline", "true"]
    if way == "hangs":
        broken = folder / "broken"
        broken.mkdir(exist_ok=True)
        (broken / "wandb.py").write_text("import time\ntime.sleep(1e6)\n")
        environment["PYTHONPATH"] = f"{broken}{os.pathsep}{os.getcwd()}"
        flags += ["--tracking.finish_timeout_s", "1.0"]
    command = [sys.executable, "-m", "distill.run", "--config", "medbrowse_cpu", "--steps", str(steps), *flags]
    options = ["--output_dir", str(folder), "--run_id", name, "--eval.at_start", "false", "--eval.at_end", "false"]
    done = subprocess.run([*command, *options, "--eval.every", "0"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["time/step"] for line in lines[WARM_UP:]]


def alone(lines: list[dict[str, float]]) -> float:
    """Milliseconds a step in the trainer's process: all alarms over a full history."""
    from distill.alarms import alarms_of, lookback
    from distill.config import AlarmsConfig

    limits = AlarmsConfig()
    full = (lines * lookback(limits))[: lookback(limits)]
    began = time.perf_counter()
    for _ in range(20):
        alarms_of(full, limits)
    return (time.perf_counter() - began) * 1000 / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            for way in WAYS:
                seconds[way] += run(folder, way, f"{way}-{number}", arguments.steps)
        base = median(seconds["none"])
        print("| tracker | median s a step | to none |\n|---|---|---|")
        for way, values in seconds.items():
            print(f"| {way} | {median(values):.3f} | {median(values) / base - 1:+.1%} |")
        lines = [json.loads(line) for line in (folder / "none-0" / "metrics.jsonl").read_text().splitlines()]
        print(f"alarms in the trainer's process: {alone(lines):.2f} ms a step")


if __name__ == "__main__":
    main()
