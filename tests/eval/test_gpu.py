"""The prepared run on a GPU, at a tiny size; and the plan's command."""

import json

import pytest

from dllm_gym.eval.gpu.__main__ import GPUConfig, work
from dllm_gym.eval.gpu.measure import LLADA_8B, TINY, measure
from dllm_gym.eval.gpu.plan import SHAPES, Setting, advice


def test_every_part_is_measured_and_printed_as_json(capsys):
    measure(tiny=True, seconds=480)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == [
        "machine",
        *["decoding"] * len(TINY.batches) * (3 * len(TINY.tokens_per_step) + 2),  # the compiled ones are fewer
        *["training"] * 3,
        "policy_training",
        "done",
    ]
    for line in lines[1:-1]:
        shares = [value for name, value in line.items() if name.endswith("share") or name.startswith("outside")]
        assert all(-0.01 <= share <= 1 for share in shares)
        assert line.get("seconds", 1) > 0 and line.get("tokens_per_second", 1) > 0
    training = next(line for line in lines if line["what"] == "training")
    phases = {f"{name}_seconds" for name in ("sampling", "forward", "backward", "optimiser")}
    assert phases <= training.keys() and sum(training[name] for name in phases) <= training["seconds"]


def test_it_stops_when_the_time_is_over(capsys):
    measure(tiny=True, seconds=0)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == ["machine", "decoding", "stopped"]


def test_without_a_gpu_it_says_what_runs_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="no CUDA device: --tiny runs on a CPU, --plan calculates"):
        measure(tiny=False, seconds=1)


def test_the_shape_measured_is_llada_8b():
    model, shape = LLADA_8B.model.resolved(), SHAPES["llada-8b"]
    found = (model.layers, model.hidden_size, model.mlp_size, model.heads, model.vocab_size)
    assert found == (shape.layers, shape.hidden, shape.mlp, shape.heads, shape.vocab)


def test_the_plan_is_printed_before_anything_is_loaded(capsys):
    work(GPUConfig(plan="llada-8b", lora_rank=128, gradient_checkpointing=True, memory_gb=20))
    shown = capsys.readouterr().out
    said = advice(SHAPES["llada-8b"], Setting(rank=128, checkpointing=True), 1, 20e9)
    assert "16.03" in shown and said.startswith("does not fit") and "does not fit" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "llada-9b"}, "plan='llada-9b': must be one of"),
        ({"cache": "deal"}, "cache='deal': must be one of"),
        ({"dtype": "int8"}, "dtype='int8': must be 'bfloat16' or 'float32'"),
        ({"batch": 0}, "batch=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_planned(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        work(GPUConfig(**{"plan": "llada-8b"} | changes))
