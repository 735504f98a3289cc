"""Videos and images of requests as pictures for the vision tower: fetched, then sampled or tiled as Python does it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from vidlada.engine.feature_store import LRUCache
from vidlada.engine.requests import MediaInput
from vidlada.machine import MEBI
from vidlada.serve.decoder import Decoders
from vidlada.serve.limits import Limits
from vidlada.serve.media import MediaReference, MediaSource, Medium
from vidlada.tiling import MediaShape, Tiling
from vidlada.video import Sampling


@dataclass
class LoadedMedia:
    """What a request shows.

    Attributes:
        inputs: videos and images in order, sampled and tiled.
        images: which of them are images.
        seconds: spent on fetching and on decoding.
    """

    inputs: list[MediaInput] = field(default_factory=list)
    images: set[int] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=lambda: {"fetch": 0.0, "video": 0.0})


class MediaLoader:
    """Opens what requests refer to; each is decoded once, however many ask for it at the same time.

    Args:
        source: of the files.
        decoders: of the pictures.
        tiling: how the model takes images.
        limits: of what is kept.
    """

    def __init__(self, source: MediaSource, decoders: Decoders, tiling: Tiling, limits: Limits):
        self.source, self.decoders, self.tiling = source, decoders, tiling
        self.store: LRUCache[MediaInput] = LRUCache(limits.frame_store_mb * MEBI)
        self.decoding: dict[Hashable, asyncio.Task[MediaInput]] = {}

    async def load(
        self,
        references: Sequence[MediaReference],
        owner: str,
        background: str,
        sampling_for: Callable[[Sequence[MediaShape], int], Sampling],
    ) -> LoadedMedia:
        """Fetch and decode everything that a conversation shows.

        Args:
            references: in order.
            owner: whose uploads may be used.
            background: what transparent places of images are laid on.
            sampling_for: gives how to sample the videos, from the shapes of all images and the number of videos.

        Raises:
            RequestError: one cannot be had, or cannot be used.
        """
        loaded, found = LoadedMedia(), {}
        async with AsyncExitStack() as stack:
            media: list[Medium] = []
            started = time.perf_counter()
            for reference in references:
                media.append(await stack.enter_async_context(self.source.open(reference.url, owner)))
            fetched = time.perf_counter()
            for number, (reference, medium) in enumerate(zip(references, media, strict=True)):
                if reference.is_image or await self.decoders.is_image(medium.path):
                    loaded.images.add(number)
            alone = len(loaded.images) == 1  # only then it is tiled
            for number in sorted(loaded.images):
                found[number] = await self.image(media[number], alone, background)
            shapes = [medium.shape for medium in found.values()]
            videos = [number for number in range(len(media)) if number not in found]
            if videos:
                sampling = sampling_for(shapes, len(videos))
                for number in videos:
                    found[number] = await self.video(media[number], sampling)
        loaded.inputs = [found[number] for number in range(len(media))]
        loaded.seconds = {"fetch": fetched - started, "video": time.perf_counter() - fetched}
        return loaded

    async def preview(self, url: str, owner: str, sampling: Sampling) -> MediaInput:
        """The frames of a video, or an image as one frame."""
        async with self.source.open(url, owner) as medium:
            return await self.video(medium, sampling)

    async def video(self, medium: Medium, sampling: Sampling) -> MediaInput:
        """Sampled frames."""
        key = (medium.key, sampling)

        async def decode() -> MediaInput:
            return MediaInput(key, await self.decoders.decode(medium.path, sampling))

        return await self._once(key, decode)

    async def image(self, medium: Medium, alone: bool, background: str) -> MediaInput:
        """An image's tiles, or one frame where the model sees images as videos."""
        if self.tiling.as_frames:
            return await self.video(medium, Sampling(max_frames=1, background=background))
        key = (medium.key, "image", alone, background)

        async def decode() -> MediaInput:
            frames, shape = await self.decoders.tile(medium.path, self.tiling, alone, background)
            return MediaInput(key, frames, shape)

        return await self._once(key, decode)

    async def _once(self, key: Hashable, decode: Callable[[], Awaitable[MediaInput]]) -> MediaInput:
        """What is kept under a key, or being decoded by another request, or is decoded now."""
        while (other := self.decoding.get(key)) is not None:
            await asyncio.wait([other])
            if not other.cancelled():  # else its client has gone, and it is our turn
                return other.result()
        known = self.store.get(key)
        if known is not None:
            return known
        task = asyncio.ensure_future(decode())
        self.decoding[key] = task
        try:
            found = await task
        finally:
            del self.decoding[key]
        self.store.put(key, found, found.frames.images.nbytes)
        return found
