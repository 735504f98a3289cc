"""Damage in the middle of a file: refused, or no picture is shown that was not filmed; and sound files beside it."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from vidlada.errors import InputError
from vidlada.h264 import has_hole
from vidlada.truncation import gaps_of
from vidlada.video import Sampling, sample_frames
from vidlada.video_index import demux

H264 = ("libx264", {"bf": "2"})
OPEN = ("libx264", {"x264-params": "open-gop=1:keyint=50:min-keyint=50:bframes=3:scenecut=0"})
SLICES = ("libx264", {"x264-params": "slices=4:sliced-threads=1"})
FIELDS = ("libx264", {"flags": "+ilme+ildct", "x264-params": "tff=1"})
REFRESH = ("libx264", {"x264-params": "intra-refresh=1:keyint=50"})
HEVC = ("libx265", {"x265-params": "log-level=0:open-gop=1:keyint=50:bframes=3"})
MPEG2, MPEG4, QPEL = ("mpeg2video", {"bf": "2"}), ("mpeg4", {"bf": "2"}), ("mpeg4", {"bf": "2", "flags": "+qpel+mv4"})
# Removed and overwritten bytes are noticed
NOTICED = {
    "mp4": H264, "open.mp4": OPEN, "slices.mp4": SLICES, "fields.mp4": FIELDS, "avi": H264, "h264": H264, "nut": H264,
    "mpg": MPEG2, "m2v": MPEG2, "mpeg2.mkv": MPEG2, "mpeg4.avi": MPEG4, "m4v": MPEG4, "qpel.avi": QPEL,
    "mpeg2.ts": MPEG2, "mxf": MPEG2, "flv1.flv": ("flv", {}), "ts": H264, "open.ts": OPEN, "flv": H264,
    "mkv": H264, "hevc.mkv": HEVC,
    "vp8.webm": ("libvpx", {}), "webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1.mkv": ("libsvtav1", {"svtav1-params": "lp=1"}),
}  # fmt: skip
SOUND = NOTICED | {
    "fields.mpg": ("mpeg2video", {"flags": "+ilme+ildct"}), "msmpeg4.avi": ("msmpeg4", {}), "refresh.mp4": REFRESH,
    "hevc.mp4": HEVC, "hevc.ts": HEVC, "wmv": ("wmv2", {}), "mjpeg.avi": ("mjpeg", {}),
    "av1.mp4": ("libsvtav1", {"svtav1-params": "lp=1"}),
}  # fmt: skip
EVERY = Sampling(fps=1000, max_frames=200)
FRAMES, TOLERANCE = 100, 3.0
TEXTURE = np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def write_moving(path, codec, options):
    """Texture that moves all the time, so that a picture that leans on a wrong one is wrong."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 160, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 25
        for number in range(FRAMES):
            top, left = 2 * number, 3 * number
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(TEXTURE[top : top + 96, left : left + 160]), format="rgb24"
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pictures(path):
    return sample_frames(path, EVERY).images[:, ::2, ::2].astype(np.int16)


