"""Traces end to end in one row: each is what it is alone. Models that need more than causal attention are padded."""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_student import LORA, assert_same_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import VOCAB, gradients_of, make_episodes, run_config, tiny_model
from transformers import PreTrainedModel

from agent_loop.types import Episode
from distill.attention import by_kernel, packed_attention, row_arguments
from distill.build import build
from distill.config import LoraConfig, RunConfig
from distill.console import Console
from distill.rows import RowModel
from distill.student import Student
from distill.types import Inputs
from tests.runs.conftest import save_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"experts_implementation": "eager", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 128}
GPT_OSS = {"experts_implementation": "eager", "num_local_experts": 4, "num_experts_per_tok": 2}


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model: PreTrainedModel = getattr(transformers, name + kind)(config).double().eval()
    return model


def row_of(traces: list[torch.Tensor]) -> Inputs:
    """All positions of traces in one row."""
    ids_T = torch.cat(traces)
    pos_N = torch.arange(len(ids_T))
    return Inputs(
        input_ids_BT=ids_T[None],
        boundaries=torch.tensor([0, *itertools.accumulate(len(t) for t in traces)]),
        seq_N=torch.zeros_like(pos_N),
        pos_N=pos_N,
        targets_N=ids_T.roll(-1),
    )


def random_traces(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3", {}),
        ("Llama", {"num_key_value_heads": 1}),
        ("Phi3", {}),
        ("Cohere", {"logit_scale": 0.0625}),  # the head is not plain
        ("Granite", {"attention_multiplier": 0.3}),  # a scale of its own
        ("GPT2", GPT2),  # learned positions: wrong ones would show
        ("Qwen3Moe", EXPERTS),
    ],
)
def test_a_trace_in_a_row_is_what_it_is_alone(name: str, changes: dict[str, Any]) -> None:
    model = make_model(name, **changes)
    reference = copy.deepcopy(model)
    rows = RowModel(model)
    assert rows.padded_because is None
    traces = random_traces(1, 30, 7, 64, 2)
    with torch.no_grad():
        found_NV = rows.head(rows.features(row_of(traces)))
        wanted = [reference(input_ids=trace[None]).logits[0] for trace in traces]
    torch.testing.assert_close(found_NV, torch.cat(wanted), rtol=1e-9, atol=1e-9)


def test_positions_start_again_with_each_trace() -> None:
    arguments = row_arguments(torch.tensor([0, 3, 4, 9]), torch.device("cpu"))
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert arguments["max_length_q"] == 5
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 4, 9]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neighbours_in_the_row_change_nothing(dtype: torch.dtype) -> None:
    rows = RowModel(tiny_model().to(dtype))
    before, own, after = random_traces(40, 50, 60)
    poisoned = [*random_traces(40, seed=1), own, *random_traces(60, seed=2)]
    with torch.no_grad():
        (clean_N, _), (poisoned_N, _) = rows(row_of([before, own, after])), rows(row_of(poisoned))
    assert torch.equal(clean_N[40:89], poisoned_N[40:89])
    assert not torch.equal(clean_N[:39], poisoned_N[:39])


def test_no_tensor_grows_with_the_square_of_the_row() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
            return out

    rows = RowModel(tiny_model())
    inputs = row_of(random_traces(600, 900, 500))
    with Largest() as largest:
        rows(inputs)[0].sum().backward()
    assert VOCAB * 2000 <= largest.numel < 200 * 2000  # the logits; a mask would have 4,000,000


def stepped(
    episodes: list[Episode], *, packed: bool, teacher: bool = False, dtype: torch.dtype = torch.float64, **config: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # of the adapters
    student = Student(tiny_model().to(dtype), run_config(**config))
    if teacher:
        student.set_teacher(tiny_model(9).to(dtype))
    if not packed:
        student.rows.padded_because = "for comparison"
    metrics = student.train_step(episodes, step=1)
    return metrics, gradients_of(student)


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_packed_and_padded_steps_are_the_same(loss: str) -> None:
    episodes = make_episodes(11, top_k=3)
    common: dict[str, Any] = {"loss": {"type": loss}, "teacher": loss == "full"}
    wanted_metrics, wanted = stepped(episodes, packed=False, **common)
    shuffled = random.Random(0).sample(episodes, len(episodes))
    for given, tokens in ((episodes, 10**6), (episodes, 100), (episodes, 1), (shuffled, 64)):
        metrics, gradients = stepped(given, packed=True, optim={"micro_batch_tokens": tokens}, **common)
        assert_same_gradients(gradients, wanted, 1e-9)
        assert metrics.keys() == wanted_metrics.keys()
        for name in metrics.keys() - {"tokens_per_s/train"}:
            # metrics are kept in float32
            assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-9 if name == "loss" else 1e-6), name


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_under_adapters_and_gradient_checkpointing(lora: LoraConfig | None, checkpointing: bool) -> None:
    episodes = make_episodes(5)
    _, wanted = stepped(episodes, packed=False, lora=lora)
    _, found = stepped(episodes, packed=True, lora=lora, gradient_checkpointing=checkpointing)
    assert_same_gradients(found, wanted, 1e-9)


