"""Denoisers: the embedded one against plain transformers arithmetic, and `predict` against tables."""

import copy

import pytest
import torch
from scripted import MASK, VOCABULARY, A, B, C, ScriptedDenoiser

from dllm_gym import decoding, load_denoiser, make_task
from dllm_gym.denoisers import base
from dllm_gym.types import Canvas, TokenSampling

LENGTH = 24


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prompts(denoiser) -> list[torch.Tensor]:
    """Prompts of several tasks, hence of several lengths."""
    texts = [make_task(name)[i].prompt for name in ("gsm8k", "countdown", "sudoku") for i in range(2)]
    prompts = [torch.tensor(denoiser.tokenizer(text)["input_ids"]) for text in texts]
    assert len({len(prompt) for prompt in prompts}) >= 3
    return prompts


@pytest.fixture(scope="module")
def canvas(denoiser, prompts) -> Canvas:
    """Half decoded at random, the last row wholly."""
    canvas = decoding.blank(prompts, LENGTH, denoiser.mask_token_id)
    generator = torch.Generator().manual_seed(0)
    canvas.masked = torch.rand(canvas.masked.shape, generator=generator) < 0.5
    canvas.masked[-1] = False
    some = torch.randint(10, 100, canvas.tokens.shape, generator=generator)
    canvas.tokens = torch.where(canvas.masked, denoiser.mask_token_id, some)
    return canvas


