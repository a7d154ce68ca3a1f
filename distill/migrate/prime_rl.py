"""prime-rl: the `rl` TOML with trainer, orchestrator and inference; the form with `teacher_tau` (until mid 2026) and
the newer one with `[orchestrator.algo]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.migrate.draft import (
    Draft,
    Rule,
    apply,
    boolean,
    drop,
    integer,
    integers,
    later,
    number,
    one_of,
    only,
    refuse,
    shown,
    text,
    texts,
    to,
)
from distill.migrate.several import environment_id, environments
from distill.migrate.source import Entry

NAME = "prime-rl"
_PACKING = "batches are cut by optim.micro_batch_tokens; no result depends on it"
_STALENESS = "rollout.max_staleness bounds the age of every token; 0, the default, is synchronous"
_RATIO = "no token or sequence is masked by its ratio; the ratio is capped at loss.rho (docs/loss.md)"
_NO_FILTER = "no such setting: no episode is left out for its difficulty or its text"
_LOGS = "metrics.jsonl, curves and episodes are written in any case"
_ONE_TRACKER = "a run has one copy in W&B: [wandb]"


def _seq_len(draft: Draft, entry: Entry) -> None:
    draft.map(entry, "rollout.max_episode_tokens", integer(entry.value), "longer episodes end there; none is cut")


def _seed(draft: Draft, entry: Entry) -> None:
    draft.map(entry, "seed", integer(entry.value))


def _wandb(table: str) -> dict[str, Rule]:
    """The rules of `[wandb]`, whose presence alone switches W&B on."""

    def on(key: str, convert: Callable[[Any], Any]) -> Rule:
        def rule(draft: Draft, entry: Entry) -> None:
            draft.map(entry, f"tracking.{key}", convert(entry.value))
            draft.add("tracking.to", ["wandb"], f"[{table}] is there")

        return rule

    return {
        table: to("tracking.to", lambda value: ["wandb"], "an empty table; the defaults of [tracking]"),
        f"{table}.project": on("project", text),
        f"{table}.name": on("name", text),
        f"{table}.tags": on("tags", texts),
        f"{table}.offline": on("offline", boolean),
        f"{table}.*": drop(_LOGS),
    }


def _quoted_extra(option: str) -> Any:
    """`enforce_eager = true` as an argument of vLLM's command line."""

    def convert(value: Any) -> list[str]:
        if not boolean(value):
            raise ValueError("false is vLLM's default; leave it out")
        return [option]

    return convert


def _server(theirs: str, ours: str) -> dict[str, Rule]:
    """The rules of `[inference]` or `[teacher_inference]`."""
    table = f"{ours}.server"
    return {
        theirs: drop(f"an empty table; [{table}] stands for it where it has GPUs"),
        f"{theirs}.model.name": to(f"{ours}.model", text),
        f"{theirs}.model.dtype": to(f"{table}.dtype", text),
        f"{theirs}.model.max_model_len": to(f"{table}.max_context", integer),
        f"{theirs}.model.enforce_eager": to(f"{table}.extra_args", _quoted_extra("--enforce-eager")),
        f"{theirs}.model.trust_remote_code": only(False, "nothing runs a model's own code here", _TRUST),
        f"{theirs}.gpu_memory_utilization": to(f"{table}.memory", number),
        f"{theirs}.parallel.tp": later,
        f"{theirs}.parallel.dp": later,
        f"{theirs}.server.host": drop("the run gives its servers loopback addresses"),
        f"{theirs}.server.port": drop("the run finds free ports"),
        f"{theirs}.*": refuse(f"give vLLM's own argument in {table}.extra_args"),
    }


_TRUST = "never: a model's own code is not run; take a model that transformers knows"
_MODEL = to("student.model", text)
_STEPS = to("steps", integer)
_LORA = "student.lora"

