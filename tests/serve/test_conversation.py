"""Clients' messages as conversations for the model, and their settings."""

import pytest

from vidlada.generation import GenerationSettings
from vidlada.serve.conversation import conversation_of, generation_settings
from vidlada.serve.errors import RequestError
from vidlada.serve.schema import ChatRequest


def request(messages, **fields):
    return ChatRequest.model_validate({"model": "m", "messages": messages, **fields})


def text(content):
    return {"type": "text", "text": content}


def shown(kind, url):
    return {"type": kind, kind: {"url": url}}


TURNS = [
    {"role": "developer", "content": "be short"},
    {"role": "user", "content": [text("what is it ?"), shown("video_url", "a"), text("say more")]},
    {"role": "assistant", "content": "a cross"},
    {"role": "user", "content": [shown("image_url", "b"), text("and this ?")]},
]


def test_turns():
    messages, references = conversation_of(request(TURNS).messages, multi_turn=True)
    assert messages == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "video"}, text("what is it ?\nsay more")]},
        {"role": "assistant", "content": "a cross"},
        {"role": "user", "content": [{"type": "video"}, text("and this ?")]},
    ]
    assert [(reference.url, reference.is_image) for reference in references] == [("a", False), ("b", True)]


def test_a_model_of_single_questions_gets_the_last_one_and_all_that_was_shown():
    messages, references = conversation_of(request(TURNS).messages, multi_turn=False)
    assert messages == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "video"}, {"type": "video"}, text("and this ?")]},
    ]
    assert [reference.url for reference in references] == ["a", "b"]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_videos(role):
    messages = [{"role": role, "content": [shown("video_url", "a")]}, {"role": "user", "content": "what is it ?"}]
    with pytest.raises(RequestError, match="cannot show"):
        conversation_of(request(messages).messages, multi_turn=True)


@pytest.mark.parametrize(
    ("fields", "slots", "block", "bound"),
    [
        ({}, 64, 16, None),
        ({"max_tokens": 20}, 32, 16, 20),
        ({"max_completion_tokens": 5, "max_tokens": 40}, 16, 16, 5),
        ({"max_tokens": 20, "block_length": 8}, 24, 8, 20),
        ({"max_tokens": 20, "gen_length": 48}, 48, 16, 20),
    ],
)
def test_slots_for_max_tokens(fields, slots, block, bound):
    base = GenerationSettings(gen_length=64, block_length=16)
    settings, max_tokens = generation_settings(request(TURNS, stop="x", **fields), base, 64)
    assert (settings.gen_length, settings.block_length, max_tokens) == (slots, block, bound)
    assert settings.stop == ("x",)
