"""What one request waits for holds up nobody else: the others are answered while it still waits."""

import asyncio
import base64
import errno
import json
import resource
import socket
import threading
from contextlib import contextmanager

import pytest
from media import write_video
from serve.inside import QUESTION, Call, chat, running_app, until

from vidlada.cli.serve import listen
from vidlada.serve import body as body_module
from vidlada.serve import threads
from vidlada.serve.decoder import Decoders
from vidlada.serve.service import MOST_PREVIEWS

FILES = "/v1/files"


def about(url):
    """A question about a video."""
    shown = {"type": "video_url", "video_url": {"url": url}}
    return {**QUESTION, "messages": [{"role": "user", "content": [{"type": "text", "text": "is it red ?"}, shown]}]}


async def others_are_answered(http):
    """A stranger's question, and the probe of whoever watches the server."""
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.post("/v1/chat/completions", json=QUESTION)).status_code == 200


@contextmanager
def block(monkeypatch, where, name):
    """Let a function wait, in its thread, until the context ends; gives an event that says that it was called."""
    called, free, function = threading.Event(), threading.Event(), getattr(where, name)

    def waiting(*arguments, **options):
        called.set()
        free.wait(60)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, waiting)
        try:
            yield called
        finally:
            free.set()


@contextmanager
def slow_names(monkeypatch):
    """Name servers that answer, that every name is this machine, once the context ends."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    with block(monkeypatch, socket, "getaddrinfo") as called:
        yield called


def test_slow_name_servers(small, monkeypatch):
    """As many slow names as there may be lookups; one more is told so, and who names no URL is answered."""

    async def run():
        async with running_app(small, {"max_fetches": 100, "max_queue": 100}) as (app, http):
            with slow_names(monkeypatch) as called:
                urls = [f"http://slow-{number}.example/x" for number in range(threads.MOST_LOOKUPS)]
                tasks = [asyncio.ensure_future(http.post("/v1/chat/completions", json=about(url))) for url in urls]
                await until(called.is_set)
                await until(lambda: app.state.server.service.media.fetching == len(urls))
                await others_are_answered(http)
                await until(lambda: not threads.lookups._value)
                assert (await http.post("/v1/chat/completions", json=about("http://a.example"))).status_code == 503
                assert not any(task.done() for task in tasks)
            assert {response.status_code for response in await asyncio.gather(*tasks)} == {403}

    asyncio.run(run())


def test_fetches_are_bounded(small, monkeypatch):
    async def run():
        async with running_app(small, {"max_fetches": 1}) as (app, http):
            with slow_names(monkeypatch) as called:
                task = asyncio.ensure_future(http.post("/v1/chat/completions", json=about("http://slow.example/x")))
                await until(called.is_set)
                refused = await http.post("/v1/chat/completions", json=about("http://other.example/x"))
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
                await others_are_answered(http)
            await task
            assert app.state.server.service.media.fetching == 0

    asyncio.run(run())


def test_parsing(small, monkeypatch):
    """The probe does not wait for JSON, however long it takes."""

    async def run():
        async with running_app(small) as (_, http):
            with block(monkeypatch, body_module, "parse") as called:
                task = asyncio.ensure_future(http.post("/v1/chat/completions", json=QUESTION))
                await until(called.is_set)
                assert (await http.get("/health")).status_code == 200
                assert (await http.get("/v1/models")).status_code == 200
                assert not task.done()
            assert (await task).status_code == 200

    asyncio.run(run())


def test_tokenizing_a_long_text(small, monkeypatch):
    """Short questions have threads of their own."""
    encode, called, free = small.processor.encode, threading.Event(), threading.Event()

    def slow(messages, counts):
        if len(str(messages)) > 10_000:
            called.set()
            free.wait(60)
        return encode(messages, counts)

    monkeypatch.setattr(small.processor, "encode", slow)

    async def run():
        async with running_app(small) as (_, http):
            long = {**QUESTION, "messages": [{"role": "user", "content": "red " * 3000}]}
            tasks = [asyncio.ensure_future(http.post("/v1/chat/completions", json=long)) for _ in range(3)]
            await until(called.is_set)
            await others_are_answered(http)
            assert not any(task.done() for task in tasks)
            free.set()
            assert all(response.status_code in (200, 422) for response in await asyncio.gather(*tasks))

    asyncio.run(run())


def test_previews(small, monkeypatch):
    """They leave places and a decoder to questions, end with their clients and at the time limit."""
    decoding, free = [], asyncio.Event()

    async def slow(self, path, sampling):
        decoding.append(sampling)
        try:
            await free.wait()
        finally:
            decoding.remove(sampling)

    monkeypatch.setattr(Decoders, "decode", slow)

    async def run():
        async with running_app(small, {"request_seconds": 2.0, "decode_workers": 2}) as (app, http):
            service = app.state.server.service
            upload = (await http.post(FILES, files={"file": ("x", b"x")})).json()["id"]
            calls = [Call(app, "GET", f"{FILES}/{upload}/frames") for _ in range(MOST_PREVIEWS)]
            for call in calls:
                call.body(b"")
            await until(lambda: decoding)
            assert (len(decoding), service.previewing, service.admitted) == (1, MOST_PREVIEWS, 0)
            assert (await http.get(f"{FILES}/{upload}/frames")).status_code == 429
            await others_are_answered(http)
            for call in calls[:20]:
                call.hang_up()
            await until(lambda: service.previewing == MOST_PREVIEWS - 20)
            assert len(decoding) == 1
            for call in calls[20:]:
                assert (await call.answer())[0] == 504
            assert (service.previewing, decoding) == (0, [])

    asyncio.run(run())


def test_a_stream_that_is_read_late_lets_others_in_between(small):
    """Every update gives way to the rest of the loop, even where many have piled up."""

    async def run():
        async with running_app(small) as (app, _):
            order = {**QUESTION, "gen_length": 64, "block_length": 8, "stream": True, "diffusing": True}
            call, turns = chat(app), 0
            call.body(json.dumps(order).encode())
            await until(lambda: len(call.sent) > 2)
            engine = app.state.server.service.engine
            wait_for_the_end(engine)  # the loop stands still meanwhile
            while not call.task.done():
                turns += 1
                await asyncio.sleep(0)
            assert turns > 32
            assert b"[DONE]" in b"".join(message.get("body", b"") for message in call.sent)

    asyncio.run(run())


def wait_for_the_end(engine):
    for _ in range(6000):
        if not engine.running and not engine.queued:
            return
        threading.Event().wait(0.01)


def test_packets_leave_at_once():
    """The listener's connections do not wait for acknowledgements (Nagle's algorithm)."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@contextmanager
