"""One update of the denoiser: microbatches, precision, optimisers, adapters, and what is forwarded at all."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from learners import ADVANTAGE, completions_of, early, make_learner, update, weights_of
from torch import Tensor

from dllm_gym.agents.trainers.denoiser import load_objective
from dllm_gym.agents.trainers.denoiser.diffu_grpo import DiffuGRPOConfig
from dllm_gym.agents.trainers.denoiser.elbo_pg import ELBOPGConfig
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
from dllm_gym.agents.trainers.denoiser.gdsd import GDSDConfig
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig, LoRAConfig
from dllm_gym.agents.trainers.denoiser.spg import SPGConfig, spg_loss
from dllm_gym.agents.trainers.denoiser.unigrpo import UniGRPOConfig
from dllm_gym.decoding import pad_left
from dllm_gym.decoding.corruption import completion_mask, corrupted_canvas


@pytest.mark.parametrize("algorithm", ["spg", "gdsd-tlc", "espo", "unigrpo", "wd1"])
def test_microbatches_change_memory_only(algorithm):
    config_type, loss = load_objective(algorithm)
    results = []
    for microbatch in (128, 3, 1):
        config = config_type(inner_iterations=2, microbatch=microbatch)
        if algorithm == "gdsd-tlc":
            config = replace(config, reference_share=0.2, kl_weight=0.1)
        learner = make_learner(config, loss, sgd=1.0)
        metrics = update(learner, ADVANTAGE)
        assert metrics.pop("step_kl") > 0  # of the first microbatch
        results.append((metrics, weights_of(learner.denoiser)))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0, msg=name)
    moved = max((weights[name] - p).abs().max() for name, p in weights_of(early()).items())
    assert moved > 1e-2


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_memory_only(rank):
    results = []
    for checkpointing in (False, True):
        config = ESPOConfig(
            inner_iterations=2, gradient_checkpointing=checkpointing, lora=LoRAConfig(rank=rank), kl_weight=0.1
        )
        learner = make_learner(config, espo_loss, sgd=0.5)
        results.append((update(learner, ADVANTAGE), weights_of(learner.denoiser)))
    (metrics, weights), (same_metrics, same) = results
    assert same_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, atol=1e-5, rtol=0)


def spying(batches: list[Batch]):
    """A loss that keeps what it sees; its gradient is that of the log-probabilities."""

    def loss(batch: Batch, config) -> tuple[Tensor, dict[str, Tensor]]:
        batches.append(batch)
        return -(batch.weight * batch.advantage * batch.new.log_prob.sum(dim=(0, 2))).sum(), {}

    return loss


@torch.no_grad()
def scores_of(denoiser, model, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities that another state of the model gives under a batch's masks."""
    other = copy.copy(denoiser)
    other.model = model
    tokens, prompts = completions_of(denoiser)
    prompt, prompt_mask = pad_left(prompts)
    canvas = corrupted_canvas(prompt, prompt_mask, tokens, batch.corruption, denoiser.mask_token_id)
    n = len(batch.new.log_prob)
    score = other.score(canvas, tokens.repeat(n, 1), batch.corruption.scored.flatten(0, 1), temperature)
    return score.log_prob.unflatten(0, (n, 7))


@pytest.mark.parametrize(("rank", "temperature"), [(0, 1.0), (2, 1.0), (0, 0.7), (2, 0.7)])
def test_old_is_what_sampled_and_reference_what_training_began_with(rank, temperature):
    """At the temperature of sampling, under the masks of each inner iteration, which are its own."""
    batches, denoiser = [], early()
    config = GDSDConfig(inner_iterations=3, reference_share=0.5, lora=LoRAConfig(rank=rank), max_grad_norm=100.0)
    config.env.temperature = temperature
    learner = make_learner(config, spying(batches), denoiser, sgd=0.05)
    beginning = copy.deepcopy(early().model)
    update(learner, ADVANTAGE)
    batches.clear()
    sampled = copy.deepcopy(denoiser.model)
    lengths = completion_mask(completions_of(denoiser)[0], learner.end_tokens).sum(dim=1).float()
    update(learner, ADVANTAGE, seed=1)
    assert len(batches) == 3
    for inner, batch in enumerate(batches):
        for of, model in ((batch.old, sampled), (batch.reference, beginning)):
            expected = scores_of(denoiser, model, batch, temperature)
            torch.testing.assert_close(of.log_prob, expected, atol=1e-4, rtol=1e-4)
            assert not of.log_prob.requires_grad
        assert torch.equal(batch.new.log_prob, batch.old.log_prob) == (inner == 0)
        assert (batch.new.log_prob - batch.reference.log_prob).abs().max() > 1e-2
        assert torch.equal(batch.length, lengths)
    assert lengths[1] == 1, "the end token counts"
    for one, other in itertools.combinations(batches, 2):
        assert not torch.equal(one.corruption.scored, other.corruption.scored)


