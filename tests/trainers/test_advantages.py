"""Group-relative advantages, and wd1's weights."""

import math

import pytest
import torch

from dllm_gym.agents.trainers.advantages import group_advantages
from dllm_gym.agents.trainers.denoiser.wd1 import WD1Config

# Advantages


def test_leave_one_out():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.3] * 4])
    expected = [[r - (sum(row) - r) / 3 for r in row] for row in reward.tolist()]
    torch.testing.assert_close(group_advantages(reward, "leave-one-out"), torch.tensor(expected))
    torch.testing.assert_close(group_advantages(reward, "leave-one-out"), 4 / 3 * group_advantages(reward))


@pytest.mark.parametrize("baseline", ["group-mean", "leave-one-out"])
@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_left_out(broken, divide_by_std, baseline):
    reward = torch.tensor([[1.0, broken, 0.5, 0.0], [broken, broken, 0.7, broken], [broken] * 4, [1.0, 0.0, 0.0, 0.0]])
    advantage = group_advantages(reward, baseline, divide_by_std)
    kept = group_advantages(reward[:1, [0, 2, 3]], baseline, divide_by_std)
    torch.testing.assert_close(advantage[0, [0, 2, 3]], kept[0])
    assert advantage[0, 1] == 0 and not advantage[1:3].any()
    torch.testing.assert_close(advantage[3:], group_advantages(reward[3:], baseline, divide_by_std))


def test_standard_deviation_is_that_of_the_sample():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.1]])
    torch.testing.assert_close(
        group_advantages(reward, divide_by_std=True), (reward - reward.mean()) / reward.std(), atol=1e-4, rtol=0
    )


def test_bad_groups():
    with pytest.raises(ValueError, match="group=1"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"baseline='mean'.*group-mean, leave-one-out"):
        group_advantages(torch.zeros(3, 2), "mean")


@pytest.mark.parametrize("psi", [1.0, 4.0])
def test_wd1_weights(psi):
    config, reward = WD1Config(psi=psi), torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.3] * 4])
    weights = config.advantages(reward)
    centred = [r - 0.4 for r in reward[0].tolist()]
    plus, minus = ([math.exp(sign * psi * a) for a in centred] for sign in (1, -1))
    expected = [4 * (p / sum(plus) - m / sum(minus)) for p, m in zip(plus, minus, strict=True)]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert weights[1].tolist() == [0] * 4 and weights[0].sum().item() == pytest.approx(0, abs=1e-5)
    assert weights[0, 0] > 0 > weights[0, 1]


def test_wd1_leaves_out_what_is_no_number():
    reward = torch.tensor([[1.0, math.nan, 0.5, math.inf], [math.nan] * 4])
    weights = WD1Config().advantages(reward)
    torch.testing.assert_close(weights[:1, [0, 2]], WD1Config().advantages(reward[:1, [0, 2]]))
    assert not weights[0, [1, 3]].any() and not weights[1].any()
