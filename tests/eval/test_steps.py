"""The benchmark of gradients from a few steps."""

import pytest

from dllm_gym.eval.benchmarks.steps import StepsConfig, figures, measure


def test_steps_in_proportion_are_nearer_to_the_gradient_of_all():
    config = StepsConfig(problems=16, group=4, steps=(2, 16), draws=6)
    length, certain, ((alike, by_doubt), (all_alike, all_by_doubt)) = figures("Sudoku", config)
    assert 1 < length < 16 and 0.2 < certain < 0.9
    assert by_doubt.mean() < 0.6 * alike.mean()
    for everything in (all_alike, all_by_doubt):
        assert everything.max() < 1e-6


def test_the_table_has_a_row_for_each_task_and_number(capsys):
    measure(StepsConfig(tasks=("Countdown",), problems=8, group=2, steps=(1, 2), draws=2, negative_scale=1.0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "Countdown" in line]
    assert len(lines) == 2 and all("nan" not in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("Nowhere",)}, "Nowhere"),
        ({"sampler": "fastest"}, "fastest"),
        ({"negative_scale": 0.0}, "worth the same"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(Exception, match=message):  # gymnasium has errors of its own
        measure(StepsConfig(**{"problems": 1, "group": 2, "denoiser": "embedded", "steps": (1,)} | changes))
