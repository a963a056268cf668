"""Files are written whole or not at all, by one process at a time, and what fails does not take the rest with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dllm_gym.agents.cli import main as train
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy, load_policy
from dllm_gym.eval import cli
from dllm_gym.eval.results import ResultsFile, read_results
from dllm_gym.files import UNFINISHED, append, held, write_text, written

ROOT = Path(__file__).parents[1]
COUNTDOWN = "--env.id MaskedDiffusion-Countdown-v0 --env.num-envs 4"
GRPO = f"{COUNTDOWN} --problems 1 --group 2 --experts --threads 1 --report.no-enabled"
GRPO += " --policy.hidden-dim 16 --policy.mlp-dim 16"


def limited(size: int, module: str, *arguments) -> subprocess.CompletedProcess:
    """A command where no file can grow beyond some bytes, as on a disk that is full."""
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    code += f"from dllm_gym.{module} import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-B", "-c", code, *map(str, arguments)]  # compiled modules would be cut off, and stay
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(UNFINISHED) or ".tmp" in path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error (os error 28)")])
def test_what_cannot_be_written_leaves_what_was_there(error, tmp_path):
    path, folder = tmp_path / "file.txt", tmp_path / "folder"
    write_text(path, "old")
    with written(folder) as temporary:
        temporary.mkdir()
        (temporary / "one").write_text("old")
    for place in (path, folder, tmp_path / "new"):
        said = rf"{place.name} cannot be written \(.*(No space left|os error 28)"
        with pytest.raises(OSError, match=said), written(place) as temporary:
            if place != path:
                temporary.mkdir()
            (temporary if place == path else temporary / "one").write_text("half")
            raise error
    assert path.read_text() == (folder / "one").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_mistake_of_another_kind_is_that_mistake(tmp_path):
    with pytest.raises(ZeroDivisionError), written(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay_in_a_folder(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "notes.txt").write_text("mine")
    policy = UnmaskingPolicy(PolicyConfig(hidden_dim=8, mlp_dim=8))
    for _ in range(2):
        policy.save(tmp_path / "policy")
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {"notes.txt", "config.json", "policy.safetensors"}
    assert torch.equal(load_policy(tmp_path / "policy").readout.weight, policy.readout.weight)


def test_a_line_that_cannot_be_appended(tmp_path):
    append(tmp_path / "log", "one")
    append(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    with pytest.raises(OSError, match=r"/dev/full cannot be written .No space left"):
        append("/dev/full", "three")


def test_one_holder_at_a_time(tmp_path):
    code = f"""
import sys
from dllm_gym.files import held
with held({str(tmp_path / ".lock")!r}, "it"):
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "held\n"
    said = rf"it: process {other.pid} on \S+, since 20\d\d-\S+ \S+ is using it; wait"
    with pytest.raises(ValueError, match=said), held(tmp_path / ".lock", "it"):
        pytest.fail("two of them")
    other.kill()  # which leaves nothing behind that another would wait for
    other.communicate()
    for _ in range(2):
        with held(tmp_path / ".lock", "it"):
            again = held(tmp_path / ".lock", "it")
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"), again:
                pytest.fail("two of them")


