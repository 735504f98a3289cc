"""Where media come from, and what is refused: forged requests, paths that leave, files too large, uploads too many."""

import asyncio
import base64
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vidlada.serve.errors import RequestError
from vidlada.serve.files import FileStore, suffix_of
from vidlada.serve.limits import Limits
from vidlada.serve.media import MediaSource, is_public


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "temporary"
    path.mkdir()
    return path


def source_of(folder, allowed=None, private_urls=False, **limits):
    checked = Limits(**limits)
    return MediaSource(folder, checked, FileStore(folder, checked), allowed, private_urls)


def content_of(source, reference, owner=""):
    """What a reference leads to; nothing temporary must be left."""

    async def read():
        async with source.open(reference, owner) as medium:
            return medium, medium.path.read_bytes()

    before = set(source.folder.iterdir())
    try:
        return asyncio.run(read())
    finally:
        assert set(source.folder.iterdir()) == before


def refusal(source, reference, owner=""):
    with pytest.raises(RequestError) as caught:
        content_of(source, reference, owner)
    return caught.value.status, caught.value.code


class Site(BaseHTTPRequestHandler):
    """A site with a file, redirects, and ways to misbehave."""

    def do_GET(self):
        path = self.path
        if path == "/video":
            self.reply(200, b"video" * 1000)
        elif path == "/long":
            self.reply(200, b"x" * 3_000_000)
        elif path == "/unannounced":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x" * 100_000)
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            time.sleep(3)
        elif path == "/packed":
            self.reply(200, b"x", **{"Content-Encoding": "gzip"})
        elif path == "/loop":
            self.reply(302, b"", Location="/loop")
        elif path == "/away":
            self.reply(302, b"", Location="http://169.254.169.254/latest/meta-data")
        elif path == "/file":
            self.reply(302, b"", Location="file:///etc/passwd")
        elif path == "/once":
            self.reply(307, b"", Location="video")
        else:
            self.reply(404, b"")

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def running_site():
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()


@pytest.fixture(scope="module")
def site():
    with running_site() as url:
        yield url


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.20.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1", False), ("fc00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_is_public(address, public):
    assert is_public(address) == public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_private_addresses_are_refused_in_every_spelling(folder, site, host):
    port = site.rpartition(":")[2]
    assert refusal(source_of(folder), f"http://{host}:{port}/video") == (403, "forbidden_url")


def test_a_name_is_judged_by_all_its_addresses(folder, monkeypatch):
    def both(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert refusal(source_of(folder), "http://rebinding.example/video") == (403, "forbidden_url")


def test_the_judged_address_is_the_one_connected_to(folder, site, monkeypatch):
    """The name is looked up once: what it says a moment later does not matter."""
    port, hosts = int(site.rpartition(":")[2]), []

    def once(host, port_, **options):
        hosts.append(host)
        assert len(hosts) == 1, "looked up again"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    monkeypatch.setattr("vidlada.serve.media.is_public", lambda address: True)
    _, content = content_of(source_of(folder), f"http://rebinding.example:{port}/video")
    assert content == b"video" * 1000


def test_fetching(folder, site):
    source = source_of(folder, private_urls=True, max_upload_mb=2)
    medium, content = content_of(source, f"{site}/video")
    assert content == b"video" * 1000
    assert content_of(source, f"{site}/once")[0].key == medium.key
    assert refusal(source, f"{site}/long") == (413, "file_too_large")
    assert refusal(source, f"{site}/unannounced") == (413, "file_too_large")
    impatient = source_of(folder, private_urls=True, fetch_seconds=1.0)
    assert refusal(impatient, f"{site}/slow") == (504, "fetch_timeout")
    assert refusal(source, f"{site}/packed") == (422, "unfetchable_url")
    assert refusal(source, f"{site}/loop") == (422, "unfetchable_url")
    assert refusal(source, f"{site}/nothing") == (422, "unfetchable_url")
    assert refusal(source, f"{site}/file") == (422, "malformed_url")
    assert refusal(source, "http://127.0.0.1:1/video") == (422, "unfetchable_url")


def test_fetched_files_take_up_room(folder, site):
    source = source_of(folder, private_urls=True, max_upload_mb=3, max_stored_mb=3)
    upload = add(source.files, b"x" * 2**20)
    data = f"data:;base64,{base64.b64encode(b'x' * 3_000_000).decode()}"
    for reference in (f"{site}/long", f"{site}/unannounced", data):
        assert refusal(source, reference) == (503, "storage_full")
    source.files.delete(upload.id, "")
    assert len(content_of(source, f"{site}/long")[1]) == len(content_of(source, data)[1]) == 3_000_000
    assert source.files.nbytes == 0


def test_redirects_are_judged(folder, site, monkeypatch):
    """A public site may not send the server to a private address."""
    monkeypatch.setattr("vidlada.serve.media.is_public", lambda address: address == "127.0.0.1")
    assert refusal(source_of(folder), f"{site}/away") == (403, "forbidden_url")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://user:pw@example.com/", "http://[::1", "http://a:99999/", "ftp://example.com/x", "gopher://x/",
     "javascript:alert(1)"],
)  # fmt: skip
def test_malformed_urls(folder, url):
    assert refusal(source_of(folder), url)[0] == 422


