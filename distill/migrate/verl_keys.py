"""verl's keys, and what becomes of each."""

from __future__ import annotations

from typing import Any, get_args

from distill.migrate.draft import (
    Draft,
    Rule,
    boolean,
    drop,
    integer,
    later,
    number,
    numbers,
    one_of,
    only,
    refuse,
    text,
    texts,
    to,
)
from distill.migrate.source import Entry
from distill.trackers import TrackerName

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
_PACKING = "batches are cut by tokens, optim.micro_batch_tokens; no result depends on it"
_LAUNCH = "FSDP2, without settings; several GPUs by the launcher: python -m torch.distributed.run (docs/concepts.md)"
_RAY = "the trainer is not on Ray; rollout workers can be: rollout.executor, [rollout.ray]"
_NO_CRITIC = "no critic: the signal is the teacher's, token by token"
_REWARDS = "rewards are not trained on: loss.adv_tau is 0"
_LOGS = "metrics.jsonl, curves and episodes are written in any case"
_TRUST = "never: a model's own code is not run; take a model that transformers knows"
_NO_CLIP = "the ratio is capped at loss.rho instead; loss.surrogate = ppo clips, by loss.clip_low and clip_high"


def _top_k(value: Any) -> int:
    return max(0, integer(value))


def _logger(draft: Draft, entry: Entry) -> None:
    """`["console", "wandb"]`; trackers that we do not have are named."""
    wanted = texts(entry.value)
    trackers = [name for name in wanted if name in get_args(TrackerName)]
    others = [name for name in wanted if name not in (*trackers, "console", "file")]
    note = f"not to be had: {', '.join(others)}" if others else _LOGS
    if trackers:
        draft.map(entry, "tracking.to", trackers, note)
    elif others:
        draft.refuse(entry, note)
    else:
        draft.drop(entry, note)


_TEACHER = to("teacher.model", text)
_RESPONSE = to("rollout.max_turn_tokens", integer, "a turn")
TEMPERATURE = "other than 1 it is off policy, corrected up to loss.rho; 1.0 is what we would take"
_SCHEDULE = to("optim.schedule", one_of(constant="constant", cosine="cosine"))