def test_packing_in_bfloat16() -> None:
    episodes = make_episodes(6)
    _, wanted = stepped(episodes, packed=False)
    distances = {}
    for packed in (True, False):
        _, found = stepped(episodes, packed=packed, dtype=torch.bfloat16)
        distances[packed] = max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    assert distances[True] < max(0.1, 1.5 * distances[False])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Mistral", {"sliding_window": 4096}, "do not see all that came before"),  # longer than the traces of the check
        ("Gemma2", {}, "do not see all that came before"),
        ("GptOss", GPT_OSS, "do not see all that came before"),  # and has sinks
        ("Lfm2", {"full_attn_idxs": [1]}, "seen by the next one"),  # a short convolution runs along the row
        ("StableLm", {"head_dim": 8}, "seen by the next one"),  # does not hand boundaries on
        ("Bloom", {"n_head": 2, "n_layer": 2}, "cannot be replaced"),
    ],
)
def test_a_model_with_other_attention_is_padded(name: str, changes: dict[str, Any], reason: str) -> None:
    model = make_model(name, **changes)
    before = model.config._attn_implementation
    student = Student(model, run_config())
    assert student.padded_because is not None
    assert reason in student.padded_because
    assert model.config._attn_implementation == before
    episodes = make_episodes(4)
    whole = student.train_step(episodes, step=1)
    split = Student(make_model(name, **changes), run_config(optim={"micro_batch_tokens": 1})).train_step(
        episodes, step=1
    )
    assert whole["loss"] == pytest.approx(split["loss"], rel=1e-9)
    assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-6)


def test_a_leak_is_found_in_sixteen_bits_too() -> None:
    """The convolution of this model moves the neighbour's log-probabilities by less than rounding does."""
    assert (
        RowModel(make_model("Lfm2", full_attn_idxs=[1], initializer_range=0.02).bfloat16()).padded_because is not None
    )


def test_a_teacher_that_cannot_be_packed_decides_for_both() -> None:
    student = Student(tiny_model().double(), run_config(loss={"type": "full"}))
    assert student.padded_because is None
    student.set_teacher(make_model("Mistral", sliding_window=4))
    assert student.padded_because is not None
    assert student.train_step(make_episodes(3), step=1)["grad_norm"] > 0  # type: ignore[operator]


def test_a_run_says_why_it_pads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "plain", seed=1)
    shutil.copytree(tmp_path / "plain", tmp_path / "window")
    make_model("Mistral", sliding_window=64, vocab_size=1024).float().save_pretrained(tmp_path / "window")
    for name, times in (("plain", 0), ("window", 1)):
        model = {"model": str(tmp_path / name), "dtype": "float32"}
        config = RunConfig.model_validate({"env": "medbrowse", "student": model, "teacher": model})
        build(config, Console(), tmp_path / "run")
        assert capsys.readouterr().err.count("micro-batches are padded, not packed: some of its layers") == times


def test_what_serves_has_the_models_own_attention() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    student = Student(model, run_config())
    assert model.config._attn_implementation != before
    assert student.serving_copy().config._attn_implementation == before


def test_options_that_it_does_not_know_are_refused() -> None:
    module = torch.nn.Module()
    query = torch.randn(1, 2, 9, 8)
    ends = torch.tensor([0, 4, 9])
    for option in ({"softcap": 50.0}, {"sliding_window": 4}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            packed_attention(module, query, query, query, None, cu_seq_lens_q=ends, max_length_q=5, **option)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="attention_mask"):
        packed_attention(module, query, query, query, torch.ones(9, 9), cu_seq_lens_q=ends, max_length_q=5)
    with pytest.raises(NotImplementedError, match="is_causal"):
        packed_attention(module, query, query, query, None, is_causal=False, cu_seq_lens_q=ends, max_length_q=5)


def test_the_kernel_is_given_shapes_that_it_takes() -> None:
    """Without a GPU, torch knows only what shape comes out."""
    query = torch.empty(1, 8, 30, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 2, 30, 64, device="meta", dtype=torch.bfloat16)
    ends = torch.empty(3, device="meta", dtype=torch.int32)
    assert by_kernel(query, key, key, ends, 20, 0.1).shape == (1, 30, 8, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_gives_what_it_gives_trace_by_trace() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0, 100, 101, 700], device="cuda", dtype=torch.int32)
    shapes = ((1, 8, 700, 64), (1, 2, 700, 64), (1, 2, 700, 64))
    exact = [torch.randn(shape, device="cuda", dtype=torch.float32).bfloat16().float() for shape in shapes]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = [tensor.to(dtype).requires_grad_() for tensor in exact]
        output, _ = packed_attention(
            torch.nn.Module(), parts[0], parts[1], parts[2], None, cu_seq_lens_q=ends, max_length_q=599
        )
        weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
        results.append([output, *torch.autograd.grad((output * weights.to(dtype)).sum(), parts)])
    for wanted, found in zip(*results, strict=True):
        assert float((found.float() - wanted).norm()) <= 2e-2 * float(wanted.norm())
