"""Decoding and rewards: pure functions, exact values. Canvases are written as text, "_" is a masked position."""

import copy
import math

import pytest
import torch
from scripted import EOS, MASK, D

from dllm_gym import decoding
from dllm_gym.rewards import get_reward
from dllm_gym.types import Action, Canvas, Observation, Prediction

LETTERS = "abcdE_"  # the scripted vocabulary: E is the end token


def canvas_of(*rows: str, steps: int = 0) -> Canvas:
    tokens = torch.tensor([[LETTERS.index(letter) for letter in row] for row in rows])
    prompt = torch.zeros(len(rows), 2, dtype=torch.int64)
    masked, steps = tokens == MASK, torch.full((len(rows),), steps)
    return Canvas(prompt, prompt >= 0, tokens, masked, torch.zeros_like(masked), torch.zeros(tokens.shape), steps)


def text_of(canvas: Canvas) -> list[str]:
    assert (canvas.masked == (canvas.tokens == MASK)).all()
    return ["".join(LETTERS[token] for token in row) for row in canvas.tokens.tolist()]


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


def see(canvas: Canvas, *predicted: str, block_length: int | None = None, confidence=None) -> Observation:
    token = canvas_of(*predicted).tokens
    best = torch.full(token.shape, 0.5) if confidence is None else torch.tensor(confidence)
    zeros = torch.zeros(token.shape)
    prediction = Prediction(token, zeros, zeros, best[..., None].where(canvas.masked[..., None], 0.0), zeros)
    return decoding.observe(canvas, prediction, block_length or token.shape[1])


def commit(
    canvas: Canvas,
    seen: Observation,
    unmask: torch.Tensor,
    ends: set[int] | None = frozenset({EOS}),
    remask: torch.Tensor | None = None,
) -> Canvas:
    end_tokens = None if ends is None else torch.tensor(sorted(ends), dtype=torch.int64)
    action = Action.unmasking(unmask) if remask is None else Action(unmask, remask)
    return decoding.commit(canvas, seen, action, mask_token_id=MASK, eos_token_id=EOS, eos_token_ids=end_tokens)


# Blank canvases


def test_blank_canvases_stand_after_left_padded_prompts():
    prompts = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([2, 2, 1])]
    canvas = decoding.blank(prompts, 4, MASK)
    assert canvas.prompt.tolist() == [[0, 3, 1], [0, 0, 0], [2, 2, 1]]
    assert canvas.prompt_mask.tolist() == [[False, True, True], [False] * 3, [True] * 3]
    assert text_of(canvas) == ["____"] * 3 and canvas.steps.tolist() == [0, 0, 0]
    assert canvas.prompt.dtype == canvas.tokens.dtype == canvas.steps.dtype == torch.int64


# Blocks


@pytest.mark.parametrize(
    ("row", "block_length", "expected"),
    [
        ("______", 6, "111111"),
        ("______", 2, "110000"),
        ("a_____", 2, "010000"),
        ("_a____", 2, "100000"),
        ("ab____", 2, "001100"),
        ("_b_b__", 2, "100000"),
        ("ab_b__", 2, "001000"),
        ("abab_b", 2, "000010"),
        ("_babab", 2, "100000"),
        ("ab____", 3, "001000"),
        ("______", 1, "100000"),
        ("a_a_ab", 1, "010000"),
        ("ababab", 2, "000000"),
        ("ababab", 6, "000000"),
        ("a_b_a_", 6, "010101"),
    ],
)
def test_eligible_are_the_masked_positions_of_the_leftmost_block_that_has_one(row, block_length, expected):
    masked = canvas_of(row, "______", "ababab").masked
    eligible = decoding.eligible(masked, block_length)
    assert eligible[0].tolist() == bits(expected)[0].tolist()
    assert eligible[1].sum() == block_length and not eligible[2].any()


