"""The learned unmasking policy: one transformer block over positions (arXiv 2512.09106, section 4 and appendix).

Deviations from the paper, and why: beside each confidence c the input carries log(1 - c), as 0.99 and 0.9999 mean
different things, and the position's index, as rotary attention alone hardly tells where in the canvas it is (the index
raised the reward on Countdown more than anything else, see docs/experiments.md); the state embedding tells eligible
from masked positions; attention gates start at 1 instead of 0, since one block behind a closed gate learns slowly.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_gym.agents.samplers.base import without_log_prob
from dllm_gym.agents.samplers.distributions import DISTRIBUTIONS
from dllm_gym.decoding import with_best
from dllm_gym.files import written
from dllm_gym.hub import download, is_hub_id
from dllm_gym.types import Observation


@dataclass
class PolicyConfig:
    """Architecture of a learned policy."""

    confidence_k: int = 1
    """Number of confidences read per position; env.confidence_k must be at least as large."""
    hidden_dim: int = 128
    """Width of the network."""
    mlp_dim: int = 512
    """Width of the feed-forward layer."""
    num_heads: int = 2
    """Number of attention heads."""
    use_index: bool = True
    """Also read the index of each position; the paper's policy has rotary attention only."""
    distribution: str = "bernoulli"
    """Distribution over sets: "bernoulli" or "dpls" (dynamic Plackett-Luce)."""
    temperature: float = 1.0
    """Divides the logits. The paper uses 1 for full diffusion and 0.5 for small blocks."""
    initial_bias: float = -1.0
    """Initial bias of the output logit; the lower, the fewer positions are unmasked at first."""


