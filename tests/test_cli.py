"""The command line: help, mistakes, and a real run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dllm_gym.agents.cli import ALGORITHMS, main

ROOT = Path(__file__).parents[1]
CONFIGS = {name: getattr(import_module(module), config) for name, (module, config) in ALGORITHMS.items()}
TINY = "--env.id MaskedDiffusion-Countdown-v0 --env.num-envs 4 --policy.hidden-dim 16 --policy.mlp-dim 32".split()
QUICK = "--iterations 2 --problems 2 --group 2 --checkpoint-every 1 --threads 1".split()
REPORT = "--report.problems 2 --report.validation-problems 2 --report.no-heuristics --report.thresholds 0.5 0.9".split()


def flags_of(config_type: type, prefix: str = "") -> list[str]:
    """Every flag of a config, as its fields say."""
    flags = []
    for field in dataclasses.fields(config_type):
        name = field.name.replace("_", "-")
        value = getattr(config_type(), field.name)
        if dataclasses.is_dataclass(value):
            flags += flags_of(type(value), f"{prefix}{name}.")
        else:
            flags += [f"--{prefix}{name}.{key}" for key in value] if isinstance(value, dict) else [f"--{prefix}{name}"]
    return flags


def error_line(capsys) -> str:
    """The one line of an error, and nothing like a traceback beside it."""
    shown = capsys.readouterr().err
    (line,) = (line for line in shown.splitlines() if line.startswith("error: "))
    assert "Traceback" not in shown and len(shown.strip().splitlines()) <= 2
    return line


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage_names_every_algorithm(flags, code, capsys):
    assert main(flags) == code
    shown = capsys.readouterr().out
    assert all(name in shown for name in ALGORITHMS) and len(shown.splitlines()) == 2


def test_unknown_algorithm(capsys):
    assert main(["grop"]) == 2
    assert "'grop'" in error_line(capsys)


def test_the_script_passes_the_exit_code_on():
    done = subprocess.run([sys.executable, "train_policy.py", "grop"], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: unknown algorithm 'grop'")
        and "Traceback" not in done.stderr
    )


def test_usage_does_not_wait_for_torch():
    code = "import sys; from dllm_gym.agents.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ALGORITHMS)
def test_help_lists_every_field(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    shown = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert stop.value.code == 0
    known = {flag for flag in flags_of(CONFIGS[name]) if not flag.endswith("env.split")}
    assert known <= shown
    assert "env.split" not in "".join(shown), "trainers and evaluations choose it"


def test_every_field_has_a_help_text():
    for config_type in CONFIGS.values():
        bases = [base for base in config_type.__mro__ if dataclasses.is_dataclass(base)]
        source = "\n".join(Path(sys.modules[base.__module__].__file__).read_text() for base in bases)
        for field in dataclasses.fields(config_type):
            pattern = rf'^    {field.name}: .*\n(?:        .*\n|    \)\n)*    """'
            assert re.search(pattern, source, re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["grpo", "--env.block-length", "7"], ["block_length=7", "gen_length=12", "6"]),
        (["grpo", "--env.id", "CartPole-v1"], ["'CartPole-v1'", "MaskedDiffusion-Countdown-v0"]),
        (["grpo", "--env.denoiser", "nowhere"], ["'nowhere'", "embedded"]),
        (["grpo", "--env.dataset", "nowhere.jsonl"], ["'nowhere.jsonl'", "no such file"]),
        (["grpo", "--env.reward", "fame"], ["'fame'", "multiplicative"]),
        (["grpo", "--group", "1"], ["group=1"]),
        (["grpo", "--checkpoint-every", "0"], ["checkpoint_every=0"]),
        (["grpo", "--report.problems", "0"], ["problems=0"]),
        (["ppo", "--policy.distribution", "gauss"], ["'gauss'", "bernoulli"]),
        (["ppo", "--policy.temperature", "0"], ["temperature=0"]),
        (["ppo", "--episodes", "0"], ["episodes=0"]),
        (["ppo", "--policy.confidence-k", "2"], ["policy.confidence_k=2", "env.confidence_k=1"]),
        (["grpo", "--policy.hidden-dim", "18"], ["hidden_dim=18", "num_heads=2"]),
        (["sb3-ppo", "--batch-size", "16", "--policy.distribution", "dpls"], ["'dpls'", "bernoulli"]),
        (["sb3-ppo", "--batch-size", "0"], ["batch_size=0"]),
    ],
)
def test_a_wrong_value_is_one_line_and_leaves_no_folder(flags, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *rest = flags
    assert main([name, *TINY, *rest, "--run-dir", "run"]) == 2
    line = error_line(capsys)
    assert all(part in line for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rest", [["--colour", "red"], ["--iterations", "many"], ["--iterations"]])
def test_a_wrong_flag_is_refused(rest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["grpo", *rest])
    assert stop.value.code == 2 and rest[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A tiny real run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["grpo", *TINY, *QUICK, *REPORT, "--experts", "0.5", "0.9", "--run-dir", str(folder)]) == 0
    return folder


def test_a_run_leaves_all_that_it_promises(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "policy", "summary.json", "front.png", "checkpoint-000002"}
    config = json.loads((run_folder / "config.json").read_text())
    assert config["algorithm"] == "grpo" and config["experts"] == [0.5, 0.9] and config["env"]["num_envs"] == 4
    assert [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    summary = json.loads((run_folder / "summary.json").read_text())
    assert set(summary["rows"]) == {"untrained", "GRPO", "threshold 0.5", "threshold 0.9"}
    assert (run_folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (run_folder / "policy").iterdir()} == {"config.json", "policy.safetensors"}


def test_tensorboard_shows_the_metrics(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder))
    events.Reload()
    assert {"reward", "accuracy", "nfe", "entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("reward")] == [1, 2]


@pytest.mark.parametrize("form", ["--resume {}", "--resume={}"])
def test_resume_needs_no_other_flag(form, run_folder, capsys):
    (run_folder / "summary.json").unlink()
    assert main(["grpo", *form.format(run_folder).split()]) == 0
    assert (run_folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["grpo", "--resume", "{}", "--iterations", "9"], ["iterations: 2 -> 9"]),
        (["grpo", "--resume", "{}", "--env.alpha", "2"], ["'alpha': 2.0"]),
        (["ppo", "--resume", "{}"], ["'grpo'", "'ppo'"]),
        (["grpo", "--resume", "nowhere"], ["'nowhere'"]),
        (["grpo", *TINY, "--run-dir", "{}"], ["holds a run already"]),
    ],
)
def test_a_run_cannot_become_another(flags, parts, run_folder, capsys):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert main([flag.format(run_folder) for flag in flags]) == 2
    line = error_line(capsys)
    assert all(part in line for part in parts)
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_traceback_on_request(monkeypatch):
    monkeypatch.setitem(os.environ, "DLLM_GYM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="group=1"):
        main(["grpo", "--group", "1"])
