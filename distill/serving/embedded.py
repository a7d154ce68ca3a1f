"""The embedded engine: a `transformers` model behind the part of vLLM's HTTP interface that the gym uses.

    engine = EmbeddedEngine.from_pretrained("path/to/model")
    reply = await post(engine.app, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 8, ...})  # in process
    python -m distill.serving.embedded --model path/to/model --port 8001                            # served

It is the engine where no vLLM is there: a laptop, a test, a first run. `app` is an ASGI application; called in
process it needs no port. Log-probabilities are `processed_logprobs`: those of the distribution that a token was drawn
from. `docs/serving.md` lists what it has and has not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.serving.app import App, make_app
from distill.serving.wire import CompletionRequest, CompletionResult, Limits, WireError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.serving.worker import Job


class EmbeddedEngine:
    """One model, one thread that runs it, one ASGI application.

    Args:
        model: any `transformers` causal language model whose layers keep keys and values. The engine takes it over:
            it is set to `eval`, loses its gradients and is overwritten by `load_weights`.
        tokenizer: for prompts given as text, and text in replies; ids in and out need none.
        name: what `model` of a request must say.
        max_model_len: longest prompt and completion together, in tokens; default: the model's own limit, or as many
            as the cache holds.
        max_batch: sequences that run at once; more wait.
        max_logprobs: largest `logprobs` and `prompt_logprobs`.
        kv_cache_gib: upper bound of the cache; it grows to it as needed.
        api_key: asked for on `/v1/` as a bearer token if given.

    Raises:
        ValueError: the model cannot be served (`distill.serving.slots.CausalLM`), or one sequence of `max_model_len`
            does not fit the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        name: str,
        max_model_len: int | None = None,
        max_batch: int = 256,
        max_logprobs: int = 20,
        kv_cache_gib: float = 4.0,
        api_key: str | None = None,
    ) -> None:
        from distill.serving.slots import CausalLM
        from distill.serving.worker import Worker

        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        lm = CausalLM(model)
        self.name = name
        self.tokenizer = tokenizer
        fits = int(kv_cache_gib * 2**30 / lm.cache.bytes_per_token)
        if max_model_len is not None and max_model_len > fits:
            raise ValueError(
                f"a sequence of max_model_len={max_model_len} tokens needs "
                f"{max_model_len * lm.cache.bytes_per_token / 2**30:.1f} GiB of cache, kv_cache_gib is {kv_cache_gib:g}"
            )
        own_limit = getattr(lm.config, "max_position_embeddings", None) or fits
        eos = _eos_token_ids(model, tokenizer)
        self.limits = Limits(
            vocab_size=lm.vocab_size,
            max_model_len=max_model_len or min(own_limit, fits),
            max_logprobs=min(max_logprobs, lm.vocab_size),
            eos_token_ids=eos,
        )
        self.app: App = make_app(self, api_key=api_key)
        """The ASGI application."""
        self.decode = None if tokenizer is None else _decoder(tokenizer)
        """Ids to text."""
        self._model = model
        self._worker = Worker(lm, max_batch=max_batch, max_kv_tokens=fits, eos_token_id=eos[0] if eos else None)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, name: str | None = None, dtype: str = "float32", device: str = "cpu", **options: Any
    ) -> EmbeddedEngine:
        """Load a model folder in the Hugging Face format, with its tokenizer if there is one.

        Args:
            dtype: `float32`, `bfloat16`, `float16`, or `auto` for what the weights are stored in.
            options: of the constructor.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        folder = Path(path)
        has_tokenizer = not folder.is_dir() or any(folder.glob("tokenizer*"))
        tokenizer = AutoTokenizer.from_pretrained(path) if has_tokenizer else None
        return cls(model, tokenizer, name=name or str(path), **options)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._worker.alive

    @property
    def weight_version(self) -> int:
        """Of the weights that answer from now on; 0 is what the engine was made with."""
        return self._worker.weight_version

    def start(self) -> None:
        """Start the thread; the first request does it otherwise."""
        self._worker.start()

    async def aclose(self) -> None:
        """Stop the thread; requests in flight fail with 503."""
        await asyncio.to_thread(self._worker.stop)

    async def load_weights(self, weights: Mapping[str, torch.Tensor] | str | Path, version: int) -> None:
        """Replace all weights between two batches: what runs is finished with the old ones, what waits gets the new
        ones, and the cache is dropped.

        Args:
            weights: by parameter name, or a folder of `*.safetensors`. All of the model's parameters; a tied
                `lm_head` may be left out.
            version: what `weight_version` says from then on.

        Raises:
            ValueError: a name, a shape or a value is wrong; nothing was changed.
        """
        from distill.serving.weights import copy_weights

        def load() -> None:
            copy_weights(self._model, weights)
            self._worker.forget()
            self._worker.weight_version = version

        await self._alone(load)

    async def forget(self) -> None:
        """Drop the cache between two batches. How much of a prompt is found there decides the shape of the forward
        pass that computes the rest, and with it the last bits: after this, what was asked before plays no part."""
        await self._alone(self._worker.forget)

    async def _alone(self, action: Callable[[], None]) -> None:
        """Run `action` in the worker's thread while nothing else runs there."""
        loop = asyncio.get_running_loop()
        done_there: asyncio.Future[None] = loop.create_future()

        def resolve(error: BaseException | None) -> None:
            if not done_there.done():
                done_there.set_exception(error) if error is not None else done_there.set_result(None)

        def done(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(resolve, error)

        self.start()
        self._worker.run_exclusive(action, done)
        await done_there

    async def complete(self, requests: Sequence[CompletionRequest]) -> list[CompletionResult]:
        """Run requests to their end. Cancelling this frees their slots.

        Raises:
            WireError: 500 or 503.
        """
        from distill.serving.worker import Job

        self.start()
        batch = _Batch(asyncio.get_running_loop(), len(requests))
        jobs = [Job(request, _deliver_to(batch.loop), batch) for request in requests]
        self._worker.submit(jobs)
        try:
            await batch.future
        finally:
            for job in jobs:
                job.cancelled = True  # of no effect on one that is through
        return [job.result for job in jobs]


class _Batch:
    """The jobs of one HTTP request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size: int) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()
        self.left = size

    def finish(self, error: WireError | None) -> None:
        self.left -= 1
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        elif not self.left:
            self.future.set_result(None)


@lru_cache(maxsize=8)
def _deliver_to(loop: asyncio.AbstractEventLoop) -> Callable[[Sequence[Job]], None]:
    """One wake-up of the loop for all jobs of a round."""

    def resolve(jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.owner.finish(job.error)

    def deliver(jobs: Sequence[Job]) -> None:
        try:
            loop.call_soon_threadsafe(resolve, jobs)
        except RuntimeError:  # the loop is closed: nobody is waiting
            return

    return deliver


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    @lru_cache(maxsize=1 << 18)
    def one(token_id: int) -> str:
        return str(tokenizer.decode([token_id]))

    def decode(ids: Sequence[int]) -> str:
        return one(ids[0]) if len(ids) == 1 else str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return decode


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The tokenizer's eos first, then those of `generation_config`, as vLLM collects them."""
    found: list[int] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    if configured is None:
        configured = model.config.get_text_config().eos_token_id
    if configured is not None:
        found.extend([configured] if isinstance(configured, int) else configured)
    return tuple(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distill.serving.embedded",
        description="Serve a transformers model over the part of vLLM's HTTP interface that the gym uses.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder in the Hugging Face format")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address; it is not meant for a network")
    parser.add_argument("--served-model-name", default=None, metavar="NAME", help="default: what --model says")
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--max-model-len", type=int, default=None, metavar="N")
    parser.add_argument("--max-batch", type=int, default=256, metavar="N", help="sequences that run at once")
    parser.add_argument("--max-logprobs", type=int, default=20, metavar="N")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0, metavar="GIB")
    parser.add_argument("--api-key-env", default=None, metavar="VAR", help="environment variable that holds the key")
    args = parser.parse_args(argv)
    if args.host not in ("127.0.0.1", "::1", "localhost"):
        parser.error(f"--host {args.host}: the embedded engine serves loopback only; use vLLM elsewhere")
    api_key = None
    if args.api_key_env is not None and not (api_key := os.environ.get(args.api_key_env)):
        parser.error(f"--api-key-env {args.api_key_env}: that environment variable is not set, or empty")

    import uvicorn

    engine = EmbeddedEngine.from_pretrained(
        args.model,
        name=args.served_model_name,
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.max_model_len,
        max_batch=args.max_batch,
        max_logprobs=args.max_logprobs,
        kv_cache_gib=args.kv_cache_gib,
        api_key=api_key,
    )
    uvicorn.run(engine.app, host=args.host, port=args.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
