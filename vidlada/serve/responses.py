"""`/v1/responses`, OpenAI's newer interface: its requests as chat requests, and answers as its objects and events.

Nothing is stored between requests, so an earlier response cannot be named; its output may be sent back as input.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from vidlada.api import VidLaDA
from vidlada.engine.entry import Update
from vidlada.serve.body import validate
from vidlada.serve.completions import Reply, event
from vidlada.serve.errors import RequestError
from vidlada.serve.objects import TokenLogprob
from vidlada.serve.refusals import unsupported_error
from vidlada.serve.schema import AnswerRequest, ChatRequest, Part, Reference, Strict, Text, as_reference
from vidlada.serve.service import Submitted

NOT_STORED = "nothing is stored between requests here; send the conversation as input"
REFUSED = {
    "previous_response_id": NOT_STORED,
    "conversation": NOT_STORED,
    "prompt": "prompts are not stored here; send the text as input",
    "background": "answers are made while the client waits",
    "context_management": "conversations are not shortened here",
}


class InputText(Part):
    """Text of an item."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputRefusal(Part):
    """What an earlier answer refused to say."""

    type: Literal["refusal"]
    refusal: Text


class InputImage(Part):
    """An image by URL or by the id of an upload."""

    ignored = Part.ignored | {"detail"}
    type: Literal["input_image"]
    image_url: Annotated[Reference, BeforeValidator(as_reference)] | None = None
    file_id: str | None = None


class InputFile(Part):
    """A file: an upload, a URL, or in the request itself."""

    ignored = Part.ignored | {"filename", "detail"}
    type: Literal["input_file"]
    file_id: str | None = None
    file_data: str | None = None
    file_url: str | None = None


class InputVideo(Part):
    """A video, by analogy: OpenAI has none."""

    type: Literal["input_video"]
    video_url: Annotated[Reference, BeforeValidator(as_reference)] | None = None
    file_id: str | None = None


AnyInput = Annotated[InputText | InputRefusal | InputImage | InputFile | InputVideo, Field(discriminator="type")]


def as_items(content: Any) -> Any:
    """A text is one part."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class Item(Strict):
    """A message of the input, or of an earlier output."""

    ignored = frozenset({"id", "status", "type", "phase"})
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[AnyInput], BeforeValidator(as_items), Field(max_length=10_000)]

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Only messages can be input."""
        if data.get("type", "message") != "message":
            raise unsupported_error("input", f"an item of type {str(data['type'])[:80]!r} cannot be used; use messages")
        return super().prepare(data)


def as_messages(given: Any) -> Any:
    """A text is the user's message; reasoning of earlier answers is left out."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, list):
        return [item for item in given if not (isinstance(item, dict) and item.get("type") == "reasoning")]
    return given


class ResponsesRequest(AnswerRequest):
    """A request of this interface."""

    input: Annotated[list[Item], BeforeValidator(as_messages), Field(min_length=1, max_length=1000)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Drop or refuse what this interface alone has."""
        for name, reason in REFUSED.items():
            if data.pop(name, None):
                raise unsupported_error(name, reason)
        data.pop("truncation", None)
        reasoning = data.pop("reasoning", {})
        if isinstance(reasoning, dict) and reasoning.get("effort") is not None:
            data["reasoning_effort"] = reasoning["effort"]
        for name in data.pop("include", []):
            if name == "message.output_text.logprobs":
                data["logprobs"] = True
        text = data.pop("text", {})
        if isinstance(text, dict):
            if text.get("format"):
                data["response_format"] = text["format"]
            if text.get("verbosity"):
                data["verbosity"] = text["verbosity"]
        options = data.get("stream_options")
        if isinstance(options, dict) and set(options) <= {"include_obfuscation"}:
            del data["stream_options"]
        return super().prepare(data)

    def chat(self) -> ChatRequest:
        """The same as a chat request."""
        if self.n != 1:
            raise unsupported_error("n", "this interface gives one answer")
        messages = [{"role": item.role, "content": [part_of(part) for part in item.content]} for item in self.input]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.instructions}]})
        own = {"input", "instructions", "max_output_tokens"}
        values = self.model_dump(exclude_unset=True, exclude=own)
        return validate({"max_tokens": self.max_output_tokens, **values, "messages": messages}, ChatRequest)


def part_of(part: Any) -> dict[str, Any]:
    """A part as chat requests have it."""
    match part:
        case InputText():
            return {"type": "text", "text": part.text}
        case InputRefusal():
            return {"type": "text", "text": part.refusal}
        case InputFile():
            if part.file_url is not None:
                return {"type": "video_url", "video_url": part.file_url}
            return {"type": "file", "file": {"file_id": part.file_id, "file_data": part.file_data}}
    kind = "video_url" if isinstance(part, InputVideo) else "image_url"
    reference = part.video_url if isinstance(part, InputVideo) else part.image_url
    url = reference.url if reference is not None else part.file_id
    if not url:
        raise RequestError(422, f"a part of type {part.type!r} needs a URL or file_id", "bad_messages", "input")
    return {"type": kind, kind: url}


