"""What an iteration of a denoiser's trainer costs: ``python -m dllm_gym.eval.benchmarks.decoding --trainer spg``.

Measured on a task with the denoiser of the environment, and on a Llama with random weights, whose shape is a flag: how
many completions a second, how much memory, and where the time goes. Then the update alone, against a plain one that
keeps the logits of all positions.

Time is the median over repeats. Memory is the most that one iteration takes beyond what stood before it (weights), in
a fresh process: gradients, the optimiser's state and activations.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import torch

from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.terminal import console
from dllm_gym.agents.trainers.denoiser import load_objective, trainer
from dllm_gym.agents.trainers.denoiser.learner import Learner, Scorer
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.eval.benchmarks.random_llama import SPECIAL, ModelConfig, decode, plain_score, random_llama
from dllm_gym.eval.benchmarks.timing import median, now

PHASES = ("sampling", "scoring without gradient", "forward", "backward", "optimiser", "the rest")
"""Parts of an iteration. Recomputation belongs to the backward pass."""


@dataclass
class Contestant:
    """What takes part in the measurement."""

    learner: Learner
    run: Callable[[], object]
    """Runs one iteration. On a task it is always the first, with the same problems, seeds and masks."""
    completions: int
    """Number of completions per iteration."""
    setting: str
    """The remaining settings, for the table."""


def measure_trainer(name: str, env: EnvConfig, model: ModelConfig, repeats: int, threads: int | None) -> None:
    """Measure the trainer of an objective and print the tables.

    Args:
        name: of the objective, see `dllm_gym.agents.trainers.denoiser.OBJECTIVES`.
        env: of the measurement on a task, with temperature 1 where it has 0.
        model: the Llama.
        repeats: of every contestant, beside one to warm up.
        threads: of torch on the CPU; None: as it is.

    Raises:
        ValueError: an unknown objective, or a config that cannot be.
    """
    load_objective(name)
    model = model.resolved()
    makers = {
        "task": partial(on_task, name, env),
        "llama": partial(on_llama, name, env, model),
        "ours": partial(update_alone, name, env, model),
        "plain": partial(update_alone, name, env, model, plain=True),
    }
    memory = {key: peak_memory_alone(make, threads) for key, make in makers.items()}
    if threads:
        torch.set_num_threads(threads)
    contestants = {key: make() for key, make in makers.items() if key != "llama"}
    contestants["llama"] = on_llama(name, env, model, contestants["ours"])  # large models do not fit three times
    seconds: dict[str, list[float]] = {key: [] for key in makers}
    phases: dict[str, list[dict[str, float]]] = {key: [] for key in makers}
    for repeat in range(repeats + 1):
        for key in list(makers)[:: 1 if repeat % 2 else -1]:
            contestant = contestants[key]
            with timed(contestant.learner) as spent:
                start = now(contestant.learner.denoiser.device)
                contestant.run()
                seconds[key].append(now(contestant.learner.denoiser.device) - start)
            phases[key].append(spent | {"the rest": seconds[key][-1] - sum(spent.values())})
    times = {key: np.array(values[1:]) for key, values in seconds.items()}

    from rich.table import Table

    whole = ("task", "llama")
    learner = contestants["llama"].learner
    table = Table(
        title=f"{name}: an iteration; {learner.denoiser.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {repeats} repeats",
        caption="median of the repeats, the least and the most in brackets; memory beyond that of the weights",
    )
    for column in ("figure", f"{env.id}, denoiser {env.denoiser_name}", "Llama with random weights"):
        table.add_column(column)
    rates = (median(contestants[key].completions / times[key], ".3g") for key in whole)
    table.add_row("completions a second", *rates)
    table.add_row("peak memory", *(f"{memory[key]:.2f} GB" for key in whole))
    for phase in PHASES:
        shares = (np.array([spent.get(phase, 0.0) for spent in phases[key][1:]]) / times[key] for key in whole)
        table.add_row(f"time in {phase}", *(median(100 * share, ".1f", " %") for share in shares))
    table.add_row("setting", *(contestants[key].setting for key in whole))
    console().print(table)

    table = Table(
        title=f"{name}: the update alone, its head in chunks and only where a token is scored",
        caption="compared with logits of all positions kept in float32; the goal is either of the two",
    )
    for column in ("figure", "measured", "goal", "setting"):
        table.add_column(column)
    ratio = median(times["plain"] / times["ours"], ".2f", "x faster")
    each = "{:.3g} s instead of {:.3g} s".format(*(np.median(times[key]) for key in ("ours", "plain")))
    table.add_row("time", ratio, ">= 1.5x", f"{each}; {contestants['ours'].setting}")
    ratio = f"{memory['plain'] / max(memory['ours'], 1e-9):.2f}x less"
    table.add_row("peak memory", ratio, ">= 2x", f"{memory['ours']:.2f} GB instead of {memory['plain']:.2f} GB")
    console().print(table)


def on_task(name: str, env: EnvConfig) -> Contestant:
    """The trainer's own iteration in an environment; all but the number of problems is its default."""
    config_type, loss = load_objective(name)
    config = config_type(env=replace(env, temperature=env.temperature or 1.0, alpha=0.0))
    config.problems = math.ceil(env.num_envs / config.group)
    config.check()
    accelerator = trainer.make_accelerator(config)
    denoiser = load_denoiser(env.denoiser_name, accelerator.device, env.dtype)
    environment = make_env(config.env, denoiser=denoiser)
    trainer.check_masking(config, environment)
    sampler = make_stepwise(config.sampler)
    learner = Learner(denoiser, config, loss, accelerator)
    return Contestant(
        learner,
        lambda: trainer.improve(learner, [environment], sampler, 0),
        completions=config.problems * config.group,
        setting=f"{config.problems} problems x {config.group} completions, L {environment.episodes.gen_length}, "
        f"{config.sampler}, {config.inner_iterations} inner iterations, {_masks(learner)}",
    )


