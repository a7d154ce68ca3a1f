"""The configuration of a run: one frozen tree, the single source of its help, schema, documentation and checks.

Sections are pydantic models with a docstring, a unit and a bound under each field. Unknown keys and values of the
wrong type are refused, never coerced: `"1e-5"` is a string, not a number. `distill.config_load` reads TOML files and
flags into it and reports every mistake with its file and line. Nothing here imports torch.

    python -m distill.config schema                      # JSON schema
    python -m distill.config show --config a.toml        # every value and where it came from
    python -m distill.config docs                        # docs/configuration.md
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from distill.alarms import AlarmName
from distill.config_rules import InconsistentConfig, notes_of, problems_of
from distill.trackers import TrackerName
from envs.types import Limits, ParseErrorPolicy, TerminationPolicy

Dtype = Literal["auto", "float32", "bfloat16"]


def _environment_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
        raise ValueError("this is the NAME of an environment variable that holds the key, such as TEACHER_API_KEY")
    return name


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("wanted an http:// or https:// address with its /v1, such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ValueError("a user name or password does not belong in the address; use api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("an address has no ?query and no #fragment")
    return url.rstrip("/")


def _table_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
        raise ValueError("letters, digits and '_' only, a letter first: it becomes part of names of metrics and files")
    return name


def _run_id(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError("letters, digits, '.', '_' and '-' only: it becomes the name of a folder")
    return name


BaseUrls = Annotated[
    tuple[str, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v, json_schema_input_type=str | list[str]),
    AfterValidator(lambda urls: tuple(map(_base_url, urls))),
]
EnvVar = Annotated[str, AfterValidator(_environment_variable)]
TableName = Annotated[str, AfterValidator(_table_name)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """What all sections share."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )


class TasksConfig(Section):
    """Which tasks are trained on and which ones are evaluated on."""

    train: Text | None = None
    """Task JSONL file (docs/formats.md), relative to the working directory. none: the environment's own tasks."""
    eval: Text | None = None
    """Task JSONL file of held-out tasks. none: the environment's own `test` split, if it has one."""
    num_train: Count | None = None
    """Training tasks of each source to use (from the start of the file) or to generate. none: all that there are."""
    num_eval: Count | None = None
    """Evaluation tasks of each source to read or to generate. none: all that there are."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of generated tasks and of the order in which tasks are taken."""


class LoraConfig(Section):
    """Low-rank adapters (PEFT) instead of full training. The table switches it on."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    target_modules: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] = ("all-linear",)
    """Names of the modules that get an adapter; "all-linear" alone is every linear layer but the output head."""
    quantization: Literal["none", "nf4"] = "none"
    """Number format of the frozen weights under the adapters. nf4: 4 bits (QLoRA, arXiv 2305.14314), with the
    bitsandbytes package."""


class ServerConfig(Section):
    """vLLM servers that the run starts, supervises and ends. The table switches it on, even if it is empty."""

    gpus: Annotated[tuple[CountOrZero, ...], Strict(False)] = ()
    """GPUs by their index: tensor_parallel x data_parallel of them. Empty: all that the server finds; on a machine
    without a GPU its cores, divided between the servers of the run."""
    tensor_parallel: Count = 1
    """GPUs that one copy of the model is spread over."""
    data_parallel: Count = 1
    """Copies of the model, each a server of its own: an episode stays with one, and one may die alone."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the served weights. auto: what the model's own configuration says."""
    memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory that a server may take."""
    cpu_cache_gib: Count = 1
    """GiB of key-value cache on a machine without a GPU."""
    max_context: Annotated[int, Field(ge=16)] | None = None
    """Tokens of context that the server takes. none: `student.max_context` for the student, room for the longest
    episode for the teacher; else what the model's configuration says."""
    extra_args: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Further arguments of vLLM's server, as on its command line."""
    python: Text | None = None
    """Python interpreter that has vLLM. none: the one that runs this."""
    startup_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 900.0
    """Seconds until a started server must answer."""
    max_restarts: CountOrZero = 3
    """Restarts of crashed servers of this table during the run; one more crash ends it."""


