"""Each video decoded once and ahead, encoded once, asked everything; a broken one costs its own questions only."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from media import write_video

from vidlada.conversation import EncodedVideo
from vidlada.decoding.running import RunningRequest
from vidlada.decoding.sampler import Denoiser
from vidlada.errors import InputError
from vidlada.evaluation.answering import VIDEOS_AHEAD, Answerer, Question, by_video
from vidlada.generation import GenerationSettings
from vidlada.video import Sampling

SETTINGS = GenerationSettings(gen_length=4, block_length=4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_video(folder / f"{n}.mp4", frames=25 * (n + 2))) for n in range(6)]


def ask(model, questions, batch_size=1, **options):
    return list(Answerer(model, Sampling(max_frames=4), batch_size, **options).replies(questions))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_replies_equal_asking_alone(small, clips, batch_size):
    questions = [(0, "is it red ?"), (1, "is it blue ?"), (0, "how many things are in the video ?"), (2, "is it red ?")]
    replies = ask(
        small, [Question(text, clips[n], SETTINGS) for n, text in questions], batch_size, time_instruction=True
    )
    for (n, text), reply in zip(questions, replies, strict=True):
        alone = small.ask(clips[n], text, frames=4, time_instruction=True, gen_length=4, block_length=4)
        assert reply.text == alone.text.removesuffix(".").strip()
        assert (reply.tokens, reply.forward_passes, reply.error) == (
            alone.statistics.tokens, alone.statistics.forward_passes, None)  # fmt: skip


@pytest.mark.parametrize("cache", ["none", "dual", "mars"])
def test_batches_share_their_forward_passes(small, clips, monkeypatch, cache):
    calls = Counter()
    last = small.model.language_model.layers[-1].mlp
    gate = type(last).gate
    monkeypatch.setattr(type(last), "gate", lambda self, hidden: (calls.update([self]), gate(self, hidden))[1])
    settings = GenerationSettings(gen_length=4, block_length=4, cache=cache)
    questions = [Question(f"is it {word} ?", clips[n % 2], settings) for n, word in enumerate(("red", "blue", "green"))]
    together = ask(small, questions, batch_size=3)
    few = calls[last]
    calls.clear()
    alone = ask(small, questions)
    assert [reply.text for reply in together] == [reply.text for reply in alone] and few > 0
    # without a cache, prompts of one length share a pass, and the clips have two lengths
    assert few * 3 == calls[last] * (2 if cache == "none" else 1)


def test_a_video_is_decoded_and_encoded_once(small, clips, monkeypatch):
    decoded, encoded = Counter(), Counter()
    decode, encode = Answerer.decode, type(small).encode_media
    monkeypatch.setattr(
        Answerer, "decode", lambda self, media, *rest: (decoded.update([media]), decode(self, media, *rest))[1]
    )

    def noting(self, media, *rest):
        encoded.update(medium.info.path for medium in media if not isinstance(medium, EncodedVideo))
        return encode(self, media, *rest)

    monkeypatch.setattr(type(small), "encode_media", noting)
    questions = [Question(f"is it {word} ?", clips[n], SETTINGS) for word in ("red", "blue") for n in range(3)]
    ask(small, questions, batch_size=2)
    assert decoded == encoded == Counter(clips[:3])


def test_the_next_videos_are_decoded_meanwhile_but_not_all(small, clips, monkeypatch):
    decoded, threads = [], set()
    decode = Answerer.decode

    def noting(self, media, settings):
        decoded.append(media)
        threads.add(threading.current_thread())
        return decode(self, media, settings)

    monkeypatch.setattr(Answerer, "decode", noting)
    replies = Answerer(small, Sampling(max_frames=2)).replies(
        [Question("is it red ?", clip, SETTINGS) for clip in clips]
    )
    next(replies)
    replies.close()
    assert threading.main_thread() not in threads
    assert 1 <= len(decoded) <= 1 + VIDEOS_AHEAD


def test_replies_come_as_soon_as_their_order_allows(small, clips, monkeypatch):
    order = []
    plain = Answerer.entry
    monkeypatch.setattr(Answerer, "entry", lambda self, q, media: (order.append(q.text), plain(self, q, media))[1])
    questions = [Question(text, clips[n], SETTINGS) for text, n in (("a", 0), ("b", 1), ("c", 0))]
    replies = Answerer(small, Sampling(max_frames=2)).replies(questions)
    next(replies)
    assert order == ["a"]
    list(replies)
    assert order == ["a", "c", "b"]


def test_failures_cost_only_themselves(small, clips, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    questions = [
        Question("is it red ?", clips[0], SETTINGS),
        Question("is it red ?", str(broken), SETTINGS),
        Question("is it blue ?", str(tmp_path / "missing.mp4"), SETTINGS),
        Question("   ", clips[0], SETTINGS),
        Question(error="the task gives sound"),
        Question("is it blue ?", clips[1], SETTINGS),
    ]
    replies = ask(small, questions, batch_size=6)
    assert [reply.error is None for reply in replies] == [True, False, False, False, False, True]
    assert "broken.mp4" in replies[1].error and "no such file" in replies[2].error
    assert "empty" in replies[3].error and replies[4].error == "the task gives sound"
    assert all(reply.text == "" for reply in replies[1:5])


def test_questions_of_different_settings_share_steps(small, clips):
    other = GenerationSettings(gen_length=8, block_length=8, cache="dual")
    questions = [Question("is it red ?", clips[n % 2], settings) for n, settings in enumerate([SETTINGS, other] * 2)]
    together, alone = ask(small, questions, batch_size=4), ask(small, questions)
    assert [(reply.text, reply.tokens) for reply in together] == [(reply.text, reply.tokens) for reply in alone]
    assert by_video(questions) == [0, 2, 1, 3]


def test_a_finished_answer_makes_room_for_the_next(small, clips, monkeypatch):
    rows, step = [], Denoiser.step

    def noting(self):
        rows.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(Denoiser, "step", noting)
    long, short = (GenerationSettings(gen_length=length, block_length=2, threshold=None) for length in (16, 2))
    questions = [Question("is it red ?", None, settings) for settings in (long, short, short, short)]
    monkeypatch.setattr(RunningRequest, "find_stop", lambda self: None)  # every slot is filled
    assert all(reply.error is None for reply in ask(small, questions, batch_size=2))
    assert max(rows) == 2
    assert sum(rows) == 16 + 3 * 2 and len(rows) < 16 + 3 * 2  # the short ones ran beside the long one


def test_frames_and_no_video(small):
    frames = np.full((3, 40, 40, 3), 200, np.uint8)
    with_frames, without = ask(small, [Question("is it red ?", frames, SETTINGS), Question("hello", None, SETTINGS)])
    assert with_frames.error is None and without.error is None


def test_what_stands_before_the_think_mode_is_as_published(small, clips, monkeypatch):
    """The published evaluation appends it to the task's text, whose last line may be empty."""
    encode, seen = type(small.processor).encode, []
    monkeypatch.setattr(
        type(small.processor), "encode", lambda self, m, *rest, **k: (seen.append(m), encode(self, m, *rest, **k))[1]
    )
    for text in ("is it red ?\n", " is it red ?"):
        for think in (False, None):
            seen.clear()
            ask(small, [Question(text, clips[0], GenerationSettings(gen_length=4, block_length=4, think=think))])
            (prompt,) = {small.processor.apply_chat_template(messages) for messages in seen}
            published = f"<image>\n{text}{'/no_think' if think is False else ''}".strip()
            assert f"\n\n{published}<|eot_id|>" in prompt


