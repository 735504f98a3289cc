"""Video files made on the spot: every frame carries its number, so that a test can tell which one it got."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10  # of the frame number, painted as bright and dark columns


def picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """(height, width, 3): columns say the number in binary; the top third is red, so that up is known."""
    image = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        image[:, edges[bit] : edges[bit + 1]] = 230 if number >> bit & 1 else 20
    image[: height // 3] = (200, 20, 20)
    return image


def number_of(image: np.ndarray) -> int:
    """The number a picture shows."""
    row = image[2 * image.shape[0] // 3].mean(-1)
    edges = np.linspace(0, image.shape[1], BITS + 1).astype(int)
    return sum(int(row[edges[bit] : edges[bit + 1]].mean() > 125) << bit for bit in range(BITS))


def write_video(
    path: Path,
    frames: int = 100,
    fps: int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (160, 96),
    keyframe_every: int = 25,
    times: list[int] | None = None,
    audio: bool = False,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode numbered pictures.

    Args:
        times: time stamps in milliseconds, for a variable frame rate.
        rotation: display rotation in degrees, stored as metadata.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = keyframe_every
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path
