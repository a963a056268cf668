"""What an episode looks like: one row of the canvas at one moment, as terminal text or as a picture.

Colours run from step 1 to step ``horizon`` (L if None, so that a token keeps its colour while the episode goes on).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# Neither dark nor bright: legible on black and on white terminals.
TERMINAL = (63, 69, 33, 38, 36, 35, 70, 106, 142, 178, 172, 166)
COLOURS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
VIRIDIS = np.array([list(bytes.fromhex(colour)) for colour in COLOURS.split()])
WHITE, INK, GREY = (255, 255, 255), (28, 30, 38), (92, 96, 106)
EMPTY, BAR, NOW = (236, 237, 240), (206, 209, 216), (240, 72, 20)
PLAIN = str.maketrans("×÷−–—", "x/---")  # Pillow's own font has little beyond ASCII
WIDTH, MARGIN, GAP, CELL = 960, 27, 6, 50


@dataclass(frozen=True, eq=False)
class Frame:
    """All that is drawn of one row at one moment; L canvas positions."""

    prompt: str
    tokens: list[str]
    """``[L]``: the text of each unmasked token, "" where masked."""
    step_of: np.ndarray
    """``[L]`` int: the step, from 1, at which the position was unmasked; 0 where masked."""
    confidence: np.ndarray
    """``[L]`` float in [0, 1]: of the token when it was written; where masked, of the best token now."""
    step: int
    """Forwards so far."""
    title: str = ""
    note: str = ""


def ansi(frame: Frame, horizon: int | None = None) -> str:
    """Text for a 256-colour terminal, at most 80 columns wide; the superscript of a token is its step."""
    canvas = []
    for text, step, confidence in zip(frame.tokens, frame.step_of.tolist(), _confidence(frame), strict=True):
        if step:
            colour = TERMINAL[round(_late(step, horizon or len(frame.tokens)) * (len(TERMINAL) - 1))]
            style = ("2;" if _is_end(text) else "") + ("7;" if step == frame.step else "")
            text = _cut(_token(text), 70, _columns) + str(step).translate(SUPERSCRIPT)
        else:
            colour, style, text = 240 + round(10 * confidence), "", "░░"
        canvas.append(f"\x1b[{style}38;5;{colour}m{text}\x1b[0m")
    head, note = f"{_clean(frame.title)} · {_status(frame)}".split(), _clean(frame.note).split()
    prompt = [line for part in frame.prompt.splitlines() for line in _wrap(_clean(part).split(), 80, _columns)]
    head, canvas, note = (_wrap(words, 80, _columns) for words in (head, canvas, note))
    parts = [f"\x1b[1m{line}\x1b[0m" for line in head], prompt, canvas, note
    return "\n\n".join("\n".join(part) for part in parts if part)


def rgb_array(frame: Frame, horizon: int | None = None) -> np.ndarray:
    """``[H, W, 3]`` uint8 picture of the prompt and the canvas; H and W are even and depend on L only."""
    return _picture([frame], 16, horizon or len(frame.tokens))


def film(frames: list[Frame]) -> np.ndarray:
    """``[H, W, 3]`` uint8 picture of a canvas being unmasked: the frames from top to bottom, without the prompt."""
    return _picture(frames, 32, max(frames[-1].step, 1), strip=True)


def save_gif(frames: list[Frame], path, milliseconds: int = 400) -> None:
    """Write an animated GIF that loops and holds its last frame for two seconds or more."""
    from PIL import Image

    pictures = [rgb_array(frame, frames[-1].step) for frame in frames]
    # One palette for all, or the colours would flicker; the two ends hold every kind of cell.
    ends = Image.fromarray(np.concatenate([pictures[0], pictures[-1]]))
    palette = ends.quantize(256, Image.Quantize.MAXCOVERAGE)
    images = [Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [milliseconds] * (len(images) - 1) + [max(2000, 5 * milliseconds)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _late(step: int, horizon: int) -> float:
    """Place of a step on the gradient, in [0, 1]; the root keeps the steps of a fast episode apart."""
    return min(max(step - 1, 0) / max(horizon - 1, 1), 1) ** 0.5


def _confidence(frame: Frame) -> np.ndarray:
    return np.clip(np.nan_to_num(np.asarray(frame.confidence, dtype=float)), 0, 1)


def _status(frame: Frame) -> str:
    return f"step {frame.step} · {np.count_nonzero(np.equal(frame.step_of, 0))} of {len(frame.tokens)} masked"


def _clean(text: str) -> str:
    """On one line and without control, format or surrogate characters: text must not steer the terminal."""
    kept = (c if c.isspace() or unicodedata.category(c)[0] != "C" else "·" for c in text)
    return " ".join("".join(kept).split())


def _token(text: str) -> str:
    return _clean(text.replace("\n", "\\n")) or "·"


def _is_end(text: str) -> bool:
    return re.fullmatch(r"</?\|?\w+\|?>", text.strip()) is not None


def _columns(text: str) -> int:
    """Terminal columns of a text, our own colour codes left out."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    return sum(not unicodedata.combining(c) and 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _cut(text: str, width: int, measure) -> str:
    if measure(text) <= width:
        return text
    return text[: bisect_right(range(1, len(text)), width, key=lambda n: measure(text[:n] + "…"))] + "…"


def _wrap(words: list[str], width: int, measure) -> list[str]:
    """Lines of words, none wider than ``width``; a word that is too wide for a line is broken."""
    lines: list[str] = []
    for word in words:
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while measure(word) > width:
            n = bisect_right(range(1, len(word)), width, key=lambda n: measure(word[:n]))
            lines.append(word[:n])
            word = word[n:]
        lines.append(word)
    return lines


@cache
def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size=2 * size)


def _measure(size: int):
    return lambda text: _font(size).getlength(text) / 2


