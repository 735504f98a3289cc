"""Conversations with texts, images and videos: what is tokenized is what the template renders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vidlada.messages import (
    BOS,
    END_HEADER,
    END_OF_TEXT,
    END_OF_TURN,
    MASK,
    START_HEADER,
    THINK_TOKENS,
    place_media,
    with_think_mode,
)
from vidlada.processor import VidLaDAProcessor
from vidlada.tiling import ImageShape

CONTROL = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, MASK)


def byte_tokenizer(*more):
    """Every byte a token: nothing is lost, so that texts can be compared."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*CONTROL, *more)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                                   clean_up_tokenization_spaces=False)  # fmt: skip


TOKENIZERS = {
    "plain": VidLaDAProcessor(byte_tokenizer(), tokens_per_frame=3, system_message="see it"),
    "think": VidLaDAProcessor(byte_tokenizer(*THINK_TOKENS), tokens_per_frame=3, image_aspect_ratio="anyres_max_4"),
}
TEXTS = st.text(st.sampled_from(" \n\tab<é🙂"), max_size=6) | st.sampled_from(
    ["<image>", "<|eot_id|>", "<think>a</think>\nb", "<stop_think>", "\u3000x\x1f"]
)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}) | st.sampled_from(
    [{"type": "image"}, {"type": "video"}, {"type": "image", "inline": True}]
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]),
        "content": TEXTS | st.lists(PARTS, max_size=5) | st.none(),
    }
)


def render(processor, encoded):
    """Token ids as text again, a run of stand-ins as one mark for each medium."""
    text, previous = "", -1
    pending = []
    for token, frame in zip(encoded.input_ids, encoded.frame_index, strict=True):
        if frame < 0:
            pending.append(token)
            continue
        if frame != previous:
            text += processor.tokenizer.decode(pending) + "<image>"
            pending, previous = [], frame
    return text + processor.tokenizer.decode(pending)


@settings(max_examples=300)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(MESSAGES, min_size=1, max_size=4), st.booleans())
def test_what_is_encoded_is_what_the_template_renders(name, messages, prompt):
    processor = TOKENIZERS[name]
    kinds = [part["type"] for m in messages if isinstance(m["content"], list) for part in m["content"]]
    shapes = [1 if kind == "video" else ImageShape(3, 5) for kind in kinds if kind != "text"]
    encoded = processor.encode(messages, shapes, add_generation_prompt=prompt)
    assert render(processor, encoded) == processor.apply_chat_template(messages, add_generation_prompt=prompt)


def test_media_stand_where_the_parts_are(small):
    processor = TOKENIZERS["think"]
    content = [{"type": "text", "text": " first "}, {"type": "image"}, {"type": "text", "text": " then  "},
               {"type": "video"}, {"type": "text", "text": "what? "}]  # fmt: skip
    encoded = processor.encode([{"role": "user", "content": content}], [ImageShape(10, 20), 2])
    assert render(processor, encoded).endswith(
        "user<|end_header_id|>\n\nfirst <image>\n then  <image><image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    frames = [index for index in encoded.frame_index if index >= 0]
    assert frames == [0] * 730 + [1] * 3 + [2] * 3  # an image is a segment of its own, like a frame


@pytest.mark.parametrize(
    ("text", "media", "expected"),
    [
        ("a <image> tag", [], "a <image> tag"),
        ("what is it? <image>", ["video"], "<image>\nwhat is it?"),
        ("<image>\nwhat?", ["image"], "<image>\nwhat?"),
        ("what?", ["image", "video"], "<image>\n<image>\nwhat?"),
        (" what?\n", ["video"], "<image>\n what?"),
        (" what? <image>\n", ["video"], "<image>\nwhat?"),
        ("left <image> right <image>\n which?", ["image", "image"], "left <image> right <image>\n which?"),
        ("a <image> tag", ["image", "video"], "<image>\n<image>\na <image> tag"),
    ],
)
def test_marks_are_places_only_for_media_that_are_given(text, media, expected):
    messages = [{"role": "user", "content": place_media(text, [{"type": kind} for kind in media])}]
    assert f"\n\n{expected}<|eot_id|>" in TOKENIZERS["plain"].apply_chat_template(messages)


@pytest.mark.parametrize("content", ["what? ", [{"type": "text", "text": "what? "}]])
@pytest.mark.parametrize(("think", "mark"), [(True, "what? /think"), (False, "what? /no_think"), (None, "what?")])
def test_the_think_mode_directly_follows_the_first_question(content, think, mark):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": content},
            {"role": "assistant", "content": "it"}, {"role": "user", "content": "and?"}]  # fmt: skip
    text = TOKENIZERS["plain"].apply_chat_template(with_think_mode(talk, think))
    assert f"\n\n{mark}<|eot_id|>" in text and "\n\nand?<|eot_id|>" in text
    assert talk[1]["content"] == content


def test_think_tags_of_an_answer_are_tokens_where_there_are_such():
    answer = {"role": "assistant", "content": "<think>why</think>\nso"}
    question = {"role": "user", "content": "say <think>"}
    for name, tags in (("plain", 0), ("think", 2)):
        processor = TOKENIZERS[name]
        ids = processor.encode([question, answer], [], add_generation_prompt=False).input_ids
        special = {processor.tokenizer.convert_tokens_to_ids(token) for token in THINK_TOKENS}
        assert sum(token in special for token in ids) == tags


def test_the_whole_header_of_an_answer_counts_as_control():
    processor = TOKENIZERS["plain"]
    encoded = processor.encode([{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}], [], False)
    learned = [answer or control for answer, control in zip(encoded.is_answer, encoded.is_control, strict=True)]
    header = len(processor.text_ids("assistant")) + len(processor.text_ids("\n\n"))
    # bos; system and user blocks: two header marks and the end each; answer: all of its block
    assert sum(learned) == 1 + 3 + 3 + (2 + header + 2 + 1)


def test_images_in_a_batch():
    processor = TOKENIZERS["think"]
    image = np.zeros((500, 300, 3), np.uint8)
    batch = processor([[{"role": "user", "content": [{"type": "image", "image": image}]}]])
    (shape,) = batch["media_shapes"]
    assert len(batch["pixel_values"]) == shape.tiles > 1
    assert int((batch["input_ids"] == -200).sum()) == processor.tiling.tokens(shape)
    two = processor([{"role": "user", "content": [{"type": "image", "image": image}] * 2}])
    assert two["media_shapes"] == [ImageShape(500, 300), ImageShape(500, 300)]