def files_of_at_most(size):
    """The system refuses to let files grow further, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_a_full_disk(small, size):
    """Uploads and data URIs are refused with 507, and nothing of them stays."""

    async def run():
        content = b"x" * size
        async with running_app(small) as (app, http):
            files = app.state.server.service.files
            uri = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
            with files_of_at_most(50_000):
                upload = await http.post(FILES, files={"file": ("x", content)})
                shown = await http.post("/v1/chat/completions", json=about(uri))
                await others_are_answered(http)
            for response in (upload, shown):
                assert (response.status_code, response.json()["error"]["code"]) == (507, "disk_full")
                assert "disk is full" in response.json()["error"]["message"]
            assert list(files.folder.iterdir()) == []
            assert files.nbytes == 0
            assert (await http.post(FILES, files={"file": ("x", content)})).status_code == 200

    asyncio.run(run())


def test_a_full_disk_while_fetching(small):
    """The site stands on loopback, which this server may use."""
    from serve.test_media import running_site

    async def run(site):
        async with running_app(small, private_urls=True) as (app, http):
            with files_of_at_most(50_000):
                response = await http.post("/v1/chat/completions", json=about(f"{site}/long"))
            assert (response.status_code, response.json()["error"]["code"]) == (507, "disk_full")
            assert list(app.state.server.service.files.folder.iterdir()) == []

    with running_site() as site:
        asyncio.run(run(site))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_another_file(small, monkeypatch, number):
    def full(*arguments, **options):
        raise OSError(number, "full")

    async def run():
        async with running_app(small) as (_, http):
            monkeypatch.setattr("vidlada.serve.media.tempfile.mkstemp", full)
            response = await http.post("/v1/chat/completions", json=about("data:;base64,AAAA"))
            assert response.status_code == 507

    asyncio.run(run())


def test_hostile_names_and_numbers_in_paths(small, tmp_path):
    """4xx, whatever a client names."""
    write_video(tmp_path / "clip.mp4", frames=4)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    urls = [
        f"file://{tmp_path}/{'n' * 300}", f"file://{tmp_path}{'/n' * 3000}", "file://[::1/x", "file://[x]/y",
        f"file://{tmp_path}/%00", f"file://{tmp_path}/loop", f"file://{tmp_path}/clip.mp4/x", "file://", "file:",
        f"file://{tmp_path}/%ff%fe", f"file://{tmp_path}", "file:///dev/zero", "file-" + "x" * 10_000, "", "x:", ":",
        "http://" + "a" * 300 + ".example/", "http://a..b/", "http://\u2603/", "http://[::1", "http://a:b/", "\u0000",
        "data:", "data:,", "data:;base64,=", "data:;base64,A",
    ]  # fmt: skip

    async def run():
        async with running_app(small, allowed=tmp_path) as (app, http):
            for url in urls:
                response = await http.post("/v1/chat/completions", json=about(url))
                assert 400 <= response.status_code < 500, (url[:80], response.text)
                assert len(response.text) < 1000
                assert str(tmp_path) not in response.text
            for query in (
                "frames=1e9",
                "frames=0",
                f"frames={'9' * 5000}",
                "fps=nan",
                "fps=0",
                "fps=1e-320",
                "fps=inf",
            ):
                response = await http.get(f"{FILES}/file-x/frames?{query}")
                assert 400 <= response.status_code < 500, (query[:80], response.text)
            for name in ("n" * 50_000, "\u0000", "\r\n", "\U0001f600" * 100):
                response = await http.post(FILES, files={"file": (name, b"", "a/b")})
                assert 400 <= response.status_code < 500, response.text
            upload = (await http.post(FILES, files={"file": ("n" * 300 + "/", b"x", "a/b")})).json()
            assert len(upload["filename"]) <= 255
            assert app.state.server.service.files.nbytes == 1

    asyncio.run(run())


def test_slow_lookups_end_with_their_requests(small, monkeypatch):
    """The time limit of fetching counts the lookup, whose thread nobody waits for."""

    async def run():
        async with running_app(small, {"fetch_seconds": 1.0}) as (_, http):
            with slow_names(monkeypatch):
                response = await http.post("/v1/chat/completions", json=about("http://slow.example/x"))
                assert (response.status_code, response.json()["error"]["code"]) == (504, "fetch_timeout")

    asyncio.run(run())
