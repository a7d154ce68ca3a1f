"""Loaded into vLLM's worker processes by `--worker-extension-cls`; imports nothing of this project.

On a CPU, vLLM 0.32 packs a copy of each layer's weight for oneDNN (model_executor/layers/utils.py). A tied output
head gets no tensor of its own from a checkpoint, so a reload leaves its packed copy as it was: the new body with the
old head (model_executor/model_loader/reload/layerwise.py, "Failed to load weights").
"""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker, which gives `model_runner`."""

    model_runner: Any

    def distill_repack_head(self) -> bool:
        """Pack the output head again; called by `/collective_rpc` after each reload. Returns whether it was done.

        Only on a CPU: elsewhere nothing is packed, or a second time would spoil it (quantised heads).
        """
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return False
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        method = getattr(head, "quant_method", None)
        if method is None or not hasattr(method, "process_weights_after_loading"):
            return False
        method.process_weights_after_loading(head)
        return True
