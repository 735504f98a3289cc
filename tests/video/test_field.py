"""Videos as people's devices write them: every picture carries its number, so that a wrong frame is seen."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from media import number_of, picture, write_video

from vidlada.errors import InputError
from vidlada.evaluation.answering import Answerer, Question
from vidlada.generation import GenerationSettings
from vidlada.video import Sampling, orient, probe, sample_frames, sample_indices
from vidlada.video_decoding import Reader

H264 = {"codec": "libx264", "options": {"bf": "2"}}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
KINDS = {
    "mp4": H264, "mkv": H264, "ts": H264, "flv": H264, "avi": H264, "h264": H264, "webm": VP9,
    "wmv": {"codec": "wmv2"}, "mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
}  # fmt: skip


def shown(frames):
    return [number_of(image) for image in frames.images]


def write_timed(path, times, codec="libx264", options=None, container_options=None):
    """Numbered pictures at given seconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.gop_size = 12
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("fps", [24, 25, 30, 50])
def test_constant_rates(tmp_path, suffix, fps):
    path = write_video(tmp_path / f"clip.{suffix}", frames=130, fps=fps, **KINDS[suffix])
    for sampling in (Sampling(), Sampling(max_frames=9, force_sample=True)):
        frames = sample_frames(path, sampling)
        assert shown(frames) == sample_indices(130, fps, sampling) == list(frames.indices)
        assert np.allclose(frames.times, np.array(shown(frames)) / fps, atol=2e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "flv", "webm", "wmv"])
def test_slides(tmp_path, suffix):
    """The header's rate is nominal: every picture of a recording of slides is seen, at its time."""
    times = np.cumsum([0, 4, 2.5, 9, 3, 6, 1.5, 7, 5, 8])
    codec = {"webm": "libvpx", "wmv": "wmv2"}.get(suffix, "libx264")
    frames = sample_frames(write_timed(tmp_path / f"slides.{suffix}", times, codec))
    assert shown(frames) == list(range(10))
    assert np.allclose(frames.times, times, atol=2e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_uneven_rates_are_sampled_by_time(tmp_path, suffix):
    times = np.concatenate([np.arange(60) / 60, 1 + np.arange(20), 21 + np.arange(60) / 30])
    frames = sample_frames(write_timed(tmp_path / f"clip.{suffix}", times), Sampling())
    # whether the last picture lasts until the 24th second, the containers say differently
    assert np.allclose(frames.times[:23], np.arange(23), atol=3e-3)
    assert len(frames.times) <= 24
    assert np.allclose(times[shown(frames)], frames.times, atol=3e-3)


def turned(image, rotation, hflip, vflip):
    image = np.rot90(image, rotation // 90)
    image = image[:, ::-1] if hflip else image
    return image[::-1] if vflip else image


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_eight_orientations(tmp_path, suffix, rotation, hflip):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.set_display_rotation(rotation, hflip=hflip)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(5), format="rgb24")))
        container.mux(stream.encode())
    image = sample_frames(path).images[0]
    expected = turned(picture(5), rotation, hflip, False)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 12


