"""lm-evaluation-harness on any denoiser, decoded by any sampler: the model "dllm". Needs ``pip install lm-eval``.

    python docs/examples/lm_eval_model.py --model dllm --tasks gsm8k --apply_chat_template --batch_size 16 \
        --model_args denoiser=GSAI-ML/LLaDA-8B-Instruct,sampler=threshold:threshold=0.9,gen_length=256,block_length=32

Without arguments: the embedded denoiser on embedded problems.
"""

import sys
from collections import defaultdict

import lm_eval
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import make_table

from dllm_gym import decoding, load_denoiser, make_task
from dllm_gym.agents import make_policy
from dllm_gym.agents.evaluation import finished
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.decoding.corruption import corrupt, corrupted_canvas
from dllm_gym.decoding.likelihood import elbo
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict


class Contexts(Task):
    """The harness's contexts as problems; it judges the completions itself."""

    name, dataset, split, columns = "lm-eval", "lm-eval", "test", "a context"

    def __init__(self, contexts: list[str]):
        self.rows = contexts

    def read_row(self, row: str):
        return row, None

    def __getitem__(self, index: int) -> Problem:
        return Problem(f"lm-eval/{index}", *self.read_row(self.rows[index]))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(False, 0.0, completion)


@register_model("dllm")
class DLLM(LM):
    """A denoiser and a sampler, both by the names that `load_denoiser` and `make_sampler` take.

    Args:
        gen_length: tokens of a completion, where the task has no max_gen_toks (``--gen_kwargs`` overrides the task's).
        maskings: over which a log-likelihood is averaged.
    """

    tokenizer_name = None  # the base class has a property here that cannot be set

    def __init__(
        self,
        denoiser: str = "embedded",
        sampler: str = "threshold:threshold=0.9",
        gen_length: int = 256,
        block_length: int | None = None,
        confidence_k: int = 1,
        maskings: int = 128,
        seed: int = 0,
        batch_size: int = 32,
        device: str = "auto",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        # The harness's command line says "cuda:0" where it is told nothing, also where there is none.
        self.denoiser = load_denoiser(denoiser, "auto" if device == "cuda:0" else device)
        self.sampler = make_sampler(sampler, seed, self.denoiser.device)
        self.gen_length, self.maskings, self.seed, self.batch_size = gen_length, maskings, seed, int(batch_size)
        self.settings = {"denoiser": self.denoiser, "block_length": block_length, "confidence_k": confidence_k}
        self.tokenizer_name = denoiser
        # The environment would apply it to every prompt; in the harness --apply_chat_template decides.
        self.template, self.denoiser.tokenizer.chat_template = self.denoiser.tokenizer.chat_template, None

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.denoiser.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests) -> list[str]:
        wanted = [normalize_gen_kwargs(request.args[1], self.gen_length) for request in requests]
        alike = defaultdict(list)
        for n, kwargs in enumerate(wanted):
            alike[kwargs["max_gen_toks"], kwargs.get("temperature", 0.0)].append(n)
        texts = [""] * len(requests)
        for (gen_length, temperature), members in alike.items():
            contexts = [requests[n].args[0] for n in members]
            decoded = self.decode(contexts, self.sampler, gen_length=gen_length, temperature=temperature)
            for n, text in zip(members, decoded, strict=True):
                texts[n] = postprocess_generated_text(text, wanted[n]["until"], None)
        return texts

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """The ELBO, a lower bound (LLaDA, arXiv 2502.09992), and whether decoding token by token agrees."""
        return [self.score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests) -> list[float]:
        raise NotImplementedError("a masked diffusion model has no next-token probabilities to roll over a long text.")

    def decode(self, contexts: list[str], sampler, **settings) -> list[str]:
        texts = [""] * len(contexts)

        rows = min(self.batch_size, len(contexts))
        env = UnmaskingVectorEnv(Contexts(contexts), rows, **self.settings | settings)
        for n, end in finished(env, sampler, range(len(contexts)), seed=self.seed):
            texts[n] = end.info["completion"]
        return texts

    @torch.inference_mode()
    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        denoiser = self.denoiser
        stripped = context.rstrip()  # a space belongs to the token after it
        prompt, whole = (denoiser.tokenizer(text)["input_ids"] for text in (stripped, context + continuation))
        tokens = torch.tensor(whole[len(prompt) :], device=denoiser.device)
        prompt = torch.tensor(prompt, dtype=torch.int64, device=denoiser.device)
        canvas = decoding.blank([prompt], len(tokens), denoiser.mask_token_id)
        generator = torch.Generator(denoiser.device).manual_seed(self.seed)
        drawn = corrupt("uniform", canvas.masked, canvas.prompt_mask, self.maskings, generator)
        noisy = corrupted_canvas(canvas.prompt, canvas.prompt_mask, tokens[None], drawn, denoiser.mask_token_id)
        rows = torch.arange(self.maskings, device=denoiser.device).split(self.batch_size)
        parts = [denoiser.score(noisy[some], tokens.expand(len(some), -1), noisy.masked[some]) for some in rows]
        bound = elbo(torch.cat([part.log_prob for part in parts])[:, None], drawn.weight).sum()
        surest = make_policy("confidence", k=1)
        (greedy,) = self.decode([stripped], surest, gen_length=len(tokens), block_length=None)
        return bound.item(), greedy == denoiser.tokenizer.decode(tokens, skip_special_tokens=True)


def main(problems: int = 64) -> dict:
    """GSM8K-style problems, as the harness would read them from a YAML file."""
    from datasets import Dataset

    embedded = make_task("gsm8k", "embedded", "test")
    rows = [{"question": embedded[i].prompt, "answer": embedded[i].answer} for i in range(problems)]
    task = {
        "task": "embedded_gsm8k",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": "#### ([0-9]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    results = lm_eval.simple_evaluate("dllm", {"sampler": "threshold:threshold=0.9"}, tasks=[task], batch_size=64)
    print(make_table(results))
    return results


if __name__ == "__main__":
    cli_evaluate() if sys.argv[1:] else main()