def test_what_a_loss_does_not_use_is_not_computed():
    batches = []
    update(make_learner(ELBOPGConfig(inner_iterations=1), spying(batches)), ADVANTAGE)
    update(make_learner(GDSDConfig(inner_iterations=1, reference_share=0.0), spying(batches)), ADVANTAGE)
    assert [(b.old is None, b.reference is None) for b in batches] == [(True, True), (False, True)]


def test_excluded_completions_change_nothing():
    """Their weight is 0 and the others' that of a batch without them."""
    config = DiffuGRPOConfig(inner_iterations=2, corruption=CorruptionConfig("full", maskings=1), kl_weight=0.1)
    loss = load_objective("diffu-grpo")[1]
    with_them, without = (make_learner(config, loss, sgd=1.0) for _ in range(2))
    update(with_them, torch.tensor([1.0, -0.5, 0.3, -0.8, 0, 0, 0]), weight=torch.tensor([0.25] * 4 + [0.0] * 3))
    update(without, torch.tensor([1.0, -0.5, 0.3, -0.8]))
    for name, weight in weights_of(with_them.denoiser).items():
        torch.testing.assert_close(weight, weights_of(without.denoiser)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["spg", "gdsd", "coupled-grpo", "trace-pg"])
def test_bad_completions_left_out_are_not_learned_from(algorithm):
    config_type, _ = load_objective(algorithm)
    config = config_type(negative_scale=0.0)
    assert config.learns_from(torch.tensor([0.5, 0.0, -0.5])).tolist() == [True, False, False]


def test_spg_without_negatives_leaves_the_weights_where_nothing_was_good():
    for weight_decay in (0.0, 0.1):
        learner = make_learner(SPGConfig(negative_scale=0, weight_decay=weight_decay, inner_iterations=2), spg_loss)
        metrics = update(learner, -torch.arange(7.0), rate=0.01)
        assert metrics["gradient_norm"] == metrics["learned_from"] == metrics["elbo"] == 0
        for name, p in weights_of(early()).items():
            expected = p * (1 - 0.01 * weight_decay) ** 2
            tolerance = 1e-6 if weight_decay else 0
            torch.testing.assert_close(learner.weights.parameters[name].detach(), expected, atol=tolerance, rtol=0)
    learner = make_learner(SPGConfig(inner_iterations=2), spg_loss)
    assert update(learner, -torch.arange(7.0))["gradient_norm"] > 0
    assert update(learner, torch.zeros(7))["gradient_norm"] == 0, "nothing is left over from the update before"


@pytest.mark.parametrize("rank", [0, 2])
def test_muon_takes_the_linear_layers(rank):
    """Its steps are orthogonal matrices times rate * 0.2 sqrt(longer side): singular values are equal."""
    denoiser = early()
    config = SPGConfig(optimizer="muon", inner_iterations=1, lora=LoRAConfig(rank=rank))
    learner = make_learner(config, spg_loss, denoiser)
    before = {name: p.detach().clone() for name, p in learner.weights.masters.items()}
    update(learner, ADVANTAGE, rate=0.01)
    assert len(learner.optimizers) == (1 if rank else 2)
    for name, p in learner.weights.masters.items():
        change = (p.detach() - before[name]).float()
        if "proj" not in name:
            assert change.abs().max() < 0.0101, "a first step of AdamW is the learning rate"
        elif change.any():  # of an adapter only B moves at first
            size = torch.linalg.svdvals(change) / (0.01 * 0.2 * max(change.shape) ** 0.5)
            assert size[0] < 1.3 and size[1] > 0.6, name


