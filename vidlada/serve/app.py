"""The application: routes, errors, the page, and what lives as long as it does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vidlada import __version__
from vidlada.api import VidLaDA
from vidlada.errors import VidLaDAError
from vidlada.serve.errors import RequestError
from vidlada.serve.http import ErrorMiddleware, as_request_error, error_response
from vidlada.serve.limits import Limits
from vidlada.serve.routes import router
from vidlada.serve.server import Server, ServerSettings
from vidlada.serve.service import Service
from vidlada.serve.temporary import temporary_folder

PAGE = Path(__file__).parent / "page"


def create_app(vidlada: VidLaDA, settings: ServerSettings, limits: Limits) -> FastAPI:
    """The application that serves a model.

    Args:
        vidlada: the model; nobody else may run it from now on.
        settings: names, keys, what may be read.
        limits: of everything.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with temporary_folder() as folder:
            service = Service(vidlada, limits, folder, settings.allowed, settings.private_urls)
            app.state.server = Server(vidlada, settings, service)
            try:
                yield
            finally:
                await service.close()

    app = FastAPI(
        title="vidlada", version=__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(VidLaDAError, on_vidlada_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_bad_parameter)
    if settings.site_rules.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.site_rules.origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )  # fmt: skip
    app.add_middleware(ErrorMiddleware, rules=settings.site_rules)
    app.include_router(router)
    app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    return app


async def on_vidlada_error(request: Request, error: Exception) -> Response:
    """Ours, with the status they have."""
    return error_response(as_request_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """The framework's: no such route or method."""
    assert isinstance(error, HTTPException)
    response = error_response(RequestError(error.status_code, str(error.detail), "http_error"))
    response.headers.update(error.headers or {})
    return response


async def on_bad_parameter(request: Request, error: Exception) -> Response:
    """A parameter of a path or query that cannot be used."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return error_response(RequestError(422, f"{where}: {first['msg']}", "invalid_request", where))
