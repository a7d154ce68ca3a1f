"""The model that is trained: one step, its weights for the server, its state for a checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agent_loop.types import Episode
from distill.batch import TrainItem, collate, group_advantages, items_of
from distill.config import LossConfig, RunConfig
from distill.loss import SupervisedLoss
from distill.metrics import Metrics
from distill.optim import Optimizer
from distill.ranks import Ranks
from distill.rows import Objective, RowModel
from distill.student_model import dtype_of, nf4, refuse_adapted_ties, switch_off_dropout, with_lora
from distill.train_metrics import StepRows, token_shares
from distill.types import Batch, Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.checkpoint import Checkpoint


class NumericError(Exception):
    """A step that must not be applied: a loss or a gradient is not finite, there is nothing to train on, or the first
    step would move nothing. The weights are as they were before it."""


class OutOfMemory(Exception):
    """A step did not fit the device's memory. It was dropped whole: no gradient is left, the weights are as they were
    before it."""


class Student:
    """A causal language model, its optimiser and, for `loss.type = "full"`, a teacher beside it.

    Dropout is off, always: with it, the trainer's log-probabilities would not be those of the model that sampled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take over a loaded model; `load` reads one from disk.

        Args:
            tokenizer: saved beside the weights.
            ranks: the processes that train it together; the leader's calls are made on all of them. None: this one.

        Raises:
            ValueError: it cannot be split over ranks.
        """
        self.config = config
        self.loss = config.loss
        """What is made small."""
        self.ranks = ranks or Ranks()
        self.tokenizer = tokenizer
        switch_off_dropout(model)
        self.rows = RowModel(model)
        self.device = self.rows.device
        self.model: Any = model
        self.has_lora = config.student.lora is not None
        self.is_quantized = bool(getattr(model, "is_quantized", False))
        if config.student.lora is not None:
            self.model = with_lora(model, config.student.lora)
            refuse_adapted_ties(model)
        if config.student.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._narrow = self.ranks.shard(self.rows)
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        """The trained ones, by their name in the model (LoRA's included)."""
        self.optimizer = Optimizer(self.parameters, config.optim, total_steps=config.steps, rounded=self._narrow.keys())
        self._teacher: RowModel | None = None
        self._has_stepped = False

    @classmethod
    def load(cls, path: str | Path, config: RunConfig, ranks: Ranks | None = None) -> Student:
        """Read a folder or a Hub model (safetensors only; no code from it is run), onto the GPU if there is one.

        Raises:
            OSError: there is no such model, or it has no safetensors.
            ValueError: adapters cannot be put where `student.lora` wants them, or weights not be quantised here.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = dtype_of(config.student.dtype, device)
        options: dict[str, Any] = {"trust_remote_code": False}
        if config.student.revision is not None and not Path(path).is_dir():
            options["revision"] = config.student.revision
        if config.student.lora is not None and config.student.lora.quantization == "nf4":
            options |= {"quantization_config": nf4(dtype, device), "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
        if "device_map" not in options:
            model = model.to(device)
        has_tokenizer = not Path(path).is_dir() or any(Path(path).glob("tokenizer*"))
        tokenizer = AutoTokenizer.from_pretrained(path, **options) if has_tokenizer else None
        return cls(model, config, tokenizer=tokenizer, ranks=ranks)

    @property
    def _causal_lm(self) -> Any:
        """The `transformers` model, without PEFT's wrapper around it."""
        return self.rows.model

    @property
    def padded_because(self) -> str | None:
        """Why the traces of a micro-batch are padded; None where they lie end to end. A teacher of
        `loss.type = "full"` sees the same rows, so it has its say."""
        teacher = None if self._teacher is None else self._teacher.padded_because
        return self.rows.padded_because or teacher

    def set_teacher(self, model: PreTrainedModel) -> None:
        """The teacher of `loss.type = "full"`: it sees the student's inputs, and no system prompt of its own.

        Raises:
            ValueError: its vocabulary has another size.
        """
        teacher = RowModel(model.eval().requires_grad_(False).to(self.device))
        if teacher.vocab_size != self.rows.vocab_size:
            raise ValueError(
                f'loss.type "full": the teacher has {teacher.vocab_size} output rows, the student '
                f"{self.rows.vocab_size}; take a teacher with the same vocabulary"
            )
        self._teacher = teacher

    def load_teacher(self, path: str | Path) -> None:
        """Read the teacher of `loss.type = "full"` beside the student, in `teacher.dtype`."""
        from transformers import AutoModelForCausalLM

        dtype = dtype_of(self.config.teacher.dtype, self.device.type)
        self.set_teacher(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True))

    def supervise(self) -> None:
        """From now on train on the tokens of the episodes as they stand, whoever wrote them: no scores are read."""
        self.loss = SupervisedLoss()

    @property
    def is_supervised(self) -> bool:
        return isinstance(self.loss, SupervisedLoss)

    # --- one step

    def train_step(self, episodes: Sequence[Episode], *, step: int) -> Metrics:
        """Forward and backward over all trained tokens, in micro-batches, then one update; `optim.epochs` times.

        The loss is divided by the trained tokens of all episodes, so that the split into micro-batches changes
        nothing but the order of floating-point sums.

        Args:
            episodes: scored by the teacher, but for `supervise`; those without a trained token contribute nothing.
            step: 1, 2, ...; decides the learning rate.

        Returns:
            The metrics of docs/metrics.md that concern training.

        Raises:
            NumericError: before the update that it refuses; naming episodes.
            OutOfMemory: before that update; saying what to set.
            ValueError: a trained token has no score; naming the episode.
        """
        with self.ranks.call("train_step", episodes=episodes, step=step):
            return self._train_step(episodes, step)

    def _train_step(self, episodes: Sequence[Episode], step: int) -> Metrics:
        began = time.monotonic()
        loss = self.loss.at(step)
        advantages = group_advantages(episodes, loss.adv_norm) if loss.adv_tau else None
        shares = {name: source.share for name, source in self.config.all_sources.items()}
        items = items_of(
            episodes, advantages, turn_balance=loss.turn_balance, source_balance=loss.source_balance, shares=shares
        )
        num_trained = sum(item.trace.num_trained for item in items)
        if not num_trained:
            raise NumericError(f"step {step}: no trained token in {_names([e.id for e in episodes])}")
        updates = [self._update(items, num_trained, loss, episodes, step) for _ in range(self.config.optim.epochs)]
        if not self.ranks.leads:
            return {}
        rows, metrics = updates[0]
        if len(updates) > 1:
            last = updates[-1][0].reduce(episodes)
            metrics |= {f"last_epoch/{name}": last[name] for name in ("teacher_kl", "ratio", "ratio/clipped")}
        return (
            rows.reduce(episodes)
            | metrics
            | {
                **({"loss/teacher_tau": loss.teacher_tau} if self.loss.teacher_tau_schedule is not None else {}),
                **token_shares(items),
                "train/tokens": num_trained,
                "train/episodes": len({item.episode_index for item in items}),
                "tokens_per_s/train": num_trained / max(time.monotonic() - began, 1e-9),
            }
        )

    def _update(
        self, items: Sequence[TrainItem], num_trained: int, loss: LossConfig, episodes: Sequence[Episode], step: int
    ) -> tuple[StepRows, Metrics]:
        """One forward and backward over everything, and one step of the optimiser; the rows are those of before it."""
        rows = StepRows()
        objective = Objective(loss, num_trained, self._teacher, self.config.rollout.temperature)
        value = 0.0
        self._causal_lm.train()
        self.optimizer.zero_grad()
        try:
            packed = self.ranks.agree(self.padded_because) is None
            for group, counts in self.ranks.share(items, self.config.optim.micro_batch_tokens, packed=packed):
                batch = collate(group, packed=packed, scored=not self.is_supervised)
                value += self._accumulate(batch, counts, objective, rows, episodes, step)
            grad_norm = self.optimizer.clip()
            if not grad_norm < float("inf"):
                names = self.optimizer.non_finite()
                raise NumericError(
                    f"step {step}: the gradient is not finite ({_names(names)}); the step trained on "
                    f"{_names([e.id for e in episodes])}. The weights are unchanged."
                )
            if not self._has_stepped:
                self._refuse_no_op(rows, grad_norm, loss, step)
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad()
            raise OutOfMemory(self._what_to_set(max(item.num_inputs for item in items), step)) from error
        except BaseException:
            self.optimizer.zero_grad()
            self.ranks.reshard(self.rows)
            raise
        finally:
            self._causal_lm.eval()
        lr = self.optimizer.step(step)
        self._has_stepped = True
        rows.gather(self.ranks)
        return rows, {"loss": self.ranks.total(value), "grad_norm": grad_norm, "lr": lr}

    def _accumulate(
        self, batch: Batch, counts: bool, objective: Objective, rows: StepRows, episodes: Sequence[Episode], step: int
    ) -> float:
        """Add one micro-batch to the gradients; returns its part of the loss. One that does not count adds zeros."""
        loss, metrics_N = self.rows(batch, objective)
        if not counts:
            loss = loss * 0.0
        rows.add(batch, metrics_N, counts=counts)
        value = float(loss.detach())
        problem = None
        if not abs(value) < float("inf"):
            bad_N = (
                ~torch.stack([metrics_N[n] for n in ("teacher_kl", "ratio", "nll") if n in metrics_N])
                .isfinite()
                .all(0)
                .cpu()
            )
            suspects = batch.episodes_N[bad_N] if bad_N.any() else batch.episodes_N
            ids = [episodes[i].id for i in dict.fromkeys(suspects.tolist())]
            problem = f"step {step}: the loss is {value} in {_names(ids)}. The weights are unchanged."
        problem = self.ranks.agree(problem)
        if problem is not None:
            raise NumericError(problem)
        loss.backward()
        return value

    def _what_to_set(self, longest: int, step: int) -> str:
        """After an out-of-memory error: a smaller micro-batch changes no result, so it is the user who sets it, once,
        instead of every step finding out again. One rank that tries by itself would leave the others waiting."""
        budget = self.config.optim.micro_batch_tokens
        ways = []
        if budget > longest:
            ways.append(f"--optim.micro_batch_tokens {max(longest, budget // 2)} (it is {budget})")
        if not self.config.student.gradient_checkpointing:
            ways.append("--student.gradient_checkpointing true")
        if self.config.student.lora is None:
            ways.append("a new run with [student.lora]")
        ways.append("a smaller rollout.max_episode_tokens in a new run")
        return (
            f"step {step}: out of memory on {self.device}; the longest trace has {longest} tokens. The step was "
            f"dropped whole, the weights are unchanged. What helps: {'; '.join(ways)}."
        )

    def _refuse_no_op(self, rows: StepRows, grad_norm: float, loss: LossConfig, step: int) -> None:
        """A run in which the teacher's signal never reaches the weights looks healthy for hours; say so at once."""
        largest = self.ranks.largest(rows.largest_signal())
        if grad_norm == 0 and largest > 0 and loss.teacher_tau:
            who = "student and demonstrations" if self.is_supervised else "student and teacher"
            raise NumericError(
                f"step {step}: {who} differ by up to {largest:.3g} nats on trained tokens, and yet the "
                f"gradient is exactly 0: this run would learn nothing. Are the {len(self.parameters)} trained tensors "
                "cut off from the output (student.lora.target_modules), or is the student certain of every token?"
            )

    # --- what the server and the canary need

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> list[float | None]:
        """[L] log-probability of each token given those before it, by the present weights; the first is None."""
        if len(ids) < 2:
            return [None] * len(ids)
        with self.ranks.call("logprobs", ids=list(ids)):
            return self._logprobs(ids)

    def _logprobs(self, ids: Sequence[int]) -> list[float | None]:
        self._causal_lm.eval()
        ids_L = torch.tensor(list(ids))
        pos_N = torch.arange(len(ids) - 1)
        inputs = Inputs(input_ids_BT=ids_L[None, :-1], seq_N=torch.zeros_like(pos_N), pos_N=pos_N, targets_N=ids_L[1:])
        logprobs_N, _ = self.rows(inputs)
        self.ranks.reshard(self.rows)
        return [None, *logprobs_N.tolist()]

    def serving_copy(self) -> PreTrainedModel:
        """An independent copy of the present model for the engine, adapters merged, in `eval` mode."""
        if self.ranks.size > 1:
            return self._whole_copy()
        model = copy.deepcopy(self.model)
        if self.has_lora:
            model = model.merge_and_unload()
        if self.config.student.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.set_attn_implementation(self.rows.attention)
        served: PreTrainedModel = model.eval().requires_grad_(False)
        return served

    @torch.no_grad()
    def state_dict_for_serving(self) -> dict[str, torch.Tensor]:
        """All weights by the names of the model itself, adapters merged; of tied weights only the first name.

        Without adapters these are the student's own tensors, not copies: use them before the next step. Of several
        ranks, the leader alone has them, on the CPU.
        """
        with self.ranks.call("state_dict_for_serving"):
            return self._weights()

    def _weights(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        deltas = {}
        for name, module in self._causal_lm.named_modules():
            if hasattr(module, "get_delta_weight"):
                deltas[f"{name}.base_layer.weight"] = module.get_delta_weight(module.active_adapters[0])
        for name, parameter in self._causal_lm.named_parameters():
            if self.has_lora and name in self.parameters:
                continue
            tensor = parameter.detach()
            if name in deltas:
                tensor = (tensor.float() + deltas[name].float()).to(tensor.dtype)
            weights[name.replace(".base_layer.", ".")] = self.ranks.whole(
                tensor.to(self._narrow.get(name, tensor.dtype))
            )
        return weights

    def _whole_copy(self) -> PreTrainedModel:
        """From the ranks' parts: what is sharded cannot be copied."""
        from transformers import AutoModelForCausalLM

        weights = self.state_dict_for_serving()
        dtype = next(iter(weights.values())).dtype
        config = copy.deepcopy(self._causal_lm.config)
        options = {"dtype": dtype, "attn_implementation": self.rows.attention}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        odd = model.load_state_dict(weights, strict=False).unexpected_keys  # tied weights are there once
        assert not odd, odd
        return model.to(self.device).eval().requires_grad_(False)

    @property
    def adapted_modules(self) -> list[str]:
        """Last names of the modules that have an adapter (`q_proj`); empty without LoRA. vLLM's filter knows no full
        names of what it packs."""
        if not self.has_lora:
            return []
        (adapter,) = self.model.peft_config.values()
        return sorted({name.rsplit(".", 1)[-1] for name in adapter.target_modules})

    def save_weights(self, folder: Path) -> None:
        """Write the present full weights, adapters merged, as a model folder that vLLM reloads from."""
        weights = self.state_dict_for_serving()
        if self.ranks.leads:
            config = copy.copy(self._causal_lm.config)
            config.dtype = next(iter(weights.values())).dtype
            self._causal_lm.save_pretrained(folder, state_dict=weights)
            config.save_pretrained(folder)  # again: the line before wrote the dtype of the masters

    def save_adapter(self, folder: Path) -> None:
        """Write the present adapter in PEFT's format, which vLLM's `/v1/load_lora_adapter` reads.

        Raises:
            ValueError: the student has no adapters.
        """
        if not self.has_lora:
            raise ValueError("this student is trained whole: it has no adapter to save")
        with self.ranks.call("save_adapter"):
            adapter = {f"base_model.model.{n}": self.ranks.whole(p.detach()) for n, p in self.parameters.items()}
        if self.ranks.leads:
            self.model.save_pretrained(folder, state_dict=adapter, save_embedding_layers=False)

    # --- checkpoints

    def save(self, folder: Path) -> None:
        """Write `model/` (opens with `from_pretrained`), `optimizer.safetensors` and, with LoRA, the unmerged
        `adapter.safetensors`. Of a quantised model, which merging would round, the adapters alone. One rank and several
        write the same files."""
        with self.ranks.call("save"):
            if not self.is_quantized:
                self.save_weights(folder / "model")
                if self.tokenizer is not None and self.ranks.leads:
                    self.tokenizer.save_pretrained(folder / "model")
            self._save_tensors(self.optimizer.state(), folder / "optimizer.safetensors")
            if self.has_lora:
                self._save_tensors(self.parameters, folder / "adapter.safetensors")

    def _save_tensors(self, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
        whole = {name: self.ranks.whole(tensor.detach()).contiguous() for name, tensor in tensors.items()}
        if self.ranks.leads:
            save_file(whole, file)

    def rng_states(self) -> list[dict[str, Any]]:
        """The random number generators of each rank."""
        from distill.checkpoint import rng_state

        with self.ranks.call("rng_states"):
            return self.ranks.each(rng_state())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue as if the run had never stopped: weights, optimiser, random number generators.

        Raises:
            CheckpointError: it belongs to another model or another `student` configuration.
        """
        from distill.checkpoint import CheckpointError

        path = checkpoint.path / "optimizer.safetensors"
        with self.ranks.call("restore", path=str(checkpoint.path), rng=checkpoint.rng):
            self.restore_weights(checkpoint)
            try:
                self.optimizer.load_state(self.ranks.read(lambda: load_file(path)), self.ranks.place)
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{checkpoint.path} does not fit this student: {error}") from error
            checkpoint.restore_rng(self.ranks.rank)

    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """The weights alone: nothing to train on with.

        Raises:
            CheckpointError: it belongs to another model or another `student` configuration.
        """
        from distill.checkpoint import CheckpointError

        path = checkpoint.path
        with self.ranks.call("restore_weights", path=str(path)):
            try:
                if self.has_lora:
                    self._load(self.ranks.read(lambda: load_file(path / "adapter.safetensors")), self.parameters)
                else:
                    self._load(self.ranks.read(lambda: _weights_in(path / "model")), self._causal_lm.state_dict())
            except (ValueError, RuntimeError, OSError) as error:
                raise CheckpointError(f"{path} does not fit this student: {error}") from error

    @torch.no_grad()
    def _load(self, saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        _same_shapes(saved, own)
        for name, tensor in own.items():
            tensor.copy_(self.ranks.place(saved[name], tensor))


def _same_shapes(saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    if odd := sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"{odd[0]!r} and {len(odd) - 1} more are only in one of checkpoint and model")
    for name, tensor in saved.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name!r} has shape {list(tensor.shape)} there, {list(own[name].shape)} here")


def _weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def _names(names: Sequence[str]) -> str:
    """At most five of them."""
    listed = ", ".join(names[:5])
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed or "nothing"
