"""Draw an answer as it denoises, below the video's frames, as an animated GIF: the picture of the README.

python scripts/draw_answer.py examples/order.mp4 "describe the video ." docs/answer.gif --threshold 0.98
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import vidlada
from vidlada.conversation import Draft
from vidlada.video import Sampling, sample_frames

WIDTH, MARGIN, FRAME, LINE, SIZE = 960, 24, 104, 30, 19
PAPER, INK, DRAFT, OPEN, QUIET = "#ffffff", "#111827", "#b45309", "#cbd5e1", "#6b7280"
STEP_MS, LAST_MS = 220, 4000
MOST_SHOWN = 8  # frames of the video


def frame_strip(images: np.ndarray, times: tuple[float, ...]) -> Image.Image:
    """Some frames of the video beside each other, with their times."""
    chosen = np.linspace(0, len(images) - 1, min(MOST_SHOWN, len(images))).astype(int)
    strip = Image.new("RGB", (WIDTH, FRAME + LINE), PAPER)
    draw = ImageDraw.Draw(strip)
    for place, number in enumerate(chosen):
        left = MARGIN + place * (FRAME + 10)
        strip.paste(Image.fromarray(images[number]).resize((FRAME, FRAME)), (left, 0))
        draw.text((left + 2, FRAME + 4), f"{times[number]:g} s", QUIET, ImageFont.load_default(14))
    return strip


def words_of(draft: Draft) -> list[tuple[str, str]]:
    """Text and colour of every slot that is decided, proposed or still open."""
    words = []
    for piece, final in draft.pieces:
        words.append(("·", OPEN) if piece is None else (piece.strip(), INK if final else DRAFT))
    return words


def picture(strip: Image.Image, question: str, draft: Draft, height: int) -> Image.Image:
    """One frame of the animation."""
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    canvas.paste(strip, (0, MARGIN))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(SIZE)
    top = MARGIN + strip.height + 10
    draw.text((MARGIN, top), question, QUIET, font)
    left, top = MARGIN, top + LINE + 8
    for word, colour in words_of(draft):
        width = draw.textlength(word + " ", font)
        if left + width > WIDTH - MARGIN:
            left, top = MARGIN, top + LINE
        draw.text((left, top), word, colour, font)
        left += width
    draw.text((MARGIN, height - LINE), f"step {draft.state.step}", QUIET, ImageFont.load_default(14))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("question")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--height", type=int, default=420)
    options = parser.parse_args()
    model = vidlada.load(options.model)
    shown = sample_frames(options.video, Sampling())
    strip = frame_strip(shown.images, shown.times)
    drafts = list(model.stream(options.video, options.question, threshold=options.threshold))
    pictures = [picture(strip, options.question, draft, options.height) for draft in drafts]
    durations = [STEP_MS] * (len(pictures) - 1) + [LAST_MS]
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


if __name__ == "__main__":
    main()