@lru_cache(4096)
def _fit(text: str, width: int, sizes: tuple[int, ...]) -> tuple[str, int]:
    """The text at the first size that fits, cut if it fits at none."""
    text = text.translate(PLAIN)
    size = next((size for size in sizes if _measure(size)(text) <= width), sizes[-1])
    return _cut(text, width, _measure(size)), size


class _Pen:
    """Draws at twice the size, to be halved: Pillow fits letters to whole pixels, which spaces small text badly."""

    def __init__(self, width: int, height: int):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x: int, y: int, width: int, height: int, colour) -> None:
        if height:
            self.draw.rectangle((2 * x, 2 * y, 2 * (x + width) - 1, 2 * (y + height) - 1), _rgb(colour))

    def text(self, x: float, y: float, text: str, size: int, colour=INK, anchor: str = "l") -> None:
        """``y`` is the base line."""
        self.draw.text((2 * x, 2 * y), text, _rgb(colour), _font(size), anchor=anchor + "s")


def _rgb(colour) -> tuple[int, ...]:
    return tuple(round(float(c)) for c in colour)


def _viridis(late: float) -> np.ndarray:
    """``[3]`` float in [0, 255]."""
    return np.array([np.interp(late, np.linspace(0, 1, len(VIRIDIS)), channel) for channel in VIRIDIS.T])


def _picture(frames: list[Frame], most: int, horizon: int, strip: bool = False) -> np.ndarray:
    """Heading, prompt if no strip, a grid of at most ``most`` columns for each frame, legend."""
    last, length = frames[-1], len(frames[-1].tokens)
    rows = -(-length // most)
    columns = -(-length // rows)  # rows as even as can be
    left, top = (MARGIN + 70, 62) if strip else (MARGIN, 146)
    pitch = max(CELL, min((WIDTH - left - MARGIN + GAP) // columns, 96))
    width = max(WIDTH, left + columns * pitch - GAP + MARGIN)
    width += width % 2  # video codecs want even sides
    tall = rows * CELL + GAP * (rows > 1)
    pen = _Pen(width, top + len(frames) * tall + 58)
    pen.text(MARGIN, 40, _fit(_clean(last.title), width - 300, (20,))[0], 20)
    if not strip:
        pen.text(width - MARGIN, 40, _status(last), 16, GREY, "r")
        for i, line in enumerate(_prompt(last.prompt, width - 2 * MARGIN)):
            pen.text(MARGIN, 74 + 23 * i, line, 16)
    for i, frame in enumerate(frames):
        y = top + i * tall
        if strip:
            pen.text(MARGIN, y + 28, f"step {frame.step}", 15, GREY)
        for j, (text, step, confidence) in enumerate(
            zip(frame.tokens, frame.step_of.tolist(), _confidence(frame), strict=True)
        ):
            place = left + j % columns * pitch, y + j // columns * CELL, pitch - GAP, CELL - GAP
            if step:
                _written(pen, *place, text, step, _late(step, horizon), step == frame.step)
            else:
                _masked(pen, *place, confidence)
    _legend(pen, width, top + len(frames) * tall + 12, horizon, _clean(last.note))
    return np.array(pen.image.reduce(2))


def _prompt(text: str, width: int, most: int = 3) -> list[str]:
    # No more than 1000 characters ever fit.
    lines = _wrap(_clean(text)[:1000].translate(PLAIN).split(), width, _measure(16))
    return lines if len(lines) <= most else [*lines[: most - 1], _cut(" ".join(lines[most - 1 :]), width, _measure(16))]


def _masked(pen: _Pen, x: int, y: int, width: int, height: int, confidence: float) -> None:
    pen.box(x, y, width, height, EMPTY)
    level = round(confidence * height)
    pen.box(x, y + height - level, width, level, BAR)


def _written(pen: _Pen, x: int, y: int, width: int, height: int, text: str, step: int, late: float, now: bool) -> None:
    if now:
        pen.box(x - 3, y - 3, width + 6, height + 6, NOW)
        pen.box(x - 1, y - 1, width + 2, height + 2, WHITE)
    fill = _viridis(late)
    ink = np.array(INK if fill @ (0.299, 0.587, 0.114) > 110 else WHITE)
    if _is_end(text):
        fill, ink = 0.3 * fill + 0.7 * 255, np.array(GREY)
    pen.box(x, y, width, height, fill)
    pen.text(x + width - 3, y + 12, str(step), 11, 0.8 * ink + 0.2 * fill, "r")
    text, size = _fit(_token(text), width - 4, (17, 16, 15, 14, 13, 12, 11))
    pen.text(x + width / 2, y + height - 10, text, size, ink, "m")


def _legend(pen: _Pen, width: int, y: int, horizon: int, note: str) -> None:
    x, bar = MARGIN + 42, 240
    for i in range(bar):
        pen.box(x + i, y, 1, 12, _viridis(i / (bar - 1)))
    for tick in [*(2**i for i in range(16) if 2**i * 1.3 < horizon), horizon]:
        pen.text(x + _late(tick, horizon) * bar, y + 25, str(tick), 11, GREY, "m")
    masked, now = x + bar + 66, x + bar + 238
    _masked(pen, masked, y - 2, 15, 16, 0.5)
    pen.box(now, y - 2, 15, 16, NOW)
    pen.box(now + 2, y, 11, 12, WHITE)
    texts = {MARGIN: "early", x + bar + 8: "late", masked + 22: "masked: confidence", now + 22: "this step"}
    for x, text in texts.items():
        pen.text(x, y + 11, text, 14, GREY)
    note, size = _fit(note, width - MARGIN - now - 110, (16, 15, 14, 13))
    pen.text(width - MARGIN, y + 11, note, size, anchor="r")
