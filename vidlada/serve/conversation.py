"""Messages as clients write them to conversations as the model was trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vidlada.generation import GenerationSettings
from vidlada.processor import Message
from vidlada.serve.errors import RequestError
from vidlada.serve.schema import ChatMessage, ChatRequest, FilePart, ImagePart, TextPart, VideoPart
from vidlada.settings import settings_of

SETTINGS = settings_of(GenerationSettings).keys() - {"gen_length", "stop"}


@dataclass(frozen=True)
class MediaReference:
    """A video or an image of a conversation, by reference."""

    url: str
    is_image: bool


def conversation_of(messages: Sequence[ChatMessage], multi_turn: bool) -> tuple[list[Message], list[MediaReference]]:
    """A conversation for the processor, and what its video parts are, in order.

    In a message videos stand before the text, wherever the client put them, as in training. A model that was not
    trained on conversations gets the last question and everything shown so far, without the earlier turns.

    Args:
        messages: at least one; the last is the user's.
        multi_turn: the model was trained on conversations.
    """
    if messages[-1].role != "user":
        raise RequestError(422, "the last message must be the user's", "bad_messages", "messages")
    turns = [turn_of(message) for message in messages]
    if not multi_turn:
        system = [turn for turn in turns if turn[0] == "system"]
        media = [reference for role, _, shown in turns if role == "user" for reference in shown]
        turns = [*system[:1], ("user", turns[-1][1], media)]
    if not turns[-1][1]:
        raise RequestError(422, "the question is empty", "bad_messages", "messages")
    conversation: list[Message] = []
    shown: list[MediaReference] = []
    for role, text, media in turns:
        videos = [{"type": "video"} for _ in media]
        conversation.append({"role": role, "content": [*videos, {"type": "text", "text": text}] if media else text})
        shown += media
    return conversation, shown


def turn_of(message: ChatMessage) -> tuple[str, str, list[MediaReference]]:
    """Role, text and media of one message."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return role, message.content.strip(), []
    texts, media = [], []
    for part in message.content:
        match part:
            case TextPart():
                texts.append(part.text.strip())
            case VideoPart():
                media.append(MediaReference(part.video_url.url, is_image=False))
            case ImagePart():
                media.append(MediaReference(part.image_url.url, is_image=True))
            case FilePart():
                media.append(MediaReference(part.file.file_id, is_image=False))
    if media and role != "user":
        raise RequestError(422, f"a {role} message cannot show a video", "bad_messages", "messages")
    return role, "\n".join(filter(None, texts)), media


def generation_settings(
    request: ChatRequest, base: GenerationSettings, most: int
) -> tuple[GenerationSettings, int | None]:
    """How to decode, and the most tokens of the answer.

    `max_tokens` is an upper bound: the answer gets the slots of the next whole block, and is cut off behind it.

    Args:
        request: of the client.
        base: the checkpoint's settings.
        most: slots allowed.

    Raises:
        InputError: settings that do not go together.
        RequestError: more slots than allowed.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    given = {name: getattr(request, name) for name in SETTINGS}
    gen_length = request.gen_length
    if gen_length is None and max_tokens is not None:
        block = request.block_length or base.block_length
        gen_length = -(-max_tokens // block) * block
        given["block_length"] = block
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    settings = base.updated(gen_length=gen_length, stop=tuple(stop) if stop else None, **given)
    if settings.gen_length > most:
        message = f"{settings.gen_length} answer slots are more than the {most} allowed"
        raise RequestError(422, message, "too_many_tokens", "max_tokens")
    return settings, max_tokens
