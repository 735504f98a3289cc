"""The JSON objects that the server answers with, for the description of its interface (`/openapi.json`).

The keys are OpenAI's, vLLM's for the tokenizer, and ours below `vidlada` and `diffusion`.
"""

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic asks for these before Python 3.12
)

from typing_extensions import TypedDict


class Health(TypedDict):
    """Whether the engine runs."""

    status: str


class Version(TypedDict):
    """The package's version."""

    version: str


class ErrorDetails(TypedDict):
    """What was wrong, what to do, and the part of the request that is meant."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorObject(TypedDict):
    """Every error."""

    error: ErrorDetails


class ModelFacts(TypedDict):
    """A model's defaults and the server's limits."""

    version: str
    gen_length: int
    block_length: int
    max_length: int
    tokens_per_frame: int
    max_tokens: int
    max_frames: int
    max_upload_mb: int
    text_only: bool
    multi_turn: bool


class ModelObject(TypedDict):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    vidlada: ModelFacts


class ModelList(TypedDict):
    """The one model that is served."""

    object: Literal["list"]
    data: list[ModelObject]


class Tokens(TypedDict):
    """The token ids of a request."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: None


class DecodedTokens(TypedDict):
    """The text of token ids."""

    prompt: str


# --- files ---


class FileObject(TypedDict):
    """An upload; times are in seconds since 1970."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(TypedDict):
    """A page of uploads."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """An upload that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Picture(TypedDict):
    """A frame as a data URI, and its time in seconds."""

    time: float
    image: str


class FrameStrip(TypedDict):
    """What the model sees of a video: its length in seconds, its size in pixels, frames."""

    duration: float
    width: int
    height: int
    frames: list[Picture]


# --- answers ---


class PromptTokens(TypedDict):
    """Parts of the prompt."""

    cached_tokens: int
    visual_tokens: int


class CompletionTokens(TypedDict):
    """Parts of the answer."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class TokenLogprob(TypedDict):
    """A token with the log of the probability with which it was committed."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: NotRequired[list["TokenLogprob"]]


class ChatLogprobs(TypedDict):
    """Of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: NotRequired[str]


class ChatChoice(TypedDict):
    """An answer and why it ended."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None


class DraftToken(TypedDict):
    """A slot: its text, None while it has no proposal, and whether it is final."""

    text: str | None
    final: bool
    confidence: float


class Draft(TypedDict):
    """An answer's slots after a step; the last four fields come with the finished answer."""

    step: int
    slots: int
    thinking: bool
    tokens: list[DraftToken]
    frame_times: NotRequired[list[float]]
    settings: NotRequired[dict[str, Any]]
    statistics: NotRequired[dict[str, Any]]


class ChatCompletion(TypedDict):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    diffusion: NotRequired[Draft]


class TextLogprobs(TypedDict):
    """Of an answer's tokens, in the older interface."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """A continuation and why it ended."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(TypedDict):
    """Continuations of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    diffusion: NotRequired[Draft]


class OutputPart(TypedDict):
    """Text of an answer or of its thought."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[TokenLogprob]]


class OutputItem(TypedDict):
    """An answer or its thought."""

    id: str
    type: Literal["message", "reasoning"]
    status: str
    content: list[OutputPart]
    role: NotRequired[Literal["assistant"]]
    summary: NotRequired[list[Any]]


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: CompletionTokens
    total_tokens: int


class ResponseObject(TypedDict):
    """An answer in OpenAI's newer interface; what it has no part in is constant."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[OutputItem]
    usage: ResponseUsage
    incomplete_details: dict[str, str] | None
    temperature: float
    top_p: float | None
    max_output_tokens: int | None
    text: dict[str, Any]
    error: None
    instructions: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    tool_choice: str
    tools: list[Any]
    truncation: str
    diffusion: NotRequired[Draft]