def damaged(data, kind, rng):
    size, place = len(data), int(0.45 * len(data))
    if kind == "overwritten":
        return data[:place] + rng.bytes(size // 50) + data[place + size // 50 :]
    if kind == "zeroed":
        return data[:place] + bytes(size // 20) + data[place + size // 20 :]
    return data[:place] + data[place + size // 50 :]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Each written once."""
    folder, written = tmp_path_factory.mktemp("clips"), {}

    def clip(name):
        if name not in written:
            path = write_moving(folder / f"c.{name}", *SOUND[name])
            written[name] = path, pictures(path)
        return written[name]

    return clip


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read_whole(clips, name):
    path, found = clips(name)
    assert len(found) == FRAMES
    # from a key picture in the middle, too
    late = sample_frames(path, Sampling(max_frames=3, force_sample=True)).images[:, ::2, ::2]
    assert np.abs(found[[0, 49, 99]] - late).mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overwritten", "zeroed", "removed"])
@pytest.mark.parametrize("name", NOTICED)
def test_no_wrong_picture_is_shown(clips, tmp_path, name, kind):
    path, sound = clips(name)
    rng = np.random.default_rng(len(name))
    for number in range(2):
        broken = tmp_path / f"{number}.{path.name}"
        broken.write_bytes(damaged(path.read_bytes(), kind, rng))
        try:
            found = pictures(broken)
        except InputError as error:
            assert "damaged" in str(error) or "truncated" in str(error) or "not a readable" in str(error)
            continue
        off = [np.abs(sound - image).mean((1, 2, 3)).min() for image in found]
        assert max(off) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("hole", [(0.6, 1.0), (0.3, 0.6), (0.5, 0.52)])
@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi", "flv", "hevc.mp4", "hevc.mkv", "hevc.ts", "webm"])
def test_zeros_of_unfinished_downloads(clips, tmp_path, name, hole):
    """Files that were given their size before they were filled."""
    path, sound = clips(name)
    data = bytearray(path.read_bytes())
    if hole[1] < 0.6 and name == "webm":
        pytest.skip("nothing in VP9 tells")
    start, stop = (int(share * len(data)) for share in hole)
    data[start:stop] = bytes(stop - start)
    broken = tmp_path / path.name
    broken.write_bytes(data)
    try:
        found = pictures(broken)
    except InputError as error:
        assert any(word in str(error) for word in ("damaged", "truncated", "not a readable"))
        return
    assert hole[1] < 1.0
    assert max(np.abs(sound - image).mean((1, 2, 3)).min() for image in found) < TOLERANCE


def test_zeros_behind_units_are_no_holes():
    """Some encoders fill up to even sizes."""
    unit = b"\x65" + bytes(range(1, 200))

    def packet(*units):
        return b"".join(len(unit).to_bytes(4) + unit for unit in units)

    assert not has_hole(packet(unit + bytes(31), unit + bytes(64)), 4)
    assert has_hole(packet(unit, unit[:90] + bytes(40) + unit), 4)
    assert has_hole(packet(unit)[:50] + bytes(400), 4)
    assert has_hole(packet(unit) + bytes(40), 4)


def test_appearing_streams_do_not_end_the_reading(tmp_path):
    """PyAV raises an error at the end of a file that has announced further streams."""
    path = write_moving(tmp_path / "c.ts", *H264)
    with av.open(str(path)) as container:

        class Container:
            def demux(self, *streams):
                yield from container.demux(*streams)
                raise IndexError("list index out of range")

        assert len(list(demux(Container(), [container.streams.video[0]]))) == FRAMES


@pytest.mark.parametrize("options", [{}, {"live": "1"}, {"cluster_time_limit": "400"}, {"reserve_index_space": "4096"},
                                     {"write_crc32": "0"}, {"flush_packets": "1"}])  # fmt: skip
@pytest.mark.parametrize("seekable", [True, False])
def test_pauses_in_sound_mkv_files_are_pauses(tmp_path, options, seekable):
    """Clusters of known and unknown length, with sound, chapters and an index at either end."""
    written = io.BytesIO()
    target = written if seekable else Pipe(written)
    with av.open(target, "w", format="matroska", options=options) as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        video.codec_context.gop_size = 10
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.metadata["title"] = "pauses"
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(TEXTURE[number:][:96, :160]), format="rgb24")
            frame.pts, frame.time_base = 40 * number + 3000 * (number // 20), Fraction(1, 1000)
            container.mux(video.encode(frame))
            silence.pts = number * 1024
            container.mux(sound.encode(silence))
        container.mux(video.encode())
        container.mux(sound.encode())
    path = tmp_path / "c.mkv"
    path.write_bytes(written.getvalue())
    assert gaps_of(path, "matroska,webm") == []
    assert len(pictures(path)) == 50


class Pipe:
    """Where one can write, and not go back."""

    def __init__(self, file):
        self.write = file.write


def test_what_is_missing_between_elements_is_named(clips, tmp_path):
    path, _ = clips("vp8.webm")
    data = path.read_bytes()
    place = data.find(b"\xa3", len(data) // 2)
    while abs(int.from_bytes(data[place + 1 : place + 3]) - 0x4000) > 0x1000 or data[place + 3] != 0x81:
        place = data.find(b"\xa3", place + 1)  # the head of a block: its name, its length, the track's number
    (tmp_path / "c.webm").write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    with pytest.raises(InputError, match="damaged: what was shown between .* is missing"):
        pictures(tmp_path / "c.webm")


def test_pauses_in_sound_mpeg_files_are_pauses(tmp_path):
    """A recording that was stopped for a while goes on with a key picture; film in broadcasts has uneven steps."""
    for rate, times in ((25, [*range(40), *range(500, 540)]), (50, np.cumsum([0, *[2, 3] * 30]).tolist())):
        path = tmp_path / f"{rate}.ts"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25, options={"bf": "2"})
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            stream.codec_context.gop_size = 20
            packets = []
            for number in range(len(times)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(TEXTURE[number:][:96, :160]), format="rgb24")
                frame.pts = number
                if number == 40:
                    frame.pict_type = av.video.frame.PictureType.I
                packets += stream.encode(frame)
            for packet in [*packets, *stream.encode()]:
                packet.pts, packet.dts = (
                    times[min(max(0, stamp), len(times) - 1)] + min(0, stamp) for stamp in (packet.pts, packet.dts)
                )
                packet.time_base = Fraction(1, rate)
                container.mux(packet)
        assert len(pictures(path)) == len(times)
