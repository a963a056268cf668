"""What must hold of a rendered episode: the order is readable, the layout constant, and tokens cannot break it."""

import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dllm_gym.rendering import Frame, ansi, film, rgb_array, save_gif

PROMPT = "tom has 12 apples . tom buys 5 more and gives 3 to mia . how many apples are left ?"
TOKENS = ["first", "12", "+", "5", "=", "17", ",", "then", "17", "-", "3", "=", "14", ".", "####", "14"]
TOKENS += ["<eos>"] * 8
STEP_OF = np.array([1, 1, 1, 1, 2, 3, 2, 3, 3, 4, 3, 4, 5, 5, 4, 5] + [12] * 8)
HOSTILE = [
    "",
    " ",
    "\n\n\r\t",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202eabc\u2028\u2029",
    "你好" * 50,
    "e\u0301\u0323",
    "👩\u200d👩",
    "\ud800",
    "word" * 500,
]
WORDS = re.compile(r"(\S+?)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)(?=\s|$)")


def at(step: int, **changes) -> Frame:
    """The frame after ``step`` steps of one episode."""
    step_of = np.where(step >= STEP_OF, STEP_OF, 0)
    tokens = [token if s else "" for token, s in zip(TOKENS, step_of, strict=False)]
    return replace(Frame(PROMPT, tokens, step_of, np.full(24, 0.4), step, "gsm8k/embedded/test/17", "fine"), **changes)


def later(frame: Frame) -> Frame:
    """The same canvas at a step that wrote nothing of it."""
    return replace(frame, step=frame.step + 1)


def canvas_of(frame: Frame) -> np.ndarray:
    """The picture below the prompt and above the legend."""
    return rgb_array(frame, horizon=12)[146:-58].astype(int)


def hostile() -> Frame:
    text = " ".join(HOSTILE)
    return Frame(text, HOSTILE, np.arange(1, 13), np.full(12, np.nan), 12, text, text)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def columns(line: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line if not unicodedata.combining(c))


@pytest.mark.parametrize("step", [0, 1, 3, 12])
def test_the_terminal_shows_the_order(step):
    frame = at(step)
    canvas = plain(ansi(frame)).split("\n\n")[2]
    shown = [(word, int(unicodedata.normalize("NFKC", digits))) for word, digits in WORDS.findall(canvas)]
    assert shown == [(token, s) for token, s in zip(frame.tokens, frame.step_of, strict=False) if s]
    assert canvas.split().count("░░") == (frame.step_of == 0).sum()
    assert f"step {step} · {(frame.step_of == 0).sum()} of 24 masked" in plain(ansi(frame))


def test_the_terminal_highlights_this_step_and_dims_the_end():
    new = re.findall(r"\x1b\[7;38;5;\d+m(\S+?)\x1b", ansi(at(np.int64(5))))
    assert new == ["14⁵", ".⁵", "14⁵"]
    assert re.findall(r"\x1b\[2;7;38;5;\d+m(\S+?)\x1b", ansi(at(12))) == ["<eos>¹²"] * 8
    assert re.findall(r"\x1b\[2;38;5;\d+m(\S+?)\x1b", ansi(later(at(12)))) == ["<eos>¹²"] * 8


def test_the_terminal_colours_steps_from_early_to_late():
    colours = dict(re.findall(r"38;5;(\d+)m\S+?([¹²³⁴⁵])\x1b", ansi(at(5))))
    assert len(colours) >= 4  # steps of one episode stay apart


@pytest.mark.parametrize("frame", [at(0), at(4), at(12), hostile()], ids=["start", "middle", "end", "hostile"])
def test_the_terminal_text_is_safe(frame):
    text = ansi(frame)
    codes = re.findall(r"\x1b\[([\d;]*)m", text)
    assert len(codes) % 2 == 0 and set(codes[1::2]) == {"0"} and "0" not in codes[::2]
    for line in text.split("\n"):
        assert columns(plain(line)) <= 80
        assert all(unicodedata.category(c)[0] != "C" for c in plain(line))
    text.encode()


def test_hostile_tokens_each_keep_their_place():
    frame = replace(hostile(), prompt="p", title="t", note="")
    assert len(re.findall(r"[¹²³⁴⁵⁶⁷⁸⁹⁰]+(?=\x1b)", ansi(frame))) == len(HOSTILE)


def test_prompt_lines_are_kept_in_the_terminal():
    assert "1 2\n3 4" in ansi(at(1, prompt="1 2\n3 4"))


@pytest.mark.parametrize("length", [1, 12, 24, 64, 81, 256, 300])
def test_pictures_of_a_length_have_one_even_size(length):
    few = Frame("", [""] * length, np.zeros(length, int), np.zeros(length), 0)
    steps = np.arange(length) % 40 + 1
    many = Frame(
        "long prompt " * 200, [HOSTILE[i % 12] for i in range(length)], steps, np.ones(length), 40, "t" * 500, "n" * 500
    )
    first, second = rgb_array(few), rgb_array(many)
    assert first.shape == second.shape and first.dtype == second.dtype == np.uint8
    assert first.shape[0] % 2 == first.shape[1] % 2 == 0 and first.shape[2] == 3
    assert (first != second).any()


def test_pictures_are_deterministic():
    assert (rgb_array(hostile()) == rgb_array(hostile())).all()


def test_cells_written_now_stand_out():
    def outline(frame):
        red, green, blue = np.moveaxis(canvas_of(frame), -1, 0)
        return ((red > 220) & (green < 90) & (blue < 60)).sum()

    assert outline(at(3)) > 0 and outline(at(4)) > 0 and outline(later(at(4))) == 0
    assert (canvas_of(at(4)) != canvas_of(later(at(4)))).any()


def test_only_the_cells_that_were_written_change():
    changed = (canvas_of(later(at(4))) != canvas_of(later(at(5)))).any(axis=2)
    rows, columns = np.nonzero(changed)
    cells = set(zip((rows // 50).tolist(), ((columns - 27) // 76).tolist(), strict=False))
    assert cells == {divmod(i, 12) for i in np.flatnonzero(STEP_OF == 5).tolist()}


def test_a_masked_cell_shows_its_confidence():
    none, half, full = ((canvas_of(at(0, confidence=np.full(24, c))) < 220).all(axis=2).sum() for c in (0, 0.5, 1))
    assert none == 0 and full == pytest.approx(2 * half)


def test_film_has_a_row_for_each_moment():
    short, long = film([at(0), at(3)]), film([at(0), at(3), at(5), at(12)])
    assert long.dtype == np.uint8 and long.shape[1] == short.shape[1]
    assert long.shape[0] - short.shape[0] == 2 * 50
    assert all(side % 2 == 0 for side in (*short.shape[:2], *long.shape[:2]))
    film([at(0)])


def test_gif(tmp_path):
    frames = [at(step) for step in (0, 1, 2, 3, 4, 5, 12)]
    save_gif(frames, tmp_path / "episode.gif", milliseconds=100)
    with Image.open(tmp_path / "episode.gif") as image:
        assert image.n_frames == len(frames)
        assert image.size == rgb_array(frames[0]).shape[1::-1]
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
    assert durations == [100] * 6 + [2000]
