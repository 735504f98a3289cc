"""Video in: real files of many kinds, each frame known by the number painted into it."""

import os

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media import number_of, picture, write_video
from PIL import Image

from vidlada import video_decoding
from vidlada.errors import InputError
from vidlada.video import Sampling, probe, sample_frames, sample_indices

KINDS = {
    "mp4": {},
    "mov": {},
    "mkv": {},
    "webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "avi": {"codec": "mpeg4"},
    "gif": {"codec": "gif", "pixel_format": "rgb8", "fps": 10},
}


def shown(frames):
    return [number_of(image) for image in frames.images]


@pytest.mark.parametrize("suffix", KINDS)
def test_every_container(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", frames=60, **KINDS[suffix])
    fps = KINDS[suffix].get("fps", 25)
    frames = sample_frames(path, Sampling(fps=5))
    assert shown(frames) == list(range(0, 60, fps // 5)) == list(frames.indices)
    assert np.allclose(frames.times, np.arange(len(frames.times)) / 5, atol=2e-3)
    assert frames.info.frames == 60
    assert frames.info.duration == pytest.approx(60 / fps, abs=0.05)


@pytest.mark.parametrize("keyframe_every", [1, 12, 300])
@pytest.mark.parametrize("count", [1, 3, 16, 100])
def test_jumping_to_keyframes_finds_the_same_frames(tmp_path, keyframe_every, count, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", frames=240, keyframe_every=keyframe_every, options={"bf": "3"})
    sampling = Sampling(max_frames=count, force_sample=True)
    frames = sample_frames(path, sampling)
    assert shown(frames) == sample_indices(240, 25, sampling)
    monkeypatch.setattr(video_decoding, "SEEK_WORTH_FRAMES", 10**9)
    assert np.array_equal(sample_frames(path, sampling).images, frames.images)


def test_a_long_file_is_not_decoded_whole(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", frames=1000, size=(64, 64), keyframe_every=10)
    decoded = []
    original = video_decoding.Reader.labelled_frames

    def counting(reader):
        for label, frame in original(reader):
            decoded.append(label)
            yield label, frame

    monkeypatch.setattr(video_decoding.Reader, "labelled_frames", counting)
    frames = sample_frames(path, Sampling(max_frames=8, force_sample=True), size=32)
    assert shown(frames) == sample_indices(1000, 25, Sampling(max_frames=8, force_sample=True))
    assert len(decoded) <= 8 * 11


def test_variable_frame_rate_keeps_true_times(tmp_path):
    times = [0, 40, 80, 500, 540, 2000, 2040, 3000]
    path = write_video(tmp_path / "clip.mkv", frames=8, times=times)
    frames = sample_frames(path, Sampling(max_frames=8, force_sample=True))
    assert shown(frames) == list(range(8))
    assert np.allclose(frames.times, np.array(times) / 1000, atol=2e-3)


def test_fractional_rate_reports_true_times(tmp_path):
    # the published code divides by the rounded stride: 7.00 s in a video of 3.96 s
    path = write_video(tmp_path / "clip.mp4", frames=95, fps=24)
    frames = sample_frames(path, Sampling(fps=2))
    assert np.allclose(frames.times, np.array(frames.indices) / 24, atol=1e-3)
    assert frames.times[-1] < 3.96


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_metadata(tmp_path, rotation):
    path = write_video(tmp_path / "clip.mp4", frames=3, rotation=rotation)
    image = sample_frames(path).images[0]
    upright = np.rot90(picture(0), rotation // 90)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 12


@pytest.mark.parametrize(
    ("pixel_format", "size", "codec"),
    [("yuv420p10le", (160, 96), "libx265"), ("gray", (160, 96), "libx264"), ("yuv444p", (161, 97), "libx264")],
)
def test_depth_grey_and_odd_sizes(tmp_path, pixel_format, size, codec):
    path = write_video(tmp_path / "clip.mkv", frames=30, codec=codec, pixel_format=pixel_format, size=size)
    frames = sample_frames(path, Sampling(fps=5))
    assert shown(frames) == list(range(0, 30, 5))
    assert frames.images.shape[1:] == (size[1], size[0], 3)


def test_sound_is_ignored(tmp_path):
    frames = sample_frames(write_video(tmp_path / "clip.mp4", frames=50, audio=True))
    assert shown(frames) == [0, 25]


def test_one_frame(tmp_path):
    frames = sample_frames(write_video(tmp_path / "clip.mp4", frames=1), Sampling(max_frames=4, force_sample=True))
    assert frames.indices == (0, 0, 0, 0)
    assert frames.images.shape[0] == 4


def test_resizing_is_pillow_bicubic(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=2)
    whole, small = sample_frames(path), sample_frames(path, size=48)
    expected = Image.fromarray(whole.images[0]).resize((48, 48), Image.Resampling.BICUBIC)
    assert np.array_equal(small.images[0], np.asarray(expected))


def test_folder_of_images_in_natural_order(tmp_path):
    for number in range(12):
        Image.fromarray(picture(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    frames = sample_frames(tmp_path, Sampling(fps=1))
    assert shown(frames) == [0, 3, 6, 9]
    assert frames.times == (0.0, 1.0, 2.0, 3.0)
    assert probe(tmp_path).duration == 4.0


def test_single_image(tmp_path):
    Image.fromarray(picture(5)).save(tmp_path / "image.png")
    frames = sample_frames(tmp_path / "image.png")
    assert shown(frames) == [5]
    assert frames.times == (0.0,)


@given(st.integers(1, 5000), st.floats(0.1, 240), st.floats(0.05, 60), st.integers(1, 128), st.booleans())
def test_indices_are_in_range_and_order(total, fps, wanted, most, force):
    indices = sample_indices(total, fps, Sampling(wanted, most, force))
    assert 1 <= len(indices) <= most
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] < total
    if force:
        assert len(indices) == most
        assert indices[-1] == (total - 1 if most > 1 else 0)


# --- bad input ---


def refused(path, *words):
    for read in (probe, sample_frames):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
    assert any(word in message for word in words), message


def test_missing(tmp_path):
    refused(tmp_path / "nothing.mp4", "no such file")


def test_empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "neither a file")


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    refused(tmp_path / "text.mp4", "not a readable video", "no video in it")


def test_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("this is no image")
    refused(tmp_path / "text.png", "cannot be read as an image")


def test_folder_without_images(tmp_path):
    refused(tmp_path, "no images")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=2)
    path.chmod(0)
    refused(path, "Permission")


def test_audio_only(tmp_path):
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(path, "no video in it, only audio")


def test_lists_of_files(tmp_path):
    """Videos elsewhere on the machine are not shown to whoever can name them in a file of his own."""
    write_video(tmp_path / "clip.mp4", frames=10)
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    refused(tmp_path / "list.txt", "list of other files", "Operation not permitted")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n")
    refused(tmp_path / "list.m3u8", "list of other files", "not a readable video")


def test_no_decoder(tmp_path):
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>")
    refused(tmp_path / "drawing.svg", "no decoder", "not a readable video")


def test_header_without_frames(tmp_path):
    path = write_video(tmp_path / "clip.mkv", frames=50)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # up to the first cluster
    refused(path, "no frames", "truncated", "not a readable video")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.8])
def test_truncated(tmp_path, suffix, kept):
    options = {"movflags": "faststart"} if suffix == "mp4" else None
    path = write_video(tmp_path / f"clip.{suffix}", frames=400, **{"options": options, **KINDS[suffix]})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, "truncated", "not a readable video", "damaged")


def test_damaged_middle_is_an_error_not_a_wrong_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=200, keyframe_every=50)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path.write_bytes(bytes(data))
    try:
        frames = sample_frames(path, Sampling(max_frames=40, force_sample=True))
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert len(frames.images) == 40  # what could be decoded stands at its own place
        assert list(frames.indices) == sample_indices(200, 25, Sampling(max_frames=40, force_sample=True))


def test_noise_is_refused(tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(200_000))  # of others one in some hundred is taken for H.263
    refused(path, "")
