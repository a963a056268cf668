"""The examples do what they say."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from checkpoints import write_llada

from dllm_gym import load_denoiser, make_task
from dllm_gym.agents import collect, make_policy
from dllm_gym.decoding import blank
from dllm_gym.tasks import TASKS
from dllm_gym.types import Observation

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@functools.cache
def example(name: str):
    """The script as a module; what stands under its ``__main__`` is not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_every_example():
    text = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", text)) == names
    assert set(re.findall(r"python docs/examples/(\w+\.py)", text)) == names


def test_sb3_ppo(capsys):
    model = example("sb3_ppo").main(timesteps=512, episodes=4)
    assert model.num_timesteps == 512
    ended = [episode["r"] for episode in model.ep_info_buffer]
    assert len(ended) > 10 and 0 < np.mean(ended) < 1
    assert len(re.findall(r"reward 0\.\d+", capsys.readouterr().out)) == 2


def test_cleanrl_ppo_learns_on_cartpole():
    cleanrl = example("cleanrl_ppo")
    _, returns = cleanrl.train(cleanrl.Args(env_id="CartPole-v1", total_timesteps=8192))
    assert np.mean(returns[-10:]) > 3 * np.mean(returns[:20])


def test_cleanrl_ppo_takes_an_unmasking_id():
    cleanrl = example("cleanrl_ppo")
    few = {"total_timesteps": 128, "num_envs": 2, "num_steps": 64}
    (before, _), (after, returns) = (cleanrl.train(cleanrl.Args(**few, learning_rate=rate)) for rate in (0.0, 1e-3))
    assert len(returns) > 20 and 0 < np.mean(returns) < 1
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all((old != new).any() for old, new in pairs)


def test_torchrl_env():
    pytest.importorskip("torchrl")
    torchrl_env = example("torchrl_env")
    rollout = torchrl_env.main(steps=60)  # its specs are checked inside
    ends, rewards = rollout["next", "done"].squeeze(), rollout["next", "reward"].squeeze()
    assert ends.sum() >= 3 and rewards[ends].mean() > 0.3 and not rewards[~ends].any()
    torchrl_env.check_env_specs(torchrl_env.GymEnv("MaskedDiffusion-Countdown-TopK-v0"))


def test_record_video(tmp_path):
    pytest.importorskip("moviepy")
    returns = example("record_video").main(tmp_path / "videos", episodes=2)
    videos = sorted(tmp_path.glob("videos/*.mp4"))
    assert len(returns) == len(videos) == 2
    assert all(video.stat().st_size > 1000 for video in videos)


def test_custom_task(monkeypatch):
    monkeypatch.setitem(TASKS, "sort", None)  # put back afterwards
    results = example("custom_task").main(steps=150, problems=80)
    accuracy = {name: result.correct.mean() for name, result in results.items()}
    assert accuracy["one at a time"] > 0.8 > 0.5 > accuracy["all at once"]
    written = {"".join(text.split()) for text in results["one at a time"].completions}
    assert any(text > text[::-1] for text in written) and any(text < text[::-1] for text in written)


def test_custom_sampler_chooses_what_it_says():
    confidence = torch.tensor([[0.6, 0.7, 0.95, 0.4, 0.8, 0.2, 0.6]])
    everywhere = torch.ones_like(confidence, dtype=torch.bool)
    seen = Observation(
        confidence[..., None], confidence, confidence.long(), everywhere, everywhere, torch.zeros(1), confidence
    )
    assert example("custom_sampler").spaced(seen)[0].nonzero()[:, 0].tolist() == [2]
    seen.eligible = torch.tensor([[True, True, False, True, True, True, True]])
    assert example("custom_sampler").spaced(seen)[0].nonzero()[:, 0].tolist() == [1, 4]


def test_custom_sampler_is_between_the_thresholds():
    results = example("custom_sampler").main(problems=60)
    spaced, fast, slow = (results[name] for name in ("spaced", "threshold 0.5", "threshold 0.7"))
    assert fast.correct.mean() < spaced.correct.mean() and fast.nfe.mean() < spaced.nfe.mean() < slow.nfe.mean()


def test_custom_denoiser():
    """Four words drawn without looking at each other: 4! / 4^4 of them differ; in pairs 3 / 4 * 1 / 2."""
    accuracy = example("custom_denoiser").main(samples=30)
    assert accuracy[1] == 1
    assert accuracy[2] == pytest.approx(3 / 8, abs=0.07)
    assert accuracy[4] == pytest.approx(24 / 256, abs=0.05)


def test_custom_denoiser_does_not_read_the_padding():
    denoiser = example("custom_denoiser").Permutations()
    canvas = blank([torch.tensor([1, 2]), torch.tensor([3])], 2, denoiser.mask_token_id)
    assert denoiser.predict(canvas).confidence[:, 0, 0].tolist() == pytest.approx([1 / 4, 1 / 5])


