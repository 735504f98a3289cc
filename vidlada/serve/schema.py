"""What requests may say. Null means absent everywhere; what changes nothing is accepted, what would silently change the
answer is refused by name (`vidlada.serve.refusals`)."""

from collections.abc import Container
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.serve.json_schema import form_of, schema_of
from vidlada.serve.refusals import NO_GRAMMAR, drop_neutral, unsupported_error
from vidlada.settings import settings_of
from vidlada.video import Sampling

MOST_CHOICES = 16  # answers to one request
MOST_GUIDED = 100  # answers to choose between
EFFORTS = {"none": False, "minimal": False, **dict.fromkeys(("low", "medium", "high", "xhigh", "max"), True)}

Text = Annotated[str, Field(max_length=1_000_000)]
StopString = Annotated[str, Field(max_length=1000)]  # every step looks for every one of them


class Strict(BaseModel):
    """A model without further fields, where null means absent."""

    model_config = ConfigDict(extra="forbid")
    ignored: ClassVar[frozenset[str]] = frozenset()  # accepted without effect

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """Drop what is null or has no effect."""
        if not isinstance(data, dict):
            return data
        return cls.prepare({name: value for name, value in data.items() if value is not None})

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Bring other clients' spellings into this model's."""
        return {name: value for name, value in data.items() if name not in cls.ignored}


class Part(Strict):
    """A part of a message."""

    ignored = frozenset({"cache_control", "annotations", "logprobs", "uuid"})


class TextPart(Part):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Part):
    """What an earlier answer refused to say."""

    type: Literal["refusal"]
    refusal: Text


class Reference(Strict):
    """A URL, or the id of an upload."""

    ignored = frozenset({"detail", "format", "uuid"})
    url: str


def as_reference(value: Any) -> Any:
    """A URL may stand alone."""
    return {"url": value} if isinstance(value, str) else value


class VideoPart(Part):
    """A video, as vLLM's convention has it."""

    type: Literal["video_url"]
    video_url: Annotated[Reference, BeforeValidator(as_reference)]


class ImagePart(Part):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[Reference, BeforeValidator(as_reference)]


class FileReference(Strict):
    """An upload, or a file in the request itself: a data URI, or base64 alone."""

    ignored = frozenset({"filename", "format", "detail"})
    file_id: str | None = None
    file_data: str | None = None

    @property
    def url(self) -> str:
        """As the media source takes it."""
        if self.file_data is None:
            return self.file_id or ""
        return self.file_data if self.file_data[:5].lower() == "data:" else f"data:;base64,{self.file_data}"


class FilePart(Part):
    """A file, as OpenAI's convention has it."""

    type: Literal["file"]
    file: FileReference


AnyPart = Annotated[TextPart | RefusalPart | VideoPart | ImagePart | FilePart, Field(discriminator="type")]


def as_parts(content: Any) -> Any:
    """A text is a list of one text part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(Strict):
    """A turn. Of an assistant's, as clients send them back, only the text counts."""

    ignored = frozenset({"name", "annotations", "reasoning_content", "reasoning", "provider_specific_fields",
                         "thinking_blocks", "images", "prefix", "partial"})  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[AnyPart], BeforeValidator(as_parts), Field(max_length=10_000)] = []

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """An answer's empty fields are no content; a refusal is."""
        data = super().prepare(data)
        for name in ("tool_calls", "function_call", "audio"):
            if data.pop(name, None):
                raise unsupported_error(f"messages.{name}", "an assistant's turn here is text alone")
        refusal = data.pop("refusal", None)
        if isinstance(refusal, str) and refusal and not data.get("content"):
            data["content"] = refusal
        return data


class StreamOptions(Strict):
    """Of a stream."""

    ignored = frozenset({"include_obfuscation", "continuous_usage_stats"})
    include_usage: bool = False


def setting_fields(cls: Any, skip: Container[str] = ()) -> dict[str, Any]:
    """Fields of a pydantic model for the listed settings of a dataclass; None leaves a setting at its default."""
    found: dict[str, Any] = {}
    for name, (_, listed, kind) in settings_of(cls).items():
        if name not in skip:
            annotation: Any = Literal[listed.choices] if listed.choices and kind is str else kind
            bounds = {} if kind is bool or annotation is not kind else {
                "ge": listed.minimum, "gt": listed.above, "le": listed.maximum, "max_length": listed.max_length,
            }  # fmt: skip
            given: dict[str, Any] = {key: bound for key, bound in bounds.items() if bound is not None}
            if kind is not str and listed.choices:
                annotation, given = Annotated[kind, Field(**given)] | Literal[listed.choices], {}
            found[listed.alias or name] = (annotation | None, Field(None, description=listed.help, **given))
    return found


Settings: Any = create_model(
    "Settings",
    __base__=Strict,
    **setting_fields(GenerationSettings, skip=("stop",)),
    **setting_fields(PromptSettings, skip=("system",)),
    **setting_fields(Sampling),
)


