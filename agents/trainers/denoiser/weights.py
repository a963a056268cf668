"""The weights of a denoiser in training. Those in half precision are trained through float32 masters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_gym.agents.trainers.sharding import gathered


class TrainedWeights:
    """What has gradients in a model, and what an optimiser changes; a checkpoint holds the latter.

    Args:
        model: the weights that decode and score are those of its parameters that have gradients.
        masters: what is optimised in their place, by their names; None: float32 copies of what is in half precision,
            and of the others the parameters themselves.
    """

    def __init__(self, model: nn.Module, masters: dict[str, nn.Parameter] | None = None):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = masters or {
            name: p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.masters)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish()

    def take_gradients(self) -> None:
        """Gradients of the model -> of the masters, in float32."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p and p.grad is not None:
                self.masters[name].grad, p.grad = p.grad.float(), None

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> model."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(gathered(self.masters[name]))