@pytest.fixture(scope="module")
def dllm():
    """The harness's class of the model."""
    pytest.importorskip("lm_eval")
    return example("lm_eval_model").DLLM


YAML = r"""
task: words
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\n"]
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: "#### ([0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_the_harness_gives_our_own_verdicts(dllm, tmp_path, monkeypatch):
    """Of a task in a YAML file, at a threshold at which some completions are wrong."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    ours = make_task("gsm8k", "embedded", "test")
    problems = [ours[i] for i in range(24)]
    lines = [json.dumps({"question": problem.prompt, "answer": problem.answer}) for problem in problems]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.yaml").write_text(YAML.format(file=tmp_path / "words.jsonl"))
    results = simple_evaluate(
        "dllm",
        "denoiser=embedded,sampler=threshold:threshold=0.5,gen_length=24,device=cpu",
        tasks=["words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=10,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["words"], key=lambda sample: sample["doc_id"])
    texts = [sample["resps"][0][0] for sample in samples]
    correct = [ours.verify(problem, text).correct for problem, text in zip(problems, texts, strict=True)]
    assert [bool(sample["exact_match"]) for sample in samples] == correct and 0 < sum(correct) < 24
    assert results["results"]["words"]["exact_match,answer"] == pytest.approx(np.mean(correct))
    env = gym.make_vec("MaskedDiffusion-GSM8K-v0", num_envs=24, split="test", device="cpu")
    assert texts == collect(env, make_policy("threshold", threshold=0.5), range(24)).completions


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_loglikelihood_is_the_mean_over_orders(dllm):
    """One token: its log-probability. Two: the mean over both orders of writing them."""
    model = dllm(maskings=1024, batch_size=256, device="cpu")
    tokenizer, mask = model.denoiser.tokenizer, model.denoiser.mask_token_id

    def log_prob(text: str, token: str) -> float:
        """Of the token in the place of "?"; "<mask>" is the other one."""
        tokens = torch.tensor([tokenizer(text.replace("?", "<mask>"))["input_ids"]])
        logits = model.denoiser.logits(tokens)[0, text.split().index("?")].float()
        logits[mask] = -torch.inf
        return logits.log_softmax(dim=0)[tokenizer(token)["input_ids"][0]].item()

    context = "make 12 from 9 4 12 :"
    one, both = model.loglikelihood([request(context, " 4"), request(f"{context} ", "4 9")])
    assert one[0] == pytest.approx(log_prob(f"{context} ?", "4"), abs=1e-4)
    forwards = log_prob(f"{context} ? <mask>", "4") + log_prob(f"{context} 4 ?", "9")
    backwards = log_prob(f"{context} <mask> ?", "9") + log_prob(f"{context} ? 9", "4")
    assert both[0] == pytest.approx((forwards + backwards) / 2, abs=0.1)
    context += " 12 / 4 = 3 , 9 + 3 ="
    right, wrong = model.loglikelihood([request(context, " 12"), request(context, " 15")])
    assert right[0] > wrong[0] and right[1] is True and wrong[1] is False
    with pytest.raises(NotImplementedError, match="next-token"):
        model.loglikelihood_rolling([request(context)])


def test_the_harness_decides_about_the_chat_template_and_lengths(dllm, tmp_path):
    folder = write_llada(tmp_path / "llada")
    model = dllm(str(folder), gen_length=8, device="cpu")
    template = load_denoiser(folder, "cpu").tokenizer.apply_chat_template
    chat = [{"role": "user", "content": "two"}]
    assert model.apply_chat_template(chat) == template(chat, tokenize=False, add_generation_prompt=True)
    assert model.chat_template()
    seen = []
    decode = model.decode

    def spy(contexts, sampler, **settings):
        seen.append((contexts, settings["gen_length"], settings["temperature"]))
        return decode(contexts, sampler, **settings)

    model.decode = spy
    texts = model.generate_until(
        [
            request("one", {"until": []}),
            request("two", {"until": [], "max_gen_toks": 4}),
            request("three", {"until": [], "temperature": 0.7, "do_sample": True}),
            request("four", {"until": []}),
        ]
    )
    assert seen == [(["one", "four"], 8, 0.0), (["two"], 4, 0.0), (["three"], 8, 0.7)]
    stop = texts[3][1]
    assert model.generate_until([request("four", {"until": [stop]})]) == [texts[3].split(stop)[0]]


def test_the_harness_takes_metropolis_hastings(dllm):
    model = dllm(sampler="metropolis:steps=2", gen_length=12, device="cpu")
    prompt = make_task("countdown", "embedded", "test")[0].prompt
    (text,) = model.generate_until([request(prompt, {"until": [], "temperature": 1.0, "do_sample": True})])
    assert "=" in text
