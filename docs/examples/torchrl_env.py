"""TorchRL takes an id as it is: `GymEnv`, or `GymWrapper` around all rows in one forward.

The policy is a TensorDict module. TorchRL resets the rows (``autoreset_mode="Disabled"``, which it prefers): where
environments reset themselves it makes tensors of all infos, and stops at a text and at what only some steps have.

Needs ``pip install torchrl``.
"""

import gymnasium as gym
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs

import dllm_gym  # noqa: F401  (registers the ids)


def confident(confidence: Tensor) -> Tensor:
    """The set of positions with a confidence above 0.7; where it is empty, the environment takes the best."""
    return (confidence[..., 0] > 0.7).to(int)


def main(id: str = "MaskedDiffusion-GSM8K-v0", rows: int = 4, steps: int = 25) -> TensorDict:
    check_env_specs(GymEnv(id, split="test"))
    env = GymWrapper(gym.make_vec(id, num_envs=rows, split="test", autoreset_mode="Disabled"))
    env.set_seed(0)
    check_env_specs(env)
    policy = TensorDictModule(confident, in_keys=["confidence"], out_keys=["action"])
    rollout = env.rollout(steps, policy, break_when_any_done=False)  # [rows, steps], episodes one after the other
    ends = rollout["next", "done"].squeeze(-1)
    print(rollout)
    print(f"{int(ends.sum())} episodes, mean reward {rollout['next', 'reward'][ends].mean():.3f}")
    return rollout


if __name__ == "__main__":
    main()
