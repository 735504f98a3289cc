"""`vidlada.load()` on real files, with a small model of random weights: batches, reuse, streaming, errors."""

import numpy as np
import pytest
import torch
from media import write_video

import vidlada
from vidlada import video as video_module
from vidlada.errors import InputError, VidLaDAError
from vidlada.model.vision import FRAMES_PER_PASS, Vision
from vidlada.video import Sampling, sample_frames

FAST = {"gen_length": 16, "block_length": 8}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{seconds}.mp4", frames=25 * seconds) for seconds in (2, 7, 4)]


def test_ask(small, clips):
    answer = small.ask(clips[1], "which way does it move ?", **FAST)
    assert answer.frame_times == tuple(float(second) for second in range(7))
    assert answer.text == small.processor.decode(answer.token_ids).strip()
    assert answer.finish_reason in ("stop", "length")
    assert set(answer.statistics.seconds) == {"video", "vision", "denoising"}
    assert answer.settings.gen_length == 16
    assert answer.to_dict()["text"] == str(answer)


def test_a_padded_batch_of_videos_answers_as_one_by_one(small, clips):
    questions = [(clips[0], "is it red ?"), (clips[1], "how many things are in the video ?"), (None, "which way ?"),
             (clips[2], "what colour is the circle ?"), (clips[1], "is it red ?")]  # fmt: skip
    together = small.ask_many(questions, **FAST)
    for (video, question), answer in zip(questions, together, strict=True):
        assert answer.token_ids == small.ask(video, question, **FAST).token_ids


def test_the_video_changes_the_answer(small, clips):
    answers = {tuple(small.ask(video, "is it red ?", **FAST).token_ids) for video in (*clips, None)}
    assert len(answers) > 1


def test_several_questions_pay_for_the_video_once(small, clips, monkeypatch):
    calls = []
    project = Vision.project
    monkeypatch.setattr(Vision, "project", lambda *a: calls.append(1) or project(*a))
    seen = small.encode_video(clips[0])
    for question in ("is it red ?", "is it small ?"):
        assert small.ask(seen, question, **FAST).token_ids == small.ask(clips[0], question, **FAST).token_ids
    assert len(calls) == 1 + 2


def test_arrays_and_sampled_frames(small, clips):
    frames = sample_frames(clips[0])
    array = small.ask(frames.images, "is it red ?", fps=1.0, **FAST)
    assert array.token_ids == small.ask(frames, "is it red ?", **FAST).token_ids
    assert array.token_ids == small.ask(clips[0], "is it red ?", **FAST).token_ids
    with pytest.raises(InputError, match="no frames"):
        small.encode_video(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="uint8"):
        small.encode_video(np.zeros((1, 4, 4, 3)))


def test_streaming_ends_at_the_answer(small, clips):
    drafts = list(small.stream(clips[0], "is it red ?", **FAST))
    assert [draft.state.step for draft in drafts] == list(range(1, len(drafts) + 1))
    assert drafts[-1].text == small.ask(clips[0], "is it red ?", **FAST).text
    texts, finals = zip(*drafts[-1].pieces, strict=True)
    assert all(finals)
    assert "".join(texts).strip() == drafts[-1].text
    assert any(piece is None for piece, _ in drafts[0].pieces)


def test_a_conversation_is_remembered_only_if_trained_for(small, clips, monkeypatch):
    monkeypatch.setattr(small.model.config, "multi_turn", True)
    chat = small.chat(clips[0], **FAST)
    first = chat.ask("is it red ?")
    assert [message["content"] for message in chat.messages][1] == first.text
    chat.ask("is it small ?")
    assert len(chat.messages) == 4
    monkeypatch.setattr(small.model.config, "multi_turn", False)
    chat = small.chat(clips[0], **FAST)
    assert chat.ask("is it red ?").token_ids == chat.ask("is it red ?").token_ids
    assert chat.messages == []


def test_stop_string_cuts_the_text(small, clips):
    free = small.ask(clips[0], "is it red ?", **FAST).text
    word = free.split()[2]
    stopped = small.ask(clips[0], "is it red ?", stop=(word,), **FAST)
    assert word not in stopped.text.split()


