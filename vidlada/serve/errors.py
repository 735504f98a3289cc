"""What a request can fail with, and the HTTP status that says so."""

from vidlada.errors import VidLaDAError


class RequestError(VidLaDAError):
    """A request that is refused or failed.

    Args:
        status: HTTP status code.
        message: what was wrong, and what to do.
        code: a short name for programs.
        param: the part of the request that is meant.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def shutting_down() -> RequestError:
    """The server is closing, and the request with it."""
    return RequestError(503, "the server is shutting down", "shutting_down")
