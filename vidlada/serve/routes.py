"""The routes: OpenAI's for models, answers and files; the tokenizer, health and metrics."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vidlada import __version__
from vidlada.serve.completions import ChatReply
from vidlada.serve.http import answer_head
from vidlada.serve.legacy import TextReply
from vidlada.serve.objects import (
    ChatCompletion,
    DecodedTokens,
    DeletedFile,
    ErrorObject,
    FileList,
    FileObject,
    FrameStrip,
    Health,
    ModelList,
    ModelObject,
    ResponseObject,
    TextCompletion,
    Tokens,
    Version,
)
from vidlada.serve.responses import ResponsesReply, ResponsesRequest
from vidlada.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest
from vidlada.serve.server import Server

router = APIRouter(responses={"4XX": {"model": ErrorObject}, "5XX": {"model": ErrorObject}})
COMPONENTS = "#/components/schemas/"
BODIES: tuple[type[BaseModel], ...] = (ChatRequest, ResponsesRequest, CompletionRequest, DetokenizeRequest)


def body_of(*models: type[BaseModel]) -> dict[str, Any]:
    """Describe the body of a route that parses its own, within bounds."""
    schemas = [{"$ref": f"{COMPONENTS}{model.__name__}"} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def server_of(request: Request) -> Server:
    """The application's server."""
    found: Server = request.app.state.server
    return found


Serving = Annotated[Server, Depends(server_of)]


async def owner_of(server: Serving, authorization: Annotated[str, Header()] = "") -> str:
    """Who asks; 401 without a valid key."""
    return server.owner(authorization)


Owner = Annotated[str, Depends(owner_of)]


@router.get("/health")
async def health(server: Serving, response: Response) -> Health:
    """Whether the engine runs."""
    alive = server.service.engine.alive
    response.status_code = 200 if alive else 503
    return {"status": "ok" if alive else "the engine has stopped"}


@router.get("/version")
async def version() -> Version:
    """The package's version."""
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(server: Serving, owner: Owner) -> Response:
    """Figures in Prometheus' format."""
    return PlainTextResponse(server.metrics.text())


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, owner: Owner) -> Response:
    """The description of the interface."""
    description = request.app.openapi()
    _, bodies = models_json_schema([(each, "validation") for each in BODIES], ref_template=COMPONENTS + "{model}")
    description["components"]["schemas"] |= bodies["$defs"]
    return JSONResponse(description)


@router.get("/v1/models")
async def models(server: Serving, owner: Owner) -> ModelList:
    """The model, as a list."""
    return {"object": "list", "data": [server.model()]}


@router.get("/v1/models/{name:path}")
async def model(server: Serving, owner: Owner, name: str) -> ModelObject:
    """The model."""
    server.check_model(name)
    return server.model()


# --- answers; their bodies are parsed in a thread, within bounds ---


@router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=body_of(ChatRequest))
async def chat(request: Request, server: Serving, owner: Owner) -> Response:
    """The answer to a conversation."""
    return await server.answer(request, owner, ChatRequest, ChatReply)


@router.post("/v1/responses", response_model=ResponseObject, openapi_extra=body_of(ResponsesRequest))
async def responses(request: Request, server: Serving, owner: Owner) -> Response:
    """The same in OpenAI's newer interface."""
    return await server.answer(request, owner, ResponsesRequest, ResponsesReply)


@router.post("/v1/completions", response_model=TextCompletion, openapi_extra=body_of(CompletionRequest))
async def completions(request: Request, server: Serving, owner: Owner) -> Response:
    """A text continued."""
    return await server.answer(request, owner, CompletionRequest, TextReply)


@router.post("/tokenize", openapi_extra=body_of(ChatRequest, CompletionRequest))
async def tokenize(request: Request, server: Serving, owner: Owner) -> Tokens:
    """The token ids of a request or a text."""
    return await server.tokenize(request, owner)


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request, server: Serving, owner: Owner) -> DecodedTokens:
    """The text of token ids."""
    return await server.detokenize(request)


# --- files ---


@router.post("/v1/files")
async def upload(request: Request, server: Serving, owner: Owner) -> FileObject:
    """A file sent as multipart/form-data."""
    return await server.upload(request, owner)


@router.get("/v1/files")
async def files(
    server: Serving,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """A page of uploads."""
    uploads, has_more = server.service.files.page(owner, after, limit, order == "desc", purpose)
    ids = [upload.id for upload in uploads]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    data = [server.file_object(each) for each in uploads]
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


@router.get("/v1/files/{file_id}")
async def file(server: Serving, owner: Owner, file_id: str) -> FileObject:
    """An upload."""
    return server.file_object(server.service.files.get(file_id, owner))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def content(server: Serving, owner: Owner, file_id: str) -> Response:
    """What was uploaded."""
    found = server.service.files.get(file_id, owner)
    return FileResponse(found.path, filename=found.name, media_type="application/octet-stream")


@router.get("/v1/files/{file_id}/frames")
async def frames(
    request: Request,
    server: Serving,
    owner: Owner,
    file_id: str,
    frames: int | None = None,
    fps: float | None = None,
    force_sample: bool = False,
) -> FrameStrip:
    """The frames that the model sees of an upload."""
    return await server.frames(request, owner, file_id, server.service.sampling(frames, fps, force_sample))


@router.delete("/v1/files/{file_id}")
async def delete(server: Serving, owner: Owner, file_id: str) -> DeletedFile:
    """Remove an upload."""
    server.service.files.delete(file_id, owner)
    return {"id": file_id, "object": "file", "deleted": True}


answer_head(router)