def test_display_matrix_moves_pixels_as_defined():
    """x' = m0 x + m3 y, y' = m1 x + m4 y, up to a shift into the picture."""
    image = np.arange(6).reshape(2, 3, 1).repeat(3, 2)
    straight = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
    across = [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
    for a, b, c, d in straight + across:
        found = orient(image, 65536 * np.array([a, b, 0, c, d, 0, 0, 0, 0]))
        for y in range(2):
            for x in range(3):
                right, down = a * x + c * y, b * x + d * y
                height, width = found.shape[:2]
                to_x = right if a + c > 0 else right + width - 1
                to_y = down if b + d > 0 else down + height - 1
                assert found[to_y, to_x, 0] == image[y, x, 0]


@pytest.mark.parametrize("suffix", ["ts", "m2ts"])
def test_recordings_that_begin_between_key_pictures(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", frames=300, keyframe_every=50, **H264)
    data = path.read_bytes()
    step = {"ts": 188, "m2ts": 192}[suffix]
    path.write_bytes(data[len(data) // 3 // step * step :])
    frames = sample_frames(path)
    numbers = shown(frames)
    assert 90 < numbers[0] < 200
    assert np.allclose(np.diff(numbers), 25)
    assert frames.times[0] == 0


def test_joined_recordings(tmp_path):
    path = write_video(tmp_path / "clip.ts", frames=100, **H264)
    path.write_bytes(2 * path.read_bytes())
    frames = sample_frames(path)
    # the demuxer may lose the packet at the joint
    assert np.abs(np.array(shown(frames)) - 2 * [0, 25, 50, 75]).max() <= 1
    assert np.allclose(frames.times, np.arange(8), atol=0.05)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.985])
@pytest.mark.parametrize(
    "suffix",
    [
        "mp4",
        "frag",
        "mkv",
        "ts",
        "m2ts",
        "flv",
        "avi",
        "webm",
        "wmv",
        "mpg",
        "ogv",
        "gif",
        "mxf",
        "gxf",
        "nut",
        "wtv",
        "swf",
    ],
)
def test_cut_files_are_refused_in_every_container(tmp_path, suffix, kept):
    kinds = {
        "gif": {"codec": "gif", "pixel_format": "rgb8", "fps": 10}, "ogv": {"codec": "libvpx"}, "mxf": KINDS["mpg"],
        "gxf": {"codec": "mpeg2video", "size": (720, 480), "fps": 30}, "wtv": {"codec": "mpeg2video"},
        "swf": {"codec": "flv"},
    }  # fmt: skip
    kind = kinds.get(suffix)
    if suffix == "frag":
        times = np.arange(150) / 25
        path = write_timed(tmp_path / "c.mp4", times, container_options={"movflags": "frag_keyframe+empty_moov"})
    else:
        path = write_video(tmp_path / f"c.{suffix}", frames=150, **(kind or KINDS.get(suffix, H264)))
    sample_frames(path)
    data = path.read_bytes()
    length = int(len(data) * kept)
    path.write_bytes(data[: length + (length % 4 == 0)])  # not at the end of a transport packet
    with pytest.raises(InputError, match="truncated|not a readable video|damaged"):
        sample_frames(path)


def test_a_picture_track_before_the_video(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        cover, stream = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=25)
        for each, form in ((cover, "yuvj420p"), (stream, "yuv420p")):
            each.width, each.height, each.pix_fmt = 160, 96, form
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(picture(999), format="rgb24").reformat(format="yuvj420p"))
        )
        container.mux(cover.encode())
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert shown(sample_frames(path)) == [0, 25, 50]


def test_metadata_that_is_not_utf8(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "Caf\xe9"
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(7), format="rgb24")))
        container.mux(stream.encode())
    assert shown(sample_frames(path)) == [7]


@pytest.mark.parametrize("name", ["2024-01-01T12:30:00.mp4", "talk: part 1.mp4", "file:x.mp4", "a#b?c%20d é.mp4"])
def test_names_are_only_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", frames=30).rename(tmp_path / name)
    assert shown(sample_frames(name)) == [0, 25]


def test_the_empty_path_is_no_folder():
    with pytest.raises(InputError, match="path is empty"):
        sample_frames("")


def test_what_is_asked_for_is_checked_before_a_frame_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", frames=30)

    def refuse(info, count):
        raise InputError(f"{count} of {info.frames}")

    monkeypatch.setattr("vidlada.video.decode_frames", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="100000 of 30"):
        sample_frames(path, Sampling(max_frames=100_000, force_sample=True), check=refuse)


def write_raw(path, frames=300, gop=50, **options):
    """An MPEG-4 elementary stream, which has no times."""
    with av.open(str(path), "w", format="m4v") as container:
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 160, 96, "yuv420p", gop
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("share", [0.21, 0.37, 0.5, 0.63])
@pytest.mark.parametrize("gop", [12, 50])
@pytest.mark.parametrize("suffix", ["mpg", "vob", "m4v"])
def test_streams_that_begin_anywhere(tmp_path, suffix, gop, share):
    """Few packets of a program stream have times of their own, none of a raw stream, but no frame is lost."""
    if suffix == "m4v":
        path = write_raw(tmp_path / "c.m4v", gop=gop, bf="2")
    else:
        path = write_video(tmp_path / f"c.{suffix}", frames=300, keyframe_every=gop, **KINDS["mpg"])
    data = path.read_bytes()
    path.write_bytes(data[int(len(data) * share) :])
    frames = sample_frames(path, Sampling(fps=25, max_frames=300))
    numbers = np.array(shown(frames))
    assert numbers[0] < 300 * share + 2 * gop + 12 and numbers[-1] == 299
    assert np.abs(numbers - numbers[0] - 25 * np.array(frames.times)).max() <= 0.51


