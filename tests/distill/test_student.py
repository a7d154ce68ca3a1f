"""One training step: what it computes, what it must not depend on, and what it refuses."""

from __future__ import annotations

import asyncio
import copy
import math
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import (
    VOCAB,
    gradients_of,
    make_episode,
    make_episodes,
    run_config,
    tiny_model,
    weights_of,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agent_loop.types import Episode
from distill import head as head_module
from distill.build import Core
from distill.config import LoraConfig, OptimConfig, RunConfig
from distill.optim import lr_at
from distill.serving.embedded import EmbeddedEngine
from distill.student import NumericError, Student

LORA = LoraConfig(rank=4, alpha=8.0)


def double_student(config: RunConfig, *, seed: int = 0) -> Student:
    return Student(tiny_model(seed).double(), config)


def step_once(episodes: Sequence[Episode], config: RunConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    student = double_student(config)
    if config.loss.type == "full":
        student.set_teacher(tiny_model(9).double())
    metrics = student.train_step(episodes, step=1)
    return metrics, gradients_of(student)


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rel: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= rel * float(gradient.norm()), name


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_neither_split_nor_padding_nor_order_matter(loss: str) -> None:
    episodes = make_episodes(9, top_k=3)
    whole, wanted = step_once(episodes, run_config(loss={"type": loss}))
    variants = [
        (episodes, {"micro_batch_tokens": 1}),
        (episodes, {"micro_batch_tokens": 90}),
        (episodes[::-1], {}),
        ([*episodes[4:], *episodes[:4]], {"micro_batch_tokens": 64}),
    ]
    for given, optim in variants:
        metrics, gradients = step_once(given, run_config(loss={"type": loss}, optim=optim))
        assert_same_gradients(gradients, wanted, 1e-6)
        for name in ("loss", "teacher_kl", "teacher_kl/p90", "entropy", "grad_norm", "mismatch_kl"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-6), name


def test_the_split_of_the_head_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = make_episodes(4, top_k=3)
    for loss in ("sampled", "topk", "full"):
        _, wanted = step_once(episodes, run_config(loss={"type": loss}))
        with monkeypatch.context() as patch:
            patch.setitem(head_module.SLICE_BYTES, "cpu", 5 * VOCAB * 4)  # five rows at a time
            _, found = step_once(episodes, run_config(loss={"type": loss}))
        assert_same_gradients(found, wanted, 1e-9)


def test_scores_of_masked_positions_and_what_follows_the_last_turn_do_not_matter() -> None:
    episodes = make_episodes(5)
    _, wanted = step_once(episodes, run_config())
    changed = copy.deepcopy(episodes)
    for episode in changed:
        trace = episode.traces[0]
        assert trace.teacher_logprobs is not None
        for i, trained in enumerate(trace.loss_mask):
            if not trained:
                trace.teacher_logprobs[i] = trace.sampling_logprobs[i] = -99.0
        last = trace.segments[-1]
        trace.token_ids[last.start : last.end] = [7] * (last.end - last.start)
    _, found = step_once(changed, run_config())
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_gradient_is_exactly_zero_at_prompt_and_tool_tokens() -> None:
    """Of the decoder's output; position i - 1 is where token i is predicted."""
    student = double_student(run_config())
    seen: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, hidden_BTH: torch.Tensor) -> None:
        hidden_BTH.retain_grad()
        seen.append(hidden_BTH)

    student._causal_lm.model.norm.register_forward_hook(keep)
    episode = make_episode(0, rng=random.Random(1))
    student.train_step([episode], step=1)
    gradient_TH = seen[-1].grad
    assert gradient_TH is not None
    trained = torch.tensor(episode.traces[0].loss_mask[1:])[: gradient_TH.shape[1]]
    moved = gradient_TH[0].abs().sum(-1) > 0
    assert torch.equal(moved, trained)


def test_loss_and_kl_equal_a_reference_in_plain_python() -> None:
    episodes = make_episodes(3)
    model = tiny_model().double()
    losses, kls = [], []
    for episode in episodes:
        trace = episode.traces[0]
        with torch.no_grad():
            logits = model(torch.tensor([trace.token_ids])).logits[0].tolist()
        assert trace.teacher_logprobs is not None
        for i, trained in enumerate(trace.loss_mask):
            if trained:
                row, y = logits[i - 1], trace.token_ids[i]
                t, b = trace.teacher_logprobs[i], trace.sampling_logprobs[i]
                assert t is not None
                assert b is not None
                s = row[y] - math.log(sum(math.exp(x) for x in row))
                losses.append(-min(math.exp(s - b), 2.0) * (t - s) * s)
                kls.append(s - t)
    metrics, _ = step_once(episodes, run_config())
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert metrics["teacher_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-6)
    assert metrics["train/tokens"] == len(losses)
    assert metrics["train/episodes"] == 3


def test_metrics_have_the_documented_names() -> None:
    episodes = make_episodes(4)
    episodes[0].task.metadata["dataset"] = "pubmedqa"
    metrics = Student(tiny_model(), run_config()).train_step(episodes, step=1)
    documented = """teacher_kl teacher_kl/p50 teacher_kl/p90 teacher_kl/p99 teacher_kl/max teacher_kl/above_5
        teacher_kl/turn_0 teacher_kl/turn_1 teacher_kl/think teacher_kl/call teacher_kl/answer teacher_kl/pubmedqa
        teacher_kl/toy teacher_kl/k2 teacher_kl/k3 entropy mismatch_kl mismatch_kl/k1 mismatch_kl/max ratio
        ratio/clipped loss grad_norm lr train/tokens train/episodes tokens_per_s/train"""
    assert set(metrics) == set(documented.split())
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_steps_bring_the_student_to_the_teacher(loss: str) -> None:
    """On a fixed set of contexts with the teacher's true scores; the exact KL falls."""
    torch.manual_seed(0)
    teacher = tiny_model(9)
    student = Student(
        tiny_model(), run_config(loss={"type": loss}, optim={"lr": 3e-3, "max_grad_norm": 1.0, "betas": (0.9, 0.95)})
    )
    student.set_teacher(copy.deepcopy(teacher))
    prompt = torch.randint(0, VOCAB, (16, 4))

    def play(seed: int) -> tuple[list[Episode], float]:
        """One-token turns sampled from the student, scored by the teacher, and the exact KL at them."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            s = student._causal_lm(prompt).logits[:, -1].log_softmax(-1)
            t = teacher(prompt).logits[:, -1].log_softmax(-1)
        episodes = make_episodes(16, seed=seed, first=4, top_k=5)
        for row, episode in enumerate(episodes):
            trace = episode.traces[0]
            assert trace.teacher_logprobs is not None
            assert trace.teacher_topk is not None
            y = int(torch.multinomial(s[row].exp(), 1, generator=generator))
            trace.token_ids[:5] = [*prompt[row].tolist(), y]
            trace.loss_mask = [i == 4 for i in range(len(trace))]
            trace.sampling_logprobs[4], trace.teacher_logprobs[4] = s[row, y].item(), t[row, y].item()
            head = t[row].topk(5)
            trace.teacher_topk.token_ids[4] = head.indices.tolist()
            trace.teacher_topk.logprobs[4] = head.values.tolist()
        return episodes, float((s.exp() * (s - t)).sum(-1).mean())

    before = play(0)[1]
    for step in range(1, 121):
        student.train_step(play(step)[0], step=step)
    assert play(0)[1] < 0.5 * before


def test_a_non_finite_loss_changes_nothing_and_names_the_episode() -> None:
    student = Student(tiny_model(), run_config())
    student.train_step(make_episodes(4), step=1)
    weights, state = weights_of(student), {k: v.clone() for k, v in student.optimizer.state().items()}
    episodes = make_episodes(4)
    trace = episodes[2].traces[0]
    assert trace.teacher_logprobs is not None
    trace.teacher_logprobs[trace.loss_mask.index(True)] = -math.inf
    with pytest.raises(NumericError, match=r"step 2: the loss is -inf in 1/task2/0\. "):
        student.train_step(episodes, step=2)
    assert all(torch.equal(weights[n], t) for n, t in student.state_dict_for_serving().items())
    assert all(torch.equal(state[n], t) for n, t in student.optimizer.state().items())
    student.train_step(make_episodes(4), step=2)  # and it goes on


def test_a_non_finite_gradient_changes_nothing() -> None:
    student = Student(tiny_model(), run_config())
    name = "model.layers.1.mlp.up_proj.weight"
    handle = student.parameters[name].register_hook(lambda g: g * math.nan)
    weights = weights_of(student)
    with pytest.raises(NumericError, match=rf"gradient is not finite \({name}\).*1/task0/0"):
        student.train_step(make_episodes(2), step=1)
    assert all(torch.equal(weights[n], t) for n, t in student.state_dict_for_serving().items())
    assert not student.optimizer.state()
    handle.remove()


def test_a_non_finite_weight_changes_nothing() -> None:
    student = Student(tiny_model(), run_config())
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        student.parameters[name][3, 5] = math.nan
    weights = weights_of(student)
    with pytest.raises(NumericError, match=r"the loss is nan in 1/task\d/0"):
        student.train_step(make_episodes(2), step=1)
    assert all(torch.equal(weights[n], t) for n, t in student.state_dict_for_serving().items() if n != name)
    assert not student.optimizer.state()


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_first_step_that_moves_nothing_is_refused(lora: LoraConfig | None) -> None:
    """The signal is cut off on its way to the weights; later steps may have no gradient by chance."""
    student = Student(tiny_model(), run_config(lora=lora))
    handles = [p.register_hook(torch.zeros_like) for p in student.parameters.values()]
    weights = weights_of(student)
    with pytest.raises(NumericError, match=r"step 1: .* gradient is exactly 0: this run would learn nothing"):
        student.train_step(make_episodes(2), step=1)
    assert all(torch.equal(weights[n], t) for n, t in student.state_dict_for_serving().items())
    for handle in handles:
        handle.remove()
    student.train_step(make_episodes(2), step=1)
    for parameter in student.parameters.values():
        parameter.register_hook(torch.zeros_like)
    assert student.train_step(make_episodes(2), step=2)["grad_norm"] == 0


def test_a_teacher_that_agrees_is_no_error() -> None:
    student = Student(tiny_model(), run_config())
    episodes = make_episodes(2)
    for episode in episodes:
        trace = episode.traces[0]
        own = student.logprobs(trace.token_ids)
        trace.teacher_logprobs = [v if m else None for v, m in zip(own, trace.loss_mask, strict=True)]
    metrics = student.train_step(episodes, step=1)
    assert abs(metrics["teacher_kl"] or 0.0) < 1e-6


def test_a_single_token_and_episodes_of_tool_output_alone() -> None:
    """F19: no 0/0; what has nothing to train on is left out of the count."""
    episodes = make_episodes(3)
    for k, episode in enumerate(episodes):
        trace = episode.traces[0]
        first = trace.loss_mask.index(True)
        trace.loss_mask = [k == 1 and i == first for i in range(len(trace))]
    metrics = Student(tiny_model(), run_config()).train_step(episodes, step=1)
    assert (metrics["train/tokens"], metrics["train/episodes"]) == (1, 1)
    assert all(v is not None and math.isfinite(v) for v in metrics.values())


def test_a_data_set_named_like_another_metric_keeps_its_own_line() -> None:
    episodes = make_episodes(2)
    episodes[0].task.metadata["dataset"] = "answer"
    metrics = Student(tiny_model(), run_config()).train_step(episodes, step=1)
    assert {"teacher_kl/answer", "teacher_kl/dataset_answer", "teacher_kl/toy"} <= metrics.keys()


def test_nothing_to_train_on_is_refused() -> None:
    episodes = make_episodes(7)
    for episode in episodes:
        episode.traces[0].loss_mask = [False] * len(episode.traces[0])
    student = Student(tiny_model(), run_config())
    for given, listed in ((episodes, "1/task4/0 and 2 more"), ([], "nothing")):
        with pytest.raises(NumericError, match=f"step 3: no trained token in .*{listed}"):
            student.train_step(given, step=3)


def test_gradients_are_clipped() -> None:
    metrics, loose = step_once(make_episodes(3), run_config())
    limit = metrics["grad_norm"] / 4
    clipped, tight = step_once(make_episodes(3), run_config(optim={"max_grad_norm": limit}))
    assert clipped["grad_norm"] == metrics["grad_norm"]
    assert_same_gradients(tight, {n: g / 4 for n, g in loose.items()}, 1e-4)


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        return [lr_at(step, 4, OptimConfig(lr=1.0, **options)) for step in (1, 2, 3, 4)]

    assert rates() == [1.0, 1.0, 1.0, 1.0]
    assert rates(warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert rates(schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.5]
    assert rates(schedule="cosine") == pytest.approx([1.0, 0.8535533, 0.5, 0.1464466])
    assert rates(schedule="cosine", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_rewards_enter_only_with_adv_tau() -> None:
    episodes = make_episodes(4)
    for i, episode in enumerate(episodes):
        episode.task = type(episode.task)(messages=episode.task.messages, id="one task")
        episode.reward = float(i == 0)
    _, pure = step_once(episodes, run_config())
    _, mixed = step_once(episodes, run_config(loss={"adv_tau": 1.0}))
    assert any(not torch.equal(pure[n], mixed[n]) for n in pure)
    episodes[0].reward = None
    _, unverified = step_once(episodes, run_config())
    assert all(torch.equal(pure[n], unverified[n]) for n in pure)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LORA])
async def test_the_engine_takes_the_weights_and_agrees(tied: bool, lora: LoraConfig | None) -> None:
    student = Student(tiny_model(tied=tied), run_config(optim={"lr": 1e-2}, lora=lora))
    served = student.serving_copy()
    engine = EmbeddedEngine(served, None, name="student")
    ids = torch.arange(2, 40)

    def of_the_served() -> list[float]:
        with torch.no_grad():
            logprobs = served(ids[None]).logits[0].log_softmax(-1)
        return logprobs[:-1].gather(-1, ids[1:, None]).squeeze(-1).tolist()

    try:
        before = of_the_served()
        for step in (1, 2):
            student.train_step(make_episodes(6), step=step)
        assert of_the_served() == before, "an independent copy does not move with the student"
        await engine.load_weights(student.state_dict_for_serving(), 2)
        after = of_the_served()
    finally:
        await engine.aclose()
    first, *own = student.logprobs(ids.tolist())
    assert first is None
    assert after == pytest.approx(own, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3


def test_logprobs_of_short_sequences() -> None:
    student = Student(tiny_model(), run_config())
    assert student.logprobs([]) == []
    assert student.logprobs([3]) == [None]
    assert len(student.logprobs([3, 4])) == 2


def test_lora_trains_the_adapters_alone() -> None:
    model = tiny_model()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    student = Student(model, run_config(optim={"lr": 1e-2}, lora=LORA))
    assert student.parameters
    assert all("lora_" in name for name in student.parameters)
    assert not any("lm_head" in name for name in student.parameters)
    for step in (1, 2):
        student.train_step(make_episodes(4), step=step)
    base = {n.replace(".base_layer", ""): p for n, p in student._causal_lm.named_parameters() if "lora_" not in n}
    assert base.keys() == frozen.keys()
    assert all(torch.equal(p, frozen[n]) for n, p in base.items())
    merged = student.state_dict_for_serving()
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], frozen["model.layers.0.self_attn.q_proj.weight"]
    )


def test_an_adapter_on_the_output_head_is_trained_and_served() -> None:
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=("lm_head", "q_proj"))
    student = Student(tiny_model(tied=False), run_config(optim={"lr": 1e-2}, lora=lora))
    before = weights_of(student)
    for step in (1, 2):
        student.train_step(make_episodes(4), step=step)
    after = weights_of(student)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)),
    }
    ids = list(range(2, 30))
    with torch.no_grad():
        wanted = student.serving_copy()(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert student.logprobs(ids)[1:] == pytest.approx([wanted[i - 1, ids[i]].item() for i in range(1, 28)], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_embedding_is_refused(module: str) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=(module, "q_proj"))
    with pytest.raises(ValueError, match=rf"student\.lora\.target_modules: '.*{module}' shares its weight"):
        Student(tiny_model(tied=True), run_config(lora=lora))


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_changes_no_gradient(lora: LoraConfig | None) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = tiny_model().double()
        torch.manual_seed(4)
        student = Student(model, run_config(lora=lora, gradient_checkpointing=checkpointing))
        student.train_step(make_episodes(3), step=1)
        assert not student.serving_copy().is_gradient_checkpointing
        return gradients_of(student)

    assert_same_gradients(gradients(True), gradients(False), 1e-9)


def test_bfloat16_weights_move_by_steps_they_cannot_hold() -> None:
    """lr 1e-5 is far below bfloat16's resolution at weights near 1; the float32 masters sum it up."""
    student = Student(tiny_model().to(torch.bfloat16), run_config(optim={"lr": 1e-5}))
    before = weights_of(student)
    for step in range(1, 4):
        student.train_step(make_episodes(3), step=step)
    name = "model.norm.weight"  # ones
    master = student.optimizer.state()[f"{name}/master"]
    assert master.dtype == torch.float32
    assert 1e-6 < float((master - 1).abs().max()) < 1e-4
    assert torch.equal(student.parameters[name], before[name])
    assert student.parameters[name].dtype == torch.bfloat16


def test_dropout_is_off() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    plain, _ = step_once(make_episodes(2), run_config())
    metrics = Student(model.double(), run_config()).train_step(make_episodes(2), step=1)
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-9)


def test_other_architectures_and_heads(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    models = [LlamaForCausalLM(LlamaConfig(**sizes)), CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625))]
    ids = list(range(2, 20))
    for model, plain in zip(models, (True, False), strict=True):
        model.save_pretrained(tmp_path / type(model).__name__)
        student = Student.load(tmp_path / type(model).__name__, run_config(dtype="float32"))
        assert student.rows._plain is plain
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__, dtype=torch.float32)
        with torch.no_grad():
            wanted = reference.to(student.device)(torch.tensor([ids], device=student.device)).logits[0].log_softmax(-1)
        own = student.logprobs(ids)
        assert own[1:] == pytest.approx([wanted[i - 1, ids[i]].item() for i in range(1, len(ids))], abs=1e-4)
        assert student.train_step(make_episodes(2), step=1)["grad_norm"] > 0  # type: ignore[operator]


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    student = Student(tiny_model(), run_config(loss={"type": "full"}))
    with pytest.raises(ValueError, match="99 output rows, the student 61"):
        student.set_teacher(tiny_model(vocab_size=99))
    with pytest.raises(ValueError, match="set_teacher"):
        student.train_step(make_episodes(1), step=1)


