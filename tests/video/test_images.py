"""Pictures of every mode, orientation and number, as arrays."""

import gc
from fractions import Fraction

import av
import numpy as np
import pytest
from media import number_of, picture
from PIL import Image, ImageCms, ImageFile

from vidlada.errors import InputError
from vidlada.images import image_info, open_images
from vidlada.video import Sampling, sample_frames

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RAMP = np.arange(256)
STORED = {  # what a camera stores so that a viewer that obeys the tag shows the picture upright
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientations(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](picture(5)))).save(path, exif=exif)
    (image,) = open_images(path)
    assert np.abs(image.astype(int) - picture(5)).mean() < 12
    assert (image_info(path).width, image_info(path).height) == (160, 96)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    "values", [(257 * RAMP).astype(np.uint16), (16 * RAMP).astype(np.uint16), (RAMP / 255).astype(np.float32),
               RAMP.astype(np.float32), (RAMP - 128).astype(np.float32), (65536 * RAMP).astype(np.int32)]
)  # fmt: skip
def test_a_ramp_stays_a_ramp(tmp_path, suffix, values):
    if suffix == "png" and values.dtype != np.uint16:
        pytest.skip("PNG holds no such numbers")
    Image.fromarray(values[None].repeat(8, 0)).save(tmp_path / f"ramp.{suffix}")
    (image,) = open_images((tmp_path / f"ramp.{suffix}").read_bytes())
    assert np.abs(image[0, :, 0].astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 4:] = 255
    image = Image.fromarray(grey)
    image = image.convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    image.save(tmp_path / "image.tif")
    (found,) = open_images(tmp_path / "image.tif")
    assert np.abs(found[..., 0].astype(int) - grey).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_places(tmp_path, suffix):
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[2:4, 2:4, 3] = 255
    Image.fromarray(drawing).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    on_white = sample_frames(tmp_path / f"a.{suffix}").images[0]
    assert on_white[0, 0, 0] == 255
    assert on_white[2, 2, 0] == 0
    assert sample_frames(tmp_path / f"a.{suffix}", Sampling(background="black")).images.max() == 0


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.apng"])
def test_animations_are_videos(tmp_path, name):
    images = [Image.fromarray(picture(number)) for number in range(75)]
    options = {"lossless": True} if name == "a.webp" else {"format": "PNG"}
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=40, **options)
    frames = sample_frames(tmp_path / name)
    assert [number_of(image) for image in frames.images] == [0, 25, 50]
    assert np.allclose(frames.times, [0, 1, 2])
    assert frames.info.duration == pytest.approx(3)


def test_pages(tmp_path):
    pages = [Image.fromarray(picture(number)) for number in range(6)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert [number_of(image) for image in open_images(tmp_path / "a.tif")] == list(range(6))
    assert [number_of(image) for image in sample_frames(tmp_path / "a.tif").images] == [0, 3]


def test_an_image_is_one_frame(tmp_path):
    Image.fromarray(picture(5)).save(tmp_path / "a.png")
    assert len(sample_frames(tmp_path / "a.png", Sampling(max_frames=8, force_sample=True)).images) == 1


def test_names_with_other_digits(tmp_path):
    for name in ("1²2.png", "2.png", "10.png"):
        Image.fromarray(picture(1)).save(tmp_path / name)
    assert sample_frames(tmp_path, size=32).info.frames == 3


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture(content):
    with pytest.raises(InputError, match="cannot be read as an image"):
        open_images(content)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_truncated_images_are_refused_whatever_another_library_allows(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval does
    with pytest.raises(InputError, match="cannot be read as an image"):
        open_images(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # for that library


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("name", ["download", "clip.mp4", "a.gif"])
def test_pictures_are_known_by_their_content(tmp_path, suffix, name):
    exif = Image.Exif()
    exif[0x112] = 7
    stored = Image.fromarray(np.ascontiguousarray(STORED[7](picture(5))))
    stored.save(tmp_path / f"image.{suffix}", exif=exif, icc_profile=PROFILE)
    (tmp_path / f"image.{suffix}").rename(tmp_path / name)
    frames = sample_frames(tmp_path / name)
    assert np.abs(frames.images[0].astype(int) - picture(5)).mean() < 12
    assert frames.info.frames == 1


def test_damaged_exif_data_does_not_make_a_picture_unreadable(tmp_path):
    Image.fromarray(picture(5)).save(tmp_path / "a.png", exif=b"no such data")
    assert number_of(open_images(tmp_path / "a.png")[0]) == 5


def test_a_video_of_pictures_with_profiles_and_exif(tmp_path):
    """PyAV knows no EXIF of frames, and frees what describes their colour profiles twice."""
    exif = Image.Exif()
    exif[0x112] = 6
    for suffix, codec, container in (("jpg", "mjpeg", "avi"), ("png", "png", "mov")):
        packets = []
        for number in range(5):
            stored = Image.fromarray(np.ascontiguousarray(np.rot90(picture(number))))
            stored.save(tmp_path / f"a.{suffix}", exif=exif, icc_profile=PROFILE)
            packets.append((tmp_path / f"a.{suffix}").read_bytes())
        path = tmp_path / f"c.{container}"
        with av.open(str(path), "w") as target:
            stream = target.add_stream(codec, rate=5)
            stream.width, stream.height, stream.pix_fmt = 96, 160, {"png": "rgb24"}.get(codec, "yuvj420p")
            for number, data in enumerate(packets):
                packet = av.Packet(data)
                packet.pts = packet.dts = number
                packet.is_keyframe, packet.stream, packet.time_base = True, stream, Fraction(1, 5)
                target.mux_one(packet)
        frames = sample_frames(path, Sampling(fps=5))
        assert frames.images.shape[1:] == (96, 160, 3)
        assert [number_of(image) for image in frames.images] == list(range(5))
        gc.collect()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_a_last_picture_that_stays(tmp_path, name):
    images = [Image.fromarray(picture(number)) for number in range(4)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=[100, 100, 100, 5000])
    frames = sample_frames(tmp_path / name)
    assert ([number_of(image) for image in frames.images], frames.info.duration) == ([0, 3], pytest.approx(5.3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("b.webm", "libvpx", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"),
     ("b.mov", "qtrle", "argb")],
)  # fmt: skip
def test_transparent_videos(tmp_path, name, codec, form):
    drawing = np.zeros((96, 160, 4), np.uint8)
    drawing[:48] = (200, 0, 0, 255)
    with av.open(str(tmp_path / name), "w") as container:
        fast = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"} if "vpx" in codec else {}
        stream = container.add_stream(codec, rate=10, options=fast)
        stream.width, stream.height, stream.pix_fmt = 160, 96, form
        if "vpx" in codec:
            stream.metadata["alpha_mode"] = "1"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(drawing, format="rgba")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for background, grey in (("white", 255), ("black", 0)):
        first, last = sample_frames(tmp_path / name, Sampling(background=background)).images
        for image in (first, last):
            assert np.abs(image[20, 20].astype(int) - (200, 0, 0)).max() < 16
            assert np.abs(image[80, 80].astype(int) - grey).max() < 4
