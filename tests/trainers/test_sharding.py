"""Training a denoiser sharded over two processes. Run by `torch.distributed.run`, this file is what they execute."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_gym import load_denoiser
from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.trainers import run as run_module
from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig
from dllm_gym.agents.trainers.denoiser.spg import SPGConfig, spg_loss
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.sharding import ShardFiles

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TRAININGS = {
    "full": (SPGConfig, spg_loss, {}),
    "lora": (
        ESPOConfig,
        espo_loss,
        {"lora": LoRAConfig(rank=4), "inner_iterations": 2, "gradient_checkpointing": True},
    ),
}


def config_of(kind: str, folder: Path, shard: bool, **changes):
    """Four problems, of which SPG learns from some completions only: the processes have unequal work."""
    config_type, _, settings = TRAININGS[kind]
    return config_type(
        env=EnvConfig("MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=16),
        problems=4,
        group=4,
        iterations=2,
        microbatch=3,
        warmup=1,
        checkpoint_every=1,
        report=DenoiserReportConfig(enabled=False),
        shard=shard,
        run_dir=None if "resume" in changes else str(folder / f"{kind}-{'sharded' if shard else 'whole'}"),
        **{"inner_iterations": 1} | settings | changes,
    )


def train(config, kind: str) -> Learner:
    """Train, and return the learner."""
    learners, start = [], Learner.__init__
    Learner.__init__ = lambda self, *args: (learners.append(self), start(self, *args))[1]
    try:
        trainer.train("spg" if kind == "full" else "espo", config, TRAININGS[kind][1])
    finally:
        Learner.__init__ = start
    return learners[0]


def bytes_of(learner: Learner) -> int:
    """Of the weights in training, their gradients, and the optimiser's states in this process."""
    states = [value for each in learner.optimizers for state in each.state.values() for value in state.values()]
    tensors = [*learner.weights.masters.values(), *learner.weights.masters.values(), *states]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def work(folder: Path) -> None:
    """What each of the two processes does."""
    rank, sizes = int(os.environ["RANK"]), {}
    for kind in TRAININGS:
        for shard in (True, False):
            learner = train(config_of(kind, folder, shard), kind)
            sizes[f"{kind} {shard}"] = bytes_of(learner)
            decoding = {name: p.detach().clone() for name, p in learner.weights.parameters.items()}
            save_file(decoding, folder / f"{kind} {shard} {rank}.safetensors")
    # Stopped after one iteration, and resumed by the same two.
    if rank == 0:
        shutil.copytree(folder / "full-sharded", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoint-000002")
    learner.processes.wait()
    train(config_of("full", folder, True, resume=str(folder / "resumed")), "full")
    # The second process finds the disk full.
    write = run_module.save_file

    def full(tensors, path):
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    run_module.save_file = full
    try:
        config = config_of("full", folder, True)
        config.run_dir = str(folder / "disk")
        train(config, "full")
    except OSError as error:
        (folder / f"error {rank}").write_text(str(error))
    (folder / f"sizes {rank}.json").write_text(json.dumps(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have done their `work`."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run([*LAUNCH, "2", __file__, str(folder)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changing = ("seconds", "tokens_per_second", "sampling_share", "peak_memory_gb", "step_kl")
    return [{name: value for name, value in row.items() if name not in changing} for row in rows]


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_sharded_training_is_the_whole_one(kind, folder):
    first, second = (load_file(folder / f"{kind} True {rank}.safetensors") for rank in (0, 1))
    whole = load_file(folder / f"{kind} False 0.safetensors")
    before = dict(load_denoiser("embedded-early").model.named_parameters())
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-5)
    moved = [name for name in whole if name in before and not torch.equal(whole[name], before[name])]
    assert moved if kind != "lora" else not moved
    for ours, theirs in zip(lines(folder / f"{kind}-sharded"), lines(folder / f"{kind}-whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("kind", TRAININGS)
def test_the_saved_denoiser_is_the_one_in_training(kind, folder):
    saved = load_denoiser(folder / f"{kind}-sharded" / "denoiser", dtype="float32")
    trained = load_file(folder / f"{kind} True 0.safetensors")
    found = dict(saved.model.named_parameters())
    for name, value in trained.items():
        assert torch.equal(found[name], value), name


def test_memory_of_a_process(folder):
    sizes = json.loads((folder / "sizes 0.json").read_text())
    assert sizes["full True"] < 0.6 * sizes["full False"]
    assert sizes["lora True"] < 0.6 * sizes["lora False"]


def test_a_resumed_run_is_the_uninterrupted_one(folder):
    assert lines(folder / "resumed") == lines(folder / "full-sharded")
    states = [folder / name / "checkpoint-000002" for name in ("resumed", "full-sharded")]
    names = sorted(path.name for path in states[0].iterdir())
    assert names == [
        *(f"shard-0000{i}-of-00002.safetensors" for i in (1, 2)), "state.json", "state.safetensors"
    ]  # fmt: skip
    for name in names[:2]:
        one, other = (load_file(state / name) for state in states)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_disk_in_one_process_is_said_in_all_and_leaves_nothing(folder):
    assert "No space left on device" in (folder / "error 1").read_text()
    assert "another process could not write its part of it" in (folder / "error 0").read_text()
    assert not list((folder / "disk").glob("checkpoint*")) and not list((folder / "disk").glob(".unfinished*"))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_number_of_processes_reads_what_two_wrote(count, folder):
    files = ShardFiles(folder / "full-sharded" / "checkpoint-000002", 2, mesh=None)
    trained = load_file(folder / "full True 0.safetensors")
    for name, value in trained.items():
        parts = [files.rows(f"/learner/weights/{name}", len(value), rank, count) for rank in range(count)]
        assert torch.equal(torch.cat(parts), value)
        assert [len(part) for part in parts] == [len(part) for part in value.chunk(count)] + [0] * (
            count - len(value.chunk(count))
        )


def test_a_missing_shard_is_said(folder, monkeypatch):
    monkeypatch.setattr(Processes, "mesh", None)
    shutil.copytree(folder / "full-sharded", folder / "missing")
    for checkpoint in (folder / "missing").glob("checkpoint-*"):
        (checkpoint / "shard-00002-of-00002.safetensors").unlink()
    run = Run("spg", config_of("full", folder, True, resume=str(folder / "missing")))
    with pytest.raises(
        ValueError, match=r"checkpoint-000002 cannot be read \(1 of 2 shards are missing: shard-00002-of"
    ):
        run.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "shard: there is one process only"), ({"optimizer": "muon"}, "shard: Muon needs whole")],
)
def test_what_cannot_be_sharded(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer.train("spg", config_of("full", tmp_path, True, **changes), spg_loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
