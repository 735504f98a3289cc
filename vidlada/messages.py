"""Messages: control tokens, the chat template, where media stand in a text, and think marks."""

import re
from collections.abc import Sequence
from typing import Any

from vidlada.errors import InputError
from vidlada.settings import check_unicode, format_value

Message = dict[str, Any]

BOS, START_HEADER, END_HEADER, END_OF_TURN = (
    "<|startoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
MASK, END_OF_TEXT = "<|mdm_mask|>", "<|endoftext|>"
VIDEO_PLACE = "<image>"
THINK, END_OF_THINK, STOP_THINK, ANSWER, END_OF_ANSWER = (
    "<think>", "</think>", "<stop_think>", "<answer>", "</answer>",
)  # fmt: skip
THINK_TOKENS = (THINK, END_OF_THINK, STOP_THINK, ANSWER)  # those that the think-mode stage adds to the vocabulary
THINK_MODES = {True: "/think", False: "/no_think"}
TAGS = re.compile("(" + "|".join(map(re.escape, (*THINK_TOKENS, END_OF_ANSWER))) + ")")
PARTS = ("text", "video", "image")

# Messages that say nothing are left out; of the others, the white space around, not that between texts and media.
CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}{% for message in messages %}"
    "{% set content %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '" + VIDEO_PLACE + "' }}{% if not part['inline'] %}{{ '\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% endif %}{% endset %}{% if content %}"
    "{{ '" + START_HEADER + "' + message['role'] + '" + END_HEADER + "\n\n' + content | trim + '" + END_OF_TURN + "' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START_HEADER + "assistant" + END_HEADER + "\n\n' }}{% endif %}"
)


def time_instruction(times: Sequence[float], duration: float) -> str:
    """Return the published sentence that states when the frames were taken.

    Args:
        times: seconds of each frame.
        duration: seconds the video lasts.
    """
    stamps = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {stamps}. Please answer the following questions related to this video."
    )


def pieces_of(message: Message) -> list[str | Message]:
    """Split a message into texts and the media between them, as the template renders them.

    White space around the whole is stripped, that between texts and media is not.

    Returns:
        Texts and media parts in turn, beginning and ending with a text; empty if the message says nothing.

    Raises:
        InputError: its role or a part is unknown, or what should be a text is none.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise InputError(f"unknown role {role!r}; use system, user or assistant")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else () if content is None else content
    if not isinstance(parts, list | tuple) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"a message's content must be a text or a list of parts, not {format_value(content)}")
    pieces: list[str | Message] = [""]
    for part in parts:
        kind = part.get("type")
        if kind not in PARTS:
            raise InputError(f"unknown content part {kind!r}; use text, image or video")
        if kind == "text":
            check_unicode("a content part", part.get("text"))
            pieces[-1] = str(pieces[-1]) + part["text"]
        else:
            pieces += [part, "" if part.get("inline") else "\n"]
    if pieces == [""]:
        return []
    pieces[0] = str(pieces[0]).lstrip()
    pieces[-1] = str(pieces[-1]).rstrip()
    return pieces


def place_media(text: str, media: Sequence[Message]) -> str | list[Message]:
    """The content of a turn: a text with media.

    They stand in the text's `<image>` marks, if there are as many and more than one; else in front of the text, a line
    each, as published. Without media a mark is a text like any other. White space around the text goes with a single
    mark, as published; else it stays.

    Args:
        text: said.
        media: parts of type `video` or `image`, in order.
    """
    if not media:
        return text
    marks = text.count(VIDEO_PLACE)
    if marks != len(media) or marks == 1:
        text = text.replace(VIDEO_PLACE, "").strip() if marks == len(media) else text
        return [*media, {"type": "text", "text": text}]
    texts = text.split(VIDEO_PLACE)
    content: list[Message] = [{"type": "text", "text": texts[0]}]
    for part, after in zip(media, texts[1:], strict=True):
        content += [{**part, "inline": True}, {"type": "text", "text": after}]
    return content


def with_think_mode(messages: Sequence[Message], think: bool | None) -> list[Message]:
    """A conversation with `/think` or `/no_think` directly behind the first user turn, white space at its end included,
    as published.

    Args:
        messages: see `VidLaDAProcessor.encode`.
        think: None leaves them as they are.
    """
    found = list(messages)
    place = next((i for i, message in enumerate(found) if message.get("role") == "user"), None)
    if think is None or place is None:
        return found
    content, mark = found[place].get("content") or "", THINK_MODES[think]
    if isinstance(content, str):
        content += mark
    elif content[-1].get("type") == "text":
        content = [*content[:-1], {"type": "text", "text": str(content[-1]["text"]) + mark}]
    else:
        content = [*content, {"type": "text", "text": mark}]
    found[place] = {**found[place], "content": content}
    return found