def test_a_second_evaluation_into_the_same_file_is_refused(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    flags = f"--sampler threshold {COUNTDOWN} --problems 2 --output {path}".split()
    with ResultsFile(path):
        assert cli.main(flags) == 2
        assert f"results '{path}': process {os.getpid()} on" in capsys.readouterr().err
        assert not path.exists() or path.read_text() == ""
    assert cli.main(flags) == 0


def test_a_second_resumption_of_a_run_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(["grpo", *GRPO.split(), "--iterations", "1", "--run-dir", str(folder)]) == 0
    before = (folder / "metrics.jsonl").read_text()
    with held(folder / ".lock", "run"):
        assert train(["grpo", "--resume", str(folder)]) == 2
    assert f"run '{folder}': process {os.getpid()} on" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_file_that_two_processes_wrote_says_so(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    assert cli.main(f"--sampler threshold {COUNTDOWN} --problems 3 --films 1 --output {path}".split()) == 0
    (whole,) = read_results(path)
    assert "warning" not in capsys.readouterr().err
    path.write_text("".join(line * 2 for line in path.read_text().splitlines(keepends=True)))
    (doubled,) = read_results(path)
    assert (doubled.problems, doubled.films) == (whole.problems, whole.films)
    assert f"warning: {path}: 3 problems are there more than once: two processes wrote it" in capsys.readouterr().err


def test_a_full_disk_at_a_checkpoint(tmp_path):
    """One line; the older checkpoint is whole, and the run goes on when there is room."""
    folder = tmp_path / "run"
    flags = [*GRPO.split(), "--iterations", "3", "--checkpoint-every", "1", "--run-dir", str(folder)]
    whole = tmp_path / "whole"
    assert train(["grpo", *flags[:-1], str(whole)]) == 0
    assert train(["grpo", *flags]) == 0
    for late in ("checkpoint-000003", "policy"):
        for path in (folder / late).iterdir():
            path.unlink()
        (folder / late).rmdir()
    size = (whole / "checkpoint-000003" / "state.safetensors").stat().st_size
    done = limited(size // 2, "agents.cli", "grpo", "--resume", folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert f"error: {folder}/checkpoint-000003 cannot be written (" in done.stderr
    assert unfinished(folder) == [] and (folder / "checkpoint-000002" / "state.json").exists()
    assert train(["grpo", "--resume", str(folder)]) == 0
    mine, theirs = (load_file(f / "policy" / "policy.safetensors") for f in (folder, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_full_disk_at_results(tmp_path):
    path, whole = tmp_path / "results.jsonl", tmp_path / "whole.jsonl"
    flags = f"--sampler threshold {COUNTDOWN} --problems 12 --films 0 --output".split()
    assert cli.main([*flags, str(whole)]) == 0
    done = limited(whole.stat().st_size // 2, "eval.cli", *flags, path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {path} cannot be written (File too large)" in done.stderr
    assert not path.read_text().endswith("\n") and unfinished(tmp_path) == []
    assert cli.main([*flags, str(path)]) == 0
    (mine,), (theirs,) = read_results(path), read_results(whole)
    assert np.array_equal(mine.nfe, theirs.nfe) and len(mine.problems) == 12 and mine.end


def test_a_cell_that_fails_leaves_the_others(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    flags = f"--sampler threshold --sampler metropolis --sampler confidence {COUNTDOWN} --problems 2 --output {path}"
    assert cli.main(flags.split()) == 1
    shown = capsys.readouterr()
    assert "confidence minus threshold" in " ".join(shown.out.split())
    assert "error: metropolis: temperature=0.0" in shown.err and "1 of 3 failed; what succeeded is kept" in shown.err
    assert [cell.settings["sampler"] for cell in read_results(path) if cell.end] == ["threshold", "confidence"]


def test_a_training_that_fails_leaves_the_others(tmp_path, capsys):
    good = {"env.id": "MaskedDiffusion-Countdown-v0", "iterations": 1, "problems": 1, "group": 2, "experts": [0.5]}
    good |= {"policy.hidden-dim": 16, "policy.mlp-dim": 16, "env.num-envs": 4, "report.enabled": False}
    cell = {"env": {"id": "MaskedDiffusion-Countdown-v0", "num_envs": 4}, "problems": 2}
    experiment = {
        "claim": "One is kept.",
        "seeds": 1,
        "train": {
            "good": {"algorithm": "grpo", "settings": good},
            "bad": {"algorithm": "grpo", "settings": good | {"env.dataset": "nowhere.jsonl"}},
        },
        "cells": {
            "good": cell | {"sampler": "{good}"},
            "bad": cell | {"sampler": "{bad}"},
            "plain": cell | {"sampler": "confidence"},
        },
        "compare": [{"first": "good", "second": "plain"}, {"first": "bad", "second": "plain"}],
    }
    (tmp_path / "one.yaml").write_text(json.dumps(experiment))  # JSON is YAML
    arguments = ["experiment", str(tmp_path / "one.yaml"), "--folder", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(arguments) == 1
    error, table = capsys.readouterr().err, (tmp_path / "out" / "table.md").read_text()
    assert "training bad, seed 0: grpo" in error and "1 of 5 failed; what succeeded is kept" in error
    assert "| good |" in table and "| good | plain |" in table and "| bad |" not in table
