"""Training the denoiser in two processes. Run by `torch.distributed.run`, this file is itself what they execute."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from dllm_gym import load_denoiser
from dllm_gym.agents.trainers.denoiser import learner as learner_module
from dllm_gym.agents.trainers.denoiser import objective as objective_module
from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import CorruptionConfig, LoRAConfig
from dllm_gym.agents.trainers.denoiser.spg import SPGConfig, spg_loss
from dllm_gym.agents.trainers.run import Run

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
COMPLETIONS = 8
UPDATES = {
    "full": (SPGConfig, spg_loss, {}),
    "full, checkpointed": (SPGConfig, spg_loss, {"gradient_checkpointing": True}),
    "lora": (SPGConfig, spg_loss, {"lora": LoRAConfig(rank=4)}),
    "lora, old and reference": (ESPOConfig, espo_loss, {"lora": LoRAConfig(rank=4)}),
}
"""What is updated in one process and in two: config, loss, and what of the config is not its default."""


def update(kind: str, own: slice) -> dict[str, torch.Tensor]:
    """Gradients of two inner iterations, two microbatches each, on some rows of a fixed batch; weights; metrics."""
    accelerator = Accelerator(cpu=True)
    config_type, loss, changes = UPDATES[kind]
    microbatch = COMPLETIONS // accelerator.num_processes // 2
    config = config_type(inner_iterations=2, microbatch=microbatch, corruption=CorruptionConfig(), **changes)
    torch.manual_seed(accelerator.process_index)  # adapters begin at random: those of the main process count
    learner = Learner(load_denoiser("embedded-early"), config, loss, accelerator)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 100, (COMPLETIONS, 16), generator=generator)
    tokens[:3, 12:] = learner.denoiser.eos_token_id
    prompts = [torch.randint(5, 100, (5 + i,), generator=generator) for i in range(COMPLETIONS)]
    advantage = torch.randn(COMPLETIONS, generator=generator)
    weight = torch.full((COMPLETIONS,), 1 / COMPLETIONS)
    gradients, step, corrupt = {}, learner._step, objective_module.corrupt

    def recorded_step():
        masters = learner.weights.masters
        inner = sum(name.startswith("gradient") for name in gradients) // len(masters)
        gradients.update({f"gradient {inner} {name}": master.grad.clone() for name, master in masters.items()})
        return step()

    def own_share(kind, _, prompt_mask, *args, **options):
        """The maskings of the whole batch are drawn, whatever the process; it takes its rows."""
        completion = learner_module.completion_mask(tokens, learner.end_tokens)
        prompt_mask = prompt_mask.new_ones(COMPLETIONS, prompt_mask.shape[1])
        return corrupt(kind, completion, prompt_mask, *args, **options)[own]

    learner._step, objective_module.corrupt = recorded_step, own_share
    try:
        metrics = learner.update(tokens[own], prompts[own], advantage[own], weight[own], generator, 1e-4)
    finally:
        objective_module.corrupt = corrupt
    weights = {f"weight {name}": master.detach().clone() for name, master in learner.weights.masters.items()}
    return gradients | weights | {f"metric {name}": torch.tensor(value) for name, value in metrics.items()}


def train(folder: Path) -> dict[str, torch.Tensor]:
    """Two iterations of the trainer; the last weights of this process."""
    config = SPGConfig(
        problems=4, group=2, iterations=2, inner_iterations=1, run_dir=str(folder / "run"),
        report=DenoiserReportConfig(enabled=False),
    )  # fmt: skip
    learners, start = [], Learner.__init__
    Learner.__init__ = lambda self, *args: (learners.append(self), start(self, *args))[1]
    trainer.train("spg", config, spg_loss)
    return dict(learners[0].weights.masters)


def work(folder: Path) -> None:
    """What each of the two processes does."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2 and accelerator.distributed_type == DistributedType.MULTI_CPU
    rank = accelerator.process_index
    results = {kind: update(kind, slice(rank, None, 2)) for kind in UPDATES} | {"train": train(folder)}
    for kind, tensors in results.items():
        save_file({name: t.detach().clone() for name, t in tensors.items()}, folder / f"{kind} {rank}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have done their `work`."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([*LAUNCH, __file__, str(folder)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def processes(folder) -> list[dict]:
    """What each process ended with."""
    kinds = (*UPDATES, "train")
    return [{kind: load_file(folder / f"{kind} {rank}.safetensors") for kind in kinds} for rank in range(2)]


@pytest.mark.parametrize("kind", UPDATES)
def test_two_processes_take_the_step_of_one(kind, processes):
    first, second = (process[kind] for process in processes)
    # Adam divides by the gradient's size: where that is near 0, its last bits decide a weight's step and what follows.
    tolerances = {"gradient 0": 1e-4, "gradient 1": 1e-3, "metric": 1e-3, "weight": 0.02}
    for name, expected in update(kind, slice(None)).items():
        tolerance = next(value for start, value in tolerances.items() if name.startswith(start))
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def test_two_processes_train_one_run(processes, folder):
    first, second = (process["train"] for process in processes)
    before = load_denoiser("embedded-early").model
    trained = load_denoiser(folder / "run" / "denoiser").model
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name].to(p.dtype), p) for name, p in trained.named_parameters())
    assert any(not torch.equal(first[name], p.to(first[name].dtype)) for name, p in before.named_parameters())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and (folder / "run" / "summary.json").exists()
    assert len(list((folder / "run").glob("events.*"))) == 1
    assert all(line["excluded"] == 0 and 0 <= line["accuracy"] <= 1 and line["nfe"] > 0 for line in lines)


def test_sigterm_to_the_launcher_saves_where_it_was(tmp_path):
    folder = tmp_path / "run"
    flags = f"--problems 2 --group 2 --iterations 500 --inner-iterations 1 --checkpoint-every 1000 --run-dir {folder}"
    command = [*LAUNCH, "train_policy.py", "spg", *flags.split()]
    with subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        for _ in range(600):
            if (folder / "metrics.jsonl").exists() or launcher.poll() is not None:
                break
            time.sleep(0.2)
        launcher.send_signal(signal.SIGTERM)
        shown = launcher.communicate(timeout=120)[0].decode()
    assert f"stopped; continue with --resume {folder}" in shown
    steps = (folder / "metrics.jsonl").read_text().count("\n")
    config = SPGConfig(
        problems=2, group=2, iterations=500, inner_iterations=1, checkpoint_every=1000, resume=str(folder)
    )
    done, state = Run("spg", config).load()
    assert 1 <= done == steps < 500 and set(state) == {"learner", "totals"}


def test_what_cannot_be_shared_is_refused(monkeypatch):
    launched = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU,
        num_processes=2,
        mixed_precision="no",
        gradient_accumulation_steps=1,
    )
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: launched)
    assert trainer.make_accelerator(SPGConfig(problems=4)) is launched
    with pytest.raises(ValueError, match=r"problems=3: must be a multiple of the 2 processes"):
        trainer.make_accelerator(SPGConfig(problems=3))
    launched.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match=r"FSDP: decoding needs whole weights.*--lora.rank"):
        trainer.make_accelerator(SPGConfig(problems=4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
