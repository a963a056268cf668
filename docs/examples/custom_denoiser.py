"""A denoiser of your own gives `logits` and a tokenizer: this one knows permutations, and nothing is trained.

Each of its probabilities is exact, yet what it says of two positions at once may be the same word twice.
"""

from itertools import combinations

import gymnasium as gym
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllm_gym.agents import evaluate, make_policy
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict

WORDS = "red green blue black white grey".split()
EOS, MASK = len(WORDS), len(WORDS) + 1


class Permutations(Denoiser):
    """Every word that neither the prompt nor the completion has yet is as likely as another, at every position."""

    mask_token_id, eos_token_id, eos_token_ids = MASK, EOS, frozenset({EOS})
    vocab_size = len(WORDS) + 2
    context_length = 64
    device = torch.device("cpu")
    default_dataset = "embedded"

    def __init__(self):
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<eos>", "<mask>"])}))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", mask_token="<mask>")

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask
        written = (torch.nn.functional.one_hot(tokens, self.vocab_size) * real[..., None]).any(dim=1)
        written[:, [EOS, MASK]] = True
        logits = torch.zeros(written.shape).masked_fill(written, -torch.inf)
        return logits[:, None].expand(-1, (tokens if positions is None else positions).shape[1], -1)


class Missing(Task):
    """The prompt has two of the words; the rest are to be written, in any order."""

    name, dataset, split, columns = "missing", "pairs", "test", "two words"
    gen_length = len(WORDS) - 2

    def __init__(self):
        self.rows = list(combinations(WORDS, 2))

    def read_row(self, row: tuple[str, str]):
        return " ".join(row), sorted(set(WORDS) - set(row))

    def __getitem__(self, index: int) -> Problem:
        return Problem(f"missing/{index}", *self.read_row(self.rows[index]))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        correct = sorted(completion.split()) == problem.answer
        return Verdict(correct, float(correct), completion)


def main(samples: int = 100) -> dict[int, float]:
    task = Missing()
    env = gym.make_vec(
        "MaskedDiffusion-Countdown-v0", num_envs=100, task=task, denoiser=Permutations(), temperature=1.0
    )
    accuracy = {}
    for k in (1, 2, 4):
        result = evaluate(env, make_policy("random", k=k), [*range(len(task))] * samples)
        accuracy[k] = float(result.correct.mean())
        print(f"{k} at a time: {100 * accuracy[k]:.1f} % right in {result.nfe.mean():.0f} steps,", end=" ")
        print(f"for example {result.completions[0]!r} after {task[0].prompt!r}")
    return accuracy


if __name__ == "__main__":
    main()
