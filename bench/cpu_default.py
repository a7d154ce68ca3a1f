"""The CPU default, cold and warm, on three seeds: what its README promises.

    python -m bench.cpu_default [--seeds 0 1 2] [--config configs/medbrowse_cpu.toml]

Cold: an empty model cache, so that teacher and student are trained first. Warm: the same again with the cache. A run
is a process of its own, timed from its start to its end.
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
from statistics import fmean
from typing import Any

WINDOW = 5


def measure(config: str, seed: int, cache: Path, output: Path, name: str) -> dict[str, Any]:
    """One run; its wall time and what it reached."""
    run_id = f"seed{seed}-{name}"
    flags = ["--output_dir", str(output), "--run_id", run_id, "--seed", str(seed)]
    text = Path(config).read_text()
    for role in ("student", "teacher"):
        model = next(line.split('"')[1] for line in text.split(f"[{role}]")[1].splitlines() if line.startswith("model"))
        flags += [f"--{role}.model", f"{model}@{seed}"]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "distill.run", "--config", config, *flags],
        check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=sys.stderr,
    )
    seconds = time.monotonic() - began
    run = output / run_id
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    success = {(e["name"], e["step"]): e["metrics"]["reward/success"] for e in evals}
    kls = [line["teacher_kl"] for line in lines]
    last = max(step for name, step in success if name == "student")
    return {
        "seed": seed,
        "start": name,
        "seconds": round(seconds, 1),
        "episodes_an_evaluation": evals[0]["episodes"],
        "teacher": round(success["teacher", 0], 4),
        "before": round(success["student", 0], 4),
        "after": round(success["student", last], 4),
        "kl_first": round(fmean(kls[:WINDOW]), 4),
        "kl_last": round(fmean(kls[-WINDOW:]), 4),
        "kl_fall": round(fmean(kls[:WINDOW]) / max(fmean(kls[-WINDOW:]), 1e-9), 1),
        "step_s": round(fmean(line["time/step"] for line in lines[2:]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_default", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/medbrowse_cpu.toml")
    parser.add_argument("--keep", type=Path, help="keep the run directories here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for name in ("cold", "warm"):
                output = arguments.keep or Path(folder)
                rows.append(measure(arguments.config, seed, Path(folder) / f"cache{seed}", output, name))
    columns = list(rows[0])
    print(" ".join(f"{c:>10}" for c in columns))
    for row in rows:
        print(" ".join(f"{row[c]!s:>10}" for c in columns))
    print(json.dumps({"bench": "cpu_default", "config": arguments.config, "rows": rows}))


if __name__ == "__main__":
    main()
