"""Several videos and images on the command line, from files and from the web, with a model that tiles images."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from media import write_video
from PIL import Image

from vidlada.cli import main


@pytest.fixture(scope="module")
def tiler(small_folder, tmp_path_factory):
    """The small model, said to take images as published: 3 × 3 patches a tile."""
    import vidlada
    from vidlada.checkpoint.load import save_model
    from vidlada.processor import VidLaDAProcessor

    model = vidlada.load(small_folder)
    model.model.config.image_aspect_ratio = "anyres_max_4"
    folder = tmp_path_factory.mktemp("tiler") / "model"
    save_model(model.model, VidLaDAProcessor.from_config(model.processor.tokenizer, model.model.config), folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip.mp4", frames=50)
    for name, colour, size in (("a.jpg", "red", (120, 50)), ("b.jpg", "blue", (40, 90))):
        Image.new("RGB", size, colour).save(folder / name)
    return folder


@pytest.fixture
def web(files):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(tiler, *arguments):
    options = ["--model", str(tiler), "--device", "cpu", "--gen-length", "8", "--json"]
    return CliRunner().invoke(main, ["ask", *map(str, arguments), *options])


def ask_json(tiler, *arguments):
    result = ask(tiler, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_images_and_a_video(tiler, files):
    found = ask_json(tiler, files / "a.jpg", files / "b.jpg", files / "clip.mp4", "compare them")
    kinds = [(medium["kind"], medium["visual_tokens"], len(medium["frames"])) for medium in found["media"]]
    # several images are untiled: 3 × 3 patches and a newline; a frame is 2 × 2 cells and a newline a row
    assert kinds == [("image", 10, 1), ("image", 10, 1), ("video", 2 * 6, 2)]
    assert found["statistics"]["tokens"] == 8


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "frozen", "interval", "sparse", "mars", "mars:window=1"])
def test_every_cache_knows_images(tiler, files, cache):
    media = (files / "clip.mp4", files / "a.jpg")
    found = ask_json(tiler, *media, "first <image> then <image> which ?", "--cache", cache)
    assert [medium["kind"] for medium in found["media"]] == ["video", "image"]
    assert found["media"][1]["visual_tokens"] > 10  # the only image is tiled
    assert found["statistics"]["tokens"] == 8


def test_addresses_on_the_web(tiler, files, web):
    there = ask_json(tiler, f"{web}/clip.mp4", f"{web}/a.jpg", "what is it ?")
    here = ask_json(tiler, files / "clip.mp4", files / "a.jpg", "what is it ?")
    assert there["answer"] == here["answer"]
    assert [medium["visual_tokens"] for medium in there["media"]] == [
        medium["visual_tokens"] for medium in here["media"]
    ]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/nothing.mp4", (), "404"),
        ("/clip.mp4", ("--max-download-mb", "1"), None),
        ("/large.mp4", ("--max-download-mb", "1"), "larger than the 1 MiB allowed"),
        ("/text.mp4", (), "/text.mp4: not a readable video"),
    ],
)
def test_what_the_web_does_not_give(tiler, files, web, path, options, message):
    (files / "large.mp4").write_bytes(bytes(2**21))
    (files / "text.mp4").write_text("no video" * 99)
    result = ask(tiler, web + path, "what is it ?", *options)
    if message is None:
        assert result.exit_code == 0
        return
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


def test_nobody_there(tiler):
    result = ask(tiler, "http://127.0.0.1:9/clip.mp4", "what is it ?")
    assert result.exit_code == 1 and "cannot be fetched" in result.stderr
    result = ask(tiler, "http:///clip.mp4", "what is it ?")
    assert result.exit_code == 2 and "not a usable address" in result.stderr


def test_as_many_frames_as_fit(tiler, files):
    write_video(files / "long.mp4", frames=60, fps=2)
    found = ask_json(tiler, files / "long.mp4", "what is it ?", "--frames", "auto")
    assert len(found["frames"]) == 30  # all that one a second gives: they fit
    assert ask(tiler, files / "long.mp4", "what ?", "--frames", "many").exit_code == 2


def test_think_on_the_command_line(tiler, files):
    found = ask_json(tiler, files / "clip.mp4", "what is it ?", "--think", "--think-length", "8")
    assert found["settings"]["think"] is True and found["statistics"]["tokens"] > 8
    assert ask_json(tiler, files / "clip.mp4", "what is it ?", "--no-think")["settings"]["think"] is False
