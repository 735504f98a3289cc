"""Messages as clients write them to conversations as the model was trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vidlada.generation import MAX_SLOTS, GenerationSettings
from vidlada.messages import VIDEO_PLACE, Message, place_media
from vidlada.serve.errors import RequestError
from vidlada.serve.media import MediaReference
from vidlada.serve.refusals import unsupported_error
from vidlada.serve.schema import (
    AnswerRequest,
    ChatMessage,
    ChatRequest,
    FilePart,
    ImagePart,
    RefusalPart,
    TextPart,
    VideoPart,
)
from vidlada.settings import INT64, settings_of

SETTINGS = settings_of(GenerationSettings).keys() - {"gen_length", "stop"}


Piece = str | MediaReference
Turn = tuple[str, list[Piece]]


@dataclass(frozen=True)
class PreparedConversation:
    """What a client's messages come to.

    Attributes:
        turns: role, texts and media of each.
        prefix: beginning of the answer, where the last message is the assistant's; else empty.
    """

    turns: list[Turn]
    prefix: str = ""

    @property
    def media(self) -> list[MediaReference]:
        """Everything that is shown, in order."""
        return [piece for _, pieces in self.turns for piece in pieces if isinstance(piece, MediaReference)]

    def messages(self, instruction: str = "") -> list[Message]:
        """For the processor.

        Args:
            instruction: a text in front of the first question about what is shown.
        """
        found: list[Message] = []
        for role, pieces in self.turns:
            if instruction and any(isinstance(piece, MediaReference) for piece in pieces):
                first = next((n for n, piece in enumerate(pieces) if isinstance(piece, str)), len(pieces))
                pieces, instruction = [*pieces[:first], instruction, *pieces[first:]], ""
            found.append({"role": role, "content": content_of(pieces)})
        return found


def conversation_of(messages: Sequence[ChatMessage], multi_turn: bool) -> PreparedConversation:
    """A conversation for the processor.

    One video or image of a message stands before its text, wherever the client put it, as in training; several stand
    in as many `<image>` marks of its text, or else where the client put them. A model that was not trained on
    conversations gets the last question and everything shown so far, without the earlier turns.

    Args:
        messages: at least one; the last is the user's, or the beginning of the assistant's answer.
        multi_turn: the model was trained on conversations.
    """
    turns: list[Turn] = [(role_of(message), fill_image_marks(pieces_of(message))) for message in messages]
    prefix = ""
    if turns[-1][0] == "assistant":
        prefix = "".join(piece for piece in turns.pop()[1] if isinstance(piece, str))
    if not turns or turns[-1][0] != "user":
        raise RequestError(
            422, "the last message must be the user's, or go on with the answer", "bad_messages", "messages"
        )
    if not multi_turn:
        system = [turn for turn in turns if turn[0] == "system"]
        earlier = [piece for role, pieces in turns[:-1] if role == "user" for piece in pieces]
        shown = [replace(piece, inline=False) for piece in earlier if isinstance(piece, MediaReference)]
        turns = [*system[:1], ("user", [*shown, *turns[-1][1]])]
    if not text_of(turns[-1][1]):
        raise RequestError(422, "the question is empty", "bad_messages", "messages")
    return PreparedConversation(turns, prefix)


def question_of(request: AnswerRequest) -> str:
    """The text that was asked, for the log."""
    if isinstance(request, ChatRequest):
        return text_of(pieces_of(request.messages[-1]))
    return "\n".join(getattr(request, "prompts", []))


def role_of(message: ChatMessage) -> str:
    """The role as the model knows it."""
    return "system" if message.role == "developer" else message.role


def pieces_of(message: ChatMessage) -> list[Piece]:
    """Texts and media of a message, in order."""
    pieces: list[Piece] = []
    for part in message.content:
        match part:
            case TextPart():
                pieces.append(part.text)
            case RefusalPart():
                pieces.append(part.refusal)
            case VideoPart():
                pieces.append(MediaReference(part.video_url.url))
            case ImagePart():
                pieces.append(MediaReference(part.image_url.url, is_image=True))
            case FilePart():
                url = part.file.url
                if not url:
                    raise RequestError(422, "a file part needs file_id or file_data", "bad_messages", "messages")
                pieces.append(MediaReference(url, is_image=url[:11].lower() == "data:image/"))
    if message.role != "user" and any(isinstance(piece, MediaReference) for piece in pieces):
        raise RequestError(422, f"a {message.role} message cannot show a video", "bad_messages", "messages")
    return pieces


def text_of(pieces: Sequence[Piece]) -> str:
    """The texts, a line each."""
    texts = [piece.strip() for piece in pieces if isinstance(piece, str)]
    return "\n".join(filter(None, texts))


def fill_image_marks(pieces: list[Piece]) -> list[Piece]:
    """The pieces of a turn, with several media in the text's `<image>` marks if there are as many of them."""
    shown = [piece for piece in pieces if isinstance(piece, MediaReference)]
    texts = "\n".join(piece for piece in pieces if isinstance(piece, str)).split(VIDEO_PLACE)
    if len(shown) < 2 or len(texts) != len(shown) + 1:
        return pieces
    placed: list[Piece] = [texts[0]]
    for reference, text in zip(shown, texts[1:], strict=True):
        placed += [replace(reference, inline=True), text]
    return placed