class AnswerRequest(Settings):
    """What every request for answers may say.

    Args:
        n: answers, each with the next seed.
        logprobs: give each token's confidence when it was committed.
        top_logprobs: with `guided_choice`, so many of the choices; else the committed token at most.
        guided_choice: answer with the likeliest of these.
        guided_json: a JSON schema of the answer; what `response_format` comes to.
        include_reasoning: give the thought beside the answer.
        diffusing: also send the draft: in a stream after every step.
        gen_length and all other settings of `Sampling`, `PromptSettings` and `GenerationSettings`: as listed there. By
            default there are as many slots as `max_tokens` needs, and no more frames than allowed.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    guided_choice: Annotated[list[StopString], Field(min_length=1, max_length=MOST_GUIDED)] | None = None
    guided_json: dict[str, Any] | None = None
    include_reasoning: bool = True
    diffusing: bool = False

    @property
    def answers(self) -> int:
        """How many are wanted."""
        return self.n

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Map vLLM's fields, and drop what has no effect."""
        data = drop_neutral(super().prepare(data))
        map_media(data, "mm_processor_kwargs", data.pop("mm_processor_kwargs", {}))
        video = data.pop("media_io_kwargs", {})
        if isinstance(video, dict):
            map_media(data, "media_io_kwargs.video", video.get("video", {}))
        map_thinking(data)
        outputs = data.pop("structured_outputs", {})
        if isinstance(outputs, dict):
            for name, value in outputs.items():
                if name == "choice" and value:
                    data.setdefault("guided_choice", value)
                elif name == "json" and value:
                    data.setdefault("guided_json", value)
                elif value:
                    raise unsupported_error(f"structured_outputs.{name}", NO_GRAMMAR)
        schema = schema_of(data.pop("response_format", {}))
        if schema is not None:
            data["guided_json"] = schema
        if not data.get("guided_json"):
            data.pop("guided_json", None)
        elif choices := form_of(data["guided_json"])[1]:  # refuses what cannot be kept, too
            del data["guided_json"]
            set_once(data, "guided_choice", list(choices), "response_format")
        return data


def map_media(data: dict[str, Any], name: str, given: Any) -> None:
    """Take how vLLM's clients sample videos into a request: `fps`, or `num_frames` evenly spaced.

    Raises:
        RequestError: anything else is asked for, or two things at once.
    """
    if not isinstance(given, dict):
        raise unsupported_error(name, "it must be an object")
    for key, value in given.items():
        if value is None or key in ("do_sample_frames", "use_audio_in_video"):
            continue
        if key == "num_frames":
            if value != -1:
                set_once(data, "frames", value, f"{name}.{key}")
                data.setdefault("force_sample", True)
        elif key == "fps":
            if value != -1:
                set_once(data, "fps", value, f"{name}.{key}")
        else:
            raise unsupported_error(f"{name}.{str(key)[:80]}", "only fps and num_frames are known here")


def map_thinking(data: dict[str, Any]) -> None:
    """Take how other servers' clients ask for a thought into a request: `think`, and `think_length` in slots.

    Raises:
        RequestError: anything else is asked for, or two things at once.
    """
    effort = data.pop("reasoning_effort", None)
    if effort is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise unsupported_error("reasoning_effort", f"it must be one of {', '.join(EFFORTS)}")
        set_once(data, "think", EFFORTS[effort], "reasoning_effort")
    template = data.pop("chat_template_kwargs", {})
    if not isinstance(template, dict):
        raise unsupported_error("chat_template_kwargs", "it must be an object")
    for key, value in template.items():
        where = f"chat_template_kwargs.{str(key)[:80]}"
        if key not in ("enable_thinking", "thinking"):
            raise unsupported_error(where, "only enable_thinking is known here")
        if value is not None:
            set_once(data, "think", value, where)
    budget = data.pop("thinking_token_budget", None)
    if budget is not None:
        set_once(data, "think_length", budget, "thinking_token_budget")


def set_once(data: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set a field that may not be something else already."""
    if data.setdefault(name, value) != value:
        raise unsupported_error(where, f"{name} says something else")


class ChatRequest(AnswerRequest):
    """`/v1/chat/completions`: OpenAI's request with the settings of denoising."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    continue_final_message: bool | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_GUIDED)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`echo` is the legacy interface's."""
        if not data.get("echo", True):
            del data["echo"]
        return super().prepare(data)


class CompletionRequest(AnswerRequest):
    """`/v1/completions`: a text to be gone on with, without a chat template.

    Args:
        prompt: one text, or several to be answered each.
        echo: begin the answer with the prompt.
        logprobs: give the tokens' confidence; a number in this interface, of which none but 0 matters.
    """

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        """All of them."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def answers(self) -> int:
        """`n` for every prompt."""
        return self.n * len(self.prompts)


class DetokenizeRequest(Strict):
    """`/detokenize`: token ids to be read."""

    model: str = ""
    tokens: list[Annotated[int, Field(ge=0)]]
