"""verl: a Hydra command line or YAML of `main_ppo`, in the form with `actor_rollout_ref.ref.model.path` as teacher and
the newer ones with `distillation.teacher_model` and `distillation.teacher_models.NAME`."""

from __future__ import annotations

from distill.migrate.draft import Draft, apply, integer, number, shown, texts
from distill.migrate.several import teachers
from distill.migrate.source import Entry
from distill.migrate.verl_keys import ACTOR, KL_TYPES, ROLLOUT, RULES, TEMPERATURE

NAME = "verl"


def convert(draft: Draft) -> None:
    """All keys to settings and rows."""
    removed = [entry for key, entry in draft.entries.items() if key.startswith("~")]
    for entry in removed:
        draft.drop(entry, "a key that is taken away")
        del draft.entries[entry.key]
    apply(draft, RULES)
    teachers(draft)
    _what(draft)
    _loss(draft)
    _files(draft)
    _sizes(draft)
    _turns(draft)
    _served(draft)
    _lora(draft)
    _warmup(draft)
    draft.add("loss.type", "sampled", f"verl's default kl_loss_type low_var_kl: {KL_TYPES['low_var_kl']}")
    draft.add("loss.teacher_tau", 1.0, "verl's default kl_loss_coef")
    draft.add("loss.adv_tau", 0.0, "verl's distillation trains on no reward")
    draft.add("skip_verification", True, "verl's distillation computes no reward")
    draft.add("optim.lr", 1e-5, "verl's default")
    draft.add("rollout.temperature", 0.6, f"verl's default for distillation; {TEMPERATURE}")
    draft.add("rollout.group_size", 1, "verl's default rollout.n")


def _what(draft: Draft) -> None:
    """Is it a distillation at all?"""
    name, enabled = draft.entries.get("--config-name"), draft.entries.get("distillation.enabled")
    distils = any(key.startswith("teacher") and key.endswith(".model") for key in draft.settings)
    if name is not None:
        if isinstance(name.value, str) and "distill" in name.value:
            draft.drop(name, "its defaults are made explicit below")
        else:
            draft.refuse(name, "its values are not read; import that YAML file, and give these overrides after --")
    if enabled is not None:
        if enabled.value is True:
            draft.drop(enabled, "distillation is what this does")
        else:
            draft.refuse(enabled, "then there is nothing to distil")
    if not distils:
        words = "no teacher: actor_rollout_ref.ref.model.path and distillation.teacher_model.model_path are not set"
        draft.say("", "teacher", "impossible", f"{words}; name one with teacher.model")


def _loss(draft: Draft) -> None:
    for key in (f"{ACTOR}.kl_loss_type", "distillation.distillation_loss.loss_mode"):
        entry = draft.entries.get(key)
        if entry is None:
            continue
        kind = entry.value.removesuffix("+") if isinstance(entry.value, str) else None
        if kind in ("mse", "k2"):
            draft.map(entry, "loss.kl_estimator", "k2", "its gradient is that of the reverse KL")
        elif kind is not None and kind in KL_TYPES:
            draft.add("loss.type", "sampled", f"for {key} = {shown(entry.value)}")
            draft.refuse(entry, KL_TYPES[kind])
        elif kind is not None and kind.endswith("topk"):
            draft.add("loss.type", "topk", f"for {key} = {shown(entry.value)}")
            draft.add("teacher.top_k", _top_of(draft), "the teacher's candidates")
            draft.refuse(entry, f"truncated to the candidates, {kind} is biased; written: topk, the reverse KL, exact")
        else:
            draft.refuse(entry, f"{shown(entry.value)} is not known; loss.type is sampled, topk or full")
    top = draft.entries.get("distillation.distillation_loss.topk")
    if top is not None:
        try:
            if draft.value("loss.type") == "topk":
                draft.map(top, "teacher.top_k", integer(top.value))
            else:
                draft.drop(top, "only the topk loss takes candidates")
        except ValueError as error:
            draft.refuse(top, str(error))


def _top_of(draft: Draft) -> int:
    entry = draft.entries.get("distillation.distillation_loss.topk")
    return entry.value if entry is not None and type(entry.value) is int else 32


def _files(draft: Draft) -> None:
    """Parquet is converted by hand, from the columns that verl's data sets have."""
    for key, ours, split in (("data.train_files", "tasks.train", "train"), ("data.val_files", "tasks.eval", "test")):
        entry = draft.entries.get(key)
        if entry is None:
            continue
        try:
            files = texts(entry.value)
            if any(name.startswith("sources.") for name in draft.settings):
                which = "tasks" if split == "train" else "eval_tasks"
                raise ValueError(f"several teachers: a task file for each, as sources.NAME.{which}")
            if len(files) != 1:
                raise ValueError(f"{len(files)} files; convert each, join them into one, and set {ours}")
            if files[0].endswith(".jsonl"):
                draft.map(entry, ours, files[0], "rows as in docs/formats.md")
                continue
            made = f"{split}.jsonl"
            columns = "--prompt prompt --answer reward_model.ground_truth"
            command = f"python convert_dataset.py {files[0]} {columns} --out {made}"
            draft.refuse(entry, f"not a task file; make one: {command}; then {ours} = {made}")
        except ValueError as error:
            draft.refuse(entry, str(error))


