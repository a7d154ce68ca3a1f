"""The process that a run's own Ray lives under; `tools/keeper.py` starts it and ends it with the run.

    python -m distill.ray_head FOLDER NUM_CPUS        # writes the address to FOLDER/address

What `distill.ray_cluster` sets in the environment keeps its servers on loopback, under a token. No dashboard.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

OBJECT_STORE_BYTES = 200 << 20
"""Episodes on their way; more goes to disk."""


def main() -> None:
    folder, num_cpus = Path(sys.argv[1]), int(sys.argv[2])
    import ray

    context = ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=num_cpus,
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(folder / "ray"),
    )
    # At once: the keeper tells all of Ray's processes, and an orderly end would wait for those that are gone.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    (folder / "address.new").write_text(context.address_info["gcs_address"])
    (folder / "address.new").rename(folder / "address")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