@pytest.mark.parametrize(
    ("suffix", "codec"), [("m1v", "mpeg1video"), ("m2v", "mpeg2video"), ("hevc", "libx265"), ("mjpeg", "mjpeg")]
)
def test_raw_streams_are_counted(tmp_path, suffix, codec):
    """FFmpeg makes time stamps up for some of them."""
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"c.{suffix}", frames=130, codec=codec, pixel_format=form)
    frames = sample_frames(path, Sampling(fps=5))
    assert shown(frames) == list(range(0, 130, 5))
    assert np.allclose(frames.times, np.arange(26) / 5)


def test_ogg_says_when_frames_end(tmp_path):
    times = np.cumsum([0, 4, 2.5, 9, 3])
    frames = sample_frames(
        write_timed(tmp_path / "slides.ogg", times, "libvpx"), Sampling(max_frames=5, force_sample=True)
    )
    assert shown(frames) == list(range(5)) and np.allclose(frames.times, times, atol=2e-3)


def open_gops(path):
    """A video whose only picture of instant refresh is the first; the others are preceded by frames that lean on what
    was before."""
    options = {"x264-params": "open-gop=1:keyint=50:min-keyint=50:bframes=3:scenecut=0"}
    return write_video(path, frames=300, keyframe_every=50, codec="libx264", options=options)


