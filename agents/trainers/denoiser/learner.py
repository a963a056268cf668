"""A denoiser in training: log-probabilities under maskings -> an objective's loss -> gradients -> weights.

Devices, processes, mixed precision come from `accelerate`; low-rank adapters from `peft`, and the reference is then the
denoiser with its adapters off, otherwise a frozen copy. Masters of the weights may be sharded over the processes
(`dllm_gym.agents.trainers.sharding`).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dllm_gym.agents.trainers.denoiser.objective import Batch, LoRAConfig, Loss, TrainerConfig, floored
from dllm_gym.agents.trainers.denoiser.weights import TrainedWeights
from dllm_gym.agents.trainers.muon import linear_and_rest, muon
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.agents.trainers.sharding import gathered, shard_rest, sharded_copy
from dllm_gym.decoding import pad_left
from dllm_gym.decoding.corruption import Corruption, completion_mask, corrupted_canvas
from dllm_gym.decoding.trajectory import Trajectories
from dllm_gym.denoisers.base import TrainableDenoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.types import Score


class Scorer(nn.Module):
    """`Denoiser.score` as the forward of a module, which is what accelerate wraps for several processes."""

    def __init__(self, denoiser: TrainableDenoiser, temperature: float):
        super().__init__()
        self.model = denoiser.model
        self._denoiser = [denoiser]  # not a submodule
        self.temperature = temperature

    def forward(self, canvas, targets: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        score = self._denoiser[0].score(canvas, targets, scored, self.temperature)
        return score.log_prob, score.centred_logit


class Learner:
    """A denoiser in training: its weights, optimiser, reference, and the update on a batch of completions."""

    def __init__(self, denoiser: TrainableDenoiser, config: TrainerConfig, loss: Loss, accelerator: Accelerator):
        self.denoiser, self.config, self.loss, self.accelerator = denoiser, config, loss, accelerator
        self.processes = Processes(accelerator)
        self.end_tokens = torch.tensor(sorted(denoiser.eos_token_ids), device=denoiser.device)
        reference = denoiser
        if config.uses_reference and not config.lora.rank:
            reference = copy.copy(denoiser)
            reference.model = copy.deepcopy(denoiser.model)
        let_train(denoiser, config.lora, config.seed)
        self.reference = Scorer(reference, config.env.temperature)
        if config.gradient_checkpointing:
            denoiser.model.gradient_checkpointing_enable()
            denoiser.model.enable_input_require_grads()
        self.whole = Scorer(denoiser, config.env.temperature)
        """Scores without gradients, by the weights that decode."""
        self.trained = denoiser
        """The denoiser whose weights have gradients."""
        how = config.optimizer, config.learning_rate, config.weight_decay, config.betas
        if config.shard:
            mesh = self.processes.mesh
            self.trained = sharded_copy(cast(PretrainedDenoiser, denoiser), mesh)
            self.scorer = shard_rest(Scorer(self.trained, config.env.temperature), self.trained, mesh)
            shards = {name: p for name, p in self.trained.model.named_parameters() if p.requires_grad}
            self.weights = TrainedWeights(denoiser.model, shards)
            denoiser.model.requires_grad_(False)
            self.optimizers = make_optimizers(self.trained.model, shards, *how)
        else:
            self.weights = TrainedWeights(denoiser.model)
            optimizers = make_optimizers(denoiser.model, self.weights.masters, *how)
            self.scorer, *self.optimizers = accelerator.prepare(self.whole, *optimizers)

    def state_dict(self) -> dict:
        """Weights in training and the optimisers' states."""
        return {"weights": self.weights.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        self.weights.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def update(
        self,
        tokens: Tensor,
        prompts: list[Tensor],
        advantage: Tensor,
        weight: Tensor,
        generator: torch.Generator,
        learning_rate: float,
        trajectories: Trajectories | None = None,
    ) -> dict[str, float]:
        """The inner iterations on one batch of E completions, of which each process has its own.

        Args:
            tokens: ``[E, L]`` int64, finished canvases.
            prompts: E 1-D int64 tensors.
            advantage: ``[E]``. weight: ``[E]``, see `Batch`.
            generator: of the maskings.
            trajectories: how the completions were written, for objectives that score that.
        """
        config, accelerator = self.config, self.accelerator
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
        prompt, prompt_mask = pad_left(prompts)
        completion = completion_mask(tokens, self.end_tokens)
        maskings = [
            config.maskings(completion, prompt_mask, generator, trajectories) for _ in range(config.inner_iterations)
        ]
        learned = (weight > 0) & config.learns_from(advantage)
        weight = weight * learned
        # Keep one completion where nothing is learned, so that every process joins the all-reduce.
        rows = learned.nonzero()[:, 0] if learned.any() else learned.new_zeros(1).long()
        chunks = list(rows.split(config.microbatch))
        own = len(chunks)
        forwards = 0
        if config.shard:  # forward and backward passes are in lockstep: the last ones of some processes weigh nothing
            chunks += chunks[:1] * (self.processes.most(own) - own)

        def score(module, corruption: Corruption, rows: Tensor) -> Score:
            part = corruption[rows]
            canvas = corrupted_canvas(prompt[rows], prompt_mask[rows], tokens[rows], part, self.denoiser.mask_token_id)
            n = len(part.masked)
            nonlocal forwards
            forwards += n * len(rows) * (3 if torch.is_grad_enabled() else 1)
            with accelerator.autocast():  # the reference too, which accelerate has not wrapped
                outputs = module(canvas, tokens[rows].repeat(n, 1), part.scored.flatten(0, 1))
            return Score(*(values.unflatten(0, (n, -1)) for values in outputs))

        @torch.no_grad()
        def frozen(module, corruption: Corruption, rows: Tensor) -> Score:
            return score(module, corruption, rows)

        # What the denoiser that sampled says under the masks of later updates; under the first it is still that one.
        later = maskings[1:] if config.uses_old else []
        old = [[frozen(self.whole, corruption, rows) for rows in chunks] for corruption in later]
        totals: dict[str, Tensor] = {}
        before: list[Tensor] = []
        self.trained.model.train()
        for inner, corruption in enumerate(maskings):
            for i, rows in enumerate(chunks):
                last = i == len(chunks) - 1
                with nullcontext() if last else accelerator.no_sync(self.scorer):
                    new = score(self.scorer, corruption, rows)
                    detached = Score(new.log_prob.detach(), new.centred_logit.detach())
                    if not inner:
                        before.append(detached.log_prob)
                    reference = None
                    if config.uses_reference:
                        with self._without_adapters():
                            reference = frozen(self.reference, corruption, rows)
                    previous = (old[inner - 1][i] if inner else detached) if config.uses_old else None
                    held = partial(floored, advantage=advantage[rows], probability=config.negative_floor)
                    loss, metrics = self.loss(
                        Batch(
                            new=held(new),
                            old=previous and held(previous),
                            reference=reference and held(reference),
                            corruption=corruption[rows],
                            length=completion[rows].sum(dim=1).float(),
                            advantage=advantage[rows],
                            weight=weight[rows] if i < own else torch.zeros_like(weight[rows]),
                        ),
                        config,
                    )
                    accelerator.backward(loss * self.processes.count)  # the processes' gradients are averaged
                for name, value in ({"loss": loss} | metrics).items():
                    totals[name] = totals.get(name, 0.0) + value.detach() / config.inner_iterations
            norm = self._step()
        self.trained.model.eval()
        self.weights.publish()
        sums = {"loss": totals.pop("loss"), "learned_from": weight.sum(), "forwards": weight.new_tensor(forwards)}
        change, scored = weight.new_zeros(()), weight.new_zeros(())
        for rows, log_prob in zip(chunks[:own], before, strict=False):
            now = frozen(self.whole, maskings[0], rows).log_prob
            change, scored = change + (now - log_prob).square().sum(), scored + maskings[0][rows].scored.sum()
        reduced = self._reduce(sums | {"change": change, "scored": scored}, totals, weight.sum())
        step_kl = 0.5 * reduced.pop("change") / max(1.0, reduced.pop("scored"))
        return reduced | {"step_kl": step_kl, "gradient_norm": float(norm)}

    def _reduce(self, sums: dict[str, Tensor], weighted: dict[str, Tensor], weight: Tensor) -> dict[str, float]:
        """Over processes: sums, and of the objective's weighted sums the means over what was learned from."""
        metrics = self.processes.sum({"weight": weight} | sums | weighted)
        total = metrics.pop("weight")
        return metrics | {name: metrics[name] / (total or 1.0) for name in weighted}

    def _without_adapters(self):
        """The reference of a denoiser with adapters is the same one without them."""
        return self.denoiser.model.disable_adapter() if self.config.lora.rank else nullcontext()

    def _step(self) -> Tensor:
        self.weights.take_gradients()
        masters = list(self.weights.masters.values())
        norm = gathered(self.accelerator.clip_grad_norm_(masters, self.config.max_grad_norm))
        for optimizer in self.optimizers:
            if norm.isfinite():  # else the weights stay what they are, and the run ends with what it logs
                optimizer.step()
            optimizer.zero_grad()
        if not self.config.shard:  # shards are gathered once, after the last one
            self.weights.publish()
        return norm


def make_optimizers(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    name: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
) -> list[torch.optim.Optimizer]:
    """AdamW for all weights ("adamw"); or Muon for those of linear layers ("muon"), and AdamW for the rest, if any."""
    if name == "adamw":
        return [torch.optim.AdamW(weights.values(), learning_rate, betas, weight_decay=weight_decay)]
    matrices, rest = linear_and_rest(model, weights)
    optimizers = [muon(matrices, learning_rate, weight_decay)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, learning_rate, betas, weight_decay=weight_decay))
    return optimizers


def let_train(denoiser: TrainableDenoiser, lora: LoRAConfig, seed: int) -> None:
    """Give gradients to what is trained: adapters, drawn from the seed, where they have a rank; else all weights."""
    if lora.rank:
        with seeded(seed):
            denoiser.model = add_adapters(denoiser.model, lora)
    else:
        denoiser.model.requires_grad_(True)


def add_adapters(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The model with low-rank adapters, the only weights that train.

    Raises:
        ValueError: targets that match no module.
    """
    from peft import LoraConfig, get_peft_model

    linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    unknown = sorted(set(config.targets) - set(linear))
    if unknown or not config.targets:
        raise ValueError(f"lora.targets={config.targets}: {unknown or 'nothing'} match no module of {linear}.")
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    return get_peft_model(model, lora).eval()  # decoding comes first, without dropout
