"""Sharing what was trained, against a hub that is a folder of the test."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from dllm_gym import load_denoiser
from dllm_gym.agents import load_policy
from dllm_gym.agents.cli import main
from dllm_gym.agents.push import card
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.agents.trainers.sft import SFTConfig
from dllm_gym.eval.cli import main as evaluate

GRPO = (
    "--env.id MaskedDiffusion-Countdown-v0 --env.num-envs 8 --policy.hidden-dim 16 --policy.mlp-dim 32 --iterations 1 "
    "--problems 2 --group 2 --experts 0.5 0.9 --report.problems 4 --report.validation-problems 4 --report.no-heuristics"
)
SPG = "--problems 2 --group 2 --iterations 1 --inner-iterations 1 --report.problems 4 --env.num-envs 4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["grpo", *GRPO.split(), "--run-dir", str(folder / "grpo")]) == 0
    assert main(["spg", *SPG.split(), "--run-dir", str(folder / "spg")]) == 0
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder with a repository in each of its folders' folders, in place of the hub."""

    def create_commit(self, repo, operations, commit_message):
        for operation in operations:
            target = tmp_path / "hub" / repo / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    def download(name, allow_patterns):
        source, target = tmp_path / "hub" / name, tmp_path / "cache" / name
        if not source.is_dir():
            raise FileNotFoundError(f"404: {name}")
        shutil.rmtree(target, ignore_errors=True)
        for pattern in allow_patterns:
            for path in source.glob(pattern):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)
        return target

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_a_test")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **_: f"hub/{repo}")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "hub"


def test_a_policy_goes_there_and_comes_back(runs, hub, capsys):
    assert main(["push", str(runs / "grpo"), "me/sampler"]) == 0
    assert "pushed policy to hub/me/sampler" in capsys.readouterr().out
    ours, theirs = load_policy(runs / "grpo"), load_policy("me/sampler")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert make_sampler("me/sampler").settings() == ours.settings()
    assert evaluate(["--sampler", "me/sampler", "--problems", "2", "--env.id", "MaskedDiffusion-Countdown-v0"]) == 0


def test_the_card_says_what_it_is_and_its_command_is_the_run(runs, hub, tmp_path):
    main(["push", str(runs / "grpo"), "me/sampler"])
    card = (hub / "me/sampler/README.md").read_text()
    assert card.startswith("---\nlibrary_name: dllm-gym\n") and 'load_policy("me/sampler")' in card
    summary = json.loads((runs / "grpo" / "summary.json").read_text())
    assert f"| GRPO | {100 * summary['rows']['GRPO']['accuracy']:.1f} [" in card and "4 held-out problems" in card
    (command,) = (line.strip() for line in card.splitlines() if "train_policy.py" in line)
    script, algorithm, *flags = command.split()
    assert (script, algorithm) == ("train_policy.py", "grpo")
    flags += ["--report.no-enabled", "--run-dir", str(tmp_path / "again")]
    assert main([algorithm, *flags]) == 0
    again, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", runs / "grpo"))
    again["report"]["enabled"] = True
    assert again == first


def test_a_denoiser_goes_there_and_comes_back(runs, hub):
    assert main(["push", str(runs / "spg"), "me/denoiser", "--part", "denoiser"]) == 0
    ours, theirs = load_denoiser(runs / "spg"), load_denoiser("me/denoiser")
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)
    card = (hub / "me/denoiser/README.md").read_text()
    assert 'load_denoiser("me/denoiser")' in card and "| confidence:k=1, spg |" in card and "base_model" not in card


def test_the_card_of_supervised_training(tmp_path):
    record = {"algorithm": "sft"} | json.loads(json.dumps(dataclasses.asdict(SFTConfig(steps=7))))
    text = card(tmp_path, record, "denoiser", "me/mine")
    assert "trained with `sft` by dllm-gym" in text and "train_policy.py sft --steps 7\n" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing", "me/x"], "'nothing': not the folder of a run"),
        (["{grpo}", "no-owner"], "repo='no-owner': must be of the form 'owner/name'"),
        (["{grpo}", "me/x", "--part", "denoiser"], "has policy"),
        (["{grpo}", "me/x", "--part", "other"], "part='other': must be 'policy' or 'denoiser'"),
    ],
)
def test_what_cannot_be_pushed(flags, message, runs, hub, capsys):
    assert main(["push", *(flag.format(grpo=runs / "grpo") for flag in flags)]) == 2
    assert message in capsys.readouterr().err
    assert not hub.exists()


def test_a_push_without_a_token(runs, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(runs / "grpo"), "me/x"]) == 2
    assert "error: no token for the hub: log in with `hf auth login`, or set HF_TOKEN." in capsys.readouterr().err


def test_a_hub_that_does_not_take_it(runs, hub, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("403 Forbidden: not yours\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert main(["push", str(runs / "grpo"), "you/x"]) == 2
    assert "error: you/x: the hub did not take it (RuntimeError: 403 Forbidden: not yours)." in capsys.readouterr().err


def test_a_policy_that_is_nowhere(hub):
    with pytest.raises(FileNotFoundError, match=r"policy='me/nothing': no such folder, and it cannot be downloaded"):
        load_policy("me/nothing")