RULES: dict[str, Rule] = {
    **_server("inference", "student"),
    **_server("teacher_inference", "teacher"),
    "teacher_gpu_ids": later,
    "inference_gpu_ids": later,
    "trainer_gpu_ids": later,
    "model.name": _MODEL,
    "trainer.model.name": _MODEL,
    "orchestrator.model.name": _MODEL,
    "trainer.tokenizer.name": refuse("the tokenizer is the student's; it has to lie in the model's folder"),
    "max_steps": _STEPS,
    "trainer.max_steps": _STEPS,
    "orchestrator.max_steps": _STEPS,
    "seq_len": _seq_len,
    "orchestrator.seq_len": _seq_len,
    "trainer.model.seq_len": _seq_len,
    "output_dir": to("output_dir", text, "a run makes a folder of its own in it"),
    "orchestrator.output_dir": drop("there is one output_dir"),
    "trainer.output_dir": drop("there is one output_dir"),
    "seed": _seed,
    "orchestrator.seed": _seed,
    # the loss
    "trainer.loss.teacher_tau": to("loss.teacher_tau", number),
    "trainer.loss.adv_tau": to("loss.adv_tau", number),
    "trainer.loss.kl_tau": only(0, "0 is how it is here", "no such setting: nothing pulls towards the sampler"),
    "trainer.loss.type": only("default", "the same", "no such setting"),
    "trainer.loss.ratio_type": only(
        "token", "the ratio is a token's here too", "no such setting: ratios are a token's"
    ),
    "trainer.loss.*": drop(_RATIO),
    "orchestrator.buffer.skip_verification": to("skip_verification", boolean),
    "orchestrator.algo.type": later,
    "orchestrator.algo.teacher.name": to("teacher.model", text),
    "orchestrator.algo.teacher.base_url": to("teacher.base_url", texts),
    "orchestrator.algo.teacher.api_key_var": to("teacher.api_key_env", text),
    # the teacher and the student, served elsewhere
    "orchestrator.teacher_model.model.name": to("teacher.model", text),
    "orchestrator.teacher_model.client.base_url": to("teacher.base_url", texts),
    "orchestrator.teacher_model.client.api_key_var": to("teacher.api_key_env", text),
    "orchestrator.teacher_model.client.timeout": to("teacher.timeout_s", number),
    "orchestrator.client.base_url": to("student.base_url", texts),
    "orchestrator.client.api_key_var": to("student.api_key_env", text),
    "orchestrator.client.timeout": drop("an episode has rollout.timeout_s"),
    # rollouts
    "orchestrator.batch_size": later,
    "orchestrator.rollouts_per_example": later,
    "orchestrator.sampling.max_tokens": to("rollout.max_turn_tokens", integer, "a turn"),
    "orchestrator.sampling.temperature": to("rollout.temperature", number),
    "orchestrator.sampling.top_p": to("rollout.top_p", number),
    "orchestrator.sampling.repetition_penalty": only(1, "1 is none", "no such setting: it would bias every score"),
    "orchestrator.sampling.min_tokens": only(0, "0 is none", "no such setting"),
    "orchestrator.sampling.seed": drop("sampling is seeded by seed, episode by episode"),
    "orchestrator.sampling.extra_body.chat_template_kwargs.enable_thinking": to("student.enable_thinking", boolean),
    "orchestrator.sampling.*": refuse("no such setting: tokens are sampled plainly, with temperature, top_p, top_k"),
    "orchestrator.max_concurrent": to("rollout.max_concurrent", integer),
    "orchestrator.env": later,
    "orchestrator.train.env": later,
    "orchestrator.train.source": later,
    "orchestrator.filters": refuse(_NO_FILTER),
    "orchestrator.buffer.seed": to("tasks.seed", integer),
    "orchestrator.buffer.*": refuse(_NO_FILTER),
    "orchestrator.advantage.type": only("default", "reward minus the mean of the group, as here", "no such setting"),
    "orchestrator.oversampling_factor": only(1, "1 is none", "no such setting: a step plays as many as it trains on"),
    "orchestrator.max_off_policy_steps": drop(_STALENESS),
    "orchestrator.max_async_level": to("rollout.max_staleness", integer),
    "orchestrator.strict_async_level": drop(_STALENESS),
    "max_async_level": to("rollout.max_staleness", integer),
    # the trainer
    "trainer.optim.lr": to("optim.lr", number),
    "orchestrator.optim.lr": to("optim.lr", number),
    "trainer.optim.weight_decay": to("optim.weight_decay", number),
    "trainer.optim.max_norm": to("optim.max_grad_norm", number),
    "trainer.optim.betas1": later,
    "trainer.optim.betas2": later,
    "trainer.optim.type": only("adamw", "AdamW, as here", "no such setting: the optimiser is AdamW"),
    "trainer.scheduler.type": to("optim.schedule", one_of(constant="constant", linear="linear", cosine="cosine")),
    "trainer.scheduler.warmup_steps": to("optim.warmup_steps", integer),
    "trainer.scheduler.decay_steps": refuse("linear and cosine fall to 0 over all steps after the warm-up"),
    "trainer.scheduler.min_lr": only(0, "0 is how it is here", "no such setting: it falls to 0"),
    "trainer.model.lora.rank": to(f"{_LORA}.rank", integer),
    "trainer.model.lora.alpha": to(f"{_LORA}.alpha", number),
    "trainer.model.lora.target_modules": to(f"{_LORA}.target_modules", texts),
    "trainer.model.lora": to(_LORA, lambda value: {}),
    "trainer.model.lora.dropout": only(0, "0 is how it is here", "no such setting: dropout is off"),
    "orchestrator.model.lora.rank": to(f"{_LORA}.rank", integer),
    "orchestrator.model.lora.alpha": to(f"{_LORA}.alpha", number),
    "orchestrator.model.lora.name": drop("an adapter is named by the run"),
    "trainer.model.ac": to("student.gradient_checkpointing", lambda value: True),
    "trainer.model.ac.*": to("student.gradient_checkpointing", lambda value: True, "all layers"),
    "trainer.model.trust_remote_code": only(False, "nothing runs a model's own code here", _TRUST),
    "trainer.model.*": drop("FSDP2, without settings; weights in bfloat16 have float32 masters"),
    "weight_broadcast.type": to("student.weight_sync", one_of(filesystem="disk", nccl="nccl")),
    "trainer.weight_broadcast.type": to("student.weight_sync", one_of(filesystem="disk", nccl="nccl")),
    "orchestrator.weight_broadcast.type": to("student.weight_sync", one_of(filesystem="disk", nccl="nccl")),
    "ckpt": drop("a run saves by itself, every checkpoint.every steps"),
    "ckpt.interval": to("checkpoint.every", integer),
    "ckpt.keep_last": to("checkpoint.keep_last", integer),
    "ckpt.keep": to("checkpoint.keep_last", integer),
    "ckpt.keep_interval": to("checkpoint.keep_every", integer),
    "ckpt.resume_step": refuse("a run goes on with --resume RUN"),
    "ckpt.*": drop("a checkpoint has all that the run needs to go on"),
    "trainer.ckpt.*": drop("[ckpt] at the top is what counts here"),
    "orchestrator.ckpt.*": drop("[ckpt] at the top is what counts here"),
    # evaluation
    "orchestrator.eval.interval": to("eval.every", integer),
    "orchestrator.eval.num_examples": to("eval.num_tasks", integer),
    "orchestrator.eval.rollouts_per_example": to("eval.group_size", integer),
    "orchestrator.eval.eval_base_model": to("eval.at_start", boolean),
    "orchestrator.eval.env": refuse("held-out tasks are the environment's own, or a file: tasks.eval"),
    "orchestrator.eval.*": refuse("an evaluation samples as training does"),
    "orchestrator.val.*": refuse("held-out tasks are evaluated: [eval]"),
    # what is around it
    **_wandb("wandb"),
    **_wandb("trainer.wandb"),
    "orchestrator.wandb.*": drop(_ONE_TRACKER),
    "orchestrator.prime_monitor.*": drop(_LOGS),
    "log.*": drop(_LOGS),
    "trainer.log.*": drop(_LOGS),
    "orchestrator.log.*": drop(_LOGS),
    "trainer.micro_batch_size": drop(_PACKING),
    "trainer.data.*": drop(_PACKING),
    "clean": drop("a used folder is never emptied; each run has its own"),
    "bench": drop("figures come from `python -m bench...`"),
    "dump_config": drop("python -m distill.config show"),
    "dry_run": drop("it is a flag here: --dry-run"),
}