class StudentConfig(Section):
    """The model that plays the episodes and is trained."""

    model: Text
    """Folder, Hub name, or `builtin:` name of a model that is made on first use (docs/cpu-default.md)."""
    revision: Text | None = None
    """Commit or branch of a Hub model. none: the Hub's default branch."""
    dtype: Dtype = "auto"
    """Number format of weights and activations in the trainer. auto: bfloat16 on a GPU, float32 on a CPU."""
    base_url: BaseUrls | None = None
    """Address of the vLLM server that samples, with its `/v1`, or a list of several that serve the same model. none:
    `student.server`, else the embedded engine in this process."""
    server: ServerConfig | None = None
    """Servers that the run starts for the student. none: `student.base_url`, else the embedded engine."""
    weight_sync: Literal["disk", "nccl"] = "disk"
    """How trained weights reach vLLM. disk: safetensors in a new folder each version. nccl: from GPU to GPU; full
    weights only."""
    weights_dir: Text | None = None
    """Folder of published weights, which the servers must be able to read; /dev/shm/NAME is fastest. none: `weights/`
    in the run's folder."""
    api_key_env: EnvVar | None = None
    """Name of the environment variable with the server's key. Keys themselves never stand in a configuration."""
    max_context: Annotated[int, Field(ge=16)] | None = None
    """Tokens that the model may see. none: what the server or the model's own configuration says."""
    lora: LoraConfig | None = None
    """Adapters instead of full training. none: all weights are trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""
    enable_thinking: bool | None = None
    """Passed to chat templates that know it (Qwen3). none: the template's own default."""


class OneTeacherConfig(Section):
    """One of several teachers, for the sources that name it (docs/concepts.md, "Several teachers")."""

    model: Text | None = None
    """Folder, Hub name, `builtin:` name, or the name its server knows it by. none: the student's model as it was at
    the start, which teaches something only with a `system_prompt` or `examples`."""
    base_url: BaseUrls | None = None
    """Address of the vLLM server that scores, with its `/v1`, or a list of several that serve the same model. none:
    `server` beside this, else the embedded engine in this process."""
    server: ServerConfig | None = None
    """Servers that the run starts for the teacher. none: `base_url` beside this, else the embedded engine."""
    on_student_server: bool = False
    """Score with the base model of the student's own vLLM server; the student is a LoRA adapter on it."""
    api_key_env: EnvVar | None = None
    """Name of the environment variable with the server's key."""
    dtype: Dtype = "auto"
    """Number format of the teacher's weights where it runs in this process."""
    system_prompt: Text | None = None
    """Text that only the teacher sees, before the task's own system message (worked examples, privileged facts)."""
    prompt_fields: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Names in the tasks' metadata whose values take the place of `{name}` in `system_prompt`: the reference of a task
    that only the teacher sees (arXiv 2601.18734)."""
    examples: Text | None = None
    """JSONL file of dialogues that only the teacher sees, after `system_prompt` and before the task's own messages
    (docs/formats.md, "Examples for the teacher")."""
    max_tokens_in_flight: Count = 131_072
    """Tokens in all scoring requests at once; prompt log-probabilities cost the server memory."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds for one scoring request, its retries included."""

    @property
    def in_process(self) -> bool:
        """Whether the embedded engine serves it."""
        return self.base_url is None and self.server is None and not self.on_student_server

    @property
    def sees_more(self) -> bool:
        """Whether it sees something before the task that the student does not."""
        return self.system_prompt is not None or self.examples is not None


