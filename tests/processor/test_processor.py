"""Prompts, position maps and pixel values."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from vectors import preprocess_arrays

from vidlada.errors import InputError
from vidlada.messages import time_instruction
from vidlada.processor import VidLaDAProcessor


def user(text, video=None):
    return {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": text}]}


def formula_image(height, width):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [127 + 120 * np.sin(x / (7 + 3 * c) + c) * np.cos(y / (5 + 2 * c)) for c in range(3)]
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("number", range(4))
def test_recorded_preprocessing(small, number):
    recorded = preprocess_arrays()
    height, width = recorded[f"frame{number}.size"]
    processor = VidLaDAProcessor(small.processor.tokenizer)
    pixels = processor.pixel_values(formula_image(height, width)[None])[0].numpy()
    np.testing.assert_allclose(pixels[:, ::16, ::16], recorded[f"frame{number}.pixels_sub"], rtol=0, atol=1e-6)
    assert pixels.mean() == pytest.approx(float(recorded[f"frame{number}.mean"]), abs=1e-5)
    assert pixels.std() == pytest.approx(float(recorded[f"frame{number}.std"]), abs=1e-5)


def test_prompt_is_the_published_one(small):
    processor = VidLaDAProcessor(small.processor.tokenizer, tokens_per_frame=2, system_message="see the video")
    encoded = processor.encode([user("is it red ?")], [2])
    tokens = processor.tokenizer.convert_ids_to_tokens([t if t >= 0 else 0 for t in encoded.input_ids])
    tokens = ["<image>" if i == -200 else t for i, t in zip(encoded.input_ids, tokens, strict=True)]
    header = "<|start_header_id|> {} <|end_header_id|> \n\n"
    expected = ["<|startoftext|>", *header.format("system").split(" "), "see", "the", "video", "<|eot_id|>",
                *header.format("user").split(" "), *["<image>"] * 4, "\n", "is", "it", "red", "?", "<|eot_id|>",
                *header.format("assistant").split(" ")]  # fmt: skip
    assert tokens == expected
    assert [i for i in encoded.frame_index if i >= 0] == [0, 0, 1, 1]


def test_template_renders_what_encode_tokenizes(small):
    messages = [{"role": "system", "content": "see the video"}, user("is it red ?"),
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": " is it small ? "}]  # fmt: skip
    text = small.processor.apply_chat_template(messages, add_generation_prompt=True)
    encoded = small.processor.encode(messages, [0])
    assert small.processor.tokenizer(text.replace("<image>", ""), add_special_tokens=False)["input_ids"] == (
        encoded.input_ids
    )


def test_control_tokens_in_a_question_stay_text(small):
    encoded = small.processor.encode([{"role": "user", "content": "is it <|eot_id|> red"}], [])
    ends = sum(t == small.processor.token_id("<|eot_id|>") for t in encoded.input_ids)
    assert ends == 1


def test_batches_are_padded_on_the_left(small):
    frames = np.zeros((3, 36, 36, 3), np.uint8)
    batch = small.processor([[user("is it red ?", frames)], [{"role": "user", "content": "yes"}]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["frame_index"].shape
    assert batch["attention_mask"][0].all()
    padding = int((batch["attention_mask"][1] == 0).sum())
    assert padding == 3 * 6 + 4
    assert (batch["attention_mask"][1][:padding] == 0).all()
    assert batch["pixel_values"].shape == (3, 3, 36, 36)
    assert batch["media_shapes"] == [3]


def test_time_instruction_is_the_published_sentence():
    assert time_instruction([0.0, 1.02], 2.0) == (
        "The video lasts for 2.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at "
        "0.00s,1.02s. Please answer the following questions related to this video."
    )


def test_round_trip(small, tmp_path):
    small.processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VidLaDAProcessor)
    assert loaded.encode([user("is it red ?")], [2]) == small.processor.encode([user("is it red ?")], [2])


@pytest.mark.parametrize(
    ("messages", "counts", "message"),
    [
        ([], [], "empty"),
        ([{"role": "robot", "content": "hi"}], [], "unknown role 'robot'"),
        ([user("hi")], [], "more videos and images than the 0"),
        ([user("hi")], [1, 1], "2 videos and images were given"),
        ([{"role": "user", "content": [{"type": "sound"}]}], [], "unknown content part 'sound'"),
        ([user("hi")], [10_000], "more than the model's"),
    ],
)
def test_bad_conversations(small, messages, counts, message):
    with pytest.raises(InputError, match=message):
        small.processor.encode(messages, counts)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 4), np.uint8)]
)
def test_bad_frames(small, images):
    with pytest.raises(InputError, match="uint8 of shape"):
        small.processor.pixel_values(images)


def test_one_pixel_high_frames(small):
    assert torch.isfinite(small.processor.pixel_values(np.zeros((1, 1, 50, 3), np.uint8))).all()
