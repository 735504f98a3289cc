"""The process that opens videos nobody vouches for: `python -m vidlada.serve.worker`.

It may be killed, run out of memory or crash; the server starts another. It reads one JSON line a video from its
standard input and answers with one JSON line and the raw pixels, so that nothing it says can run code in the server.
"""

import json
import resource
import sys
from dataclasses import asdict
from typing import Any

from vidlada.errors import InputError
from vidlada.images import open_images
from vidlada.tiling import Tiling
from vidlada.video import Sampling, VideoInfo, probe, sample_frames


def confine(memory_bytes: int) -> None:
    """No more memory than this, no files written, no core dumps."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check(info: VideoInfo, frames: int, max_duration: float, max_pixels: int, max_frames: int) -> None:
    """Refuse what is too long or too large before a frame of it is decoded."""
    if frames > max_frames:
        raise InputError(f"{frames} frames are more than the {max_frames} that fit in the model's context")
    if info.width * info.height > max_pixels:
        raise InputError(f"it is {info.width} × {info.height} pixels, more than the {max_pixels} allowed")
    if info.duration > max_duration:
        raise InputError(f"it lasts {info.duration:.0f} s, more than the {max_duration:.0f} s allowed")


def answer(order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Header and pixels for one order."""
    path = order["path"]
    try:
        limits = {name: order[name] for name in ("max_duration", "max_pixels", "max_frames")}
        if order.get("probe"):
            return {"frames": probe(path).frames}, b""
        if order.get("tiling") is not None:
            check(probe(path), 1, **limits)
            return tiles(path, order)
        sampling = Sampling(**order["sampling"])
        frames = sample_frames(path, sampling, order["size"], lambda info, count: check(info, count, **limits))
    except InputError as error:
        # paths of the server are nobody's business
        return {"error": str(error).removeprefix(f"{path}: ").replace(path, "the file")}, b""
    except MemoryError:
        return {"error": "decoding it takes more memory than is allowed"}, b""
    except Exception as error:  # a file that no check foresaw costs its own request, not the worker
        return {"error": f"it cannot be decoded ({type(error).__name__})"}, b""
    header = {
        "shape": frames.images.shape,
        "times": frames.times,
        "indices": frames.indices,
        "info": {**asdict(frames.info), "path": ""},
    }
    return header, frames.images.tobytes()


def tiles(path: str, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Header and pixels of an image's tiles."""
    image = open_images(path, order["sampling"]["background"])[0]
    pictures, shape = Tiling(**order["tiling"]).cut(image, order["alone"])
    info = VideoInfo("", 1, 1.0, 0.0, shape.width, shape.height, "image")
    header = {"shape": pictures.shape, "times": [0.0], "indices": [0], "info": asdict(info), "image": asdict(shape)}
    return header, pictures.tobytes()


def main() -> None:
    """Serve orders until standard input ends."""
    confine(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        header, pixels = answer(json.loads(line))
        sys.stdout.buffer.write(json.dumps(header).encode() + b"\n")
        sys.stdout.buffer.write(pixels)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
