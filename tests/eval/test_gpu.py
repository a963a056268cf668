"""The prepared run on a GPU, at a tiny size; and the plan's command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_gym.eval.gpu.measure import LLADA_8B, TINY, measure
from dllm_gym.eval.gpu.plan import SHAPES, Setting, advice

ROOT = Path(__file__).parents[2]


def gpu(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dllm_gym.eval.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_part_is_measured_and_printed_as_json(capsys):
    measure(tiny=True, seconds=480)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == [
        "machine",
        *["decoding"] * (len(TINY.batches) * len(TINY.tokens_per_step) * 3),
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


def test_the_plan_is_printed_before_anything_is_loaded():
    done = gpu("--plan", "llada-8b", "--lora-rank", "128", "--gradient-checkpointing", "--memory-gb", "40")
    assert done.returncode == 0, done.stderr
    said = advice(SHAPES["llada-8b"], Setting(rank=128, checkpointing=True), 1, 40e9)
    assert said in " ".join(done.stdout.split()) and "16.03" in done.stdout
    done = gpu("--plan", "llada-9b")
    assert done.returncode == 2 and "plan='llada-9b'" in done.stderr and "Traceback" not in done.stderr
