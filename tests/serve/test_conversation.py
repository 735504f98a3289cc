"""Clients' messages as conversations for the model, and their settings."""

import pytest

from vidlada.generation import GenerationSettings
from vidlada.serve.body import validate
from vidlada.serve.conversation import conversation_of, generation_settings
from vidlada.serve.errors import RequestError
from vidlada.serve.schema import ChatRequest


def request(messages, **fields):
    return ChatRequest.model_validate({"model": "m", "messages": messages, **fields})


def text(content):
    return {"type": "text", "text": content}


def media_part(kind, url):
    return {"type": kind, kind: {"url": url}}


AFTER_A_LINE = {"type": "video", "inline": False}
TURNS = [
    {"role": "developer", "content": "be short"},
    {"role": "user", "content": [text("what is it ?"), media_part("video_url", "a"), text("say more")]},
    {"role": "assistant", "content": "a cross"},
    {"role": "user", "content": [media_part("image_url", "b"), text("and this ?")]},
]


def test_turns():
    conversation = conversation_of(request(TURNS).messages, multi_turn=True)
    messages, references = conversation.messages(), conversation.media
    assert messages == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "video"}, text("what is it ?\nsay more")]},
        {"role": "assistant", "content": "a cross"},
        {"role": "user", "content": [{"type": "video"}, text("and this ?")]},
    ]
    assert [(reference.url, reference.is_image) for reference in references] == [("a", False), ("b", True)]


def test_a_model_of_single_questions_gets_the_last_one_and_all_that_was_shown():
    conversation = conversation_of(request(TURNS).messages, multi_turn=False)
    messages, references = conversation.messages(), conversation.media
    assert messages == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [AFTER_A_LINE, AFTER_A_LINE, text("and this ?")]},
    ]
    assert [reference.url for reference in references] == ["a", "b"]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_videos(role):
    messages = [{"role": role, "content": [media_part("video_url", "a")]}, {"role": "user", "content": "what is it ?"}]
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


def test_several_media_stay_where_they_are():
    parts = [
        text("first"),
        media_part("image_url", "a"),
        text("then"),
        media_part("video_url", "b"),
        text("what changed ?"),
    ]
    conversation = conversation_of(request([{"role": "user", "content": parts}]).messages, multi_turn=True)
    assert conversation.messages()[0]["content"] == [
        text("first"), AFTER_A_LINE, text("then"), AFTER_A_LINE, text("what changed ?"),
    ]  # fmt: skip
    assert [medium.is_image for medium in conversation.media] == [True, False]


def test_media_stand_in_as_many_marks():
    inline = {"type": "video", "inline": True}
    parts = [media_part("image_url", "a"), media_part("video_url", "b"), text("is <image> in <image> ?")]
    conversation = conversation_of(request([{"role": "user", "content": parts}]).messages, multi_turn=True)
    assert conversation.messages()[0]["content"] == [text("is "), inline, text(" in "), inline, text(" ?")]
    one = [media_part("image_url", "a"), text("what is <image> ?")]
    assert conversation_of(request([{"role": "user", "content": one}]).messages, True).messages()[0]["content"] == [
        {"type": "video"}, text("what is  ?"),
    ]  # fmt: skip
    none = conversation_of(request([{"role": "user", "content": "what is <image> ?"}]).messages, multi_turn=True)
    assert none.messages()[0]["content"] == "what is <image> ?"


def test_the_assistants_last_message_is_gone_on_with():
    turns = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "it is a "}]
    conversation = conversation_of(request(turns).messages, multi_turn=False)
    assert conversation.messages() == [{"role": "user", "content": "what is it ?"}]
    assert conversation.prefix == "it is a "