class ResponsesReply(Reply):
    """An answer of this interface: an item for the thought, if there is one, and one for the message."""

    identity = "resp"
    parts: ClassVar[dict[str, str]] = {"reasoning": "reasoning_text", "message": "output_text"}  # of each item

    def __init__(self, vidlada: VidLaDA, name: str, order: AnswerRequest, submitted: Sequence[Submitted]):
        super().__init__(vidlada, name, order, submitted)
        self.number = 0  # of the next event
        self.begun: list[str] = []  # items of the stream so far

    def whole(self) -> dict[str, Any]:
        """One object with all items."""
        (update,) = self.finished
        complete = update.stable.finish_reason == "stop"
        status = "completed" if complete else "incomplete"
        usage = self.usage()
        return {
            **self.body(status, self.items(update, status)),
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
            **self.draft(0, update),
        }

    def body(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """A response."""
        settings, job = self.order, self.submitted[0].handle.job
        return {
            "id": self.id, "object": "response", "created_at": self.created, "model": self.name, "status": status,
            "output": output, "error": None, "incomplete_details": None, "instructions": None, "metadata": {},
            "parallel_tool_calls": False, "tool_choice": "none", "tools": [], "store": False,
            "temperature": job.settings.temperature, "top_p": job.settings.top_p,
            "max_output_tokens": settings.max_tokens, "previous_response_id": None, "truncation": "disabled",
            "text": {"format": {"type": "text"}}, "usage": None,
        }  # fmt: skip

    def items(self, update: Update, status: str) -> list[dict[str, Any]]:
        """The output of a finished answer."""
        tokens = self.token_logprobs(0, update) if getattr(self.order, "logprobs", False) else []
        message = self.item("message", self.part("message", self.text(0, update), tokens), status)
        thought = self.reasoning(update)
        return [*([self.item("reasoning", self.part("reasoning", thought))] if thought else []), message]

    def part(self, kind: str, text: str, tokens: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """The content of an item."""
        part = {"type": self.parts[kind], "text": text}
        return {**part, "annotations": [], "logprobs": list(tokens)} if kind == "message" else part

    def item(self, kind: str, part: dict[str, Any] | None, status: str = "completed") -> dict[str, Any]:
        """An output item."""
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        content = [] if part is None else [part]
        return {"id": self.place(kind)["item_id"], "type": kind, "status": status, **more, "content": content}

    def place(self, kind: str) -> dict[str, Any]:
        """Which item an event is about."""
        index = self.begun.index(kind) if kind in self.begun else len(self.begun)
        prefix = "msg" if kind == "message" else "rs"
        return {"output_index": index, "item_id": f"{prefix}_{self.id.removeprefix('resp-')}", "content_index": 0}

    # --- the stream ---

    def event(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        content = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return event(content, kind)

    def opening(self) -> bytes:
        """The events before the first item."""
        return b"".join(
            self.event(kind, response=self.body("in_progress", []))
            for kind in ("response.created", "response.in_progress")
        )

    def begin(self, kind: str) -> bytes:
        """The events before an item's first text, if it has not begun."""
        if kind in self.begun:
            return b""
        self.begun.append(kind)
        place = self.place(kind)
        item = self.item(kind, None, "in_progress")
        return b"".join((
            self.event("response.output_item.added", output_index=place["output_index"], item=item),
            self.event("response.content_part.added", **place, part=self.part(kind, "")),
        ))  # fmt: skip

    def end(self, item: dict[str, Any]) -> bytes:
        """The events after an item's last text."""
        kind, (part,) = item["type"], item["content"]
        place = self.place(kind)
        text = {name: part[name] for name in ("text", "logprobs") if name in part}
        return b"".join((
            self.event(f"response.{self.parts[kind]}.done", **place, **text),
            self.event("response.content_part.done", **place, part=part),
            self.event("response.output_item.done", output_index=place["output_index"], item=item),
        ))  # fmt: skip

    def events(self, number: int, update: Update) -> bytes:
        """What became certain; a draft of which nothing is certain yet comes with an event of the response."""
        reasoning, text, tokens = self.delta(number, update)
        draft, found = self.draft(number, update), b""
        if reasoning:
            found += self.begin("reasoning")
            found += self.event("response.reasoning_text.delta", **self.place("reasoning"), delta=reasoning, **draft)
            draft = {}
        if text:
            if "reasoning" in self.begun and "message" not in self.begun:
                found += self.end(self.item("reasoning", self.part("reasoning", self.reasoning(update))))
            found += self.begin("message")
            place = self.place("message")
            found += self.event("response.output_text.delta", **place, delta=text, logprobs=tokens, **draft)
            draft = {}
        if draft:
            found += self.event("response.in_progress", response=self.body("in_progress", []), **draft)
        return found

    def closing(self, include_usage: bool) -> bytes:
        """The events after the last text; usage is part of them."""
        response = self.whole()
        *thoughts, message = response["output"]
        found = b""
        if "message" not in self.begun:
            found = b"".join(map(self.end, thoughts)) + self.begin("message")
        return found + self.end(message) + self.event(f"response.{response['status']}", response=response)

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error after the stream began."""
        error = body["error"]
        failed = {"code": "server_error", "message": error["message"]}
        return self.event("response.failed", response={**self.body("failed", []), "error": failed})