def content_of(pieces: Sequence[Piece]) -> str | list[Message]:
    """The content of a turn for the processor, which only needs to know where something is shown."""
    shown = [piece for piece in pieces if isinstance(piece, MediaReference)]
    if len(shown) < 2:
        return place_media(text_of(pieces), [{"type": "video"} for _ in shown])
    content: list[Message] = []
    for piece in pieces:
        if isinstance(piece, MediaReference):
            content.append({"type": "video", "inline": piece.inline})
        elif content and content[-1]["type"] == "text":
            content[-1] = {"type": "text", "text": f"{content[-1]['text']}\n{piece}"}
        else:
            content.append({"type": "text", "text": piece})
    return content


def generation_settings(
    request: AnswerRequest, base: GenerationSettings, most: int, most_thought: int = MAX_SLOTS
) -> tuple[GenerationSettings, int | None]:
    """How to decode, and the most tokens of the answer.

    `max_tokens` is an upper bound: the answer gets the slots of the next whole block, and is cut off behind it.

    Args:
        request: of the client.
        base: the checkpoint's settings.
        most: slots allowed.
        most_thought: slots allowed for the thought, which are also the most that it gets by default.

    Raises:
        InputError: settings that do not go together.
        RequestError: more slots than allowed, or a way to sample that is not known here.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    given = {name: getattr(request, name) for name in SETTINGS}
    gen_length = request.gen_length
    if gen_length is None and max_tokens is not None:
        block = request.block_length or base.block_length
        gen_length = -(-max_tokens // block) * block
        given["block_length"] = block
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    settings = base.replace(gen_length=gen_length, stop=tuple(stop) if stop else None, **given)
    if settings.gen_length > most:
        message = f"{settings.gen_length} answer slots are more than the {most} allowed"
        raise RequestError(422, message, "too_many_tokens", "max_tokens")
    if settings.think_length > most_thought:
        if request.think_length is not None:
            message = f"think_length {settings.think_length} is more than the {most_thought} slots allowed"
            raise RequestError(422, message, "too_many_tokens", "think_length")
        settings = replace(settings, think_length=most_thought)
    if settings.think and not isinstance(request, ChatRequest):
        raise unsupported_error("think", "a text is continued without a thought; use /v1/chat/completions")
    if getattr(request, "top_logprobs", 0) > 1 and not request.guided_choice:
        reason = "only the committed token's confidence is known; guided_choice tells the probabilities of choices"
        raise unsupported_error("top_logprobs", reason)
    if settings.temperature > 0:  # at 0 the likeliest token is taken, which neither could exclude
        if (request.top_k or 0) > 0:
            raise unsupported_error("top_k", "with a temperature above 0 use top_p, or temperature alone")
        if request.min_p:
            raise unsupported_error("min_p", "with a temperature above 0 use top_p, or temperature alone")
    return settings, max_tokens


def with_seed(settings: GenerationSettings, number: int) -> GenerationSettings:
    """The settings of one of several answers to a question: the seed counts up."""
    return replace(settings, seed=(settings.seed + number + INT64) % (2 * INT64) - INT64) if number else settings