class TeacherConfig(OneTeacherConfig):
    """The model that scores the student's tokens. It is asked for log-probabilities, never for text. Of several
    teachers (`[teachers.NAME]`), that of every source that names none."""

    top_k: Annotated[int, Field(ge=0, le=1024)] = 0
    """Candidates a position that every teacher returns, for the `topk` loss. 0: the sampled token alone."""
    max_dropped_fraction: Fraction = 0.2
    """Share of a step's episodes that may go unscored before the run stops."""


class SourceConfig(Section):
    """A data set with its environment and its teacher, one of several in a run (docs/concepts.md, "Several
    teachers")."""

    env: Text | None = None
    """Name of a registered environment or path of an environment's folder. none: the run's."""
    env_args: dict[str, Any] | None = None
    """Keyword arguments of the environment. none: the run's where the environment is the run's, else no arguments."""
    tasks: Text | None = None
    """Task JSONL file. none: the environment's own tasks."""
    eval_tasks: Text | None = None
    """Task JSONL file of held-out tasks. none: the environment's own `test` split, if it has one."""
    teacher: Text | None = None
    """Name of a teacher in `[teachers]`. none: `[teacher]`."""
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Share of a step's tasks, relative to the other sources. 0: evaluated only."""


class RayConfig(Section):
    """Rollout workers on Ray, for `rollout.executor = "ray"` (docs/serving.md, "Rollout workers")."""

    workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Worker processes, each with an environment for every episode that it plays and a browser of its own."""
    episodes_per_worker: Annotated[int, Field(ge=1, le=1000)] = 32
    """Episodes that one worker plays at once; `rollout.max_concurrent` bounds all workers together."""
    cpus: Annotated[float, Field(gt=0, le=1024)] = 1.0
    """Cores that Ray sets aside for a worker where it looks for a machine; the process may use more."""
    address: Text | None = None
    """Address of a Ray cluster that is there, such as `10.0.0.1:6379`. none: a Ray on this machine that the run starts
    and ends."""
    host: Text | None = None
    """Address of this machine by which workers on other machines ask it for completions, in a network that you trust.
    none: loopback, for workers on this machine."""


class CurriculumConfig(Section):
    """Few turns at first, more later (TCOD, arXiv 2604.24005). The table switches it on."""

    start: Count = 2
    """Turns an episode at the first step."""
    every: Count = 10
    """Steps after which an episode may have one more turn, up to `rollout.max_turns`."""


class RolloutConfig(Section):
    """How many episodes are played, how they are sampled, and every budget of an episode."""

    batch_size: Count = 16
    """Tasks a step."""
    group_size: Count = 4
    """Episodes of each task: a step has batch_size x group_size of them."""
    max_concurrent: Count = 64
    """Episodes in play at once."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """Updates that the weights which sampled a token may be behind those that are trained on it. 0: rollouts and
    training take turns. 1 or more: the next episodes are played while a step trains; `loss.rho` corrects."""
    executor: Literal["asyncio", "ray"] = "asyncio"
    """asyncio: environments live in this process. ray: in worker processes, here or on other machines; needs the extra
    `ray`."""
    ray: RayConfig = Field(default_factory=RayConfig)
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Sampling temperature. Other than 1, the student is trained off its own policy (corrected by `loss.rho`)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1, tokens outside of the nucleus are never seen by the loss."""
    top_k: CountOrZero = 0
    """Sample among the k most probable tokens. 0: off."""
    max_turns: Count = 10
    """Model calls an episode."""
    curriculum: CurriculumConfig | None = None
    """A smaller `max_turns` in the first steps. none: the same in all."""
    max_turn_tokens: Count = 1024
    """Sampled tokens a turn."""
    max_episode_tokens: Count | None = None
    """Tokens an episode: prompt, sampled tokens and tool output together. none: what the context holds."""
    max_tool_calls: Count | None = None
    """Tool calls an episode, over all tools. none: no limit."""
    max_calls_per_tool: dict[str, CountOrZero] = Field(default_factory=dict)
    """Calls an episode by tool name: `[rollout.max_calls_per_tool]`, `search = 5`. Tools not named have no limit."""
    max_tool_output_chars: Count = 8000
    """Characters of one tool result that the model sees; the rest is behind a page footer."""
    max_parse_errors: CountOrZero = 3
    """Malformed tool calls after which an episode ends."""
    timeout_s: Annotated[float, Field(gt=0, le=604_800)] = 600.0
    """Seconds of wall time an episode."""
    termination_policy: TerminationPolicy = "last_tool"
    """last_tool: a reply without a tool call ends the episode. max_turns: only an ending tool or a budget does."""
    on_parse_error: ParseErrorPolicy = "train"
    """What becomes of a turn with a malformed call. train: its tokens are trained on. mask: they are not. stop: the
    episode ends."""

    def limits(self, step: int | None = None) -> Limits:
        """The budgets of an episode, as the environment layer wants them.

        Args:
            step: of training, from 1: `curriculum` applies. None: it does not.
        """
        max_turns = self.max_turns
        if self.curriculum is not None and step is not None:
            max_turns = min(max_turns, self.curriculum.start + (step - 1) // self.curriculum.every)
        return Limits(
            max_turns=max_turns,
            max_turn_tokens=self.max_turn_tokens,
            max_episode_tokens=self.max_episode_tokens,
            max_tool_calls=self.max_tool_calls,
            max_calls_per_tool=dict(self.max_calls_per_tool),
            max_tool_output_chars=self.max_tool_output_chars,
            max_parse_errors=self.max_parse_errors,
            timeout_s=self.timeout_s,
            termination_policy=self.termination_policy,
            on_parse_error=self.on_parse_error,
        )


class TauScheduleConfig(Section):
    """Where `loss.teacher_tau` goes and over how many steps. The table switches it on."""

    end: Annotated[float, Field(ge=0, le=100)]
    """Weight of the teacher's signal from step `over` + 1 on."""
    over: Count
    """Steps from the first one, which has `loss.teacher_tau`, to the one that has `end`."""
    shape: Literal["linear", "cosine"] = "linear"
    """linear: by the same amount each step. cosine: slowly at both ends."""

    def value(self, start: float, step: int) -> float:
        """The weight in force at `step`, from 1, if it begins with `start`."""
        done = min(1.0, (step - 1) / self.over)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (self.end - start) * done


class LossConfig(Section):
    """The reverse KL on the student's own tokens (docs/loss.md)."""

    type: Literal["sampled", "topk", "full"] = "sampled"
    """sampled: the sampled token's log-ratio. topk: exact over the teacher's k candidates, sampled on the tail; far
    less variance. full: exact over the vocabulary, where the teacher runs in this process."""
    teacher_tau: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Weight of the teacher's signal; at the first step, where a schedule changes it."""
    adv_tau: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the rewards' advantage. 0: rewards never enter the loss."""
    candidates: Literal["teacher", "student"] = "teacher"
    """Whose `teacher.top_k` candidates the `topk` loss sums over. student: those of the student at sampling; only with
    a teacher that scores given ids (vLLM on a GPU)."""
    rho: Annotated[float, Field(ge=1, le=1000)] = 2.0
    """Cap of the importance ratio between the trainer's and the sampler's probability of a token."""
    surrogate: Literal["importance_sampling", "ppo"] = "importance_sampling"
    """How old tokens count. importance_sampling: by the truncated ratio (`rho`). ppo: the clipped ratio of PPO (arXiv
    1707.06347), which zeroes the gradient of tokens that moved too far; the type `sampled` alone."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """`ppo`: the ratio counts down to 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    """`ppo`: the ratio counts up to 1 + clip_high."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Sample estimator that the type `sampled` descends. k1 (the log-ratio, by REINFORCE) and k2 (its square, by
    backpropagation) have the reverse KL's gradient; k3 has the forward KL's and is refused (docs/loss.md)."""
    entropy_coeff: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of an entropy bonus; above 0 it is no longer the reverse KL alone that is descended."""
    adv_norm: Literal["mean", "std"] = "mean"
    """Advantage of an episode in its task's group: reward minus the mean (Dr. GRPO, arXiv 2503.20783), or that over
    the standard deviation (GRPO, arXiv 2402.03300)."""
    turn_balance: Fraction = 0.0
    """0: every trained token weighs the same, so long turns weigh more. 1: every turn weighs the same (TurnOPD, arXiv
    2607.05804). Between: a mixture."""
    source_balance: Fraction = 0.0
    """0: every trained token weighs the same, so sources with long episodes weigh more. 1: each source's tokens
    together weigh as its `share` (Open-MOPD, arXiv 2608.19098). Between: a mixture."""
    advantage_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Cap of a token's absolute log-ratio of teacher and student in the loss, in nats: less variance, a biased
    gradient. none: no cap."""
    teacher_tau_schedule: TauScheduleConfig | None = None
    """A `teacher_tau` that changes from step to step. none: the same in all."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's signal has a weight above 0 in some step."""
        schedule = self.teacher_tau_schedule
        return self.teacher_tau > 0 or (schedule is not None and schedule.end > 0)

    def at(self, step: int) -> LossConfig:
        """The loss of one step: `teacher_tau` is the value in force.

        Args:
            step: of training, from 1.
        """
        if self.teacher_tau_schedule is None:
            return self
        tau = self.teacher_tau_schedule.value(self.teacher_tau, step)
        return self.model_copy(update={"teacher_tau": tau, "teacher_tau_schedule": None})


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak learning rate. Full training of billions of parameters: 1e-6 to 1e-5. LoRA: about 1e-4."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Strict(False),
    ] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay, times the learning rate a step."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from 0 to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    epochs: Count = 1
    """Updates from the same episodes; from the second on the ratio to the sampler's probabilities corrects them."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Gradients are scaled down to this L2 norm where theirs is larger."""
    micro_batch_tokens: Count = 16_384
    """Tokens of one forward pass, padding included where a model's traces cannot be packed; a longer trace goes alone.
    Bounds memory, changes no result."""


