"""Threads for work that would hold up the event loop: a pool for each kind, so that no kind waits for another.

Looking up names has no pool: a name server may let one wait for a minute, and Python waits for the threads of pools
before it ends. Each lookup is a thread of its own that nobody waits for.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vidlada.serve.errors import RequestError

JSON = ThreadPoolExecutor(1, "vidlada-json")  # holds the interpreter's lock: more threads would only add memory
TEXT = ThreadPoolExecutor(2, "vidlada-text")  # tokenizing a question
LONG_TEXT = ThreadPoolExecutor(1, "vidlada-long-text")  # tokenizing what takes a while
FILES = ThreadPoolExecutor(8, "vidlada-files")  # reading and writing files
PICTURES = ThreadPoolExecutor(1, "vidlada-pictures")  # encoding previews

MOST_LOOKUPS = 64
lookups = threading.Semaphore(MOST_LOOKUPS)
Result = TypeVar("Result")


async def in_thread(pool: ThreadPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread of a pool."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def look_up(host: str, port: int | str) -> list[str]:
    """Addresses of a name, IPv4 first.

    Raises:
        OSError: there are none.
        RequestError: too many lookups are under way (503).
    """
    if not lookups.acquire(blocking=False):
        raise RequestError(503, "too many names are being looked up; try later", "busy")
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Any]] = loop.create_future()

    def settle(entries: list[Any], error: Exception | None) -> None:
        if found.done():  # the request gave up
            return
        if error is None:
            found.set_result(entries)
        else:
            found.set_exception(error)

    def work() -> None:
        entries, error = [], None
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as caught:  # OSError, or UnicodeError for a name that is none
            error = caught
        finally:
            lookups.release()
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, entries, error)

    threading.Thread(target=work, name="vidlada-lookup", daemon=True).start()
    addresses = {str(entry[4][0]).partition("%")[0] for entry in await found}
    return sorted(addresses, key=lambda text: (":" in text, text))