@pytest.mark.parametrize("algorithm", ["spg", "elbo-pg", "wd1"])
def test_what_has_no_gradient_is_not_forwarded(algorithm):
    """And nothing changes by it: neither the update nor what the metrics say of the completions learned from."""
    config_type, loss = load_objective(algorithm)
    zero = {"negative_scale": 0.0} if algorithm == "spg" else {}
    settings = {"microbatch": 2} | zero
    config, all_of_them = config_type(**settings), type("All", (config_type,), {})(**settings)
    type(all_of_them).learns_from = lambda config, advantage: torch.ones_like(advantage, dtype=torch.bool)
    advantage = torch.tensor([0.0, 0.7, 0.0, -0.2, 1.0, 0.0, -0.4])
    advantage = advantage.clamp(min=0) if zero else advantage  # as the trainer gives them
    rows, results, learners = [], [], []
    for each in (config, all_of_them):
        seen: list[float] = []
        learners.append(
            make_learner(each, lambda b, c, seen=seen: (seen.extend(b.advantage.tolist()), loss(b, c))[1], sgd=1.0)
        )
        results.append(update(learners[-1], advantage))
        rows.append(seen)
    for name, weight in weights_of(learners[0].denoiser).items():
        torch.testing.assert_close(weight, weights_of(learners[1].denoiser)[name], atol=1e-6, rtol=0)
    kept = [a for a in advantage.tolist() if a != 0]
    assert rows[0] == kept * config.inner_iterations and len(rows[1]) == 7 * config.inner_iterations
    assert results[0]["learned_from"] == pytest.approx(len(kept) / 7) and results[1]["learned_from"] == pytest.approx(1)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5, abs=1e-6)


def test_nothing_scored_in_a_microbatch_is_no_mistake():
    """A bernoulli masking may mask none of a short completion's tokens."""
    learner = make_learner(UniGRPOConfig(inner_iterations=1, microbatch=1), load_objective("unigrpo")[1])
    tokens, prompts = completions_of(learner.denoiser)
    tokens = torch.full_like(tokens[:2], learner.denoiser.eos_token_id)
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.full((2,), 0.5)
        metrics = learner.update(tokens, prompts[:2], torch.tensor([1.0, -1.0]), weight, generator, 1e-3)
        assert all(math.isfinite(value) for value in metrics.values())
        seen.add(metrics["step_kl"] == 0)
    assert seen == {True, False}


def test_half_precision_weights_train_through_float32_masters():
    """Each step is less than what bfloat16 can tell apart; ten of them are not."""
    batches = []
    learner = make_learner(ELBOPGConfig(inner_iterations=1), spying(batches), early("bfloat16"))
    start = weights_of(learner.denoiser)
    matrices = [name for name, p in start.items() if p.ndim == 2 and "embed" not in name]
    large = {name: start[name].abs() > 2**-6 for name in matrices}  # there an ulp is at least 2^-13

    def changed() -> float:
        moved = [(learner.weights.parameters[name] != start[name])[large[name]] for name in matrices]
        return torch.cat(moved).float().mean().item()

    update(learner, ADVANTAGE, rate=2.5e-5)
    assert all(p.dtype == torch.bfloat16 for p in learner.weights.parameters.values())
    assert all(master.dtype == torch.float32 for master in learner.weights.masters.values())
    moved = max((learner.weights.masters[name] - start[name].float()).abs().max().item() for name in matrices)
    assert 1.25e-5 < moved < 5e-5 and changed() == 0
    for _ in range(9):
        update(learner, ADVANTAGE, rate=2.5e-5)
    assert changed() > 0.3
    for name, p in learner.weights.parameters.items():
        assert torch.equal(p, learner.weights.masters[name].bfloat16())
    assert learner.state_dict()["weights"][matrices[0]].dtype == torch.float32


def test_only_adapters_train():
    config = ESPOConfig(inner_iterations=3, lora=LoRAConfig(rank=2), kl_weight=0.1)
    learner = make_learner(config, espo_loss)
    start = weights_of(learner.denoiser)
    metrics = update(learner, ADVANTAGE, rate=0.01)
    assert metrics["kl"] > 0
    layers = learner.denoiser.causal_lm.config.num_hidden_layers
    names = list(learner.weights.parameters)
    assert len(names) == 2 * 7 * layers and all("lora_" in name for name in names)
    for name, p in learner.denoiser.model.named_parameters():
        assert torch.equal(p, start[name]) != ("lora_" in name), name
        assert p.requires_grad == ("lora_" in name), "switching adapters off for the reference is undone"


def test_reference_equals_new_before_the_first_step():
    config = ESPOConfig(inner_iterations=1, lora=LoRAConfig(rank=2), kl_weight=0.1)
    metrics = update(make_learner(config, espo_loss), ADVANTAGE)
    assert metrics["kl"] == pytest.approx(0, abs=1e-9) and metrics["clip_fraction"] == 0