class Trunk(nn.Module):
    """Observation -> one feature vector per position, ``[B, L, hidden_dim]``."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        width = config.hidden_dim
        if min(width, config.num_heads) < 1 or width % (2 * config.num_heads):
            raise ValueError(f"hidden_dim={width}: must be a multiple of 2 x num_heads={config.num_heads}.")
        self.config = config
        self.project = nn.Linear(2 * config.confidence_k, width)
        self.place = nn.Linear(width, width, bias=False) if config.use_index else None
        self.state = nn.Embedding(3, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 8 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, observation: Observation) -> Tensor:
        """``[B, L, hidden_dim]`` float32."""
        seen = observation.confidence[..., : self.config.confidence_k]
        if seen.shape[-1] < self.config.confidence_k:
            raise ValueError(
                f"the policy reads {self.config.confidence_k} confidences per position, the environment shows "
                f"{seen.shape[-1]}: make it with confidence_k={self.config.confidence_k}."
            )
        doubt = (1 - seen + 1e-4).log() / 4
        x = self.project(torch.cat([seen, doubt], dim=-1))
        if self.place:
            index = torch.arange(seen.shape[1], device=seen.device) / 64
            x = x + self.place(_sinusoidal(index, x.shape[-1]))
        time = self.time(_sinusoidal(observation.progress, x.shape[-1]))
        # A row has three conditions, one for each state of a position; each position takes its own.
        modulation = self.modulation(F.silu(self.state.weight + time[:, None]))
        state = F.one_hot(observation.masked.long() + observation.eligible.long(), 3).to(modulation.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3 = (state @ modulation).chunk(8, dim=-1)
        x = x + (1 + gate1) * self._attend(self.norm(x) * (1 + scale1) + shift1)
        x = x + (1 + gate2) * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return self.norm(x) * (1 + scale3) + shift3

    def _attend(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], 3, self.config.num_heads, -1)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q), _rotate(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UnmaskingPolicy(nn.Module):
    """A learned sampler.

    `act` samples as in training; calling the policy gives the set to unmask, never empty where something is eligible:
    the position with the best LOGIT is forced into an empty draw, by the policy.

    It is a `dllm_gym.agents.samplers.base.Sampler`.

    Attributes:
        deterministic: take the most likely set (Bernoulli: probability > 0.5) instead of drawing one.
    """

    signals = ("confidence",)
    stepwise = True
    draws = True
    ignores_tokens = True

    def __init__(self, config: PolicyConfig):
        super().__init__()
        if config.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution={config.distribution!r}: must be one of {sorted(DISTRIBUTIONS)}.")
        if not 0 < config.temperature < math.inf:
            raise ValueError(f"temperature={config.temperature} of the policy: must be more than 0, and finite.")
        self.config = config
        self.distribution = DISTRIBUTIONS[config.distribution]()
        self.trunk = Trunk(config)
        self.readout = nn.Linear(config.hidden_dim, 1)
        nn.init.normal_(self.readout.weight, std=0.02)
        nn.init.constant_(self.readout.bias, config.initial_bias)
        self.deterministic = False
        self.generator: torch.Generator | None = None
        self.seed = 0

    @property
    def confidence_k(self) -> int:
        """Number of probabilities per position that it reads."""
        return self.config.confidence_k

    def logits(self, observation: Observation) -> Tensor:
        """One logit per position, ``[B, L]``, divided by the policy's temperature."""
        return self.readout(self.trunk(observation))[..., 0] / self.config.temperature

    @torch.no_grad()
    def act(self, observation: Observation, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``picks`` ``[B, L]`` (see `dllm_gym.agents.samplers.distributions`) and their log-probability ``[B]``.

        ``uniforms`` ``[B, L + 1]``: as in `Sampler.choose`.

        Raises:
            FloatingPointError: a logit is no number.
        """
        logits = self._finite_logits(observation)
        picks = self.distribution.sample(logits, observation.eligible, self._uniforms(logits, uniforms))
        return picks, self.distribution.log_prob(logits, observation.eligible, picks)

    @torch.no_grad()
    def __call__(self, observation: Observation, uniforms: Tensor | None = None) -> Tensor:
        """The set to unmask, ``[B, L]`` bool. Raises FloatingPointError where a logit is no number."""
        logits = self._finite_logits(observation)
        if self.deterministic:
            picks = (logits > 0) & observation.eligible
        else:
            picks = self.distribution.sample(logits, observation.eligible, self._uniforms(logits, uniforms)) > 0
        return with_best(picks, observation, logits)

    def _finite_logits(self, observation: Observation) -> Tensor:
        logits = self.logits(observation)
        if not logits.isfinite().all():
            broken = [name for name, p in self.named_parameters() if not p.isfinite().all()]
            reason = (
                f"its weights {', '.join(broken)} are not" if broken else "what it saw, or its weights, is too large"
            )
            raise FloatingPointError(f"the policy's logits are not finite: {reason}.")
        return logits

    def _uniforms(self, logits: Tensor, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        shape = (logits.shape[0], logits.shape[1] + 1)
        return torch.rand(shape, generator=self.generator, device=logits.device)

    def choose(
        self, observation: Observation, explore: bool = False, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.act(observation, uniforms) if explore else without_log_prob(self(observation, uniforms))

    def settings(self) -> dict[str, Any]:
        """The architecture and a digest of the weights."""
        weights = b"".join(p.cpu().numpy().tobytes() for p in self.state_dict().values())
        return asdict(self.config) | {"weights": hashlib.sha256(weights).hexdigest()[:12]}

    def seeded(self, seed: int) -> UnmaskingPolicy:
        """Draw from a seed of its own from now on; returns itself."""
        self.seed = seed
        self.generator = torch.Generator(self.readout.weight.device).manual_seed(seed)
        return self

    def save(self, folder: str | Path, **record) -> Path:
        """Write config.json (with ``record`` beside the architecture) and policy.safetensors."""
        settings = json.dumps({"policy": asdict(self.config)} | record, indent=2)
        with written(folder) as temporary:
            temporary.mkdir()
            save_file(self.state_dict(), temporary / "policy.safetensors")
            (temporary / "config.json").write_text(settings + "\n")
        return Path(folder)


class Critic(nn.Module):
    """State value from a trunk of its own: mean over positions, then linear."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.readout = nn.Linear(config.hidden_dim, 1)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, observation: Observation) -> Tensor:
        """Values ``[B]``."""
        return self.readout(self.trunk(observation).mean(dim=1))[:, 0]


def load_policy(folder: str | Path, device: str | torch.device = "cpu") -> UnmaskingPolicy:
    """A trained policy from the folder that a run or `UnmaskingPolicy.save` wrote, on the device of its environment.

    Args:
        folder: or a hub id, "owner/name", which is downloaded once.
        device: of the environment.

    Raises:
        ValueError: no such folder, or its files are not a policy or do not fit each other.
        FileNotFoundError: a hub id that cannot be had.
    """
    name, folder = str(folder), Path(folder)
    if not folder.is_dir() and is_hub_id(name):
        folder = download(f"policy={name!r}", name, ["config.json", "policy.safetensors"])
    path = folder / "policy" if (folder / "policy").is_dir() else folder
    try:
        config = PolicyConfig(**json.loads((path / "config.json").read_text())["policy"])
        policy = UnmaskingPolicy(config)
        policy.load_state_dict(load_file(path / "policy.safetensors"))
        if broken := [name for name, p in policy.named_parameters() if not p.isfinite().all()]:
            raise ValueError(f"the weights {', '.join(broken)} are not finite")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"policy={name!r}: must be a folder with config.json and policy.safetensors "
            f"({type(error).__name__}: {reason})."
        ) from error
    return policy.eval().to(device)


def _sinusoidal(progress: Tensor, width: int) -> Tensor:
    """``[B]`` float, steps of 1/1000 and more apart -> ``[B, width]``."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=progress.device))
    angles = progress[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``[B, heads, L, dim]``."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
