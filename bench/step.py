"""Where the seconds of a training step go on the CPU default.

python -m bench.step [--steps 12] [--config configs/medbrowse_cpu.toml]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

STAGES = ("rollout", "score", "train", "publish", "step")
WARM_UP = 2
"""Steps left out: first calls allocate and compile."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--config", default="configs/medbrowse_cpu.toml")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output_dir", folder, "--run_id", "bench", "--steps", str(arguments.steps)]
        flags += ["--eval.at_start", "false", "--eval.at_end", "false", "--eval.every", "0"]
        subprocess.run([sys.executable, "-m", "distill.run", "--config", arguments.config, *flags], check=True)
        lines = [json.loads(text) for text in (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()]
    kept = lines[WARM_UP:]
    result: dict[str, float] = {stage: median(line[f"time/{stage}"] for line in kept) for stage in STAGES}
    result["sampled_tokens_per_s"] = median(line["tokens_per_s/rollout"] for line in kept)
    result["trained_tokens_per_s"] = median(line["train/tokens"] / line["time/train"] for line in kept)
    for name, value in result.items():
        print(f"{name:22} {value:12,.3f}")
    print(json.dumps({"bench": "step", "steps": len(kept), **{k: round(v, 4) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
