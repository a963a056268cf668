"""TorchRL takes an id as it is: `GymEnv` in set form, with a policy that is a TensorDict module.

Needs ``pip install torchrl``.
"""

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import GymEnv
from torchrl.envs.utils import check_env_specs

import dllm_gym  # noqa: F401  (registers the ids)


def confident(confidence: Tensor) -> Tensor:
    """The set of positions with a confidence above 0.7; where it is empty, the environment takes the best."""
    return (confidence[..., 0] > 0.7).to(int)


def main(id: str = "MaskedDiffusion-GSM8K-v0", steps: int = 100) -> TensorDict:
    env = GymEnv(id, split="test")
    env.set_seed(0)
    check_env_specs(env)
    policy = TensorDictModule(confident, in_keys=["confidence"], out_keys=["action"])
    rollout = env.rollout(steps, policy, break_when_any_done=False)  # episodes one after the other
    ends = rollout["next", "done"].squeeze()
    print(rollout)
    print(f"{int(ends.sum())} episodes, mean reward {rollout['next', 'reward'][ends].mean():.3f}")
    return rollout


if __name__ == "__main__":
    main()