def _sizes(draft: Draft) -> None:
    """A step of ours is one update: verl makes train_batch_size / ppo_mini_batch_size of them from one batch."""
    entries = {
        name: draft.entries.get(key)
        for name, key in (
            ("batch", "data.train_batch_size"),
            ("mini", f"{ACTOR}.ppo_mini_batch_size"),
            ("steps", "trainer.total_training_steps"),
            ("save", "trainer.save_freq"),
            ("test", "trainer.test_freq"),
        )
    }
    sizes: dict[str, int] = {}
    for name, entry in list(entries.items()):
        try:
            if entry is not None:
                sizes[name] = integer(entry.value)
        except ValueError as error:
            if entry is not None:
                draft.refuse(entry, str(error))
            entries[name] = None
    batch, mini = sizes.get("batch"), sizes.get("mini")
    updates = batch // mini if batch and mini and batch > mini > 0 else 1
    for name in ("mini", "batch"):
        entry = entries[name]
        if entry is None:
            continue
        if name == "batch" and updates > 1:
            draft.drop(entry, f"{updates} updates of {mini} tasks each; here every update samples anew: {mini} a step")
        elif name == "mini" and batch and mini and mini > batch:
            draft.drop(entry, "larger than a batch")
        else:
            draft.map(entry, "rollout.batch_size", sizes[name], "tasks a step, which is one update")
    for name, ours in (("steps", "steps"), ("save", "checkpoint.every"), ("test", "eval.every")):
        entry = entries[name]
        if entry is None:
            continue
        if sizes[name] < 1:
            draft.drop(entry, "never, or as often as the rest says")
        else:
            note = f"{updates} updates each there, one a step here" if updates > 1 else ""
            draft.map(entry, ours, sizes[name] * updates, note)


def _turns(draft: Draft) -> None:
    several = draft.entries.get(f"{ROLLOUT}.multi_turn.enable")
    if several is not None and several.value is True:
        draft.drop(several, "there are turns where the environment has tools")
    else:
        if several is not None:
            draft.drop(several, "one turn: rollout.max_turns = 1")
        draft.add("rollout.max_turns", 1, "verl plays single turns unless multi_turn.enable")
        draft.add("env", "reasoning", "prompts without tools; its tasks are those of tasks.train")
    for key in ("data.max_prompt_length", f"{ROLLOUT}.prompt_length"):
        prompt = draft.entries.get(key)
        if prompt is None:
            continue
        response = draft.value("rollout.max_turn_tokens")
        try:
            if response is None:
                draft.drop(prompt, "an episode is bounded as a whole: rollout.max_episode_tokens")
            else:
                total = integer(prompt.value) + response
                draft.map(prompt, "rollout.max_episode_tokens", total, "prompt and response together")
        except ValueError as error:
            draft.refuse(prompt, str(error))


def _served(draft: Draft) -> None:
    engine = draft.entries.get(f"{ROLLOUT}.name")
    if engine is None:
        return
    if engine.value == "vllm":
        draft.map(engine, "student.server", {}, "a vLLM server that the run starts")
    elif engine.value == "hf":
        draft.drop(engine, "the embedded engine, in this process")
    else:
        draft.refuse(engine, "students are served by vLLM or by the embedded engine")


def _lora(draft: Draft) -> None:
    """Rank 0 is verl's way to say that there is no adapter."""
    keys = (
        ("lora_rank", "rank", integer),
        ("lora_alpha", "alpha", number),
        ("target_modules", "target_modules", texts),
    )
    rank = draft.entries.get("actor_rollout_ref.model.lora_rank")
    switched_on = rank is not None and rank.value != 0
    for theirs, ours, value_of in keys:
        entry: Entry | None = draft.entries.get(f"actor_rollout_ref.model.{theirs}")
        if entry is None:
            continue
        if not switched_on:
            draft.drop(entry, "no adapter: lora_rank is 0")
            continue
        try:
            draft.map(entry, f"student.lora.{ours}", value_of(entry.value))
        except ValueError as error:
            draft.refuse(entry, str(error))
    if switched_on:
        draft.add("student.lora.alpha", 16.0, "verl's default lora_alpha")


def _warmup(draft: Draft) -> None:
    absolute, ratio = (draft.entries.get(f"{ACTOR}.optim.{k}") for k in ("lr_warmup_steps", "lr_warmup_steps_ratio"))
    try:
        if absolute is not None:
            if integer(absolute.value) < 0:
                draft.drop(absolute, "the ratio is what counts")
            else:
                draft.map(absolute, "optim.warmup_steps", integer(absolute.value))
    except ValueError as error:
        assert absolute is not None
        draft.refuse(absolute, str(error))
    if ratio is None:
        return
    try:
        share, steps = number(ratio.value), draft.value("steps")
        if share == 0:
            draft.drop(ratio, "no warm-up")
        elif steps is None:
            draft.refuse(ratio, f"{share:g} of the steps, which are not known: set optim.warmup_steps")
        else:
            draft.map(ratio, "optim.warmup_steps", round(share * steps), f"{share:g} of {steps} steps")
    except (ValueError, OverflowError) as error:
        draft.refuse(ratio, str(error))
