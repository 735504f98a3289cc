"""Packets lost from transport streams: their counters tell, also where decoders notice nothing."""

import av
import numpy as np
import pytest
from video.test_damage import EVERY, H264, HEVC, MPEG2, TOLERANCE, pictures, write_moving

from vidlada.errors import InputError
from vidlada.transport import transport_losses
from vidlada.video import Sampling, sample_frames

PACKET = 188
KINDS = {"h264": H264, "hevc": HEVC, "mpeg2": MPEG2}


def rows_of(data, stream=256):
    """Places of the packets of one stream that carry something."""
    found = []
    for place in range(0, len(data), PACKET):
        if (data[place + 1] & 0x1F) << 8 | data[place + 2] == stream and data[place + 3] & 0x10:
            found.append(place)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_wrong_picture_behind_lost_packets(tmp_path, kind):
    path = write_moving(tmp_path / "c.ts", *KINDS[kind])
    sound, data = pictures(path), path.read_bytes()
    assert transport_losses(path, 256) == []
    rng, broken, read = np.random.default_rng(7), tmp_path / "b.ts", 0
    for place in rng.choice(rows_of(data)[5:-5], 30):
        broken.write_bytes(data[:place] + data[place + PACKET * int(rng.choice([1, 1, 3])) :])
        assert len(transport_losses(broken, 256)) == 1
        try:
            found = pictures(broken)
        except InputError as error:
            assert "damaged" in str(error)
            continue
        read += 1
        assert max(np.abs(sound - image).mean((1, 2, 3)).min() for image in found) < TOLERANCE
    assert read


@pytest.mark.parametrize("step", [188, 192, 204])
def test_losses_are_found_where_they_are(tmp_path, step):
    data = write_moving(tmp_path / "c.ts", *MPEG2).read_bytes()
    rows = rows_of(data)
    removed, marked, twice = rows[40], rows[90], rows[140]
    data = bytearray(data)
    data[marked + 1] |= 0x80
    packets = [bytes(data[at : at + PACKET]) for at in range(0, len(data), PACKET)]
    packets.insert(twice // PACKET, packets[twice // PACKET])  # FFmpeg reads both
    del packets[removed // PACKET]
    front, behind = {188: (b"", b""), 192: (bytes(4), b""), 204: (b"", bytes(16))}[step]
    (tmp_path / "d.ts").write_bytes(b"".join(front + packet + behind for packet in packets))
    found = transport_losses(tmp_path / "d.ts", 256)
    expected = [rows[41] // PACKET - 1, marked // PACKET - 1, twice // PACKET]
    assert [loss.place // step for loss in found] == expected
    assert not found[1].tail_is_there


def test_bytes_missing_inside_a_packet(tmp_path):
    path = write_moving(tmp_path / "c.ts", *MPEG2)
    data = path.read_bytes()
    path.write_bytes(b"noise" + data[: 50 * PACKET + 30] + data[70 * PACKET + 99 :])
    assert len(transport_losses(path, 256)) == 1
    (tmp_path / "x").write_bytes(bytes(5000))
    assert transport_losses(tmp_path / "x", 256) is None


def test_joined_recordings_lose_no_frame(tmp_path):
    """Each counts from 0, and the last packet of the first is full of stuffing: nothing is lost."""
    parts = []
    for number, (first, count) in enumerate([(0, 40), (500, 60)]):
        path = tmp_path / f"{number}.ts"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            for own in range(count):
                picture = np.full((96, 160, 3), (first + own) % 200, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = own
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append(path.read_bytes())
    joined = tmp_path / "j.ts"
    joined.write_bytes(b"".join(parts))
    assert sample_frames(joined, EVERY).info.frames == 100
    assert len(sample_frames(joined, Sampling(fps=5)).images) == 20
