"""One model behind the routes: questions answered whole or as streams, the tokenizer, uploads."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from vidlada import __version__
from vidlada.api import VidLaDA
from vidlada.errors import VidLaDAError
from vidlada.machine import MEBI
from vidlada.serve.body import LimitedReceive, parse_in_thread
from vidlada.serve.completions import Reply, updates_of
from vidlada.serve.conversation import question_of
from vidlada.serve.errors import RequestError, disk_errors
from vidlada.serve.files import Upload, too_large
from vidlada.serve.http import EventStream, SiteRules, as_request_error, cancel_on_disconnect, error_body
from vidlada.serve.metrics import Metrics
from vidlada.serve.objects import DecodedTokens, FileObject, FrameStrip, ModelObject, Tokens
from vidlada.serve.previews import strip
from vidlada.serve.responses import ResponsesRequest
from vidlada.serve.schema import AnswerRequest, ChatRequest, CompletionRequest, DetokenizeRequest
from vidlada.serve.service import Service
from vidlada.serve.threads import FILES, PICTURES, in_thread
from vidlada.settings import as_sequence
from vidlada.video import Sampling

MULTIPART_BYTES = 2**16  # an upload's envelope may add
log = logging.getLogger("vidlada.serve")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server, besides its limits.

    Args:
        name: the model is served under.
        api_keys: one of them must be given as a bearer token; empty for no check.
        allowed: folder that local paths (`file:///…`) must lie in; None refuses them.
        private_urls: also fetch from addresses that are not public.
        log_content: log questions and answers too.
        site_rules: which web pages may use it.
    """

    name: str
    api_keys: str | Sequence[str] = ()
    allowed: Path | None = None
    private_urls: bool = False
    log_content: bool = False
    site_rules: SiteRules = SiteRules()

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_keys", tuple(as_sequence(self.api_keys)))  # one text is one key, not its letters