class CheckpointConfig(Section):
    """When the run saves what it needs to go on."""

    every: Count = 10
    """Steps between checkpoints. One is always written after the last step."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    keep_every: CountOrZero = 0
    """Checkpoints of every n-th step are never deleted. 0: only the last ones are kept."""
    keep_best: bool = False
    """Save the step whose evaluation had the highest success so far (`eval.every`), and keep it beside the last."""


class CostConfig(Section):
    """What the run cannot see for itself when it estimates GPU-seconds (docs/metrics.md, "Cost")."""

    student_gpus: CountOrZero | None = None
    """GPUs behind `student.base_url`. none: not known, and not in the estimate."""
    teacher_gpus: CountOrZero | None = None
    """GPUs behind `teacher.base_url`, of several teachers behind all of theirs. none: not known, and not in the
    estimate."""


class EvalConfig(Section):
    """Evaluation on held-out tasks. Graders run here even where `skip_verification` is on: nothing is trained on."""

    every: CountOrZero = 0
    """Steps between evaluations during training. 0: none."""
    num_tasks: Count = 100
    """Tasks an evaluation, from the start of the evaluation tasks."""
    group_size: Count = 1
    """Episodes of each evaluation task."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = False
    """Evaluate after the last step."""
    teacher: bool = True
    """Evaluate the teacher too, once, where the first evaluation is at the start and the teacher can sample."""


