"""Kept keys and values: exact ones against forwarding everything, Fast-dLLM's against their algorithm written out."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen
from errors import error_of
from reference import reference, some_tokens
from scripted import ScriptedDenoiser

import dllm_gym
from dllm_gym import load_denoiser
from dllm_gym.denoisers import cache as cache_module
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.denoisers.session import DecodingSession
from dllm_gym.types import Action, TokenSampling

WRITERS = {"llada": write_llada, "dream": write_dream, "sdar": write_qwen}
LENGTHS = [5, 11, 2, 9, 7, 1, 12, 6, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


def load(folders, kind: str, block_size: int | None = None) -> PretrainedDenoiser:
    """A denoiser by attention pattern: bidirectional as it is, prompt-causal made from LLaDA's weights."""
    if kind != "prompt-causal":
        return load_denoiser(folders[kind], block_size=block_size)
    denoiser = load_denoiser(folders["llada"])
    denoiser.model.config.attention_pattern = kind
    return PretrainedDenoiser(denoiser.model, denoiser.tokenizer)


def play(
    denoiser, cache: str, block_length: int, *, rows: int = 3, temperature: float = 0.0, length: int = 12, order=0
):
    """Decode completions of prompts of `LENGTHS`, rows refilled; a row's choices follow from its prompt and step alone.

    Returns tokens, steps, positions, and the confidences seen at each step, by prompt.
    """
    queue = np.random.default_rng(order).permutation(len(LENGTHS)).tolist()
    nothing = [torch.zeros(0, dtype=torch.int64)] * rows
    session = DecodingSession.blank(denoiser, nothing, length, block_length, cache=cache)
    session.clear()
    owner = [None] * rows
    results, seen = {}, {n: [] for n in range(len(LENGTHS))}
    while queue or any(n is not None for n in owner):
        free = [row for row in range(rows) if owner[row] is None][: len(queue)]
        for row in free:
            owner[row] = queue.pop()
        if free:
            session.begin(free, [some_tokens(LENGTHS[owner[row]], owner[row]) for row in free])
        active = torch.tensor([row for row in range(rows) if owner[row] is not None])
        steps = session.canvas.steps[active].tolist()
        rngs = [np.random.default_rng([owner[row], step]) for row, step in zip(active.tolist(), steps, strict=True)]
        uniforms = torch.as_tensor(np.stack([rng.random(length, dtype=np.float32) for rng in rngs]))
        observation, _ = session.observe(active, 2, TokenSampling(temperature), uniforms)
        wanted = torch.as_tensor(np.stack([rng.random(length) < 0.4 for rng in rngs]))
        first = observation.eligible & (observation.eligible.cumsum(dim=1) == 1)
        session.commit(observation, Action.unmasking(wanted | first), active)
        for i, row in enumerate(active.tolist()):
            seen[owner[row]].append(observation.confidence[i])
            if not session.canvas.masked[row].any():
                tokens, count = session.canvas.tokens[row].tolist(), int(session.canvas.steps[row])
                results[owner[row]] = (tokens, count, int(session.positions[row]))
                owner[row] = None
    return results, seen