def on_llama(name: str, env: EnvConfig, model: ModelConfig, update: Contestant | None = None) -> Contestant:
    """Random prompts are completed; then the update, of a contestant that is there already or of a new one."""
    contestant = update or update_alone(name, env, model)
    denoiser, run_update = contestant.learner.denoiser, contestant.run
    prompts = [*torch.randint(len(SPECIAL), model.vocab_size, (model.batch, model.prompt_length))]
    prompts = [prompt.to(denoiser.device) for prompt in prompts]

    def run() -> None:
        decode(denoiser, prompts, model.gen_length, model.steps)
        run_update()

    setting = f"{contestant.setting}, decoded in {model.steps} steps"
    return replace(contestant, run=run, setting=setting)


def update_alone(name: str, env: EnvConfig, model: ModelConfig, plain: bool = False) -> Contestant:
    """The update on random completions of random prompts; ``plain``: with the logits of all positions."""
    config_type, loss = load_objective(name)
    config = config_type(
        env=replace(env, temperature=1.0),
        problems=1,
        inner_iterations=model.inner_iterations,
        microbatch=model.microbatch,
        lora=LoRAConfig(rank=model.lora_rank),
        gradient_checkpointing=model.gradient_checkpointing,
    )
    config.check()
    accelerator = trainer.make_accelerator(config)
    denoiser = random_llama(model, accelerator.device)
    if plain:
        denoiser.score = partial(plain_score, denoiser)
    learner = Learner(denoiser, config, loss, accelerator)
    generator = torch.Generator().manual_seed(0)
    shape = (model.batch, model.prompt_length + model.gen_length)
    text = torch.randint(len(SPECIAL), model.vocab_size, shape, generator=generator).to(denoiser.device)
    prompts, tokens = [*text[:, : model.prompt_length]], text[:, model.prompt_length :]
    advantage = torch.rand(model.batch, generator=generator).to(denoiser.device)  # all are learned from
    weight = torch.full_like(advantage, 1 / model.batch)
    masks = torch.Generator(denoiser.device)

    def run() -> dict[str, float]:
        return learner.update(tokens, prompts, advantage, weight, masks.manual_seed(0), config.learning_rate)

    weights = sum(p.numel() for p in denoiser.model.parameters())
    setting = (
        f"{weights / 1e6:.3g} M weights in {model.dtype}, lora.rank {model.lora_rank}, V {model.vocab_size}; "
        f"{model.batch} completions, L {model.gen_length} after {model.prompt_length}, {model.inner_iterations} inner "
        f"iterations, {_masks(learner)}"
    )
    return Contestant(learner, run, model.batch, setting)


@contextmanager
def timed(learner: Learner) -> Iterator[dict[str, float]]:
    """Yields the seconds spent in each of `PHASES` but the last; nothing is left behind in what is measured."""
    spent: dict[str, float] = defaultdict(float)
    device = learner.denoiser.device

    def watch(owner, method: str, phase: str | None = None):
        function = getattr(owner, method)

        def watched(*args, **kwargs):
            # Scores without gradient are those of the denoiser that sampled and of the reference.
            part = phase or ("forward" if torch.is_grad_enabled() else "scoring without gradient")
            start = now(device)
            result = function(*args, **kwargs)
            spent[part] += now(device) - start
            return result

        return patch.object(owner, method, watched)

    with ExitStack() as watches:
        watches.enter_context(watch(trainer, "collect", "sampling"))
        watches.enter_context(watch(sys.modules[__name__], "decode", "sampling"))
        watches.enter_context(watch(Scorer, "forward"))
        watches.enter_context(watch(learner.accelerator, "backward", "backward"))
        watches.enter_context(watch(learner, "_step", "optimiser"))
        yield spent


def peak_memory_alone(make: Callable[[], Contestant], threads: int | None) -> float:
    """`peak_memory` of a contestant in a process of its own, so that none finds what another has left."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_memory, make, threads).result()


def peak_memory(make: Callable[[], Contestant], threads: int | None = None) -> float:
    """GB (10^9 bytes) that one iteration takes at most, beyond what stands before it."""
    if threads:
        torch.set_num_threads(threads)
    contestant = make()
    device = contestant.learner.denoiser.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contestant.run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9

    import psutil  # comes with accelerate

    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def look() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        contestant.run()
    finally:
        done.set()
        looking.join()
    return (peak - before) / 1e9


def _masks(learner: Learner) -> str:
    corruption = learner.config.corruption
    return f"{corruption.maskings} maskings ({corruption.kind}), microbatch {learner.config.microbatch}"