@pytest.mark.parametrize("kind", ["cut", "long"])
def test_what_ask_refuses_costs_its_question(small, clips, tmp_path, monkeypatch, kind):
    """A truncated file, and more frames than the model takes, which is known before one is decoded."""
    path, frames = tmp_path / "clip.mp4", 4
    data = Path(clips[0]).read_bytes()
    path.write_bytes(data if kind == "long" else data[: len(data) * 2 // 3])
    if kind == "long":
        frames = 99_999
        monkeypatch.setattr("vidlada.video.decode_frames", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError) as refused:
        small.ask(path, "is it red ?", frames=frames, force_sample=True)
    answerer = Answerer(small, Sampling(max_frames=frames, force_sample=True))
    (reply,) = answerer.replies([Question("is it red ?", str(path), SETTINGS)])
    assert reply.error == str(refused.value) and ("truncated" if kind == "cut" else "99999 frames") in reply.error


def test_choices_are_answered_by_the_likeliest(small, clips):
    choices = ("red circle", "blue square")
    questions = [Question("which ?", clips[0], SETTINGS, choices), Question("is it red ?", clips[0], SETTINGS)]
    chosen, decoded = ask(small, questions, batch_size=2)
    alone = small.ask(clips[0], "which ?", choices, frames=4, gen_length=4, block_length=4)
    assert chosen.text == alone.text in choices
    assert decoded.text == ask(small, questions[1:])[0].text
