"""The oracle and tabular denoisers, and the enumerations on them, against slow enumerations written another way."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from dllm_gym import decoding, make_task
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.denoisers.enumeration import (
    exact_block_elbo,
    exact_elbo,
    exact_eubo,
    random_order_log_likelihood,
    sampling_distribution,
)
from dllm_gym.denoisers.oracle import OracleDenoiser, TabularDenoiser
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.oracle_joint import PROMPT, SENTENCES, mixture
from dllm_gym.tasks.oracle import Oracle
from dllm_gym.types import Canvas

SEEDS = range(5)


def random_joint(words: int, length: int, seed: int = 0, zeros: float = 0.0) -> torch.Tensor:
    """Uneven probabilities, a share of them 0; they do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (words,) * length
    joint = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    return joint * (torch.rand(shape, generator=generator) >= zeros)


@pytest.fixture(scope="module")
def oracle() -> OracleDenoiser:
    return OracleDenoiser.default()


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p - q).abs().sum().item() / 2


def conditional(denoiser: TabularDenoiser, canvas: list[int], position: int) -> list[float]:
    """Probabilities of the words at one position of one canvas."""
    return denoiser.logits(torch.tensor([canvas]))[0, position, : denoiser.num_words].softmax(dim=-1).tolist()


def log_prob(denoiser: TabularDenoiser, x: list[int], masked, position: int) -> float:
    canvas = [denoiser.mask_token_id if i in masked else token for i, token in enumerate(x)]
    return math.log(conditional(denoiser, canvas, position)[x[position]])


def orders(length: int, block_length: int):
    """All orders of revealing that go through the blocks from left to right."""
    blocks = [range(start, start + block_length) for start in range(0, length, block_length)]
    for parts in itertools.product(*map(itertools.permutations, blocks)):
        yield [i for part in parts for i in part]


def log_prob_in_order(denoiser: TabularDenoiser, x: list[int], order: list[int]) -> float:
    return sum(log_prob(denoiser, x, order[n:], i) for n, i in enumerate(order))


# Conditionals


@pytest.mark.parametrize(("words", "length", "zeros"), [(3, 3, 0.0), (2, 4, 0.5), (4, 2, 0.3), (3, 1, 0.0)])
def test_conditionals_are_those_of_the_joint(words, length, zeros):
    joint = random_joint(words, length, zeros=zeros)
    oracle = OracleDenoiser(joint)
    total, undefined = joint.sum().item(), 0
    sequences = list(itertools.product(range(words), repeat=length))
    for canvas in itertools.product(range(words + 1), repeat=length):
        agree = [s for s in sequences if all(c in (words, t) for c, t in zip(canvas, s, strict=True))]
        for i in (i for i in range(length) if canvas[i] == words):
            weights = [sum(joint[s].item() for s in agree if s[i] == word) for word in range(words)]
            if not sum(weights):  # nothing follows from the joint: the marginal
                weights = [sum(joint[s].item() for s in sequences if s[i] == word) for word in range(words)]
                undefined += 1
            logits = oracle.logits(torch.tensor([canvas]))[0, i]
            assert logits.exp()[:words].tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-12)
            assert logits[words] == -torch.inf
    assert (undefined > 0) == (zeros > 0)
    assert oracle.probabilities().tolist() == pytest.approx([joint[s].item() / total for s in sequences])
    assert oracle.sequences().tolist() == [list(s) for s in sequences]


def test_a_contradiction_does_not_spoil_the_prediction():
    oracle = OracleDenoiser(mixture({"a b a": 1, "b a b": 1}, smoothing=0))
    canvas = decoding.blank([torch.tensor([7])], 3, oracle.mask_token_id)
    canvas.tokens[0, :2], canvas.masked[0, :2] = 0, False
    prediction = oracle.predict(canvas, k=2)
    assert prediction.confidence[0, 2].tolist() == [0.5, 0.5] and prediction.entropy[0, 2] == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", [OracleDenoiser.default, lambda: TabularDenoiser.random(4, 4)])
