"""Download videos and images from http(s) URLs into temporary files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import unquote, urlsplit

from vidlada.errors import InputError, VidLaDAError
from vidlada.settings import check_settings, setting

CHUNK = 2**18
MEBI = 2**20
SECONDS = 30.0  # without a byte
KNOWN_SUFFIX = 5  # characters of a suffix, at most
# What the first bytes of pictures are, for addresses whose name does not show it.
PICTURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}

Progress = Callable[[str, int, int | None], Any]  # address, bytes so far, bytes in all if known


@dataclass(frozen=True)
class Fetching:
    """Limits of downloads."""

    max_download_mb: int = setting(
        2048, "Largest video or image taken from a web address, in MiB.", minimum=1, maximum=2**30, metavar="MIB"
    )

    def __post_init__(self) -> None:
        check_settings(self)


def is_url(source: Any) -> bool:
    """Return whether a medium is given by an http(s) URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


@contextmanager
def download(url: str, fetching: Fetching | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """Download a URL into a temporary file, which is deleted when the context ends.

    Proxies of the environment are used. Unlike the server's clients, who are strangers, the user may name any address.

    Args:
        url: http or https.
        fetching: limits.
        progress: called as bytes arrive.

    Raises:
        InputError: the address is malformed, there is nothing, or it is too large.
        VidLaDAError: it cannot be reached, or the transfer broke off.
    """
    import httpx

    most = (fetching or Fetching()).max_download_mb * MEBI
    with NamedTemporaryFile(suffix=_suffix(url)) as file:
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=SECONDS) as response:
                if response.status_code != 200:
                    raise InputError(f"{url}: the server answers {response.status_code} {response.reason_phrase}")
                announced = response.headers.get("content-length", "")
                total = int(announced) if announced.isdigit() else None
                if total is not None and total > most:
                    raise _too_large(url, most)
                done = 0
                for chunk in response.iter_bytes(CHUNK):
                    done += len(chunk)
                    if done > most:
                        raise _too_large(url, most)
                    file.write(chunk)
                    if progress is not None:
                        progress(url, done, total)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError) as error:
            raise InputError(f"{url}: not a usable address: {error}") from error
        except (httpx.HTTPError, OSError) as error:
            raise VidLaDAError(f"{url}: cannot be fetched: {error or type(error).__name__}") from error
        if done == 0:
            raise InputError(f"{url}: there is nothing at this address")
        file.flush()
        path = Path(file.name)
        suffix = picture_suffix(path)
        if suffix is None or path.suffix == suffix:
            yield path
            return
        named = path.with_name(path.name + suffix)
        named.symlink_to(path)
        try:
            yield named
        finally:
            named.unlink()


def picture_suffix(path: Path) -> str | None:
    """Return the suffix of an image file from its first bytes, or None if it is not an image."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in PICTURES.items() if head.startswith(start)), None)


def _suffix(url: str) -> str:
    """Return the file suffix of a URL."""
    try:
        suffix = Path(unquote(urlsplit(url).path)).suffix
    except ValueError:  # half an IPv6 address; the client refuses it by name
        return ""
    return suffix.lower() if 1 < len(suffix) <= KNOWN_SUFFIX and suffix[1:].isalnum() else ""


def _too_large(url: str, most: int) -> InputError:
    return InputError(f"{url}: larger than the {most // MEBI} MiB allowed; raise max_download_mb")