def test_data_uris(folder):
    source = source_of(folder, max_upload_mb=1)
    medium, content = content_of(source, "data:video/mp4;base64," + base64.b64encode(b"hello").decode())
    assert content == b"hello"
    assert medium.path.suffix == ""
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n....").decode()
    assert content_of(source, f"data:;base64,{png}")[0].path.suffix == ".png"
    for bad in ("data:video/mp4,plain", "data:video/mp4;base64,!!!", "data:"):
        assert refusal(source, bad) == (422, "malformed_data_uri")
    assert refusal(source, "data:;base64," + "A" * 2_000_000) == (413, "file_too_large")


def test_local_paths(folder, tmp_path):
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    (allowed / "sub" / "clip one.mp4").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "folder").symlink_to(tmp_path)
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "x").write_bytes(b"outside")
    source = source_of(folder, allowed)
    assert content_of(source, f"file://{allowed}/sub/clip%20one.mp4")[1] == b"inside"
    for outside in ("link", "folder/secret", "../secret", "sub/../../secret", "../allowed-not/x", "%2e%2e/secret"):
        assert refusal(source, f"file://{allowed}/{outside}") == (403, "forbidden_path")
    assert refusal(source, "file:///etc/passwd") == (403, "forbidden_path")
    assert refusal(source, f"file://elsewhere{allowed}/sub/clip%20one.mp4") == (403, "forbidden_path")
    assert refusal(source, f"file://{allowed}/none.mp4") == (404, "no_such_file")
    assert refusal(source, f"file://{allowed}/sub") == (404, "no_such_file")
    assert refusal(source, f"file://{allowed}/%00")[0] in (403, 404, 422)
    assert refusal(source_of(folder), f"file://{allowed}/sub/clip%20one.mp4") == (403, "forbidden_path")


def add(store, content, owner=""):
    import io

    upload = store.write(io.BytesIO(content), "../../name.mp4", "user_data", owner)
    store.add(upload)
    return upload


def test_uploads(folder):
    source = source_of(folder, max_upload_mb=2, max_stored_mb=3)
    store = source.files
    upload = add(store, b"x" * 100, owner="me")
    assert upload.path.parent == folder
    assert content_of(source, upload.id, "me")[1] == b"x" * 100
    assert refusal(source, upload.id, "you") == (404, "no_such_file")
    assert refusal(source, "file-unknown") == (404, "no_such_file")
    with pytest.raises(RequestError, match="larger"):
        store.reserve(3 * 2**20)
    add(store, b"x" * 2**21)
    with pytest.raises(RequestError, match="no room"):
        add(store, b"x" * 2**21)
    assert len(list(folder.iterdir())) == 2
    store.delete(upload.id, "me")
    assert store.of("me") == []


def test_a_deleted_upload_is_readable_to_its_end(folder):
    source = source_of(folder)
    upload = add(source.files, b"content")

    async def read():
        async with source.open(upload.id, "") as medium:
            source.files.delete(upload.id, "")
            assert medium.path.read_bytes() == b"content"
        assert not medium.path.exists()

    asyncio.run(read())


def test_uploads_expire(folder):
    source = source_of(folder, upload_seconds=1.0)
    upload = add(source.files, b"content")
    source.files.uploads[upload.id] = type(upload)(**{**vars(upload), "created": time.time() - 2})
    assert refusal(source_of(folder), upload.id)[0] == 404
    assert source.files.of("") == []
    assert not upload.path.exists()


def test_suffixes():
    assert suffix_of(b"\xff\xd8\xff\xe0") == ".jpg"
    assert suffix_of(b"RIFF\n\n\n\nWEBPVP8 ") == ".webp"
    assert suffix_of(b"RIFF\n\n\n\nAVI LIST") == ""
    assert suffix_of(b"\0\0\0\x20ftypisom") == ""
