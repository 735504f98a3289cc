"""Hostile videos: fuzzed, truncated, enormous, slow; workers that are killed."""

import asyncio
import os
import random
import signal
import struct
import zlib
from contextlib import asynccontextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from media import number_of, write_video

from vidlada.serve.decoder import Decoders
from vidlada.serve.errors import RequestError
from vidlada.serve.limits import Limits
from vidlada.video import Sampling, sample_frames

pytestmark = pytest.mark.slow

SIZE = 64


@asynccontextmanager
async def running(**limits):
    decoders = Decoders(Limits(**{"decode_workers": 1, "decode_seconds": 60.0, **limits}), SIZE)
    try:
        yield decoders
    finally:
        await decoders.close()


def decode(*paths, **limits):
    """What comes of each file, one after another in the same worker: frames or the refusal."""

    async def run():
        outcomes = []
        async with running(**limits) as decoders:
            for path in paths:
                try:
                    outcomes.append(await decoders.decode(path, Sampling(max_frames=4)))
                except RequestError as error:
                    outcomes.append(error)
        return outcomes

    return asyncio.run(run())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=100)


def png_bomb(path, width, height):
    """A picture of many pixels in few bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_frames_come_through_as_they_are(clip):
    (frames,) = decode(clip)
    expected = sample_frames(clip, Sampling(max_frames=4), size=SIZE)
    assert np.array_equal(frames.images, expected.images)
    assert (frames.times, frames.indices) == (expected.times, expected.indices)
    assert [number_of(image) for image in frames.images] == list(frames.indices)
    assert frames.info.path == ""


def test_hostile_files_are_refused_and_the_next_is_served(clip, tmp_path):
    content, generator = clip.read_bytes(), random.Random(0)
    files = []
    for number in range(12):
        path = tmp_path / f"fuzzed-{number}"
        damaged = bytearray(content)
        for _ in range(200):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        files.append(path)
    files.append(tmp_path / "truncated")
    files[-1].write_bytes(content[: len(content) // 2])
    files.append(tmp_path / "noise")
    files[-1].write_bytes(generator.randbytes(10_000))
    files.append(tmp_path / "playlist.m3u8")
    files[-1].write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "other.mp4").write_bytes(content)
    files.append(tmp_path / "list")
    files[-1].write_text("ffconcat version 1.0\nfile other.mp4\n")
    files.append(tmp_path / "other.m3u8")
    files[-1].write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nother.mp4\n#EXT-X-ENDLIST\n")
    files.append(tmp_path / "empty")
    files[-1].touch()
    files.append(png_bomb(tmp_path / "bomb.png", 60_000, 60_000))
    files.append(clip)
    *outcomes, last = decode(*files)
    for path, outcome in zip(files, outcomes, strict=False):
        if isinstance(outcome, RequestError):
            assert outcome.status == 422
            assert str(tmp_path) not in str(outcome)
        else:
            assert "fuzzed" in path.name
            assert outcome.images.shape[1:] == (SIZE, SIZE, 3)
    assert all(isinstance(outcome, RequestError) for outcome in outcomes[12:])
    assert last.images.shape == (4, SIZE, SIZE, 3)


def test_limits(clip):
    too_long, fine = decode(clip, max_duration=2.0) + decode(clip, max_duration=5.0)
    assert (too_long.status, "lasts 4 s" in str(too_long)) == (422, True)
    assert fine.images.shape[0] == 4
    (too_large,) = decode(clip, max_pixels=1000)
    assert (too_large.status, "160 × 96" in str(too_large)) == (422, True)


def test_memory_is_bounded(tmp_path):
    path = tmp_path / "huge.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 8000, 8000, "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((8000, 8000), np.uint8), format="gray")))
        container.mux(stream.encode())
    (outcome,) = decode(path, decode_memory_mb=700, max_pixels=10**9)
    assert isinstance(outcome, RequestError)
    assert outcome.status == 422


def test_a_worker_that_takes_too_long_is_replaced(clip):
    async def run():
        async with running() as decoders:
            await decoders.decode(clip, Sampling(max_frames=1))
            (worker,) = decoders.processes
            os.kill(worker.pid, signal.SIGSTOP)
            decoders.limits = Limits(decode_workers=1, decode_seconds=1.0)
            with pytest.raises(RequestError) as caught:
                await decoders.decode(clip, Sampling(max_frames=1))
            assert caught.value.status == 504
            assert worker.returncode == -signal.SIGKILL
            decoders.limits = Limits(decode_workers=1, decode_seconds=60.0)
            return await decoders.decode(clip, Sampling(max_frames=1))

    assert asyncio.run(run()).images.shape[0] == 1


def test_a_killed_worker_costs_its_request_and_no_other(clip):
    async def run():
        async with running() as decoders:
            await decoders.decode(clip, Sampling(max_frames=1))
            (worker,) = decoders.processes
            os.kill(worker.pid, signal.SIGSTOP)
            task = asyncio.ensure_future(decoders.decode(clip, Sampling(max_frames=1)))
            await asyncio.sleep(0.1)
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(RequestError, match="crashed"):
                await task
            assert decoders.deaths == 1
            # killed while idle: nobody notices
            await decoders.decode(clip, Sampling(max_frames=1))
            (worker,) = decoders.processes
            os.kill(worker.pid, signal.SIGKILL)
            await worker.wait()
            await decoders.decode(clip, Sampling(max_frames=1))
            assert decoders.deaths == 1

    asyncio.run(run())


def test_secrets_stay_with_the_server(clip, monkeypatch):
    monkeypatch.setenv("VIDLADA_API_KEYS", "secret")

    async def run():
        async with running() as decoders:
            await decoders.decode(clip, Sampling(max_frames=1))
            (worker,) = decoders.processes
            return Path(f"/proc/{worker.pid}/environ").read_bytes()

    assert b"secret" not in asyncio.run(run())


def test_images_are_tiled_in_the_worker(tmp_path):
    from PIL import Image

    from vidlada.tiling import Tiling

    tiling = Tiling("anyres_max_4", 48, 4)
    Image.new("RGB", (130, 60), (9, 200, 30)).save(tmp_path / "green.png")

    async def tile(alone):
        decoders = Decoders(Limits(), 48)
        try:
            return await decoders.tile(tmp_path / "green.png", tiling, alone, "white")
        finally:
            await decoders.close()

    frames, shape = asyncio.run(tile(True))
    assert shape == tiling.shape_of(60, 130) and shape.tiles > 1
    assert frames.images.shape == (shape.tiles, 48, 48, 3)
    assert (frames.images[0] == (9, 200, 30)).all()
    frames, shape = asyncio.run(tile(False))
    assert len(frames.images) == shape.tiles == 1