def copy_packets(source, target, first):
    """Copy a stream from a packet on, without re-encoding."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if number >= first and packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mpeg4"])
def test_clips_cut_between_open_groups(tmp_path, codec):
    """The first frames lean on pictures that were cut off."""
    if codec == "libx264":
        path = open_gops(tmp_path / "c.mp4")
    else:
        path = write_video(tmp_path / "c.mp4", frames=300, codec=codec, keyframe_every=50, options={"bf": "2"})
    with av.open(str(path)) as container:
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    frames = sample_frames(copy_packets(path, tmp_path / "cut.mp4", keys[2]), Sampling(fps=25, max_frames=300))
    numbers = np.array(shown(frames))
    assert keys[2] - 4 <= numbers[0] <= keys[2] + 4 and numbers[-1] == 299
    assert np.abs(numbers - numbers[0] - 25 * np.array(frames.times)).max() <= 1.01


def test_streams_without_parameter_sets_are_refused_by_name(tmp_path):
    path = open_gops(tmp_path / "c.ts")
    data = path.read_bytes().replace(b"\x00\x00\x01\x67", b"\x00\x00\x01\x6c").replace(
        b"\x00\x00\x01\x68", b"\x00\x00\x01\x6c"
    )  # fmt: skip
    path.write_bytes(data)
    with pytest.raises(InputError, match="parameter sets are missing"):
        sample_frames(path)


@pytest.mark.parametrize("cut", ["before a fragment", "behind a fragment's head"])
def test_cuts_between_boxes_that_an_index_or_a_head_shows(tmp_path, cut):
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}
    path = write_timed(tmp_path / "c.mp4", np.arange(150) / 25, container_options=flags)
    assert len(sample_frames(path).times) == 6
    data = path.read_bytes()
    place = data.find(b"moof", len(data) // 2) - 4
    length = int.from_bytes(data[place : place + 4])
    path.write_bytes(data[: place + (0 if cut == "before a fragment" else length)])
    with pytest.raises(InputError, match="truncated"):
        sample_frames(path)


def test_interlaced_pictures(tmp_path):
    """Frames are shown as stored, both fields in one picture."""
    for suffix, codec in (("mp4", "libx264"), ("mpg", "mpeg2video"), ("ts", "mpeg2video")):
        options = {"flags": "+ilme+ildct", **({"x264-params": "tff=1"} if codec == "libx264" else {})}
        path = write_video(tmp_path / f"c.{suffix}", frames=80, codec=codec, options=options)
        assert shown(sample_frames(path)) == [0, 25, 50, 75]


@pytest.mark.slow
def test_an_hour_is_not_decoded_whole(tmp_path, small, monkeypatch):
    """By `ask` and by an evaluation."""
    path = write_video(tmp_path / "hour.mp4", frames=3600, fps=1, keyframe_every=60)
    labelled, decoded = Reader.labelled_frames, []
    monkeypatch.setattr(Reader, "labelled_frames", lambda self: (decoded.append(f[0]) or f for f in labelled(self)))
    frames = sample_frames(path, Sampling(max_frames=32))
    expected = np.linspace(0, 3599, 32).astype(int)
    assert shown(frames) == (expected % 1024).tolist() and frames.times == tuple(expected.astype(float))
    assert len(decoded) <= 32 * 64
    question, settings = "is it red ?", GenerationSettings(gen_length=4, block_length=4)
    answer = small.ask(path, question, frames=32, gen_length=4, block_length=4)
    (reply,) = Answerer(small, Sampling(max_frames=32)).replies([Question(question, str(path), settings)])
    assert reply.text == answer.text.removesuffix(".").strip() and answer.frame_times == frames.times


def test_program_streams_of_cameras_run_at_their_own_rate(tmp_path):
    """Few of their packets are timed; what FFmpeg guesses from those is far off."""
    path = write_video(tmp_path / "c.mpg", 60, codec="libx265", options={"x265-params": "log-level=0:keyint=25"})
    frames = sample_frames(path, Sampling(fps=5))
    assert (frames.info.frames, frames.info.fps) == (60, pytest.approx(25))
    assert shown(frames) == list(range(0, 60, 5))


def test_joined_fragmented_files_are_not_mixed(tmp_path):
    """What a browser records anew begins anew; FFmpeg takes the second start for the first and leaves it out."""
    parts = []
    for number in range(2):
        path, options = tmp_path / f"{number}.mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        parts.append(write_timed(path, np.arange(60) / 25, container_options=options).read_bytes())
    (tmp_path / "j.mp4").write_bytes(b"".join(parts))
    found = shown(sample_frames(tmp_path / "j.mp4", Sampling(fps=25, max_frames=200)))
    assert found == [*range(60), *range(12, 60)]


def test_parts_of_a_camera_stream(tmp_path):
    """FFmpeg takes the mark behind the last picture for a damaged one."""
    path = write_video(tmp_path / "c.mjpeg", 30, codec="mjpeg", pixel_format="yuvj420p")
    with av.open(str(path)) as source, av.open(str(tmp_path / "c.mpjpeg"), "w", format="mpjpeg") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux_one(packet)
    assert shown(sample_frames(tmp_path / "c.mpjpeg", Sampling(fps=25))) == list(range(30))
    data = (tmp_path / "c.mpjpeg").read_bytes()
    (tmp_path / "cut.mpjpeg").write_bytes(data[: int(0.9 * len(data))])
    with pytest.raises(InputError, match="truncated"):
        probe(tmp_path / "cut.mpjpeg")


def with_edits(path, edits):
    """An mp4 file whose only track shows these parts, one after another: seconds, and from which second on."""
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") - 4
    scale = int.from_bytes(content[content.index(b"mdhd") + 16 :][:4], "big")
    whole = int.from_bytes(content[content.index(b"mvhd") + 16 :][:4], "big")
    (old,), begin = struct.unpack_from(">I", content, place), struct.unpack_from(">i", content, place + 20)[0]
    rows = [
        struct.pack(">IiI", round(seconds * whole), begin + round(start * scale), 1 << 16) for seconds, start in edits
    ]
    new = struct.pack(">I4sII", 16 + 12 * len(rows), b"elst", 0, len(rows)) + b"".join(rows)
    for name in (b"moov", b"trak", b"edts"):
        size = content.index(name) - 4
        struct.pack_into(">I", content, size, struct.unpack_from(">I", content, size)[0] + len(new) - old)
    content[place : place + old] = new
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("bf", ["0", "2"])
def test_parts_that_several_edits_show(tmp_path, bf):
    """What they hide moves nothing."""
    options = {"bf": bf, "g": "10"}
    again = write_video(tmp_path / "again.mp4", frames=60, fps=10, codec="libx264", options=options)
    frames = sample_frames(with_edits(again, [(2, 0), (3, 0)]), Sampling(fps=10, max_frames=99))
    assert shown(frames) == [*range(20), *range(30)]
    assert np.allclose(frames.times, np.arange(50) / 10, atol=2e-3)
