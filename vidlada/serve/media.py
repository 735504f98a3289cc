"""Where videos and images come from: data URIs, http(s) URLs, uploads, and files under an allowed folder."""

import asyncio
import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

import httpx2

from vidlada.machine import MEBI
from vidlada.serve.addresses import is_public
from vidlada.serve.errors import RequestError, disk_errors
from vidlada.serve.files import FileStore, suffix_of, too_large
from vidlada.serve.limits import Limits
from vidlada.serve.threads import FILES, in_thread, look_up

MOST_REDIRECTS = 5
CHUNK = 2**18
MOST_HEAD = 1000  # characters of a data URI before its content


@dataclass(frozen=True)
class MediaReference:
    """A video or an image of a conversation, by reference.

    Attributes:
        url: of it, or the id of an upload.
        is_image: the client says that it is an image; else its content decides.
        inline: no line break follows it: it stands in the place of a mark within a text.
    """

    url: str
    is_image: bool = False
    inline: bool = False


@dataclass(frozen=True)
class Medium:
    """A file to be decoded.

    Attributes:
        path: where it lies; its suffix distinguishes images from videos.
        key: of its content.
    """

    path: Path
    key: str


class MediaSource:
    """Turns references in requests into files.

    Args:
        folder: for temporary files.
        limits: of size and time.
        files: the uploads.
        allowed: the folder local paths must lie in; None refuses them all.
        private_urls: also fetch from private, loopback and link-local addresses.
    """

    def __init__(
        self, folder: Path, limits: Limits, files: FileStore, allowed: Path | None = None, private_urls: bool = False
    ):
        self.folder, self.limits, self.files, self.private_urls = folder, limits, files, private_urls
        self.allowed = allowed.resolve() if allowed is not None else None
        self.fetching = 0

    @asynccontextmanager
    async def open(self, reference: str, owner: str) -> AsyncIterator[Medium]:
        """The file behind a reference, for as long as the context is open.

        Args:
            reference: `data:…;base64,…`, `http(s)://…`, `file:///…` or the id of an upload.
            owner: whose uploads may be used.

        Raises:
            RequestError: it is malformed (422), not allowed (403), unknown (404), too large (413), or cannot be had
                (422, 504).
        """
        scheme = reference.partition(":")[0].lower() if ":" in reference else ""
        if scheme == "file":
            yield await in_thread(FILES, self._local, reference)
        elif scheme in ("data", "http", "https"):
            with disk_errors():
                descriptor, name = tempfile.mkstemp(dir=self.folder)
            path = Path(name)
            try:
                with self.files.arrival() as count:
                    with disk_errors(), os.fdopen(descriptor, "wb", buffering=0) as file:
                        if scheme == "data":
                            count(size_of_data_uri(reference, self.limits.max_upload_mb * MEBI))
                            digest, head = await in_thread(FILES, write_data_uri, reference, file)
                        else:
                            digest, head = await self._fetch(reference, file, count)
                    path = path.rename(path.with_name(path.name + suffix_of(head)))
                    yield Medium(path, digest)
            finally:
                path.unlink(missing_ok=True)
        elif not scheme:
            upload = self.files.get(reference, owner)
            with self.files.in_use(upload):
                yield Medium(upload.path, upload.digest)
        else:
            message = (
                f"{scheme[:20]!r} URLs are not supported; use data:, http(s):, an upload's id, or file: if allowed"
            )
            raise RequestError(422, message, "unsupported_url")

    def _local(self, reference: str) -> Medium:
        """A file under the allowed folder; symbolic links are followed before it is judged."""
        if self.allowed is None:
            raise RequestError(403, "local files are not served here (--allow-dir)", "forbidden_path")
        try:
            parts = urlsplit(reference)
            path = Path(os.path.realpath(unquote(parts.path)))
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(self.allowed):
                raise RequestError(403, "the path lies outside the allowed folder", "forbidden_path")
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            facts = None
        except PermissionError as error:
            raise RequestError(403, "the server may not read that path", "forbidden_path") from error
        except (OSError, ValueError) as error:  # names over 255 bytes, paths over 4096, null bytes, half an address
            reason = getattr(error, "strerror", None) or str(error)
            raise RequestError(422, f"the path is malformed: {reason}", "malformed_path") from error
        if facts is None or not S_ISREG(facts.st_mode):
            raise RequestError(404, "there is no such file in the allowed folder", "no_such_file")
        if facts.st_size > self.limits.max_upload_mb * MEBI:
            raise too_large(self.limits.max_upload_mb)
        return Medium(path, f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}")

    async def _fetch(self, url: str, file: BinaryIO, count: Callable[[int], None]) -> tuple[str, bytes]:
        """Download into a file, counting its bytes; digest and first bytes."""
        if self.fetching >= self.limits.max_fetches:
            raise RequestError(503, f"{self.fetching} URLs are being fetched; try later", "busy")
        self.fetching += 1
        try:
            async with asyncio.timeout(self.limits.fetch_seconds):
                return await self._download(url, file, count)
        except TimeoutError:
            seconds = self.limits.fetch_seconds
            raise RequestError(504, f"fetching the URL took longer than {seconds:g} s", "fetch_timeout") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise RequestError(422, f"the URL cannot be fetched: {reason}", "unfetchable_url") from error
        finally:
            self.fetching -= 1

    async def _download(self, url: str, file: BinaryIO, count: Callable[[int], None]) -> tuple[str, bytes]:
        most = self.limits.max_upload_mb * MEBI
        # proxies and credentials of this machine's environment are not for strangers' URLs
        async with httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client:
            for _ in range(MOST_REDIRECTS + 1):
                request = await self._checked_request(client, url)
                response = await client.send(request, stream=True)
                try:
                    if response.is_redirect and "location" in response.headers:
                        url = urljoin(url, response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise RequestError(422, f"the URL answered {response.status_code}", "unfetchable_url")
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise RequestError(422, "the URL's answer is compressed", "unfetchable_url")
                    digest, head, size = hashlib.sha256(), b"", 0
                    if int(response.headers.get("content-length", 0)) > most:
                        raise too_large(self.limits.max_upload_mb)
                    async for chunk in response.aiter_raw(CHUNK):
                        size += len(chunk)
                        if size > most:
                            raise too_large(self.limits.max_upload_mb)
                        count(len(chunk))
                        head = head or chunk[:32]
                        await in_thread(FILES, write_all, file, chunk, digest)
                    return digest.hexdigest(), head
                finally:
                    await response.aclose()
        raise RequestError(422, f"the URL redirects more than {MOST_REDIRECTS} times", "unfetchable_url")

    async def _checked_request(self, client: httpx2.AsyncClient, url: str) -> httpx2.Request:
        """A request to an address that was looked up once and judged: a name cannot point elsewhere afterwards."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise RequestError(422, "the URL is malformed", "malformed_url") from error
        if parts.scheme.lower() not in ("http", "https") or not host or parts.username is not None:
            raise RequestError(422, "only plain http and https URLs are fetched, without credentials", "malformed_url")
        addresses = await look_up(host, port or parts.scheme)
        if not self.private_urls and not all(is_public(address) for address in addresses):
            raise RequestError(403, "the URL points to an address that is not public", "forbidden_url")
        named = httpx2.URL(url)
        headers = {"Host": named.netloc.decode(), "Accept-Encoding": "identity", "User-Agent": "vidlada"}
        target, name = named.copy_with(host=addresses[0]), named.raw_host.decode()
        return client.build_request("GET", target, headers=headers, extensions={"sni_hostname": name})


def size_of_data_uri(uri: str, most: int) -> int:
    """Bytes that a data URI decodes to, padding included; 413 if there are more than `most`."""
    size = (len(uri) - uri.find(",", 0, MOST_HEAD) - 1) * 3 // 4
    if size > most:
        raise too_large(most // MEBI)
    return size


def write_data_uri(uri: str, file: BinaryIO) -> tuple[str, bytes]:
    """Write the content of `data:[type];base64,…` to a file; digest and first bytes."""
    comma = uri.find(",", 0, MOST_HEAD)
    if comma < 0 or not uri[:comma].endswith(";base64"):
        raise RequestError(422, "a data URI must have the form data:video/mp4;base64,…", "malformed_data_uri")
    try:
        content = base64.b64decode(uri[comma + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, f"the data URI is not valid base64: {error}", "malformed_data_uri") from error
    digest = hashlib.sha256()
    write_all(file, content, digest)
    return digest.hexdigest(), content[:32]


def write_all(file: BinaryIO, content: bytes, digest: "hashlib._Hash") -> None:
    """Write to an unbuffered file; a full disk takes a part first."""
    digest.update(content)
    view = memoryview(content)
    with disk_errors():
        while view:
            view = view[file.write(view) :]