class Server:
    """One model behind the routes."""

    def __init__(self, vidlada: VidLaDA, settings: ServerSettings, service: Service):
        self.vidlada, self.settings, self.service = vidlada, settings, service
        self.limits = service.limits
        self.arrivals = service.arrivals
        self.metrics = Metrics(service)

    def owner(self, authorization: str) -> str:
        """Who asks, by the header of that name; 401 without a valid key."""
        if not self.settings.api_keys:
            return ""
        kind, _, given = authorization.partition(" ")
        valid = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.settings.api_keys]
        if kind.lower() != "bearer" or not any(valid):
            raise RequestError(401, "give a valid API key: Authorization: Bearer KEY", "invalid_api_key")
        return hashlib.sha256(given.strip().encode()).hexdigest()

    # --- answers ---

    async def answer(
        self, request: Request, owner: str, model: type[AnswerRequest], reply_type: type[Reply]
    ) -> Response:
        """Answer a request of any interface.

        Args:
            request: of the client.
            owner: whose uploads it may name.
            model: what its body has to be.
            reply_type: what the interface answers.
        """
        started = time.perf_counter()
        async with AsyncExitStack() as stack:
            self.service.refuse_if_full()
            body = await stack.enter_async_context(self.arrivals.json_body(request))
            deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
            stack.enter_context(self.service.admit())
            order = await parse_in_thread(body, model, self.vidlada.processor.max_length)
            del body
            self.check_model(order.model)
            if isinstance(order, ResponsesRequest):
                order = order.chat()
            for _ in range(order.answers - 1):
                stack.enter_context(self.service.admit())
            try:
                async with asyncio.timeout_at(deadline):
                    submitted = await cancel_on_disconnect(request, self.service.submit(order, owner))
                    for each in submitted:
                        stack.callback(each.handle.cancel)
                    reply = reply_type(self.vidlada, self.settings.name, order, submitted)
                    if not order.stream:
                        return await cancel_on_disconnect(request, self.whole(reply, started))
            except TimeoutError:
                raise self.too_slow() from None
            events = self.stream(reply, started, deadline)
            return EventStream(events, stack.pop_all(), deadline + self.limits.reader_seconds)
        raise AssertionError("unreachable")

    def check_model(self, name: str) -> None:
        """404 for another model's name."""
        if name != self.settings.name:
            message = f"the model {name[:80]!r} is not served here; use {self.settings.name!r}"
            raise RequestError(404, message, "model_not_found", "model")

    def too_slow(self) -> RequestError:
        """The refusal after the deadline."""
        return RequestError(504, f"the request took longer than {self.limits.request_seconds:g} s", "timeout")

    async def whole(self, reply: Reply, started: float) -> Response:
        """The answers at once."""
        async for number, update in updates_of([each.handle for each in reply.submitted]):
            reply.last[number] = update
        self.finish(reply, started)
        return JSONResponse(reply.whole())

    async def stream(self, reply: Reply, started: float, deadline: float) -> AsyncIterator[bytes]:
        """The answers as they settle."""
        yield reply.opening()
        try:
            async with aclosing(updates_of([each.handle for each in reply.submitted], deadline)) as updates:
                async for number, update in updates:
                    events = reply.events(number, update)
                    if events:
                        yield events
        except TimeoutError:
            yield reply.failure(error_body(self.too_slow()))
            return
        except VidLaDAError as error:
            yield reply.failure(error_body(as_request_error(error)))
            return
        self.finish(reply, started)
        options = reply.order.stream_options
        yield reply.closing(options is not None and options.include_usage)

    def finish(self, reply: Reply, started: float) -> None:
        """Count and log answers."""
        total = time.perf_counter() - started
        for number, update in enumerate(reply.finished):
            self.metrics.observe({**reply.seconds(number, update), "total": total})
            prompt = reply.submitted[number].prompt_tokens(update.state.statistics)
            line = (
                f"{reply.id} prompt={prompt} completion={update.stable.tokens} "
                f"steps={update.state.step} finish={update.stable.finish_reason} seconds={total:.3f}"
            )
            if self.settings.log_content:
                line += f" question={question_of(reply.order)!r} answer={reply.text(number, update)!r}"
            log.info(line)

    # --- the tokenizer ---

    async def tokenize(self, request: Request, owner: str) -> Tokens:
        """`POST /tokenize`: the token ids of a chat request or of a text, as the model gets them."""
        async with AsyncExitStack() as stack:
            body = await stack.enter_async_context(self.arrivals.json_body(request))
            stack.enter_context(self.service.admit())
            model = CompletionRequest if b'"messages"' not in body else ChatRequest
            order = await parse_in_thread(body, model, self.vidlada.processor.max_length)
            self.check_model(order.model)
            async with asyncio.timeout(self.limits.request_seconds):
                jobs, _ = await cancel_on_disconnect(request, self.service.prepare(order, owner))
            ids = jobs[0].encoded.input_ids
            most = self.vidlada.processor.max_length
            return {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": None}
        raise AssertionError("unreachable")

    async def detokenize(self, request: Request) -> DecodedTokens:
        """`POST /detokenize`: the text of token ids."""
        async with AsyncExitStack() as stack:
            body = await stack.enter_async_context(self.arrivals.json_body(request))
            order = await parse_in_thread(body, DetokenizeRequest, self.vidlada.processor.max_length)
        most = len(self.vidlada.processor.tokenizer)
        if any(token >= most for token in order.tokens):
            raise RequestError(422, f"tokens: the ids of this model are below {most}", "invalid_request", "tokens")
        return {"prompt": self.vidlada.processor.decode(order.tokens, skip_special_tokens=False)}

    # --- models ---

    def model(self) -> ModelObject:
        """What `/v1/models` says, and what the page needs to know."""
        config, settings = self.vidlada.model.config, self.vidlada.settings()
        return {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "vidlada",
            "vidlada": {
                "version": __version__,
                "gen_length": settings.gen_length,
                "block_length": settings.block_length,
                "max_length": config.max_length,
                "tokens_per_frame": config.tokens_per_frame(),
                "max_tokens": self.limits.max_tokens,
                "max_frames": self.limits.max_frames,
                "max_upload_mb": self.limits.max_upload_mb,
                "text_only": config.text_only,
                "multi_turn": config.multi_turn,
            },
        }

    # --- files ---

    async def upload(self, request: Request, owner: str) -> FileObject:
        """`POST /v1/files`, multipart with `file` and `purpose`."""
        files = self.service.files
        mebibytes = self.limits.max_upload_mb

        async def take(limited: Request, receive: LimitedReceive) -> Upload:
            async with limited.form(max_files=1, max_fields=20) as form:
                if not is_complete_multipart(request.headers.get("content-type", ""), receive.tail):
                    raise RequestError(400, "the upload was cut off: its last boundary is missing", "cut_off")
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    message = "send multipart/form-data with the file in the field 'file'"
                    raise RequestError(422, message, "missing_file", "file")
                if not file.size:
                    raise RequestError(422, "the file is empty", "empty_file", "file")
                if file.size > mebibytes * MEBI:
                    raise too_large(mebibytes)
                purpose = str(form.get("purpose") or "user_data")[:64]
                name = (file.filename or "video")[:255]
                return await in_thread(FILES, files.write, file.file, name, purpose, owner)

        with files.arrival() as count, disk_errors():
            most = mebibytes * MEBI + MULTIPART_BYTES
            upload = await self.arrivals.receive(request, most, mebibytes, take, count)
        files.add(upload)
        return self.file_object(upload)

    def file_object(self, upload: Upload) -> FileObject:
        """An upload as OpenAI describes one."""
        return {
            "id": upload.id,
            "object": "file",
            "bytes": upload.size,
            "created_at": int(upload.created),
            "expires_at": int(upload.created + self.limits.upload_seconds),
            "filename": upload.name,
            "purpose": upload.purpose,
            "status": "processed",
        }

    async def frames(self, request: Request, owner: str, file_id: str, sampling: Sampling) -> FrameStrip:
        """`GET /v1/files/{id}/frames`: what the model sees of an upload."""

        async def preview() -> FrameStrip:
            async with self.service.previews:
                shown = await self.service.loader.preview(file_id, owner, sampling)
            return await in_thread(PICTURES, strip, shown.frames)

        with self.service.admit_preview():
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    return await cancel_on_disconnect(request, preview())
            except TimeoutError:
                raise self.too_slow() from None


def is_complete_multipart(content_type: str, tail: bytes) -> bool:
    """Whether a multipart body's last bytes have the boundary that closes it; what is not multipart has none."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    return boundary is None or b"--" + boundary + b"--" in tail