def test_the_teacher_of_the_full_loss_is_read_from_a_folder(tmp_path: Path) -> None:
    tiny_model(9).save_pretrained(tmp_path)
    config = run_config(loss={"type": "full"})
    found, wanted = Student(tiny_model(), config), Student(tiny_model(), config)
    found.load_teacher(tmp_path)
    wanted.set_teacher(tiny_model(9))
    losses = [s.train_step(make_episodes(2), step=1)["loss"] for s in (found, wanted)]
    assert losses[0] == losses[1]


async def test_all_steps_of_a_run_are_made_in_one_thread() -> None:
    """Memory that a step has freed stays with its thread: in the threads of a pool by turns, it would be held once in
    each of them."""
    student = Student(tiny_model(), run_config())
    core = Core(config=student.config, student=student)
    threads: set[int] = set()
    student.model.get_input_embeddings().register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    done = threading.Event()
    busy = []
    for step in (1, 2, 3):
        busy.append(asyncio.ensure_future(asyncio.to_thread(done.wait)))  # takes the loop's idle thread, if it has one
        await asyncio.sleep(0)
        await core.train_step(make_episodes(2), step=step)
    done.set()
    await asyncio.gather(*busy)
    assert len(threads) == 1
    assert threads.isdisjoint({threading.get_ident()})