def convert(draft: Draft) -> None:
    """All keys to settings and rows."""
    apply(draft, RULES)
    entries = draft.entries
    _algo(draft)
    _batch(draft)
    _betas(draft)
    for name in ("orchestrator.env", "orchestrator.train.env", "orchestrator.train.source"):
        if name in entries:
            _env(draft, entries[name])
    trains_elsewhere = "student.base_url" in draft.settings
    if trains_elsewhere and "inference_gpu_ids" in entries:
        draft.drop(entries.pop("inference_gpu_ids"), "student.base_url names servers that are there")
    else:
        _gpus(draft, "inference_gpu_ids", "inference", "student")
    if "teacher.base_url" in draft.settings and "teacher_gpu_ids" in entries:
        draft.drop(entries.pop("teacher_gpu_ids"), "teacher.base_url names servers that are there")
    else:
        _gpus(draft, "teacher_gpu_ids", "teacher_inference", "teacher")
    if not trains_elsewhere:
        draft.add("student.server.gpus", [0], "prime-rl's default inference_gpu_ids")
    _trainer(draft)
    draft.add("loss.teacher_tau", 0.0, "prime-rl's default")
    draft.add("loss.adv_tau", 1.0, "prime-rl's default")
    draft.add("skip_verification", False, "prime-rl's default")


def _algo(draft: Draft) -> None:
    entry = draft.entries.get("orchestrator.algo.type")
    if entry is None:
        return
    if entry.value == "opd":
        draft.map(entry, "loss.teacher_tau", 1.0, "pure distillation; prime-rl's ref-KL loss has no coefficient")
        draft.add("loss.adv_tau", 0.0, 'orchestrator.algo.type = "opd"')
        draft.add("skip_verification", True, 'orchestrator.algo.type = "opd" trains on no reward; false tracks them')
    elif entry.value == "opsd":
        draft.refuse(entry, "the student's own model as teacher with a hint: write the hint as teacher.system_prompt")
    else:
        draft.refuse(entry, f"{shown(entry.value)} has no teacher; here are loss.teacher_tau and loss.adv_tau")


