"""Uploads: kept in a temporary folder, bounded together, forgotten after a while."""

import hashlib
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vidlada.machine import MEBI
from vidlada.serve.errors import RequestError, disk_errors
from vidlada.serve.limits import Limits

SIGNATURES = {  # how files begin that are read as images; everything else is a video to FFmpeg
    rb"\x89PNG\r\n\x1a\n": ".png",
    rb"\xff\xd8\xff": ".jpg",
    rb"BM.{12}": ".bmp",
    rb"RIFF.{4}WEBP": ".webp",
    rb"II\*\0|MM\0\*": ".tif",
}


def suffix_of(head: bytes) -> str:
    """File name suffix for content that begins so; empty for a video."""
    return next((suffix for start, suffix in SIGNATURES.items() if re.match(start, head, re.DOTALL)), "")


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        id: `file-…`, hard to guess.
        name: as the client gave it; never used as a path.
        path: where it lies.
        digest: SHA-256 of its content.
        size: bytes.
        purpose: as the client gave it.
        created: seconds since the epoch.
        owner: who may use it.
    """

    id: str
    name: str
    path: Path
    digest: str
    size: int
    purpose: str
    created: float
    owner: str


class FileStore:
    """The uploads of a server.

    Args:
        folder: to keep them in.
        limits: of size, of all together, and of time.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self.uploads: dict[str, Upload] = {}
        self.users: Counter[str] = Counter()
        self.removed: set[str] = set()
        self.arriving = 0  # bytes of uploads that are not complete, and of files fetched for a request

    @property
    def nbytes(self) -> int:
        """Bytes of all files, those on their way included."""
        return self.arriving + sum(upload.size for upload in self.uploads.values())

    @contextmanager
    def arrival(self) -> Iterator[Callable[[int], None]]:
        """A file on its way: gives what to call with the size of every piece, which is refused if there is no room.

        What has come takes up room until the context ends. Of an upload that is when it is complete; `add` follows.
        """
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            self.reserve(size)
            arrived += size
            self.arriving += size

        try:
            yield count
        finally:
            self.arriving -= arrived

    def reserve(self, size: int) -> None:
        """Refuse what does not fit."""
        self.expire()
        if size > self.limits.max_upload_mb * MEBI:
            raise too_large(self.limits.max_upload_mb)
        if self.nbytes + size > self.limits.max_stored_mb * MEBI:
            raise no_room()

    def write(self, source: BinaryIO, name: str, purpose: str, owner: str) -> Upload:
        """Copy an upload; to be called in a thread, followed by `add` in the event loop."""
        head = source.read(32)
        source.seek(0)
        path = self.folder / f"{uuid.uuid4().hex}{suffix_of(head)}"
        try:
            with disk_errors():
                with path.open("xb") as target:
                    shutil.copyfileobj(source, target, 2**20)
                with path.open("rb") as written:
                    digest = hashlib.file_digest(written, "sha256").hexdigest()
        except RequestError:
            path.unlink(missing_ok=True)
            raise
        identity = f"file-{uuid.uuid4().hex}"
        return Upload(identity, name, path, digest, path.stat().st_size, purpose, time.time(), owner)

    def add(self, upload: Upload) -> None:
        """Make an upload known, if there still is room."""
        try:
            self.reserve(upload.size)
        except RequestError:
            upload.path.unlink()
            raise
        self.uploads[upload.id] = upload

    def get(self, identity: str, owner: str) -> Upload:
        """An owner's upload; 404 if there is none."""
        self.expire()
        upload = self.uploads.get(identity)
        if upload is None or upload.owner != owner:
            raise RequestError(404, f"there is no file {identity[:80]!r}; it may have expired", "no_such_file")
        return upload

    def of(self, owner: str) -> list[Upload]:
        """All uploads of an owner, the oldest first."""
        self.expire()
        return [upload for upload in self.uploads.values() if upload.owner == owner]

    def page(
        self, owner: str, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[Upload], bool]:
        """Some uploads of an owner, and whether there are more.

        Args:
            owner: whose.
            after: id of the last upload of the page before; 404 if it is gone.
            limit: most uploads.
            newest_first: the order.
            purpose: only uploads for it.
        """
        listed = self.of(owner)
        if newest_first:
            listed.reverse()
        if after is not None:
            listed = listed[listed.index(self.get(after, owner)) + 1 :]
        listed = [upload for upload in listed if purpose in (None, upload.purpose)]
        return listed[:limit], len(listed) > limit

    def delete(self, identity: str, owner: str) -> None:
        """Remove an owner's upload; 404 if there is none."""
        self.forget(self.get(identity, owner))

    @contextmanager
    def in_use(self, upload: Upload) -> Iterator[None]:
        """Keep the file while it is read."""
        self.users[upload.id] += 1
        try:
            yield
        finally:
            self.users[upload.id] -= 1
            if not self.users[upload.id]:
                del self.users[upload.id]
                if upload.id in self.removed:
                    self.removed.discard(upload.id)
                    upload.path.unlink(missing_ok=True)

    def expire(self) -> None:
        """Forget what is older than the limit."""
        oldest = time.time() - self.limits.upload_seconds
        for upload in [upload for upload in self.uploads.values() if upload.created < oldest]:
            self.forget(upload)

    def forget(self, upload: Upload) -> None:
        """Remove an upload; the file goes as soon as nobody reads it."""
        self.uploads.pop(upload.id, None)
        if self.users[upload.id]:
            self.removed.add(upload.id)
        else:
            upload.path.unlink(missing_ok=True)


def no_room() -> RequestError:
    """The refusal of an upload there is no room for."""
    return RequestError(503, "there is no room for more files; delete uploads, or try later", "storage_full")


def too_large(mebibytes: int) -> RequestError:
    """The refusal of a file over the limit."""
    return RequestError(413, f"the file is larger than the {mebibytes} MiB allowed", "file_too_large")
