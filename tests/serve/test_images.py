"""Images and videos through HTTP are seen as `vidlada.ask` sees them: tiled, padded, mixed, in marks, from anywhere."""

import asyncio
import base64
from pathlib import Path

import numpy as np
import pytest
from media import write_video
from PIL import Image
from serve.inside import running_app

pytestmark = pytest.mark.slow

ASPECTS = ("anyres_max_4", "frame")
QUESTION = "is it red ?"
FAST = {"gen_length": 8, "block_length": 4, "cache": "mars"}


@pytest.fixture(params=ASPECTS)
def model(request, small, monkeypatch):
    """The small model with images as tiles, and as videos of one frame."""
    monkeypatch.setattr(small.model.config, "image_aspect_ratio", request.param)
    monkeypatch.setattr(small.processor, "image_aspect_ratio", request.param)
    return small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A wide photograph, a tall one that is transparent, an animation, and a video."""
    folder = tmp_path_factory.mktemp("shown")
    pixels = np.random.default_rng(4).integers(0, 255, (100, 170, 4), np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "wide.png")
    Image.fromarray(pixels.swapaxes(0, 1)).save(folder / "tall.webp", lossless=True)
    frames = [Image.fromarray(np.roll(pixels[..., :3], shift, axis=1)) for shift in (0, 40, 80)]
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:], duration=1000, lossless=True)
    write_video(folder / "clip.mp4", frames=75)
    return folder


def data_uri(path):
    kind = "video/mp4" if path.suffix == ".mp4" else f"image/{path.suffix[1:]}"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def part(path, kind="image_url"):
    return {"type": kind, kind: {"url": data_uri(path)}}


def ask_http(model, *contents, upload=(), **extra):
    """Answers to questions put one after another, and how many pictures passed the vision tower for each."""

    async def run():
        async with running_app(model) as (app, http):
            files = {}
            for path in upload:
                form = {"file": (path.name, path.read_bytes())}
                files[path] = (await http.post("/v1/files", files=form, data={"purpose": "user_data"})).json()["id"]
            engine, found, counts = app.state.server.service.engine, [], []
            for content in contents:
                before = engine.totals.frames_encoded
                pieces = [{"type": "file", "file": {"file_id": files[piece]}} if isinstance(piece, Path) else piece
                          for piece in content]  # fmt: skip
                body = {"model": "small", "messages": [{"role": "user", "content": pieces}], **FAST, **extra}
                response = await http.post("/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
                found.append((response.json()["choices"][0]["message"]["content"], response.json()["usage"]))
                counts.append(engine.totals.frames_encoded - before)
            return found, counts

    return asyncio.run(run())


def text_part(text=QUESTION):
    return {"type": "text", "text": text}


def expected(model, media, question=QUESTION, **extra):
    chat = model.chat(media, **FAST, **extra)
    return chat.ask(question).text, sum(len(medium.visual_tokens) for medium in chat.media)


def seen(found):
    return [(text, usage["prompt_tokens_details"]["visual_tokens"]) for text, usage in found]


def test_one_image_from_anywhere(model, folder):
    path = folder / "wide.png"
    inline = {"type": "file", "file": {"file_data": data_uri(path)}}
    as_video = part(path, "video_url")
    contents = [[part(path), text_part()], [path, text_part()], [inline, text_part()], [as_video, text_part()]]
    found, counts = ask_http(model, *contents, upload=[path])
    wanted = expected(model, path)
    assert seen(found) == [wanted] * 4
    pictures = len(model.processor.image_pictures(np.asarray(Image.open(path)))[0])
    assert counts == [pictures, 0, 0, 0]  # features are kept by content
    assert (pictures == 1) == model.processor.tiling.as_frames


def test_several_images_are_not_tiled(model, folder):
    paths = [folder / "wide.png", folder / "tall.webp"]
    found, counts = ask_http(model, [*map(part, paths), text_part()], [part(paths[0]), text_part()])
    assert seen(found) == [expected(model, paths), expected(model, paths[0])]
    assert counts[0] == 2


def test_images_and_videos_mixed(model, folder):
    paths = [folder / "wide.png", folder / "clip.mp4", folder / "tall.webp"]
    uploads = [*paths, text_part()]
    found, _ = ask_http(model, uploads, [part(paths[0]), part(paths[1], "video_url"), text_part()], upload=paths)
    assert seen(found) == [expected(model, paths), expected(model, paths[:2])]


def test_frames_of_a_video_beside_images_as_many_as_fit(model, folder):
    paths = [folder / "wide.png", folder / "clip.mp4"]
    found, _ = ask_http(model, [*paths, text_part()], upload=paths, frames="auto", fps=25)
    assert seen(found) == [expected(model, paths, frames="auto", fps=25)]


def test_an_animation_is_a_video_unless_the_client_says_otherwise(model, folder):
    path = folder / "moves.webp"
    found, _ = ask_http(model, [path, text_part()], [part(path), text_part()], upload=[path])
    first = np.asarray(Image.open(path).convert("RGB"))
    assert seen(found) == [expected(model, path), expected(model, first)]


def test_marks_and_places(model, folder):
    paths = [folder / "wide.png", folder / "tall.webp"]
    marks = "is the star of <image> in <image> too ?"
    between = [text_part("first "), part(paths[0]), text_part(" then"), part(paths[1]), text_part("which is red ?")]
    found, _ = ask_http(model, [*map(part, paths), text_part(marks)], between)
    assert seen(found)[0] == expected(model, paths, marks)
    pieces = [{"type": "image", "image": str(paths[0])}, {"type": "image", "image": str(paths[1])}]
    content = [text_part("first "), pieces[0], text_part(" then"), pieces[1], text_part("which is red ?")]
    assert found[1][0] == model.complete([{"role": "user", "content": content}], **FAST).text


@pytest.mark.parametrize("background", ["black", "white"])
def test_transparent_places(model, folder, background):
    path = folder / "tall.webp"
    found, _ = ask_http(model, [part(path), text_part()], background=background)
    assert seen(found) == [expected(model, path, background=background)]


@pytest.mark.parametrize("cache", ["mars:window=1", "mars:window=2,anchors=4", "mars:window=0"])
def test_frame_attention_of_a_single_image_is_full_attention(model, folder, cache):
    path = folder / "wide.png"
    found, _ = ask_http(model, [part(path), text_part()], cache=cache)
    assert found[0][0] == model.ask(path, QUESTION, **{**FAST, "cache": "mars"}).text


def test_times_of_the_only_video(model, folder):
    paths = [folder / "wide.png", folder / "clip.mp4"]
    found, _ = ask_http(model, [part(paths[0]), part(paths[1], "video_url"), text_part()], time_instruction=True)
    assert seen(found) == [expected(model, paths, time_instruction=True)]


def test_damaged_images_are_refused(model, folder):
    content = (folder / "wide.png").read_bytes()[:300]
    broken = f"data:image/png;base64,{base64.b64encode(content).decode()}"

    async def run():
        async with running_app(model) as (_, http):
            for kind in ("image_url", "video_url"):
                body = {
                    "model": "small",
                    **FAST,
                    "messages": [{"role": "user", "content": [text_part(), {"type": kind, kind: {"url": broken}}]}],
                }
                response = await http.post("/v1/chat/completions", json=body)
                assert response.status_code == 422, response.text

    asyncio.run(run())