def whole(canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask of prompt and completion."""
    return torch.cat([canvas.prompt, canvas.tokens], 1), torch.cat([canvas.prompt_mask, canvas.masked | True], 1)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def draw(table_row: list[float], uniforms: torch.Tensor, temperature: float):
    """Predictions of one position for many uniforms."""
    n = len(uniforms)
    canvas = decoding.blank([torch.zeros(0, dtype=torch.int64)] * n, 1, MASK)
    sampling = TokenSampling(temperature)
    return ScriptedDenoiser([table_row]).predict(canvas, k=2, sampling=sampling, uniforms=uniforms[:, None])


# Logits of the embedded denoiser


@torch.no_grad()
def test_the_prompt_sees_itself_and_the_completion_everything(denoiser, canvas):
    tokens, mask = whole(canvas)
    lengths = canvas.prompt_mask.sum(dim=1)
    start = tokens.shape[1] - LENGTH
    for column, seen_by_prompt in ((start - 1, True), (tokens.shape[1] - 1, False)):
        changed = tokens.clone()
        changed[:, column] = torch.where(tokens[:, column] == 20, 21, 20)
        before, after = (denoiser.logits(t, mask, prompt_length=lengths) for t in (tokens, changed))
        difference = (before - after).abs().amax(dim=2)
        assert (difference[:, start:] > 1e-4).all()
        assert ((difference[:, :start] > 1e-4)[mask[:, :start]] == seen_by_prompt).all()
    with pytest.raises(ValueError, match="is prompt-causal: give prompt_length"):
        denoiser.logits(tokens, mask)


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone_whatever_the_padding_is(denoiser, canvas):
    tokens, mask = whole(canvas)
    other = torch.where(mask, tokens, torch.arange(tokens.shape[1]))
    lengths = canvas.prompt_mask.sum(dim=1)
    padded, otherwise_padded = (denoiser.logits(t, mask, prompt_length=lengths) for t in (tokens, other))
    for row, (real, prompt) in enumerate(zip(mask, canvas.prompt, strict=True)):
        alone = denoiser.logits(tokens[row : row + 1, real], prompt_length=lengths[row : row + 1])[0]
        assert len(alone) == LENGTH + canvas.prompt_mask[row].sum() <= LENGTH + len(prompt)
        assert close(padded[row, real].softmax(dim=-1), alone.softmax(dim=-1))
        assert close(padded[row, real], alone, 1e-4)
        assert close(otherwise_padded[row, real], alone, 1e-4)


def test_a_batch_predicts_what_its_rows_predict_alone(denoiser, canvas):
    together = denoiser.predict(canvas, k=3)
    for row, real in enumerate(canvas.prompt_mask):
        cut = canvas[row : row + 1]
        cut.prompt, cut.prompt_mask = cut.prompt[:, real], cut.prompt_mask[:, real]
        alone = denoiser.predict(cut, k=3)
        assert torch.equal(together.token[row], alone.token[0])
        for name in ("probability", "confidence", "entropy"):
            assert close(getattr(together, name)[row], getattr(alone, name)[0])


@torch.no_grad()
def test_logits_at_positions(denoiser, canvas):
    tokens, mask = whole(canvas)
    positions = torch.arange(3 * len(tokens)).reshape(-1, 3).flip(dims=[1]) % tokens.shape[1]
    lengths = canvas.prompt_mask.sum(dim=1)
    full, some = (denoiser.logits(tokens, mask, at, lengths) for at in (None, positions))
    assert full.shape == (*tokens.shape, denoiser.vocab_size)
    assert close(some, full.gather(1, positions[..., None].expand(-1, -1, denoiser.vocab_size)), 1e-4)


# Predictions


@torch.no_grad()
def test_predictions_are_the_softmax_of_the_logits_without_the_mask_token(denoiser, canvas):
    prediction = denoiser.predict(canvas, k=4)
    logits = denoiser.logits(*whole(canvas), prompt_length=canvas.prompt_mask.sum(dim=1))[:, -LENGTH:].double()
    logits[..., denoiser.mask_token_id] = -torch.inf
    wanted = logits.softmax(dim=-1)
    masked = canvas.masked
    assert close(prediction.confidence[masked].double(), wanted.sort(descending=True).values[masked][:, :4])
    assert close(prediction.entropy[masked].double(), torch.distributions.Categorical(wanted[masked]).entropy(), 1e-4)
    assert (prediction.confidence.diff(dim=-1) <= 0).all() and (prediction.confidence[masked] > 0).all()
    assert torch.equal(prediction.token[masked], wanted.argmax(dim=-1)[masked])
    assert torch.equal(prediction.probability, prediction.confidence[..., 0])
    assert masked.any() and all(not values[~masked].any() for values in vars(prediction).values())
    assert [values.dtype for values in vars(prediction).values()] == [torch.int64, *[torch.float32] * 4]


def test_nothing_to_predict(denoiser, canvas):
    prediction = denoiser.predict(canvas[-1:], k=2)
    assert prediction.confidence.shape == (1, LENGTH, 2) and prediction.token.shape == (1, LENGTH)
    assert not any(values.any() for values in vars(prediction).values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunks_change_nothing(chunk, temperature, denoiser, canvas, monkeypatch):
    uniforms = torch.rand(canvas.masked.shape, generator=torch.Generator().manual_seed(1))
    at_once = denoiser.predict(canvas, 3, TokenSampling(temperature), uniforms)
    monkeypatch.setattr(base, "CHUNK", chunk)
    in_chunks = denoiser.predict(canvas, 3, TokenSampling(temperature), uniforms)
    assert torch.equal(at_once.token, in_chunks.token)
    assert all(close(at, vars(in_chunks)[name]) for name, at in vars(at_once).items())


def test_the_head_runs_on_masked_positions_only_and_never_on_more_than_a_chunk(denoiser, canvas, monkeypatch):
    sizes, head = [], denoiser.head
    monkeypatch.setattr(base, "CHUNK", 7 * denoiser.vocab_size)
    monkeypatch.setattr(denoiser, "head", lambda features: sizes.append(len(features)) or head(features))
    denoiser.predict(canvas)
    assert sum(sizes) == canvas.masked.sum() and max(sizes) == 7


def test_exact_values_and_the_mask_token_left_out():
    canvas = decoding.blank([torch.tensor([A])], 3, MASK)
    table = [[0.2, 0.3, 0, 0, 0, 0.5], [0, 0, 1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25, 0, 0]]
    prediction = ScriptedDenoiser(table).predict(canvas, k=2)
    assert prediction.token[0, :2].tolist() == [B, C]
    assert prediction.probability[0].tolist() == pytest.approx([0.6, 1, 0.25])
    assert prediction.confidence[0].flatten().tolist() == pytest.approx([0.6, 0.4, 1, 0, 0.25, 0.25])
    assert prediction.entropy[0].tolist() == pytest.approx([0.6730117, 0, 1.3862944])


# Sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_token_frequencies_follow_the_tempered_softmax(temperature):
    n = 4001
    table = [0.1, 0.25, 0.0, 0.15, 0.2, 0.3]
    weights = torch.tensor([*table[:MASK], 0.0, 0.0], dtype=torch.float64) ** (1 / temperature)
    prediction = draw(table, (torch.arange(n) + 0.5) / n, temperature)
    counts = torch.bincount(prediction.token[:, 0], minlength=len(VOCABULARY))
    assert ((counts - n * weights / weights.sum()).abs() <= 1.01).all()
    assert counts[[C, MASK]].tolist() == [0, 0]
    untempered = torch.tensor([*table[:MASK], 0.0, 0.0]) / 0.7
    assert close(prediction.probability[:, 0], untempered[prediction.token[:, 0]])
    assert close(prediction.confidence[:, 0], torch.tensor([0.25, 0.2]) / 0.7)


@pytest.mark.parametrize("table", [[0, 0.5, 0, 0.3, 0, 0.2], [0, 0.1, 0.9], [0, 0, 0, 0, 0, 0.5, 0.5]])
def test_the_ends_of_the_unit_interval_draw_no_impossible_token(table):
    possible = [i for i, p in enumerate(table) if p > 0 and i != MASK]
    prediction = draw(table, torch.tensor([0.0, 1 - 2**-24]), temperature=1.0)
    assert prediction.token[:, 0].tolist() == [possible[0], possible[-1]]


def test_a_low_temperature_is_the_argmax(denoiser, canvas):
    uniforms = torch.rand(canvas.masked.shape, generator=torch.Generator().manual_seed(2))
    drawn, best = denoiser.predict(canvas, 1, TokenSampling(1e-3), uniforms), denoiser.predict(canvas)
    sure = best.entropy < 0.1
    assert sure.any() and torch.equal(drawn.token[sure], best.token[sure])


def test_a_draw_does_not_depend_on_other_rows(denoiser, canvas):
    uniforms = torch.rand(canvas.masked.shape, generator=torch.Generator().manual_seed(3))
    together = denoiser.predict(canvas, 1, TokenSampling(1.5), uniforms)
    back = denoiser.predict(canvas[[2, 0]], 1, TokenSampling(1.5), uniforms[[2, 0]])
    assert torch.equal(back.token, together.token[[2, 0]])
    assert (together.token != denoiser.predict(canvas).token).any()
    assert not (together.token == denoiser.mask_token_id).any()


# The class


def test_weights_exist_once_and_are_frozen(denoiser):
    assert copy.deepcopy(denoiser) is denoiser
    assert copy.deepcopy({"denoiser": [denoiser]})["denoiser"][0] is denoiser
    assert not any(p.requires_grad for p in denoiser.model.parameters()) and not denoiser.model.training


class PromptLength(base.Denoiser):
    """Says how many prompt tokens a row has: B for one, C for two; it gives nothing but `logits`."""

    mask_token_id, vocab_size = MASK, len(VOCABULARY)

    def logits(self, tokens, attention_mask=None, positions=None):
        said = attention_mask.sum(dim=1) - 2
        return torch.nn.functional.one_hot(said, self.vocab_size).float()[:, None].repeat(1, tokens.shape[1], 1)


def test_a_denoiser_needs_only_logits():
    canvas = decoding.blank([torch.tensor([B]), torch.tensor([A, A])], 2, MASK)
    prediction = PromptLength().predict(canvas)
    assert prediction.token.tolist() == [[B, B], [C, C]]
    assert prediction.confidence[0, 0, 0] == pytest.approx(torch.e / (torch.e + 5))
    with pytest.raises(TypeError, match="logits"):
        base.Denoiser()


def test_bfloat16_weights_give_float32_signals(canvas):
    denoiser = load_denoiser("embedded", device="cpu", dtype="bfloat16")
    assert denoiser.model.dtype == torch.bfloat16
    prediction = denoiser.predict(canvas)
    assert prediction.confidence.dtype == prediction.entropy.dtype == torch.float32
    assert prediction.confidence.max() <= 1


def test_facts_that_decoding_relies_on(denoiser):
    tokenizer = denoiser.tokenizer
    assert {denoiser.eos_token_id} <= denoiser.eos_token_ids and denoiser.mask_token_id not in denoiser.eos_token_ids
    assert max(tokenizer.get_vocab().values()) < denoiser.vocab_size
    assert tokenizer.decode([denoiser.mask_token_id, denoiser.eos_token_id], skip_special_tokens=True) == ""
    assert denoiser.default_dataset == "embedded"


def test_tokens_are_not_drawn_without_uniforms(scripted):
    canvas = decoding.blank([torch.tensor([1])], 4, scripted.mask_token_id)
    with pytest.raises(ValueError, match=r"temperature=0.5: .* give uniforms"):
        scripted.predict(canvas, sampling=TokenSampling(0.5))
