"""Train the denoiser with RL: the loop that every objective of this folder shares.

    problems -> (a sampler decodes with the denoiser, in the environment) -> Rollout -> group-relative advantages
             -> maskings -> scores of the masked tokens (new, old, reference) -> the objective's loss -> update

Metrics, one row an iteration: ``reward`` (what is maximised), ``accuracy``, ``nfe``, ``completion_length`` (tokens up
to the end); ``entropy`` of the denoiser at the positions that could be chosen, in nats; ``equal_groups`` share of
groups without any difference in reward (they teach nothing); ``excluded`` episodes whose reward was not a number;
``learned_from`` share of completions with a gradient (the update forwards no others); ``step_kl`` half the squared
change of a token's log-probability in this iteration (k2, per scored token of the first maskings); ``loss`` and the
objective's own, means over inner iterations; ``gradient_norm`` before clipping; ``learning_rate``; ``forwards`` rows of
denoiser forward passes so far, in decoding and updates, a backward pass being two; ``tokens_per_second`` completion
tokens sampled and trained on; ``seconds`` of training so far, and ``sampling_share`` of the iteration's;
``peak_memory_gb``.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.trainers.advantages import scale_negatives
from dllm_gym.agents.trainers.by_task import means_by_task, sums_by_task
from dllm_gym.agents.trainers.denoiser.comparison import report
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import Loss, TrainerConfig
from dllm_gym.agents.trainers.processes import own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.schedule import rate_factor
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.decoding.corruption import check_corruption, completion_mask
from dllm_gym.decoding.trajectory import Trajectories, doubt
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.envs.episodes import Episodes
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Rollout


@own_threads
def train(algorithm: str, config: TrainerConfig, loss: Loss) -> Path | None:
    """Train, then compare the denoiser with what it was on held-out problems. Returns the run's folder.

    Several processes (`accelerate launch`) share the problems of an iteration.
    """
    config.check()
    accelerator = make_accelerator(config)
    denoiser = load_trainable(config.env, accelerator.device)
    sampler = make_stepwise(config.sampler, device=accelerator.device)
    confidence_k = max(config.env.confidence_k, sampler.confidence_k)
    envs = make_envs(config.env, denoiser=denoiser, confidence_k=confidence_k)
    check_masking(config, envs[0])
    learner = Learner(denoiser, config, loss, accelerator)
    run = Run(algorithm, config, learner.processes)
    with run:
        for iteration in run.steps(config.iterations, {"learner": learner}, forwards=config.forwards):
            metrics, problems = improve(learner, envs, sampler, iteration, run.totals["forwards"])
            run.record(metrics, problems)
        if run.main:
            denoiser.save(run.folder / "denoiser")
            # The others are done: waiting for a long comparison, they would run into the backend's timeout.
            run.finish(report(run.folder, config.report, config.env, denoiser, algorithm))
    return run.folder


def improve(
    learner: Learner, envs: list[UnmaskingVectorEnv], sampler: Sampler, iteration: int, forwards: float = 0
) -> tuple[dict[str, float], np.ndarray]:
    """One iteration: sample, score, update. Returns the metrics and the indices of the problems.

    ``forwards`` are those of the iterations before.
    """
    config, processes, since = learner.config, learner.processes, time.perf_counter()
    device = learner.denoiser.device
    # Everything drawn follows from (seed, iteration, process), so a resumed run needs no generator state.
    episodes = envs[0].episodes
    problems = np.random.default_rng([config.seed, iteration]).integers(len(episodes.task), size=config.problems)
    rng = processes.rng(config.seed, iteration)
    decoding_seed, mask_seed = (int(n) for n in rng.integers(2**32, size=2))
    own = np.repeat(processes.own(problems), config.group)
    rollout = collect(envs, sampler, own, seed=decoding_seed, explore=False)
    sampled = time.perf_counter()

    valid = rollout.reward.isfinite()
    for i in (~valid).nonzero()[:, 0].tolist():
        print(f"warning: reward {rollout.reward[i].item()} for {rollout.problems[i].id}: excluded", file=sys.stderr)
    advantage = config.advantages(rollout.reward.view(-1, config.group)).flatten()
    advantage = scale_negatives(advantage, config.negative_scale)
    sums = summarise(rollout, valid, learner.end_tokens, config.group)
    sampling = processes.sum(sums | sums_by_task(rollout, episodes.task.parts))
    weight = valid / max(1.0, sampling["valid"])
    prompts = [episodes.encode_prompt(problem) for problem in rollout.problems[:: config.group]]
    prompts = [prompt for prompt in prompts for _ in range(config.group)]
    generator = torch.Generator(device).manual_seed(mask_seed)
    rate = config.learning_rate * rate_factor(config, iteration, forwards)
    with seeded(mask_seed):  # dropout
        steps = trajectories(rollout, episodes.empty_action, config.env.temperature) if config.uses_trajectory else None
        metrics = learner.update(rollout.tokens, prompts, advantage, weight, generator, rate, steps)

    if learner.denoiser.approximates(config.env.cache):
        metrics["cache_gap"] = cache_gap(learner, episodes, rollout, rng)
    seconds = time.perf_counter() - since
    means = {name: sampling[name] / max(1.0, sampling["valid"]) for name in MEANS}
    return metrics | means | means_by_task(sampling, episodes.task.parts) | {
        "entropy": sampling["entropy"] / max(1.0, sampling["choices"]),
        "equal_groups": sampling["equal_groups"] / config.problems,
        "excluded": config.problems * config.group - sampling["valid"],
        "learning_rate": rate,
        "tokens_per_second": sampling["completion_length"] / seconds,
        "sampling_share": (sampled - since) / seconds,
        "peak_memory_gb": peak_memory_gb(device),
        "forwards": sampling["nfe"] + metrics["forwards"],
        "seconds": seconds,
    }, problems


def trajectories(rollout: Rollout, empty_action: str, temperature: float) -> Trajectories:
    """How the completions of a rollout were written: the sampler's picks, and what the environment adds to none."""
    seen, unmask = rollout.observation, rollout.picks > 0
    if empty_action == "best":
        unmask = decoding.with_best(unmask, seen)
    written = unmask & seen.eligible
    return Trajectories(seen.masked, written, rollout.episode, doubt(seen.probability, written, temperature))