def _batch(draft: Draft) -> None:
    """Theirs counts episodes a step, ours tasks a step and episodes of each."""
    batch, group = (draft.entries.get(f"orchestrator.{key}") for key in ("batch_size", "rollouts_per_example"))
    try:
        size = integer(group.value) if group is not None else 1
        if group is not None:
            draft.map(group, "rollout.group_size", size)
    except ValueError as error:
        assert group is not None
        draft.refuse(group, str(error))
        size = 1
    if batch is None:
        return
    try:
        total = integer(batch.value)
    except ValueError as error:
        draft.refuse(batch, str(error))
        return
    if size < 1 or total % size:
        draft.refuse(batch, f"{total} episodes a step are no whole number of tasks with {size} episodes each")
        return
    draft.map(batch, "rollout.batch_size", total // size, f"tasks a step: {total} episodes / {size} of each task")
    draft.add("rollout.group_size", 1, "prime-rl's default rollouts_per_example")


def _betas(draft: Draft) -> None:
    """Two keys there, one array here; the one that is not given is prime-rl's default."""
    given = [draft.entries.get(f"trainer.optim.betas{n}") for n in (1, 2)]
    if not any(given):
        return
    try:
        values = [d if e is None else number(e.value) for e, d in zip(given, (0.9, 0.999), strict=True)]
    except ValueError as error:
        for entry in filter(None, given):
            draft.refuse(entry, str(error))
        return
    for entry in filter(None, given):
        draft.map(entry, "optim.betas", values)


def _env(draft: Draft, entry: Entry) -> None:
    listed = entry.value if isinstance(entry.value, list) else [entry.value]
    names = [environment_id(item) if isinstance(item, dict) else "?" for item in listed]
    if len(listed) > 1 and all(isinstance(item, dict) for item in listed):
        environments(draft, entry, listed)
        draft.refuse(
            entry,
            f"verifiers environments ({', '.join(names)}): give each as sources.NAME.env, as verifiers:ID where its "
            "package is installed (docs/write_an_env.md), or its tools and tasks as a folder (python -m envs new NAME)",
        )
        return
    draft.refuse(
        entry,
        f"a verifiers environment ({', '.join(names)}): give it with --env verifiers:ID where its package is installed "
        "(docs/write_an_env.md), or write its tools and tasks as a folder (python -m envs new NAME) for --env ./NAME",
    )


def _gpus(draft: Draft, key: str, inference: str, ours: str) -> None:
    """GPUs, and how the model is spread over them: copies = GPUs / tensor parallel, as prime-rl sets it up."""
    table = f"{ours}.server"
    given = draft.entries.get(key)
    tp, dp = (draft.entries.get(f"{inference}.parallel.{name}") for name in ("tp", "dp"))
    for entry, name in ((tp, "tensor_parallel"), (dp, "data_parallel")):
        if entry is not None:
            try:
                draft.map(entry, f"{table}.{name}", integer(entry.value))
            except ValueError as error:
                draft.refuse(entry, str(error))
    if given is None:
        return
    try:
        gpus = integers(given.value)
    except ValueError as error:
        draft.refuse(given, str(error))
        return
    spread = draft.value(f"{table}.tensor_parallel") or 1
    if not gpus or len(gpus) % spread:
        draft.refuse(given, f"{len(gpus)} GPUs are no whole number of copies over {spread} each")
        return
    copies = len(gpus) // spread
    draft.map(given, f"{table}.gpus", gpus, f"vLLM servers that the run starts: {copies} copies over {spread} GPU each")
    if copies > 1:
        draft.add(f"{table}.data_parallel", copies, f"{key}: copies of the model, as prime-rl sets it up")


def _trainer(draft: Draft) -> None:
    given = draft.entries.get("trainer_gpu_ids")
    if given is None:
        if 0 in (draft.value("student.server.gpus") or ()):
            words = "their default is GPU 1: CUDA_VISIBLE_DEVICES=1 python -m ...; else it shares GPU 0 with a server"
            draft.say("", "trainer_gpu_ids", "dropped", words)
        return
    try:
        gpus = integers(given.value)
    except ValueError as error:
        draft.refuse(given, str(error))
        return
    if len(gpus) == 1:
        draft.drop(given, f"the trainer takes the first GPU that it sees: CUDA_VISIBLE_DEVICES={gpus[0]} python -m ...")
    else:
        visible = f"CUDA_VISIBLE_DEVICES={','.join(map(str, gpus))}"
        launcher = f"python -m torch.distributed.run --standalone --nproc-per-node {len(gpus)} -m distill.run ..."
        draft.drop(given, f"the launcher's: {visible} {launcher} (docs/concepts.md)")
