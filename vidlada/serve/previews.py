"""Pictures of what the model sees, for the page."""

import base64
import io

from PIL import Image

from vidlada.serve.objects import FrameStrip, Picture
from vidlada.video import Frames


def strip(frames: Frames) -> FrameStrip:
    """Frames as JPEG data URIs with their times."""
    pictures: list[Picture] = []
    for image, seconds in zip(frames.images, frames.times, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=80)
        content = base64.b64encode(buffer.getvalue()).decode()
        pictures.append({"time": round(seconds, 3), "image": f"data:image/jpeg;base64,{content}"})
    info = frames.info
    return {"duration": info.duration, "width": info.width, "height": info.height, "frames": pictures}
