"""What `/v1/chat/completions` accepts. Unknown fields are refused: a setting that is silently ignored misleads."""

from collections.abc import Container
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.settings import settings_of
from vidlada.video import Sampling

Text = Annotated[str, Field(max_length=1_000_000)]
StopString = Annotated[str, Field(max_length=1000)]  # every step looks for every one of them


class Strict(BaseModel):
    """A model without further fields."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class Reference(Strict):
    """A URL, or the id of an upload. `detail` is accepted and has no effect."""

    url: str
    detail: str | None = None


class VideoPart(Strict):
    """A video, as vLLM's convention has it."""

    type: Literal["video_url"]
    video_url: Reference


class ImagePart(Strict):
    """An image; the model sees a video of one frame."""

    type: Literal["image_url"]
    image_url: Reference


class FileReference(Strict):
    """An upload."""

    file_id: str


class FilePart(Strict):
    """An upload, as OpenAI's convention has it."""

    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | VideoPart | ImagePart | FilePart, Field(discriminator="type")]


class ChatMessage(Strict):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


def setting_fields(cls: Any, skip: Container[str] = ()) -> dict[str, Any]:
    """Fields of a pydantic model for the listed settings of a dataclass; None leaves a setting at its default."""
    found: dict[str, Any] = {}
    for name, (_, listed, kind) in settings_of(cls).items():
        if name not in skip:
            annotation: Any = Literal[listed.choices] if listed.choices else kind
            bounds = {} if kind is bool or listed.choices else {
                "ge": listed.minimum, "gt": listed.above, "le": listed.maximum, "max_length": listed.max_length,
            }  # fmt: skip
            given: dict[str, Any] = {key: bound for key, bound in bounds.items() if bound is not None}
            found[listed.alias or name] = (annotation | None, Field(None, description=listed.help, **given))
    return found


Settings: Any = create_model(
    "Settings",
    __base__=Strict,
    **setting_fields(GenerationSettings, skip=("stop",)),
    **setting_fields(PromptSettings, skip=("system",)),
    **setting_fields(Sampling),
)


class ChatRequest(Settings):
    """OpenAI's request with the settings of denoising.

    Args:
        diffusing: also tell the draft: in a stream after every step.
        gen_length and all other settings of `Sampling`, `PromptSettings` and `GenerationSettings`: as listed there. By
            default there are as many slots as `max_tokens` needs, and no more frames than allowed.
        user, metadata, store, service_tier, prompt_cache_key, safety_identifier: accepted, without effect.
        top_p and others: accepted with the value that has no effect.
    """

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None

    diffusing: bool = False

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    n: Literal[1] | None = None
    top_p: float | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
