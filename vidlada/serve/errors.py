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


class ClosingError(RequestError):
    """The server is ending, and the request with it."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down", "shutting_down")