def test_prompt_padding_and_positions_do_not_change_the_logits(kind):
    denoiser = kind()
    mask = denoiser.mask_token_id
    canvas = torch.tensor([[0, mask, mask, 2], [mask, 1, mask, mask]])
    alone = denoiser.logits(canvas)
    prompt = torch.tensor(denoiser.tokenizer([PROMPT, "one"], padding=True)["input_ids"])
    assert prompt.shape == (2, 3) and prompt[1, 0] == prompt[1, 1] == denoiser.tokenizer.pad_token_id
    tokens = torch.cat([prompt, canvas], dim=1)
    seen = denoiser.logits(tokens, tokens != denoiser.tokenizer.pad_token_id)
    assert seen.shape == (2, 7, 5) and torch.equal(seen[:, 3:], alone)
    positions = torch.tensor([[4, 6], [5, 3]])
    assert torch.equal(denoiser.logits(tokens, positions=positions), seen[torch.arange(2)[:, None], positions])


def test_predict_and_score_leave_the_mask_out_and_have_gradients():
    denoiser = TabularDenoiser.random(3, 4, seed=1)
    mask = denoiser.mask_token_id
    canvas = decoding.blank([torch.zeros(2, dtype=torch.int64)] * 3, 4, mask)
    canvas.tokens[1, 2], canvas.masked[1, 2] = 1, False
    wanted = denoiser.logits(canvas.tokens)
    prediction = denoiser.predict(canvas, k=3)
    assert torch.equal(prediction.token, wanted.argmax(dim=-1).where(canvas.masked, torch.tensor(0)))
    assert prediction.confidence.sum(dim=-1)[canvas.masked].tolist() == pytest.approx([1] * 11)

    targets = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(0))
    score = denoiser.score(canvas, targets, canvas.masked)
    for kind, values in (
        ("log_prob", wanted[..., :3].log_softmax(dim=-1)),
        ("centred_logit", wanted[..., :3] - wanted[..., :3].mean(dim=-1, keepdim=True)),
    ):
        values = values.gather(-1, targets[..., None])[..., 0] * canvas.masked
        got = getattr(score, kind)
        assert torch.allclose(got, values.float(), atol=1e-5)
        (gradient,) = torch.autograd.grad(got.sum(), denoiser.model.table, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0.1
    assert not any(p.requires_grad for p in OracleDenoiser.default().model.parameters())


def test_a_table_from_an_oracle_is_a_trainable_copy(oracle):
    table = TabularDenoiser.from_oracle(oracle)
    x = oracle.sequences()
    assert torch.equal(table.model.table, oracle.model.table) and table.model.table.requires_grad
    (-exact_elbo(table, x[:3]).sum()).backward()
    torch.optim.SGD(table.model.parameters(), lr=1.0).step()
    assert not torch.equal(table.model.table, oracle.model.table)
    assert (exact_elbo(table, x[:3]) > exact_elbo(oracle, x[:3])).all()


def test_random_tables_follow_from_their_seed():
    tables = [TabularDenoiser.random(3, 2, seed, scale).model.table for seed, scale in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(tables[0], tables[1]) and torch.equal(2 * tables[0], tables[2])
    assert not torch.equal(tables[0], tables[3])


# What a sampler produces


def in_order(*order: int):
    """A sampler that unmasks one position after the other."""

    def policy(observation):
        step = (observation.progress * len(order)).round().long()
        return torch.nn.functional.one_hot(torch.tensor(order)[step], len(order)).bool()

    return policy


def everything(observation):
    return observation.eligible


def nothing(observation):
    return torch.zeros_like(observation.eligible)


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize(
    "policy",
    [make_policy("left-to-right"), make_policy("confidence"), make_policy("entropy"), make_policy("margin"), nothing],
)
def test_one_at_a_time_gives_the_joint(policy, block_length, oracle):
    made = sampling_distribution(oracle, policy, block_length, confidence_k=2)
    assert total_variation(made, oracle.probabilities()) < 1e-6


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_any_order_gives_the_joint_of_an_oracle_and_its_own_product_of_a_table(order, oracle):
    assert total_variation(sampling_distribution(oracle, in_order(*order)), oracle.probabilities()) < 1e-6
    table = TabularDenoiser.random(2, 4, seed=sum(order[:2]))
    wanted = [math.exp(log_prob_in_order(table, x, list(order))) for x in table.sequences().tolist()]
    assert sampling_distribution(table, in_order(*order)).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_a_block_at_once_gives_the_product_of_its_marginals(block_length, oracle):
    p = oracle.joint.numpy()
    if block_length == 4:
        wanted = np.einsum("i,j,k,l", p.sum((1, 2, 3)), p.sum((0, 2, 3)), p.sum((0, 1, 3)), p.sum((0, 1, 2)))
    elif block_length == 2:
        first = np.einsum("i,j->ij", p.sum((1, 2, 3)), p.sum((0, 2, 3)))
        wanted = first[..., None, None] * p.sum(3, keepdims=True) * p.sum(2, keepdims=True)
        wanted = wanted / p.sum((2, 3), keepdims=True) ** 2
    else:
        wanted = p
    made = sampling_distribution(oracle, everything, block_length)
    assert total_variation(made, torch.from_numpy(wanted).flatten()) < 1e-6
    distance = total_variation(made, oracle.probabilities())
    assert distance == pytest.approx(abs(wanted - p).sum() / 2, abs=1e-6)
    assert distance < 1e-6 if block_length == 1 else distance > 0.4


def followed(denoiser: TabularDenoiser, policy, block_length: int) -> dict[tuple, float]:
    """The distribution of `sampling_distribution` by recursion, one canvas at a time."""
    mask, length, final = denoiser.mask_token_id, denoiser.length, {}

    def follow(tokens: list[int], steps: int, mass: float):
        if mask not in tokens:
            final[tuple(tokens)] = final.get(tuple(tokens), 0.0) + mass
            return
        row = torch.tensor([tokens])
        zeros = torch.zeros(row.shape)
        canvas = Canvas(row[:, :0], row[:, :0] == 0, row, row == mask, zeros > 0, zeros, torch.tensor([steps]))
        seen = decoding.observe(canvas, denoiser.predict(canvas), block_length)
        seen.token = row
        chosen = [i for i in range(length) if policy(seen)[0, i] and seen.eligible[0, i]]
        table = [conditional(denoiser, tokens, i) for i in chosen]
        for words in itertools.product(range(denoiser.num_words), repeat=len(chosen)):
            after = list(tokens)
            for i, word in zip(chosen, words, strict=True):
                after[i] = word
            follow(after, steps + 1, mass * math.prod(p[word] for p, word in zip(table, words, strict=True)))

    follow([mask] * length, 0, 1.0)
    return final


def patient(observation):
    """Sets that hang on the confidences, on the words that stand there and on the step; ineligible ones among them."""
    surest = make_policy("threshold", threshold=0.75)(observation)
    after_b = (observation.token == 1).any(dim=1)
    return surest | (after_b & (observation.progress > 0.3))[:, None]


@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_sampling_distribution_against_recursion(seed, block_length):
    table = TabularDenoiser.random(2, 4, seed)
    wanted = followed(table, patient, block_length)
    assert len(wanted) == 16
    made = sampling_distribution(table, patient, block_length)
    assert made.tolist() == pytest.approx([wanted[tuple(x)] for x in table.sequences().tolist()], abs=1e-9)


@pytest.mark.parametrize(
    ("policy", "distance"),
    [
        (make_policy("random"), 0.0),
        (make_policy("confidence", k=2), 0.487),
        (make_policy("threshold", threshold=0.5), 0.125),
        (everything, 0.926),
    ],
)
def test_the_environment_samples_from_that_distribution(policy, distance, oracle):
    env = gym.make_vec("MaskedDiffusion-Oracle-v0", num_envs=512, denoiser=oracle, temperature=1.0)
    rollout = collect(env, policy, range(8000))
    index = (rollout.tokens * 4 ** torch.arange(3, -1, -1)).sum(dim=1)
    sampled = torch.bincount(index, minlength=256).double() / 8000
    # "random" is no function of the canvas; whatever its order, the oracle's joint comes out.
    exact = oracle.probabilities() if distance == 0 else sampling_distribution(oracle, policy)
    noise = (exact * (1 - exact) / 8000).sqrt().sum().item() / 2  # at least the expected distance of a sample
    assert total_variation(sampled, exact) < noise < 0.1
    assert total_variation(exact, oracle.probabilities()) == pytest.approx(distance, abs=1e-3)
    support = (mixture(smoothing=0) > 0).flatten()
    assert rollout.correct.double().mean().item() == pytest.approx(exact[support].sum().item(), abs=0.03)
    assert torch.equal(rollout.score, rollout.correct.to(rollout.score))


# Likelihoods and bounds


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_a_consistent_denoiser_has_one_likelihood(block_length, oracle):
    x, log_p = oracle.sequences(), oracle.probabilities().log()
    assert torch.allclose(random_order_log_likelihood(oracle, x, block_length), log_p, rtol=0, atol=1e-10)
    assert torch.allclose(exact_block_elbo(oracle, x, block_length), log_p, rtol=0, atol=1e-10)
    assert torch.allclose(exact_elbo(oracle, x), log_p, rtol=0, atol=1e-10)
    eubo = exact_eubo(oracle, x, 1.5, block_length)
    assert (eubo >= log_p - 1e-10).all() and (eubo > log_p + 0.1).any() == (block_length > 1)


@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_enumerations_against_all_orders_and_all_masks(seed, block_length):
    table = TabularDenoiser.random(3, 4, seed)
    x = torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(seed))
    for row in x:
        tokens = row.tolist()
        paths = [log_prob_in_order(table, tokens, order) for order in orders(4, block_length)]
        likelihood = math.log(sum(map(math.exp, paths)) / len(paths))
        elbo = sum(paths) / len(paths)
        assert len(paths) == math.factorial(block_length) ** (4 // block_length)
        assert random_order_log_likelihood(table, row, block_length).item() == pytest.approx(likelihood)
        assert exact_block_elbo(table, row, block_length).item() == pytest.approx(elbo)
        if block_length == 4:
            assert exact_elbo(table, row).item() == pytest.approx(elbo)
        # The bounds again, as expectations over masks: block, number l of masked positions, which ones.
        by_masks, inside = 0.0, [0.0] * 4
        blocks = 4 // block_length
        for block, count in itertools.product(range(blocks), range(1, block_length + 1)):
            start = block * block_length
            sets = list(itertools.combinations(range(start, start + block_length), count))
            for chosen in sets:
                probability = 1 / (blocks * block_length * len(sets))
                weight = blocks * block_length / count
                for i in chosen:
                    value = log_prob(table, tokens, {*chosen, *range(start + block_length, 4)}, i)
                    by_masks += probability * weight * value
                    inside[i] += probability * weight * math.exp(1.7 * value)
        assert by_masks == pytest.approx(elbo)
        eubo = sum(math.log(value) / 1.7 for value in inside)
        assert exact_eubo(table, row, 1.7, block_length).item() == pytest.approx(eubo)
    batch = exact_eubo(table, x, 1.7, block_length)
    assert torch.equal(batch, torch.stack([exact_eubo(table, row, 1.7, block_length) for row in x]))
    assert torch.equal(batch.view(2, 1), exact_eubo(table, x[:, None], 1.7, block_length))


@torch.no_grad()
@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_of_inconsistent_denoisers(seed, block_length):
    table = TabularDenoiser.random(3, 4, seed)
    x = table.sequences()
    likelihood, elbo = random_order_log_likelihood(table, x, block_length), exact_block_elbo(table, x, block_length)
    assert likelihood.exp().sum().item() == pytest.approx(1) and elbo.exp().sum() < 0.95
    assert (elbo < likelihood).all() and (likelihood - elbo).max() > 0.5
    eubos = [exact_eubo(table, x, beta, block_length) for beta in (1e-6, 0.5, 1.0, 1.5, 2.0, 8.0)]
    assert torch.allclose(eubos[0], elbo, atol=1e-4)
    assert all((more > less).all() for less, more in itertools.pairwise(eubos))
    assert (eubos[2] < likelihood).any(), "an upper bound for consistent denoisers only"


@pytest.mark.parametrize(
    "function",
    [
        random_order_log_likelihood,
        lambda d, x: random_order_log_likelihood(d, x, 2),
        exact_elbo,
        lambda d, x: exact_block_elbo(d, x, 2),
        lambda d, x: exact_eubo(d, x, 1.5),
        lambda d, x: exact_eubo(d, x, 2.0, 2),
    ],
)
def test_gradients_are_those_of_finite_differences(function):
    table = TabularDenoiser.random(2, 4, seed=3)
    x = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    weights = torch.tensor([1.0, -0.6])

    def value():
        return (weights * function(table, x)).sum()

    (gradient,) = torch.autograd.grad(value(), table.model.table)
    flat, parameter = gradient.flatten(), table.model.table.data.view(-1)
    entries = flat.abs().topk(12).indices.tolist() + (flat == 0).nonzero()[:3, 0].tolist()
    assert len(entries) == 15 and flat[entries[11]].abs() > 1e-3
    for entry in entries:
        values = []
        for step in (1e-5, -1e-5):
            before = parameter[entry].item()
            parameter[entry] += step
            values.append(value().item())
            parameter[entry] = before
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(flat[entry].item(), abs=1e-8)


# The task and the environment


def test_the_default_joint_is_the_sentences_and_a_little_of_everything(oracle):
    likely = oracle.probabilities().argsort(descending=True)[:5]
    texts = [oracle.tokenizer.decode(tokens) for tokens in oracle.sequences()[likely]]
    assert texts == list(SENTENCES)
    assert oracle.probabilities()[likely].tolist() == pytest.approx(
        [0.98 * weight + 0.02 / 256 for weight in SENTENCES.values()]
    )
    assert oracle.probabilities().min().item() == pytest.approx(0.02 / 256)


def test_greedy_decoding_is_right_one_at_a_time_and_wrong_at_once(oracle):
    env = gym.make("MaskedDiffusion-Oracle-v0", denoiser=oracle)
    _, info = env.reset(seed=0)
    assert info["prompt"] == PROMPT and info["dataset"] == "embedded" and info["problem_id"].startswith("oracle/")
    *_, info = env.step(np.ones(4))
    assert (info["completion"], info["correct"], info["score"], info["nfe"]) == ("a a d d", False, 0.0, 1)
    env.reset()
    for _ in range(4):
        *_, info = env.step(np.zeros(4))  # an empty set unmasks the most confident
    assert (info["completion"], info["correct"], info["score"], info["nfe"]) == ("c a d b", True, 1.0, 4)


@pytest.mark.parametrize("form", ["", "-TopK", "-Threshold", "-Position"])
def test_every_form_is_registered_with_the_oracle(form, oracle):
    id = f"MaskedDiffusion-Oracle{form}-v0"
    assert gym.spec(id).kwargs["denoiser"] == "oracle"
    env = gym.make(id, denoiser=oracle, temperature=1.0)
    env.reset(seed=0)
    env.action_space.seed(0)
    terminated, steps = False, 0
    while not terminated:
        _, _, terminated, _, info = env.step(env.action_space.sample())
        steps += 1
    assert len(info["completion"].split()) == 4 and info["nfe"] == steps <= 4


def test_the_task_knows_its_sentences():
    task, rng = make_task("oracle"), np.random.default_rng(0)
    assert isinstance(task, Oracle) and task.gen_length == 4
    assert task[3].prompt == make_task("oracle", split="test")[5].prompt == PROMPT
    assert task[3].id == "oracle/embedded/train/3" and task[3].answer == tuple(SENTENCES)
    for sentence in SENTENCES:
        assert task.verify(task[0], f" {sentence}\n").correct and task.verify(task[0], sentence).score == 1
    for wrong in ("", "a b d c", "a b c", "a b c d a", "abcd", "A B C D", "#### a b c d"):
        verdict = task.verify(task[0], wrong)
        assert not verdict.correct and verdict.score == 0
    shown = [task.example(0, rng)[1] for _ in range(2000)]
    shares = {sentence: shown.count(sentence) / 2000 for sentence in SENTENCES}
    assert sum(shares.values()) == 1 and shares == pytest.approx(SENTENCES, abs=0.04)


def test_another_joint_with_its_own_task():
    sentences = {"b a": 3.0, "a b": 1.0}
    oracle = OracleDenoiser(torch.from_numpy(mixture(sentences, smoothing=0.0)))
    env = UnmaskingEnv(Oracle(sentences=sentences), denoiser=oracle)
    env.reset(seed=0)
    *_, info = env.step([1, 0])
    *_, info = env.step([0, 1])
    assert info["completion"] == "b a" and info["correct"]
    assert oracle.probabilities().tolist() == [0, 0.25, 0.75, 0]


# Errors


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: OracleDenoiser(torch.ones(3, 2)), r"joint of shape \(3, 2\): must have one axis of V words"),
        (lambda: OracleDenoiser(torch.tensor(1.0)), r"joint of shape \(\): must"),
        (lambda: OracleDenoiser(torch.ones(1, 1)), "1 words at 2 positions: must be 2 to 26 words"),
        (lambda: OracleDenoiser(torch.tensor([0.5, -0.1])), "joint: probabilities must be finite, 0 or more"),
        (lambda: OracleDenoiser(torch.tensor([0.5, torch.nan])), "joint: probabilities must be finite, 0 or more"),
        (lambda: OracleDenoiser(torch.zeros(2, 2)), "not all of them 0"),
        (lambda: TabularDenoiser(torch.zeros(8, 2, 2)), r"table of shape \(8, 2, 2\): must be \[\(V \+ 1\)\*\*L, L, V"),
        (lambda: TabularDenoiser.random(20, 20), "20 words at 20 positions: .* no larger than"),
        (lambda: mixture({"a b": 1, "c": 1}), r"sentences=\['a b', 'c'\]: must be lower-case letters"),
        (lambda: mixture({"a word": 1}), r"sentences=\['a word'\]: must be lower-case letters"),
        (lambda: mixture({}), r"sentences=\[\]: must be"),
        (lambda: mixture({"a b": -1, "b a": 2}), r"weights=\[-1.0, 2.0\]: must be 0 or more"),
        (lambda: mixture(smoothing=2), "smoothing=2: must be from 0 to 1"),
        (lambda: make_task("oracle", "hub"), "dataset='hub': the oracle's problems are its own"),
    ],
)
def test_what_cannot_be_built(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda d, x: exact_eubo(d, x, 0.0), "beta=0.0: must be more than 0"),
        (lambda d, x: exact_eubo(d, x, 1.0, 3), r"block_length=3: must divide the length 4, one of \[1, 2, 4\]"),
        (lambda d, x: exact_block_elbo(d, x, 0), "block_length=0: must divide"),
        (lambda d, x: random_order_log_likelihood(d, x, 3), "block_length=3: must divide"),
        (lambda d, x: sampling_distribution(d, everything, 3), "block_length=3: must divide"),
        (lambda d, x: exact_elbo(d, x + 1), "x: tokens must be 0 to 4 and not the mask, 4"),
        (lambda d, x: exact_elbo(d, x - 9), "x: tokens must be 0 to 4 and not the mask, 4"),
        (lambda d, x: exact_elbo(d, x[:, :2]), "a completion must be 4 tokens of 0 to 4 .*use gen_length=4"),
        (lambda d, x: d.logits(x + 6), "a completion must be 4 tokens of 0 to 4 .*use gen_length=4"),
        (lambda d, x: gym.make("MaskedDiffusion-Oracle-v0", denoiser=d, gen_length=5), "gen_length=5 exceed"),
    ],
)
def test_what_cannot_be_asked(function, message, oracle):
    with pytest.raises(ValueError, match=message) as caught:
        function(oracle, torch.tensor([[0, 1, 2, 3]]))
    assert "\n" not in str(caught.value)