RULES: dict[str, Rule] = {
    "--config-name": later,
    "--config-path": drop("Hydra's own"),
    "hydra.*": drop("Hydra's own"),
    # models
    "actor_rollout_ref.model.path": to("student.model", text),
    "actor_rollout_ref.ref.model.path": _TEACHER,
    "distillation.teacher_model.model_path": _TEACHER,
    "actor_rollout_ref.model.trust_remote_code": only(False, "nothing runs a model's own code here", _TRUST),
    "data.trust_remote_code": only(False, "nothing runs a model's own code here", _TRUST),
    "actor_rollout_ref.model.enable_gradient_checkpointing": to("student.gradient_checkpointing", boolean),
    "actor_rollout_ref.model.lora_rank": later,
    "actor_rollout_ref.model.lora_alpha": later,
    "actor_rollout_ref.model.target_modules": later,
    "actor_rollout_ref.model.*": drop(_LAUNCH),
    # data
    "data.train_files": later,
    "data.val_files": later,
    "data.train_batch_size": later,
    "data.val_batch_size": drop("eval.num_tasks tasks are evaluated"),
    "data.max_prompt_length": later,
    "data.max_response_length": _RESPONSE,
    "data.prompt_key": drop("convert_dataset.py --prompt COLUMN"),
    "data.shuffle": only(True, "tasks are shuffled", "no such setting: tasks are shuffled by seed"),
    "data.seed": to("tasks.seed", integer),
    "data.filter_overlong_prompts": drop("an episode whose prompt does not fit ends at once and is counted"),
    "data.truncation": only("error", "no prompt is cut here either", "no prompt is cut"),
    "data.*": drop("convert_dataset.py reads data sets; a run reads task files (docs/formats.md)"),
    # the loss
    f"{ACTOR}.use_kl_loss": only(True, "the KL is the loss", "then there is no distillation: loss.teacher_tau = 0"),
    f"{ACTOR}.kl_loss_coef": to("loss.teacher_tau", number),
    f"{ACTOR}.kl_loss_type": later,
    f"{ACTOR}.entropy_coeff": to("loss.entropy_coeff", number),
    f"{ACTOR}.ppo_epochs": to("optim.epochs", integer, "updates from the same episodes"),
    f"{ACTOR}.ppo_mini_batch_size": later,
    f"{ACTOR}.ppo_max_token_len_per_gpu": to("optim.micro_batch_tokens", integer),
    f"{ACTOR}.ppo_micro_batch_size": drop(_PACKING),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": drop(_PACKING),
    f"{ACTOR}.use_dynamic_bsz": drop(_PACKING),
    f"{ACTOR}.loss_agg_mode": only("token-mean", "the mean over the step's tokens", "loss.turn_balance, or token-mean"),
    f"{ACTOR}.clip_ratio": drop(_NO_CLIP),
    f"{ACTOR}.clip_ratio_low": drop(_NO_CLIP),
    f"{ACTOR}.clip_ratio_high": drop(_NO_CLIP),
    f"{ACTOR}.clip_ratio_c": drop(_NO_CLIP),
    f"{ACTOR}.grad_clip": to("optim.max_grad_norm", number),
    f"{ACTOR}.optim.lr": to("optim.lr", number),
    f"{ACTOR}.optim.weight_decay": to("optim.weight_decay", number),
    f"{ACTOR}.optim.betas": to("optim.betas", numbers),
    f"{ACTOR}.optim.lr_warmup_steps": later,
    f"{ACTOR}.optim.lr_warmup_steps_ratio": later,
    f"{ACTOR}.optim.warmup_style": _SCHEDULE,
    f"{ACTOR}.optim.lr_scheduler_type": _SCHEDULE,
    f"{ACTOR}.optim.total_training_steps": drop("steps is what counts"),
    f"{ACTOR}.*": drop(_LAUNCH),
    "actor_rollout_ref.ref.*": drop(_PACKING),
    "actor_rollout_ref.hybrid_engine": drop(_LAUNCH),
    "distillation.enabled": later,
    "distillation.distillation_loss.loss_mode": later,
    "distillation.distillation_loss.topk": later,
    "distillation.distillation_loss.distillation_loss_coef": to("loss.teacher_tau", number),
    "distillation.distillation_loss.use_policy_loss": only(False, _REWARDS, "loss.adv_tau = 1 with graders"),
    "distillation.distillation_loss.use_task_rewards": only(False, _REWARDS, "loss.adv_tau = 1 with graders"),
    "distillation.distillation_loss.use_policy_gradient": drop("it is one here: the log-ratio weighs log p"),
    "distillation.distillation_loss.loss_max_clamp": refuse(
        "another clamp, of a token's loss; loss.advantage_clip bounds a token's log-ratio"
    ),
    "distillation.distillation_loss.*": refuse("no such setting"),
    "distillation.teacher_model.inference.tensor_model_parallel_size": to("teacher.server.tensor_parallel", integer),
    "distillation.teacher_model.inference.gpu_memory_utilization": to("teacher.server.memory", number),
    "distillation.teacher_model.inference.max_model_len": to("teacher.server.max_context", integer),
    "distillation.teacher_model.*": drop("GPUs of the teacher: teacher.server.gpus"),
    "distillation.teacher_models.*": later,
    "distillation.teacher_key": later,
    "distillation.*": drop("GPUs of the teacher: teacher.server.gpus"),
    "algorithm.adv_estimator": drop(_REWARDS),
    "algorithm.use_kl_in_reward": only(False, "it is in the loss", "the KL is in the loss; it is never a reward"),
    "algorithm.kl_ctrl.*": drop("the KL is in the loss: loss.teacher_tau"),
    "algorithm.gamma": drop("a token bears its own KL alone (discount 0)"),
    "algorithm.lam": drop(_NO_CRITIC),
    "algorithm.*": drop(_REWARDS),
    "critic.*": drop(_NO_CRITIC),
    "reward_model.*": drop(_REWARDS),
    "reward.*": drop(_REWARDS),
    "custom_reward_function.*": drop(f"{_REWARDS}; for evaluation: @reward functions (docs/write_an_env.md)"),
    # rollouts
    f"{ROLLOUT}.temperature": to("rollout.temperature", number, TEMPERATURE),
    f"{ROLLOUT}.top_p": to("rollout.top_p", number),
    f"{ROLLOUT}.top_k": to("rollout.top_k", _top_k, "-1, all, is 0 here"),
    f"{ROLLOUT}.n": to("rollout.group_size", integer, "episodes of each task"),
    f"{ROLLOUT}.response_length": _RESPONSE,
    f"{ROLLOUT}.prompt_length": later,
    f"{ROLLOUT}.name": later,
    f"{ROLLOUT}.mode": drop("episodes are played at the same time in any case"),
    f"{ROLLOUT}.tensor_model_parallel_size": to("student.server.tensor_parallel", integer),
    f"{ROLLOUT}.gpu_memory_utilization": to("student.server.memory", number),
    f"{ROLLOUT}.max_model_len": to("student.max_context", integer),
    f"{ROLLOUT}.dtype": to("student.server.dtype", text),
    f"{ROLLOUT}.do_sample": only(
        True, "tokens are sampled", "no such setting: a greedy policy has nothing to learn from"
    ),
    f"{ROLLOUT}.ignore_eos": only(False, "an end is an end", "no such setting"),
    f"{ROLLOUT}.multi_turn.enable": later,
    f"{ROLLOUT}.multi_turn.max_assistant_turns": to("rollout.max_turns", integer),
    f"{ROLLOUT}.multi_turn.max_tool_response_length": to(
        "rollout.max_tool_output_chars", integer, "characters in both"
    ),
    f"{ROLLOUT}.multi_turn.tool_config_path": refuse("write the tools as @tool functions in a folder's tools.py"),
    f"{ROLLOUT}.multi_turn.interaction_config_path": refuse("write an environment (docs/write_an_env.md)"),
    f"{ROLLOUT}.multi_turn.*": drop("calls are read by the student's own template"),
    f"{ROLLOUT}.val_kwargs.n": to("eval.group_size", integer),
    f"{ROLLOUT}.val_kwargs.*": refuse("an evaluation samples as training does"),
    f"{ROLLOUT}.*": drop("vLLM's own arguments: student.server.extra_args"),
    # the run
    "trainer.total_training_steps": later,
    "trainer.total_epochs": refuse("steps = epochs x tasks / rollout.batch_size; set steps"),
    "trainer.save_freq": later,
    "trainer.test_freq": later,
    "trainer.val_before_train": to("eval.at_start", boolean),
    "trainer.max_actor_ckpt_to_keep": to("checkpoint.keep_last", integer),
    "trainer.default_local_dir": to("output_dir", text, "a run makes a folder of its own in it"),
    "trainer.experiment_name": to("run_id", text),
    "trainer.project_name": to("tracking.project", text),
    "trainer.logger": _logger,
    "trainer.n_gpus_per_node": drop(
        "the launcher's --nproc-per-node (docs/concepts.md); servers: student.server.gpus, teacher.server.gpus"
    ),
    "trainer.nnodes": drop("the launcher's --nnodes (docs/concepts.md)"),
    "trainer.resume_mode": drop("a run goes on with --resume RUN"),
    "trainer.*": drop(_LAUNCH),
    "ray_init.*": drop(_RAY),
    "ray_kwargs.*": drop(_RAY),
    "global_profiler.*": drop(_LOGS),
    "transfer_queue.*": drop(_RAY),
}

KL_TYPES = {
    "kl": "k1 backpropagated has no expected gradient; written: loss.type = sampled, the reverse KL",
    "low_var_kl": "k3 backpropagated follows the forward KL; not offered. Written: loss.type = sampled, the reverse KL",
    "k1": "k1 backpropagated has no expected gradient; written: loss.type = sampled, the reverse KL",
    "k3": "k3 backpropagated follows the forward KL; not offered. Written: loss.type = sampled, the reverse KL",
    "abs": "its gradient is no divergence's; written: loss.type = sampled, the reverse KL",
    "full": "loss.type = full needs the teacher in this process; written: sampled, the same on average",
}
"""What each optimises: docs/loss.md, "k1, k2, k3"."""
