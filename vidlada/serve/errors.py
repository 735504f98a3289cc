"""What a request can fail with, and the HTTP status that says so."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vidlada.errors import VidLaDAError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RequestError(VidLaDAError):
    """A request that is refused or failed.

    Args:
        status: HTTP status code.
        message: what was wrong, and what to do.
        code: a short name for programs.
        param: the part of the request that is meant.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(writable(message))
        self.status, self.code, self.param = status, code, None if param is None else writable(param)


def writable(text: str) -> str:
    """A text as UTF-8 can hold it: halves of characters, as in names that a request gave, become escapes."""
    return text.encode(errors="backslashreplace").decode()


def shutting_down() -> RequestError:
    """The server is closing, and the request with it."""
    return RequestError(503, "the server is shutting down", "shutting_down")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what goes wrong with the server's temporary files into a refusal: 507 if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RequestError(507, "the server's disk is full; try later", "disk_full") from error
        message = f"the server cannot write its temporary files: {error.strerror}"
        raise RequestError(500, message, "disk_failed") from error