# Exact caches


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    ("kind", "block_length"),
    [("prompt-causal", 4), ("prompt-causal", 12), ("sdar", 2), ("sdar", 3), ("sdar", 4), ("sdar", 12)],
)
def test_exact_caches_change_nothing(folders, kind, block_length, temperature):
    denoiser = load(folders, kind, block_length if kind == "sdar" else None)
    wanted, wanted_seen = play(denoiser, "none", block_length, temperature=temperature)
    for rows, order in ((1, 1), (3, 2), (9, 3)):
        got, seen = play(denoiser, "auto", block_length, rows=rows, order=order, temperature=temperature)
        for n in wanted:
            assert got[n][:2] == wanted[n][:2] and got[n][2] < wanted[n][2]
            for a, b in zip(seen[n], wanted_seen[n], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_positions_are_those_that_are_forwarded(folders):
    """12 tokens in blocks of 4, prompts of n tokens."""
    llada, causal, sdar = (load(folders, kind) for kind in ("llada", "prompt-causal", "sdar"))
    for n, (_, steps, positions) in play(llada, "none", 4)[0].items():
        assert positions == steps * (LENGTHS[n] + 12)
    for n, (_, steps, positions) in play(causal, "auto", 4)[0].items():
        assert positions == LENGTHS[n] + 12 * steps
    for n, (_, steps, positions) in play(llada, "dual", 4)[0].items():
        assert positions == 3 * (LENGTHS[n] + 12) + 4 * (steps - 3)
    for n, (_, steps, positions) in play(sdar, "auto", 4)[0].items():
        # Steps run over the active block; the first of each also over what is not yet kept.
        shared = LENGTHS[n] % 4
        assert positions <= LENGTHS[n] + 12 + 4 * steps
        assert positions >= (LENGTHS[n] - shared) + (12 - 3) + (steps - 4)


def test_a_group_of_completions_forwards_its_prompt_once(folders, monkeypatch):
    denoiser = load(folders, "prompt-causal")
    session = DecodingSession.blank(denoiser, [some_tokens(7, n // 4) for n in range(8)], 6, 6)
    forwarded, run = [], denoiser.run
    monkeypatch.setattr(denoiser, "run", lambda tokens, *rest: forwarded.append(tokens.shape) or run(tokens, *rest))
    session.observe()
    session.observe()
    assert forwarded == [(2, 7), (8, 6), (8, 6)]


def test_a_token_taken_back_is_seen_by_all_that_follow(folders):
    denoiser = load(folders, "sdar")
    seen = {}
    for cache in ("none", "prefix"):
        session = DecodingSession.blank(denoiser, [some_tokens(6)], 12, 4, cache=cache)
        for _ in range(3):
            observation, _ = session.observe()
            session.commit(observation, Action.unmasking(observation.eligible))
        back = torch.zeros(1, 12, dtype=torch.bool)
        back[0, 1] = True  # of the first block
        observation, _ = session.observe()
        session.commit(observation, Action(observation.eligible, back))
        observation, _ = session.observe(sampling=TokenSampling(5.0), uniforms=torch.full((1, 12), 0.99))
        session.commit(observation, Action.unmasking(observation.eligible))
        back[0, 9] = True
        seen[cache] = [observation.confidence, session.canvas.tokens]
    for a, b in zip(*seen.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# Fast-dLLM's caches


def fast_dllm(folder, prompt, cache: str, block_length: int, length: int, mask: int, threshold: float):
    """arXiv 2505.22618, algorithm 1, for one row: tokens, and the number of forward passes."""
    shifted = json.loads((folder / "config.json").read_text())["model_type"] == "Dream"
    row = torch.cat([prompt, torch.full((length,), mask)])
    forwards = 0
    for begin in range(len(prompt), len(row), block_length):
        end = begin + block_length
        kept = []
        logits = reference(folder, row, kept=kept)
        window = 0
        while True:
            forwards += 1
            logits[:, mask] = -torch.inf
            confidence, token = logits.softmax(dim=-1)[begin - window : end - window].max(dim=-1)
            confidence = confidence.masked_fill(row[begin:end] != mask, -1)
            chosen = (confidence >= threshold) | (torch.arange(block_length) == confidence.argmax())
            chosen &= row[begin:end] == mask
            row[begin:end] = torch.where(chosen, token, row[begin:end])
            if not (row[begin:end] == mask).any():
                break
            window = begin - shifted
            stop = len(row) if cache == "prefix" else end
            logits = reference(folder, row[window:stop], start=window, kept=kept)
    return row[len(prompt) :].tolist(), forwards


@pytest.mark.parametrize("threshold", [0.02, 1.0])
@pytest.mark.parametrize("block_length", [3, 4, 12])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_prefix_and_dual_are_fast_dllms(folders, kind, cache, block_length, threshold):
    denoiser = load(folders, kind)
    prompts = [some_tokens(n, n) for n in (5, 11, 2, 8)]
    session = DecodingSession.blank(denoiser, prompts, 12, block_length, cache=cache, stop_at_eos=False)
    while (rows := session.canvas.masked.any(dim=1).nonzero()[:, 0]).numel():
        observation, _ = session.observe(rows)
        confidence = observation.confidence[..., 0].masked_fill(~observation.eligible, -1)
        best = torch.nn.functional.one_hot(confidence.argmax(dim=1), 12).bool()
        session.commit(observation, Action.unmasking((confidence >= threshold) | best), rows)
    for row, prompt in enumerate(prompts):
        wanted = fast_dllm(folders[kind], prompt, cache, block_length, 12, denoiser.mask_token_id, threshold)
        assert (session.canvas.tokens[row].tolist(), int(session.canvas.steps[row])) == wanted


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream", "prompt-causal"])
def test_a_row_of_a_batch_is_the_row_alone(folders, kind, cache):
    denoiser = load(folders, kind)
    alone, alone_seen = play(denoiser, cache, 4, rows=1)
    for rows, order in ((3, 2), (9, 3)):
        together, seen = play(denoiser, cache, 4, rows=rows, order=order)
        assert together == alone
        for n in seen:
            for a, b in zip(seen[n], alone_seen[n], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# Weights that change, and memory


@pytest.mark.parametrize("change", ["optimizer", "load"])
@pytest.mark.parametrize("kind, cache", [("llada", "dual"), ("prompt-causal", "prompt"), ("sdar", "prefix")])
def test_keys_of_earlier_weights_are_never_used(folders, kind, cache, change):
    denoiser = load(folders, kind)
    sessions = [DecodingSession.blank(denoiser, [some_tokens(6)], 8, 4, cache=cache) for _ in range(2)]
    sessions[0].observe()
    parameters = list(denoiser.model.parameters())
    if change == "optimizer":
        for p in parameters:
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(parameters, lr=0.05).step()
    else:
        denoiser.model.load_state_dict({name: 1.5 * w for name, w in denoiser.model.state_dict().items()})
    old, fresh = (session.observe()[0] for session in sessions)
    torch.testing.assert_close(old.confidence, fresh.confidence, rtol=0, atol=1e-6)


def test_too_little_memory_is_said_before_anything_is_allocated(folders, monkeypatch):
    denoiser = load(folders, "llada")
    session = DecodingSession.blank(denoiser, [some_tokens(500)] * 4, 12, 4, cache="dual")
    needed = 2 * 2 * 4 * 8 * 4 * (512 + 1) * 4  # keys and values, layers, heads, head size, rows, columns, bytes
    assert denoiser.cache_bytes(4, 513) == needed
    monkeypatch.setattr(cache_module, "free_memory", lambda device: needed - 1)
    message = error_of(ValueError, session.observe)
    assert "keys and values of 4 rows of 512 positions need 0.0 GB" in message and "cache='none'" in message
    monkeypatch.setattr(cache_module, "free_memory", lambda device: needed)
    session.observe()


# Environments


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"question": "What is" + " a" * n + f" {n} + 2?", "answer": f"#### {n + 2}"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    "kind, cache",
    [("llada", "prefix"), ("llada", "dual"), ("dream", "dual"), ("prompt-causal", "auto"), ("sdar", "auto")],
)
def test_row_i_is_the_single_environment_seeded_s_plus_i(folders, data, kind, cache):
    settings = {
        "denoiser": load(folders, kind),
        "dataset": data,
        "gen_length": 8,
        "block_length": 4,
        "temperature": 1.0,
        "cache": cache,
    }
    vector = gym.make_vec("MaskedDiffusion-GSM8K-v0", num_envs=3, **settings)
    singles = [gym.make("MaskedDiffusion-GSM8K-v0", disable_env_checker=True, **settings) for _ in range(3)]
    observations, _ = vector.reset(seed=7)
    shown = [single.reset(seed=7 + i)[0] for i, single in enumerate(singles)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        for i, one in enumerate(shown):
            for name, value in one.items():
                np.testing.assert_allclose(observations[name][i], value, rtol=0, atol=1e-5)
        actions = (rng.random((3, 8)) < 0.3).astype(np.int8)
        observations, rewards, terminated, _, infos = vector.step(actions)
        for i, single in enumerate(singles):
            shown[i], reward, done, _, info = single.step(actions[i])
            assert (reward, done) == (rewards[i], terminated[i])
            if done:
                assert info["positions"] == infos["final_info"]["positions"][i]
                shown[i], _ = single.reset()


@pytest.mark.parametrize(
    "kind, cache, allowed",
    [
        ("llada", "prompt", "'auto', 'none', 'prefix', 'dual'"),
        ("sdar", "dual", "'auto', 'prefix', 'none'"),
        ("prompt-causal", "fast", "'auto', 'prompt', 'none', 'prefix', 'dual'"),
    ],
)
def test_a_cache_that_a_denoiser_does_not_have(folders, data, kind, cache, allowed):
    make = {"denoiser": load(folders, kind), "dataset": data, "gen_length": 8, "cache": cache}
    message = error_of(ValueError, gym.make, "MaskedDiffusion-GSM8K-v0", **make)
    assert f"cache={cache!r}" in message and f"can be decoded with {allowed}." in message


def test_a_denoiser_of_a_users_own_knows_nothing_of_caches():
    scripted = ScriptedDenoiser(torch.full((8, 4), 0.25))
    canvas = dllm_gym.decoding.blank([torch.zeros(2, dtype=torch.int64)], 8, scripted.mask_token_id)
    session = DecodingSession(scripted, canvas, 8, cache="auto")
    session.observe()
    assert int(session.positions) == 10
    assert "can be decoded with 'auto', 'none'" in error_of(
        ValueError, lambda: DecodingSession(scripted, canvas, 8, cache="dual")
    )


def test_metropolis_hastings_with_an_exact_cache(folders, data):
    from dllm_gym.agents.samplers.metropolis import Metropolis

    for kind in ("prompt-causal", "sdar"):
        chains = []
        for cache in ("none", "auto"):
            make = {"denoiser": load(folders, kind), "dataset": data, "gen_length": 8, "block_length": 4}
            env = gym.make("MaskedDiffusion-GSM8K-v0", **make, temperature=1.0, cache=cache)
            sampler = Metropolis(steps=2, likelihood="elbo", maskings=2, proposal="confidence")
            chains.append(sampler.run(env.unwrapped.episodes, [0, 1, 2]))
        assert torch.equal(chains[0].canvas.tokens, chains[1].canvas.tokens)
        torch.testing.assert_close(chains[0].log_likelihood, chains[1].log_likelihood, rtol=0, atol=1e-3)
        assert (chains[1].positions < chains[0].positions).all() and torch.equal(chains[0].nfe, chains[1].nfe)