@pytest.mark.parametrize("block_length", [1, 2, 3, 6])
def test_choosing_everything_fills_block_after_block(block_length):
    canvas = canvas_of("______")
    for block in range(6 // block_length):
        assert text_of(canvas) == ["ababab"[: block * block_length].ljust(6, "_")]
        canvas = commit(canvas, see(canvas, "ababab", block_length=block_length), bits("111111"))
    assert text_of(canvas) == ["ababab"] and canvas.steps.tolist() == [6 // block_length]


def test_observation_shows_the_written_token_where_there_is_one_and_the_progress():
    seen = see(canvas_of("a_c_", steps=3), "dddd", block_length=2, confidence=[[0.9, 0.8, 0.7, 0.6]])
    assert seen.token.tolist() == [[0, 3, 2, 3]] and seen.progress.tolist() == [0.75]
    assert seen.masked.tolist() == bits("0101").tolist() and seen.eligible.tolist() == bits("0100").tolist()
    assert seen.confidence[0, :, 0].tolist() == pytest.approx([0, 0.8, 0, 0.6])


# Commit


@pytest.mark.parametrize(
    ("row", "unmask", "block_length", "expected"),
    [
        ("____", "0000", 4, "____"),
        ("____", "0101", 4, "_d_d"),
        ("____", "1111", 4, "dddd"),
        ("a_b_", "1110", 4, "adb_"),
        ("____", "0110", 2, "_d__"),
        ("____", "0011", 2, "____"),
        ("a___", "1101", 2, "ad__"),
        ("abca", "1111", 4, "abca"),
    ],
)
def test_commit_writes_at_chosen_eligible_positions_only(row, unmask, block_length, expected):
    canvas = canvas_of(row, steps=5)
    after = commit(canvas, see(canvas, "dddd", block_length=block_length), bits(unmask))
    assert text_of(after) == [expected]
    assert after.steps.tolist() == [6 if "_" in row else 5]
    assert after.prompt is canvas.prompt and after.prompt_mask is canvas.prompt_mask


def test_rows_take_steps_of_their_own():
    canvas, steps = canvas_of("____", "____", "abcd"), []
    for unmask in (bits("1111", "0000", "1111"), bits("1111", "1100", "1111"), bits("1111", "0011", "1111")):
        canvas = commit(canvas, see(canvas, "abcd", "dcba", "aaaa"), unmask)
        steps.append(canvas.steps.tolist())
    assert text_of(canvas) == ["abcd", "dcba", "abcd"]
    assert steps == [[1, 1, 0], [1, 2, 0], [1, 3, 0]]


def test_rows_with_nothing_eligible_stay_as_they_are():
    canvas = canvas_of("a_c_", "a_c_", steps=2)
    seen = see(canvas, "dddd", "dddd")
    seen.eligible[0] = False
    after = commit(canvas, seen, decoding.with_best(bits("1111", "0000"), seen))
    assert text_of(after) == ["a_c_", "adc_"] and after.steps.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("row", "predicted", "unmask", "ends", "expected"),
    [
        ("____", "aEbc", "1100", {EOS}, "aEEE"),
        ("____", "Eabc", "1000", {EOS}, "EEEE"),
        ("____", "abcE", "1111", {EOS}, "abcE"),
        ("____", "aEbc", "1101", {EOS}, "aEEc"),
        ("_b__", "aEcE", "0010", {EOS}, "_bc_"),
        # out of order: the end waits until all before it is decoded
        ("____", "aEbc", "0100", {EOS}, "_E__"),
        ("_E__", "abcd", "0010", {EOS}, "_Ec_"),
        ("_E__", "abcd", "1000", {EOS}, "aEEE"),
        ("_E_d", "abcd", "1000", {EOS}, "aEEd"),
        ("__E_", "abcd", "1000", {EOS}, "a_E_"),
        ("_E_E_", "aacda", "10000", {EOS}, "aEEEE"),
        # several end tokens, and the one that fills
        ("____", "adbc", "1100", {EOS, D}, "adEE"),
        ("____", "adbc", "1100", {EOS}, "ad__"),
        ("____", "aEbc", "1100", {D}, "aE__"),
        # switched off
        ("____", "aEbc", "1100", None, "aE__"),
        ("_E__", "abcd", "1000", None, "aE__"),
    ],
)
def test_canvas_is_filled_after_its_end(row, predicted, unmask, ends, expected):
    length = len(row)
    canvas = canvas_of(row, "_" * length)
    after = commit(canvas, see(canvas, predicted, "E" * length), bits(unmask, "0" * length), ends)
    assert text_of(after) == [expected, "_" * length]
    assert after.steps.tolist() == [1, 1], "filling costs nothing"


def test_the_end_fills_later_blocks_too():
    canvas = canvas_of("______")
    assert text_of(commit(canvas, see(canvas, "aEbcbc", block_length=2), bits("110000"))) == ["aEEEEE"]
    assert text_of(commit(canvas, see(canvas, "aEbcbc", block_length=2), bits("010011"))) == ["_E____"]


# Taking back


def test_a_written_token_is_taken_back_and_written_again():
    canvas = commit(canvas_of("____"), see(canvas_of("____"), "abcd"), bits("1100"))
    canvas = commit(canvas, see(canvas, "dddd"), bits("0010"), remask=bits("1001"))
    assert text_of(canvas) == ["_bd_"], "what is masked already cannot be taken back"
    canvas = commit(canvas, see(canvas, "cccc"), bits("1001"))
    assert text_of(canvas) == ["cbdc"] and canvas.steps.tolist() == [3]
    assert text_of(commit(canvas, see(canvas, "aaaa"), bits("0000"), remask=bits("1111"))) == ["cbdc"], "it is finished"


def test_what_was_filled_in_goes_with_the_end_that_is_taken_back():
    canvas = canvas_of("____")
    canvas = commit(canvas, see(canvas, "_E__"), bits("0100"))
    canvas = commit(canvas, see(canvas, "____"), bits("0000"), remask=bits("0100"))
    assert text_of(canvas) == ["____"]
    filled = commit(canvas_of("___c"), see(canvas_of("___c"), "aE__"), bits("1100"))
    assert text_of(filled) == ["aEEc"] and filled.filled.tolist() == bits("0010").tolist()


def test_blocks_open_again():
    canvas = canvas_of("ab__")
    seen = see(canvas, "cccc", block_length=2)
    canvas = commit(canvas, seen, bits("0010"), remask=bits("1000"))
    assert text_of(canvas) == ["_bc_"]
    assert see(canvas, "dddd", block_length=2).eligible.tolist() == bits("1000").tolist()


def test_the_log_likelihood_is_that_of_the_tokens_that_stand():
    canvas = canvas_of("____")

    def seen(*probability: float) -> Observation:
        observation = see(canvas, "abEd")
        observation.probability = torch.where(canvas.masked, torch.tensor([probability]), canvas.probability)
        return observation

    canvas = commit(canvas, seen(0.5, 0.1, 0.2, 0.3), bits("1000"))
    canvas = commit(canvas, seen(0.9, 0.25, 0.8, 0.3), bits("0100"), remask=bits("1000"))
    canvas = commit(canvas, seen(0.75, 0.9, 0.8, 0.3), bits("1010"))
    assert text_of(canvas) == ["abEE"]
    assert decoding.log_likelihood(canvas).item() == pytest.approx(math.log(0.25 * 0.75 * 0.8))


def naive_commit(row: list, predicted: list, unmask: list, block_length: int) -> list:
    """The same, one row of plain numbers: None is masked."""
    row = list(row)
    if None in row:
        start = row.index(None) // block_length * block_length
        for i in range(start, start + block_length):
            if unmask[i] and row[i] is None:
                row[i] = predicted[i]
    for i, token in enumerate(row):
        if token is None:
            break
        if token == EOS:
            return row[: i + 1] + [EOS if later is None else later for later in row[i + 1 :]]
    return row


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
def test_random_walks_match_a_naive_commit(block_length):
    generator = torch.Generator().manual_seed(block_length)
    canvas, rows = canvas_of(*["________"] * 32), [[None] * 8] * 32
    for _ in range(12):
        predicted = torch.randint(0, 5, (32, 8), generator=generator)
        unmask = torch.rand(32, 8, generator=generator) < 0.3
        zeros = torch.zeros(32, 8)
        seen = decoding.observe(canvas, Prediction(predicted, zeros, zeros, zeros[..., None], zeros), block_length)
        canvas = commit(canvas, seen, unmask)
        rows = [naive_commit(*row, block_length) for row in zip(rows, predicted.tolist(), unmask.tolist(), strict=True)]
        assert canvas.tokens.tolist() == [[MASK if token is None else token for token in row] for row in rows]
        assert canvas.masked.tolist() == [[token is None for token in row] for row in rows]


def test_nothing_that_was_passed_in_is_changed():
    canvas = canvas_of("____", "_E__", "abcd")
    seen, unmask = see(canvas, "aEbc", "abcd", "aaaa"), bits("1100", "1000", "0000")
    before = copy.deepcopy((vars(canvas), vars(seen), unmask))
    after = commit(canvas, seen, decoding.with_best(unmask, seen))
    after.tokens[:], after.masked[:] = 0, True
    for old, new in zip(before, (vars(canvas), vars(seen), unmask), strict=True):
        pairs = [(old, new)] if isinstance(old, torch.Tensor) else [(old[name], new[name]) for name in old]
        assert all(torch.equal(a, b) for a, b in pairs)


# The best position, row by row


def test_one_position_is_forced_only_in_the_row_that_needs_it():
    canvas = canvas_of("____", "____", "a__b", "abcd")
    confidence = [[0.9, 0.2, 0.95, 0.3], [0.1, 0.2, 0.4, 0.3], [0.99, 0.6, 0.5, 0.99], [0.0, 0.0, 0.0, 0.0]]
    seen = see(canvas, *["dddd"] * 4, confidence=confidence)
    unmask = decoding.with_best(seen.confidence[..., 0] > 0.8, seen)
    assert unmask.tolist() == bits("1010", "0010", "0100", "0000").tolist()
    assert text_of(commit(canvas, seen, unmask)) == ["d_d_", "__d_", "ad_b", "abcd"]


@pytest.mark.parametrize(
    ("row", "unmask", "confidence", "block_length", "written"),
    [
        ("____", "0000", [0.1, 0.2, 0.9, 0.3], 4, "0010"),
        ("____", "0000", [0.1, 0.2, 0.9, 0.3], 2, "0100"),
        ("____", "0011", [0.1, 0.2, 0.9, 0.3], 2, "0100"),
        ("____", "1000", [0.1, 0.2, 0.9, 0.3], 2, "1000"),
        ("_d__", "0101", [0.1, 0.9, 0.9, 0.9], 2, "1000"),
        ("____", "0000", [0.5, 0.5, 0.5, 0.5], 1, "1000"),
        ("____", "0000", [0.0, 0.0, 0.0, 0.0], 1, "1000"),
        ("dddd", "0000", [0.1, 0.2, 0.9, 0.3], 4, "0000"),
    ],
)
def test_the_best_is_eligible_and_joins_an_empty_set_only(row, unmask, confidence, block_length, written):
    seen = see(canvas_of(row), "dddd", block_length=block_length, confidence=[confidence])
    assert (decoding.with_best(bits(unmask), seen) & seen.eligible).tolist() == bits(written).tolist()


def test_the_best_by_another_score():
    seen = see(canvas_of("____"), "dddd", block_length=2, confidence=[[0.9, 0.1, 0.9, 0.9]])
    score = torch.tensor([[-7.0, -3.0, 5.0, 6.0]])
    assert decoding.with_best(bits("0000"), seen, score).tolist() == bits("0100").tolist()


def test_one_of_equals_is_forced():
    seen = see(canvas_of("____"), "dddd")
    assert decoding.with_best(bits("0000"), seen).sum() == 1


# Completions


@pytest.mark.parametrize(
    ("row", "ends", "expected"),
    [
        ("abcd", {EOS}, "abcd"),
        ("abEE", {EOS}, "ab"),
        ("abEc", {EOS}, "ab"),
        ("EEEE", {EOS}, ""),
        ("adEc", {EOS, D}, "a"),
        ("adbc", {D}, "a"),
        ("aEbc", {D}, "aEbc"),
    ],
)
def test_completions_stop_before_the_first_end_token(row, ends, expected):
    texts = decoding.completions(canvas_of(row, "cccc"), torch.tensor(sorted(ends)))
    assert ["".join(LETTERS[token] for token in text.tolist()) for text in texts] == [expected, "cccc"]


# Rewards


@pytest.mark.parametrize(
    ("name", "score", "nfe", "alpha", "expected"),
    [
        ("multiplicative", 1.0, 1, 1.0, 1.0),
        ("multiplicative", 1.0, 1, 3.0, 1.0),
        ("multiplicative", 1.0, 2, 1.0, 0.75),
        ("multiplicative", 1.0, 4, 1.0, 0.25),
        ("multiplicative", 1.0, 9, 1.0, 0.25),
        ("multiplicative", 0.5, 2, 3.0, 0.5 * 0.75**3),
        ("multiplicative", 1.0, 4, 0.3, 0.25**0.3),
        ("multiplicative", 1.0, 9, 0.3, 0.25**0.3),
        ("multiplicative", 0.5, 4, 0.0, 0.5),
        ("multiplicative", 0.0, 4, 0.0, 0.0),
        ("multiplicative", 0.0, 1, 1.0, 0.0),
        ("additive", 1.0, 1, 1.0, 0.75),
        ("additive", 1.0, 4, 1.0, 0.0),
        ("additive", 0.0, 4, 1.0, -1.0),
        ("additive", 1.0, 9, 1.0, 1 - 9 / 4),
        ("additive", 0.5, 2, 0.3, 0.5 - 0.15),
        ("additive", 0.5, 2, 3.0, 0.5 - 1.5),
        ("additive", 0.5, 9, 0.0, 0.5),
    ],
)
def test_reward_at_four_positions(name, score, nfe, alpha, expected):
    assert get_reward(name)(score, nfe, 4, alpha) == pytest.approx(expected, abs=1e-12)


def test_a_callable_is_a_reward_and_an_unknown_name_is_not():
    def reward(score, nfe, gen_length, alpha):
        return score

    assert get_reward(reward) is reward
    with pytest.raises(ValueError, match=r"reward='fast'.*'additive', 'multiplicative'"):
        get_reward("fast")