def test_null_is_absent_everywhere():
    null = {"role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "tool_calls": None, "reasoning_content": None}  # fmt: skip
    turns = [{"role": "user", "content": [{**text("hi"), "cache_control": None}], "name": None}, null, TURNS[1]]
    fields = dict.fromkeys([*ChatRequest.model_fields.keys() - {"model", "messages"}, "tools", "logit_bias", "made_up"])
    nulled = request(turns, **fields)
    assert nulled == request([{"role": "user", "content": "hi"}, {"role": "assistant"}, TURNS[1]])


HARMLESS = {
    "tools": [], "logit_bias": {}, "parallel_tool_calls": True, "tool_choice": "auto", "top_logprobs": 0,
    "include_reasoning": True, "verbosity": "medium", "modalities": ["text"], "prompt_cache_key": "k", "top_k": -1,
    "prompt_cache_retention": "24h", "chat_template_kwargs": {"enable_thinking": None}, "repetition_penalty": 1.0,
    "min_p": 0.0, "service_tier": "auto", "presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "top_p": 1,
    "response_format": {"type": "text"}, "stop": [], "user": "u", "metadata": {"a": None}, "store": True,
    "stream_options": {"include_obfuscation": True}, "skip_special_tokens": True, "best_of": 1, "echo": False,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted(name):
    base = GenerationSettings(gen_length=64, block_length=16)
    settings, _ = generation_settings(request(TURNS, **{name: HARMLESS[name]}), base, 64)
    assert settings == base


REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "logit_bias": {"3": 1},
    "modalities": ["text", "audio"], "repetition_penalty": 1.1, "presence_penalty": 0.5, "verbosity": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}, "top_logprobs": 5, "best_of": 3,
    "chat_template_kwargs": {"tools_in_user": True}, "reasoning_effort": "heroic", "ignore_eos": True,
    "mm_processor_kwargs": {"size": 3},
    "guided_regex": "a+", "structured_outputs": {"regex": "a+"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(name):
    with pytest.raises(RequestError, match=name) as refused:
        generation_settings(request(TURNS, **{name: REFUSED[name]}), GenerationSettings(), 128)
    assert refused.value.status == 422
    assert refused.value.param.startswith(name)


@pytest.mark.parametrize(
    ("fields", "think", "slots"),
    [
        ({"reasoning_effort": "none"}, False, 1024),
        ({"reasoning_effort": "minimal"}, False, 1024),
        ({"reasoning_effort": "low"}, True, 1024),
        ({"reasoning_effort": "high", "think": True, "think_length": 64}, True, 64),
        ({"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 32}, True, 32),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, 1024),
        ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "medium"}, True, 1024),
    ],
)
def test_how_other_clients_ask_for_a_thought(fields, think, slots):
    settings, _ = generation_settings(request(TURNS, **fields), GenerationSettings(), 128)
    assert (settings.think, settings.think_length) == (think, slots)


@pytest.mark.parametrize(
    "fields",
    [{"reasoning_effort": "low", "think": False}, {"reasoning_effort": 3}, {"chat_template_kwargs": []},
     {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
     {"think_length": 16, "thinking_token_budget": 32}],
)  # fmt: skip
def test_two_ways_to_ask_for_a_thought_must_agree(fields):
    with pytest.raises(RequestError, match="reasoning_effort|chat_template_kwargs|thinking_token_budget"):
        request(TURNS, **fields)


def test_a_thought_has_the_slots_that_the_server_allows():
    base = GenerationSettings(think=True, think_length=512)
    assert generation_settings(request(TURNS), base, 128, most_thought=64)[0].think_length == 64
    with pytest.raises(RequestError, match="think_length 100 is more than the 64"):
        generation_settings(request(TURNS, think_length=100), base, 128, most_thought=64)


@pytest.mark.parametrize("name", ["top_k", "min_p"])
def test_greedy_answers_need_no_bounds(name):
    generation_settings(request(TURNS, **{name: 1}), GenerationSettings(), 128)
    with pytest.raises(RequestError, match=name):
        generation_settings(request(TURNS, temperature=0.5, **{name: 1}), GenerationSettings(), 128)


@pytest.mark.parametrize(
    "fields",
    [{"mm_processor_kwargs": {"num_frames": 5, "fps": 2}}, {"media_io_kwargs": {"video": {"num_frames": 5, "fps": 2}}}],
)
def test_how_other_servers_sample_is_mapped(fields):
    mapped = request(TURNS, **fields)
    assert (mapped.frames, mapped.fps, mapped.force_sample) == (5, 2, True)
    with pytest.raises(RequestError, match="num_frames"):
        request(TURNS, frames=6, **fields)


@pytest.mark.parametrize(
    ("part", "url"),
    [
        ({"type": "video_url", "video_url": "http://x/a.mp4"}, "http://x/a.mp4"),
        ({"type": "image_url", "image_url": {"url": "b", "detail": "high"}, "cache_control": {"type": "x"}}, "b"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file-1"),
        ({"type": "file", "file": {"file_data": "data:video/mp4;base64,AA", "filename": "a.mp4"}},
         "data:video/mp4;base64,AA"),
        ({"type": "file", "file": {"file_data": "AA=="}}, "data:;base64,AA=="),
    ],
)  # fmt: skip
def test_media_as_clients_write_them(part, url):
    messages = [{"role": "user", "content": [text("what is it ?"), part]}]
    assert conversation_of(request(messages).messages, multi_turn=True).media[0].url == url


@pytest.mark.parametrize(
    ("message", "place", "words"),
    [
        ({"role": "user", "content": [text("a"), {"type": "input_audio", "input_audio": {}}]},
         "messages[0].content[1]", "cannot hear"),
        ({"role": "user", "content": [{"type": "hologram"}]}, "messages[0].content[0]", "'hologram' cannot be used"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {"uri": "x"}}]},
         "messages[0].content[0].video_url.url", "missing"),
        ({"role": "user", "content": 3}, "messages[0].content", "a text or a list of parts"),
        ({"role": "tool", "content": "x"}, "messages[0].role", "'tool' is not known"),
        ({"role": "user", "content": "a", "mood": "bad"}, "messages[0].mood", "not known here"),
    ],
)  # fmt: skip
def test_a_refused_part_is_named_as_what_it_is(message, place, words):
    with pytest.raises(RequestError) as refused:
        validate({"model": "m", "messages": [message]}, ChatRequest)
    assert refused.value.param == place
    assert words in str(refused.value)
