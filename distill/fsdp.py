"""Several ranks: the student split by FSDP2, calls from the leader to its followers, and news of who failed.

Three groups: the default one (NCCL for CUDA tensors, gloo for CPU tensors) for the work itself; one for calls, in which
waiting may take as long as a rollout takes; one for news, in which every follower's connection to the leader is watched
from a thread: a process that dies closes it at once.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import datetime
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from agent_loop.episodes import episode_to_json
from agent_loop.types import Episode
from distill.batch import TrainItem, split_micro_batches
from distill.console import fail
from distill.failures import EXIT_RANK
from distill.ranks import RankError, Ranks, Share

if TYPE_CHECKING:
    from distill.rows import RowModel

T = TypeVar("T")

COLLECTIVE = datetime.timedelta(hours=1)
"""For one collective of the work: no rank is that much slower than another."""
WAIT = datetime.timedelta(days=365)
"""For the next call: rollouts and evaluations take as long as they take."""
NEWS_S = 5.0
"""Between a connection that broke and the news of who died."""
GRACE_S = 20.0
"""For the leader to end by itself after it lost a rank: a thread may hang in a collective that never ends, and torchrun
kills after 30 s."""


class SeveralRanks(Ranks):
    """One process of several."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = "cuda" if cuda else "cpu"
        self._mesh = init_device_mesh(self._device, (self.size,))
        self._calls = dist.new_group(backend="gloo", timeout=WAIT)
        self._news = dist.new_group(backend="gloo", timeout=WAIT)
        self._lock = threading.RLock()
        self._depth = 0
        self._broken = False
        self._closing = False
        self._code = 0
        self._lost: RankError | None = None
        self._was_lost = threading.Event()
        self._on_loss: Callable[[], object] = lambda: None
        partners = range(1, self.size) if self.leads else (0,)
        self._watchers = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in partners]
        if self.leads:
            signal.signal(signal.SIGTERM, self._terminate)
        else:  # the leader decides what a signal means
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for watcher in self._watchers:
            watcher.start()
        atexit.register(self.close)

    # --- the work

    def shard(self, rows: RowModel) -> dict[str, torch.dtype]:
        model = rows.model
        if getattr(model, "is_quantized", False):
            raise ValueError("a quantised model cannot be split over several ranks; train it on one")
        named = dict(model.named_parameters())
        kinds = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        if not layers:
            raise ValueError(f"{type(model).__name__} does not say what its layers are (_no_split_modules)")
        for tensor in (*named.values(), *model.buffers()):
            if tensor.is_floating_point():
                dist.broadcast(tensor.detach(), 0)
        narrow = {n: p.dtype for n, p in named.items() if p.requires_grad and p.dtype.itemsize < 4}
        compute = next(p.dtype for p in named.values() if p.is_floating_point())
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        if compute.itemsize >= 4:
            policy = MixedPrecisionPolicy()
        del named
        for module in (*layers, rows):
            for parameter in module.parameters():  # layer by layer: never more than one whole in float32
                if parameter.requires_grad and parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.float()
            sharded = fully_shard(module, mesh=self._mesh, mp_policy=policy)
            # The loss is divided by the whole step's tokens: gradients are summed over ranks, not averaged. gloo has no
            # other reduction than the plain sum.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        return narrow

    def reshard(self, rows: RowModel) -> None:
        rows.reshard()  # type: ignore[operator]  # `fully_shard` made it a FSDPModule; its layers do so by themselves

    def share(self, items: Sequence[TrainItem], max_tokens: int, *, packed: bool) -> list[Share]:
        tokens = sum(item.num_inputs for item in items)
        each = min(max_tokens, -(-tokens // self.size))  # something for each rank
        groups = split_micro_batches(items, each, packed=packed)
        own = [(group, True) for group in groups[self.rank :: self.size]]
        shortest = min(items, key=lambda item: item.num_inputs)
        rounds = -(-len(groups) // self.size)
        return own + [([shortest], False)] * (rounds - len(own))

    def agree(self, problem: str | None) -> str | None:
        first = torch.tensor(self.rank if problem is not None else self.size)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if int(first) == self.size:
            return None
        message: str = self._spread({"problem": problem}, source=int(first))["problem"]
        return message

    def total(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor)

    def largest(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, table_MN: np.ndarray) -> np.ndarray:
        widths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(widths, torch.tensor([table_MN.shape[1]]))
        if not self.leads:
            if table_MN.size:
                dist.send(torch.from_numpy(np.ascontiguousarray(table_MN)), dst=0)
            return table_MN
        tables = [table_MN]
        for rank in range(1, self.size):
            received = torch.zeros(table_MN.shape[0], int(widths[rank]), dtype=torch.float64)
            if received.numel():
                dist.recv(received, src=rank)
            tables.append(received.numpy())
        return np.concatenate(tables, axis=1)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.cpu() if self.leads else full.to("meta")

    def read(self, load: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        if not self.leads:
            told = self._spread(None)
            if "problem" in told:
                raise ValueError(told["problem"])
            return {n: torch.empty(s, dtype=getattr(torch, d), device="meta") for n, s, d in told["tensors"]}
        try:
            tensors = load()
        except BaseException as error:
            self._spread({"problem": str(error)})
            raise
        names = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()]
        self._spread({"tensors": names})
        return tensors

    def place(self, tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(like, DTensor):
            full = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.clone()
            dist.broadcast(full, 0)
            return full if like is None else full.to(like.device, like.dtype)
        device = torch.device(self._device)
        full = (
            torch.empty_like(tensor, device=device, dtype=like.dtype)
            if tensor.is_meta
            else tensor.to(device, like.dtype).contiguous()
        )
        placed: DTensor = distribute_tensor(full, like.device_mesh, like.placements)
        return placed

    def each(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        if not self.leads:
            self._send(value, 0, None)
            return [value]
        return [value, *(self._receive(rank, None) for rank in range(1, self.size))]

    # --- calls

    @contextlib.contextmanager
    def call(self, name: str, **arguments: Any) -> Iterator[None]:
        if not self.leads:
            yield
            return
        with self._lock:
            self._depth += 1
            try:
                if self._lost is not None:
                    raise self._lost
                if self._depth == 1:  # a call within a call is made by the others too
                    self._spread({"call": name, "arguments": arguments}, group=self._calls)
                yield
            except BaseException as error:
                self._broken = True
                if isinstance(error, RuntimeError | KeyboardInterrupt) or isinstance(error.__cause__, RuntimeError):
                    self._was_lost.wait(NEWS_S)
                if self._lost is not None and error is not self._lost:
                    raise self._lost from error
                raise
            finally:
                self._depth -= 1

    def next_call(self) -> tuple[str, dict[str, Any]]:
        """On a follower: wait for what the leader calls. `stop`: there is nothing more."""
        told = self._spread(None, group=self._calls)
        return told["call"], told["arguments"]

    async def while_whole(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        lost = asyncio.Event()
        self._on_loss = lambda: loop.call_soon_threadsafe(lost.set)
        if self._lost is not None:
            lost.set()
        task = asyncio.ensure_future(work)
        alarm = asyncio.ensure_future(lost.wait())
        try:
            await asyncio.wait([task, alarm], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_loss = lambda: None
            alarm.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._lost is not None and (task.cancelled() or task.exception() is not None):
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now, and the message is still to be said
            raise self._lost
        return task.result()

    # --- news

    def report(self, error: BaseException, code: int) -> None:
        """On a follower: tell the leader why this process ends."""
        if isinstance(error, RuntimeError):
            self._watchers[0].join(NEWS_S)  # a broken connection has a cause elsewhere: the leader will say so
        self._code, self._closing = code, True
        with contextlib.suppress(RuntimeError):
            self._send({"failure": f"{type(error).__name__}: {error}", "code": code}, 0, self._news)
            self._watchers[0].join(NEWS_S)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        if self.leads:
            regular = self._lost is None and not self._broken and self._lock.acquire(blocking=False)
            if regular:
                with contextlib.suppress(RuntimeError):
                    self._spread({"call": "stop", "arguments": {}}, group=self._calls)
            if self._lost is None:
                self._send_home(at_once=not regular)
        else:
            with contextlib.suppress(RuntimeError):
                self._send({"end": True}, 0, self._news)
        for watcher in self._watchers:
            watcher.join(NEWS_S)
        if self._lost is None and not any(watcher.is_alive() for watcher in self._watchers):
            dist.destroy_process_group()

    def _send_home(self, *, at_once: bool) -> None:
        for rank in range(1, self.size):
            with contextlib.suppress(RuntimeError):
                self._send({"end": True, "at_once": at_once}, rank, self._news)

    def _watch(self, rank: int) -> None:
        """A thread for each partner: of the leader for every follower, of a follower for the leader."""
        try:
            news = self._receive(rank, self._news)
        except RuntimeError:
            news = {"failure": "it died without a word: was it killed, or out of memory?", "code": EXIT_RANK}
        if self.leads:
            if "failure" in news and not self._closing and self._lost is None:
                self._lose(rank, news)
        elif "failure" in news:
            fail(f"rank {self.rank}: the leader is gone")
            os._exit(EXIT_RANK)
        elif news["at_once"]:
            os._exit(self._code)  # the leader's exit code is the one that counts

    def _terminate(self, number: int, frame: object) -> None:
        """torchrun sends SIGTERM to all when one rank died; who died is better news than that."""
        if not self._was_lost.wait(1.0):
            raise KeyboardInterrupt

    def _lose(self, rank: int, news: Mapping[str, Any]) -> None:
        self._lost = lost = RankError(f"rank {rank} of {self.size} failed: {news['failure']}", int(news["code"]))
        self._was_lost.set()
        self._on_loss()

        def give_up() -> None:
            fail(f"{lost} (and a collective does not end)")
            os._exit(lost.code)

        timer = threading.Timer(GRACE_S, give_up)
        timer.daemon = True
        timer.start()
        self._send_home(at_once=True)

    # --- JSON in tensors

    def _spread(self, value: Any, *, source: int = 0, group: Any = None) -> Any:
        """From one rank to all."""
        data = _to_bytes(value) if self.rank == source else torch.zeros(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, source, group=group)
        if self.rank != source:
            data = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(data, source, group=group)
        return value if self.rank == source else _from_bytes(data)

    def _send(self, value: Any, rank: int, group: Any) -> None:
        data = _to_bytes(value)
        dist.send(torch.tensor([len(data)]), rank, group=group)
        dist.send(data, rank, group=group)

    def _receive(self, rank: int, group: Any) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank, group=group)
        data = torch.zeros(int(length), dtype=torch.uint8)
        dist.recv(data, rank, group=group)
        return _from_bytes(data)


def _to_bytes(value: Any) -> torch.Tensor:
    text = json.dumps(value, default=_plain, separators=(",", ":"))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def _plain(value: Any) -> Any:
    if isinstance(value, Episode):
        return episode_to_json(value)
    raise TypeError(f"{type(value).__name__} does not travel between ranks")