class CheckConfig(Section):
    """The pre-flight check that runs before training (`python -m distill.check`)."""

    skip: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Names of checks that are not made (`mismatch`, `vocabulary` ...). That they were skipped is reported."""
    max_mismatch_kl: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Mean KL a token, in nats, between what the sampler and the trainer say of the same tokens."""
    max_self_difference: Annotated[float, Field(gt=0, le=100)] = 0.5
    """Largest difference of one log-probability, in nats, between two scorings of the same tokens by one server.
    float32 stays below 1e-3; bfloat16 kernels differ by up to 0.5 on single tokens."""
    max_canary_difference: Annotated[float, Field(gt=0, le=100)] = 0.5
    """Largest difference of one log-probability, in nats, between trainer and server on a fixed sequence after new
    weights were published."""


class TrackingConfig(Section):
    """Copies of the metrics in experiment trackers (docs/metrics.md). `metrics.jsonl` is always written, and first."""

    to: Annotated[tuple[TrackerName, ...], Strict(False)] = ()
    """Trackers to copy to; their packages are the extra `trackers`. Keys stand in their own environment variables, such
    as WANDB_API_KEY."""
    project: Text = "distill-gym"
    """Project in W&B and trackio."""
    name: Text | None = None
    """Name of the run there. none: the name of the run's folder."""
    tags: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Tags of the run in W&B."""
    offline: bool = False
    """Send nothing: W&B writes into the run's folder, for `wandb sync` later; trackio keeps to its local database."""
    finish_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Seconds that a tracker has after the last step to send what is left; then the run ends without it."""


class AlarmsConfig(Section):
    """What the run warns of (docs/metrics.md). Each threshold: "none" switches its alarm off."""

    stop: Annotated[tuple[AlarmName, ...], Strict(False)] = ()
    """Alarms that end the run, with its last step saved; the others warn."""
    window: Annotated[int, Field(ge=2, le=1000)] = 5
    """Steps that a mean is taken over, or that a number must be beyond its threshold."""
    kl_rise: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.2
    """kl_rising: share by which `teacher_kl` rises over three windows, each above the one before."""
    kl_negative: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.01
    """kl_negative: nats by which the window's `teacher_kl` is below 0, where chance does not explain it."""
    kl_far: Fraction | None = 0.05
    """kl_far: share of tokens further than 5 nats from the teacher, for a window."""
    coverage: Fraction | None = 0.999
    """coverage: least share of the tokens to be trained that the teacher scored."""
    mismatch_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.02
    """mismatch: mean KL a token, in nats, between server and trainer in a step."""
    mismatch_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """mismatch_max: largest difference of a token's log-probability between server and trainer, for a window."""
    ratio_clipped: Fraction | None = 0.05
    """ratio_clipped: share of tokens at the cap `loss.rho`, for a window."""
    entropy_collapse: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """entropy_collapse: share of the entropy of up to 50 steps before that is left, while `teacher_kl` did not fall."""
    length_growth: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 2.0
    """length_growth: sampled tokens an episode as a multiple of up to 50 steps before, while `teacher_kl` did not
    fall."""
    repetition: Fraction | None = 0.4
    """repetition: share of a turn's sequences of four tokens that it repeats (`rollout/repeated`), for a window."""
    truncated: Fraction | None = 0.25
    """truncated: share of episodes cut short by a token budget, for a window."""
    tool_errors: Fraction | None = 0.05
    """tool_errors: share of tool results that are errors, for two windows."""
    valid_calls: Fraction | None = 0.8
    """invalid_calls: least share of tool calls that can be parsed, for two windows."""
    reward_drop: Fraction | None = 0.1
    """reward_drop: how far the window's tracked reward is below that of up to 50 steps before, where chance does not
    explain it."""
    no_op: bool = True
    """no_op: warn where nothing is learnt (no gradient, no learning rate, a student that is its teacher)."""