def test_one_text_is_one_choice(small):
    assert small.ask(None, "is it red ?", choices="yes", **FAST).choices == {"yes": 1.0}
    for choices in (1, ["yes", 2], b"yes", [None]):
        with pytest.raises(InputError, match="choices must be a list of texts"):
            small.ask(None, "is it red ?", choices=choices, **FAST)


def test_suffix_comes_back_with_the_answer(small, clips):
    assert small.ask(clips[0], "is it red ?", suffix=" red circle", **FAST).text.endswith(" red circle")


def test_time_instruction_is_seen(small, clips):
    plain = small.chat(clips[1], **FAST).request("is it red ?").prompt
    timed = small.chat(clips[1], time_instruction=True, **FAST).request("is it red ?").prompt
    assert len(timed) > len(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_lenght": 3}, "unknown option gen_lenght"),
        ({"frames": 0}, "frames must be a whole number of at least 1"),
        ({"fps": -1}, "fps"),
        ({"block_length": 5}, "does not divide"),
    ],
)
def test_bad_options(small, clips, options, message):
    with pytest.raises(InputError, match=message):
        small.ask(clips[0], "is it red ?", **options)


def test_bad_questions_and_models(small, clips, tmp_path):
    with pytest.raises(InputError, match="question is empty"):
        small.ask(clips[0], "  ")
    with pytest.raises(InputError, match="no such model folder"):
        vidlada.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no config\.json"):
        vidlada.load(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' cannot be used"):
            vidlada.load(device="cuda")


def test_bfloat16_answers(small_folder, clips):
    model = vidlada.load(small_folder, dtype="bfloat16")
    assert model.ask(clips[0], "is it red ?", **FAST).statistics.tokens == 16


def test_a_conversation_of_parts(small, clips):
    image = np.full((30, 50, 3), 90, np.uint8)
    parts = [{"type": "text", "text": "is it "}, {"type": "image", "image": image, "inline": True},
             {"type": "text", "text": " red "}, {"type": "video", "video": clips[0], "inline": True}]  # fmt: skip
    answer = small.complete([{"role": "user", "content": parts}], **FAST)
    assert answer.frame_times == (0.0, 0.0, 1.0)
    marked = small.ask([image, clips[0]], "is it <image> red <image>", **FAST)
    assert answer.token_ids == marked.token_ids
    with pytest.raises(InputError, match="a part of type video has no video"):
        small.complete([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(InputError, match="last message must be the user's"):
        small.complete([{"role": "assistant", "content": "yes"}])


def test_frames_that_fit_the_context(small):
    settings = small.settings(gen_length=16)
    most = small.frames_that_fit([], 1, settings)
    assert 0 < most * 6 <= small.model.config.max_length - 16
    assert small.frames_that_fit([], 2, settings) == pytest.approx(most / 2, abs=1)
    with pytest.raises(InputError, match="not a single frame fits"):
        small.frames_that_fit([10**6], 1, settings)


def test_frames_pass_the_tower_while_the_next_are_decoded(small, tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", frames=25 * 40)
    order, project, resize = [], Vision.project, video_module._resize
    monkeypatch.setattr(Vision, "project", lambda self, pixels: (order.append(len(pixels)), project(self, pixels))[1])
    monkeypatch.setattr(video_module, "_resize", lambda image, size: (order.append("frame"), resize(image, size))[1])
    encoded = small.encode_video(path, frames=40)
    assert order == [*["frame"] * FRAMES_PER_PASS, FRAMES_PER_PASS] * 2 + ["frame"] * 8 + [8]
    frames = sample_frames(path, Sampling(max_frames=40), small.processor.image_size)
    (whole,) = small.model.encode_media(small.processor.pixel_values(frames.images), [40])
    torch.testing.assert_close(encoded.visual_tokens, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"cache": "mars"}, {"choices": ["yes", "no"]}])
def test_predictions_that_are_not_numbers_are_no_answer(small_folder, options):
    damaged = vidlada.load(small_folder)
    damaged.model.language_model.norm.weight.data[0] = float("nan")
    with pytest.raises(VidLaDAError, match=r"predictions are not numbers \(NaN\)"):
        damaged.ask(None, "is it red ?", **FAST, **options)