@torch.no_grad()
def cache_gap(
    learner: Learner, episodes: Episodes, rollout: Rollout, rng: np.random.Generator, most: int = 32
) -> float:
    """Mean absolute difference, in nats, that an approximate cache makes to the log-probabilities of written tokens.

    Of up to ``most`` steps of the rollout in each process, forwarded again without cache. By so much the completions
    are off-policy.
    """
    chosen = rng.permutation(len(rollout.episode))[:most]
    steps = torch.as_tensor(chosen, device=rollout.tokens.device)
    seen, written = rollout.observation[steps], rollout.picks[steps] > 0
    prompts = [episodes.encode_prompt(rollout.problems[n]) for n in rollout.episode[steps].tolist()]
    canvas = decoding.before(seen, prompts, learner.denoiser.mask_token_id)
    log_prob = learner.denoiser.score(canvas, seen.token, written).log_prob
    gap = torch.where(written, (log_prob - seen.probability.log()).abs(), 0.0)
    sums = learner.processes.sum({"gap": gap.sum(), "written": written.sum()})
    return sums["gap"] / sums["written"]


MEANS = ("reward", "accuracy", "nfe", "completion_length")


def summarise(rollout: Rollout, valid: Tensor, end_tokens: Tensor, group: int) -> dict[str, Tensor]:
    """Sums over this process's completions, float32 scalars; of `MEANS` over those whose reward is a number."""
    lengths = completion_mask(rollout.tokens, end_tokens).sum(dim=1)
    values = zip(MEANS, (rollout.reward, rollout.correct, rollout.nfe, lengths), strict=True)
    groups = torch.where(valid, rollout.reward, torch.nan).view(-1, group)
    first = groups.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    equal = ((groups == first) | groups.isnan()).all(dim=1)
    eligible = rollout.observation.eligible
    sums = {name: value[valid].sum() for name, value in values} | {
        "valid": valid.sum(),
        "equal_groups": equal.sum(),
        "entropy": rollout.observation.entropy[eligible].sum(),
        "choices": eligible.sum(),
    }
    return {name: value.float() for name, value in sums.items()}


def check_masking(config: TrainerConfig, env: UnmaskingVectorEnv) -> None:
    """Refuse a corruption that does not fit the environment. Raises ValueError."""
    kind, episodes = config.corruption, env.episodes
    check_corruption(
        kind.kind,
        kind.maskings,
        episodes.gen_length,
        kind.block_length or episodes.block_length,
        kind.p_mask_prompt,
    )


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Devices and processes as `accelerate launch` says.

    Raises:
        ValueError: problems that cannot be shared evenly, a way of sharding that hides the weights from decoding, or a
            setting of accelerate's that this project has one of its own for.
    """
    device = config.env.device
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"env.device={device!r}: training needs 'auto', 'cpu', or 'cuda' where there is CUDA.")
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    if accelerator.mixed_precision == "fp16":
        raise ValueError(UNDERFLOW)
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError("accelerate's gradient_accumulation_steps: must be 1; --microbatch saves memory here.")
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate's {kind.value}: decoding needs whole weights on every device; launch with DDP, and shard "
            f"with --shard, or fit the denoiser with --lora.rank, --env.dtype bfloat16, --microbatch."
        )
    if config.shard and accelerator.num_processes == 1:
        raise ValueError("shard: there is one process only; start several with torchrun or accelerate launch.")
    if config.problems % accelerator.num_processes:
        raise ValueError(
            f"problems={config.problems}: must be a multiple of the {accelerator.num_processes} processes."
        )
    return accelerator


UNDERFLOW = "float16: gradients underflow in it; train in bfloat16 or float32."


def load_trainable(env: EnvConfig, device: str | torch.device) -> PretrainedDenoiser:
    """The environment's denoiser. Raises ValueError where it has no weights to train, adapters on them, or float16."""
    own = replace(env, denoiser=None).denoiser_name
    if own == "oracle":
        raise ValueError(
            f"env.id={env.id!r}: its denoiser must be the oracle, which has nothing to train; "
            "docs/oracle.md says what trains there."
        )
    name = env.denoiser_name
    denoiser = load_denoiser(name, **env.loading | {"device": device})
    if not isinstance(denoiser, PretrainedDenoiser):
        raise ValueError(f"env.denoiser={name!r}: has no weights to train.")
    if denoiser.dtype == torch.float16:
        raise ValueError(UNDERFLOW)
    if denoiser.model is not denoiser.causal_lm:
        raise ValueError(
            f"env.denoiser={name!r}: has an adapter; write it into the weights first, "
            f"load_denoiser({name!r}).merge().save(folder)."
        )
    return denoiser


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far, in GB (10^9 bytes): of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