class RunConfig(Section):
    """All settings of a run."""

    env: Text
    """Name of a registered environment (`python -m envs list`) or path of an environment's folder. Not needed with
    `episodes`, and where each of several sources has its own."""
    env_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment: `[env_args]`, `max_hops = 2`, or `--env_args.max_hops 2`."""
    episodes: Text | None = None
    """Train on stored, scored episodes: a JSONL file, a folder of them, or a run (docs/episodes.md). Nothing is played,
    asked, published or evaluated. none: episodes are played."""
    skip_verification: bool = True
    """Graders are neither built nor called in training, and no reward is computed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of sampling and of the trainer."""
    steps: Count = 100
    """Optimiser steps."""
    output_dir: Text = "runs"
    """Folder of all runs, relative to the working directory."""
    run_id: Annotated[str, AfterValidator(_run_id)] | None = None
    """Name of this run's folder in `output_dir`. none: made from the date, the time and the environment."""
    max_outage_s: Annotated[float, Field(gt=0, le=604_800)] = 900.0
    """Seconds that a model server may be away. Rollouts and scoring wait that long; then the run saves and exits."""
    tasks: TasksConfig = Field(default_factory=TasksConfig)
    sources: dict[TableName, SourceConfig] = Field(default_factory=dict)
    """Several data sets in one run, by name; empty: the run's environment and tasks alone."""
    student: StudentConfig
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    teachers: dict[TableName, OneTeacherConfig] = Field(default_factory=dict)
    """Further teachers, by the name that sources call them."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    check: CheckConfig = Field(default_factory=CheckConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)
    cost: CostConfig = Field(default_factory=CostConfig)

    @property
    def teacher_model(self) -> str:
        """`teacher.model`, or the student's where it is not given."""
        return self.teacher.model or self.student.model

    @property
    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources with `env` and `env_args` filled in; a run without `[sources]` has one, named ""."""
        own = SourceConfig(env=self.env, env_args=self.env_args, tasks=self.tasks.train, eval_tasks=self.tasks.eval)
        if not self.sources:
            return {"": own}
        filled = {}
        for name, source in self.sources.items():
            args = source.env_args if source.env_args is not None else {} if source.env else self.env_args
            filled[name] = source.model_copy(update={"env": source.env or self.env, "env_args": args})
        return filled

    @property
    def all_teachers(self) -> dict[str, OneTeacherConfig]:
        """The teachers that a source has, in the order of the sources; `[teacher]` is named ""."""
        names = dict.fromkeys(source.teacher or "" for source in self.all_sources.values())
        return {name: self.teachers[name] if name else self.teacher for name in names}

    def place_of(self, teacher: OneTeacherConfig) -> OneTeacherConfig:
        """What decides where a teacher is served, and nothing else: those alike in it share one endpoint."""
        return OneTeacherConfig(
            model=teacher.model or self.student.model,
            base_url=teacher.base_url,
            server=teacher.server,
            on_student_server=teacher.on_student_server,
            api_key_env=teacher.api_key_env,
            dtype=teacher.dtype,
        )

    @property
    def places_of_teachers(self) -> dict[str, OneTeacherConfig]:
        """`place_of` of the teachers that a source has, by the name of the first teacher there."""
        places: dict[OneTeacherConfig, str] = {}
        for name, teacher in self.all_teachers.items():
            places.setdefault(self.place_of(teacher), name)
        return {name: place for place, name in places.items()}

    @model_validator(mode="before")
    @classmethod
    def _without_env(cls, values: Any) -> Any:
        """Stored episodes say where they were played; the run takes their name. So does one whose sources all have
        environments of their own, of the first."""
        if not isinstance(values, dict) or values.get("env") is not None:
            return values
        if values.get("episodes") is not None:
            return {"env": "episodes", **values}
        sources = values.get("sources")
        envs = [s.get("env") for s in sources.values() if isinstance(s, dict)] if isinstance(sources, dict) else []
        return {"env": envs[0], **values} if envs and all(envs) else values

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        problems = list(problems_of(self))
        if problems:
            raise InconsistentConfig(problems)
        return self

    def notes(self) -> list[str]:
        """Settings that are allowed and seldom meant, in words for the log."""
        return list(notes_of(self))


if __name__ == "__main__":
    from distill.config_cli import main

    raise SystemExit(main())
