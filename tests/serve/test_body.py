"""Bodies of requests: what is refused before anything is built from it, and who makes way for whom."""

import asyncio
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.inside import QUESTION, Call, chat, running_app, until

from vidlada.errors import VidLaDAError
from vidlada.serve import body as body_module
from vidlada.serve.body import MOST_VALUES, parse, scan
from vidlada.serve.errors import RequestError
from vidlada.serve.schema import ChatRequest

MAX_LENGTH = 4096
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


def message_of(content):
    return json.dumps({**QUESTION, "messages": [{"role": "user", "content": content}]}).encode()


def refusal(content):
    """Status of a body, and the bytes that Python held beside it at most."""
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            parse(content, ChatRequest, MAX_LENGTH)
        return caught.value.status, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (message_of([{"type": "x"}] * 500_000), 413),
        (message_of([0] * 2_000_000), 413),
        (message_of("is it red ? " * 200_000), 413),
        (b"[" * 5_000_000, 413),
        (b"[[]," * 1_000_000, 413),
        (b'{"a":{' * 1_000_000, 413),
        (b'"' * 5_000_000, 413),
        (b'"' + b"\\" * 5_000_000, 413),
        (b" " * 5_000_000, 413),
        (b'{"model": ' + b"9" * 5_000_000 + b"}", 413),
        (b'{"model": ' + b"9" * 5_000 + b"}", 400),
        (json.dumps({str(number): None for number in range(6000)}).encode(), 422),
        (message_of([0] * 15_000), 422),
        (b"[" * 15_000, 400),
        (json.dumps(QUESTION).encode("utf-16"), 400),
        (b'{"model": "\xff"}', 400),
        (b"\xef\xbb\xbf{}", 400),
    ],
    ids=range(17),
)
def test_hostile_bodies_are_refused_with_little_memory(content, status):
    found, peak = refusal(content)
    assert found == status
    assert peak < len(content) + 40 * 2**20


def test_a_data_uri_is_no_text():
    uri = "data:video/mp4;base64," + "A" * 20_000_000
    part = {"type": "video_url", "video_url": {"url": uri}}
    order = parse(message_of([{"type": "text", "text": "is it red ?"}, part]), ChatRequest, MAX_LENGTH)
    assert order.messages[0].content[1].video_url.url == uri
    escaped = json.dumps(uri).replace("AA", "\\u0041A").encode()  # what some encoders do to a slash
    scan(b'{"url": ' + escaped + b"}", 1000)


@settings(max_examples=40)
@given(TREES)
def test_no_small_json_is_refused_by_its_shape(tree):
    content = json.dumps(tree).encode()
    scan(content, len(content))


@settings(max_examples=40)
@given(TREES, st.integers(1, 30))
def test_values_are_never_counted_short(tree, most):
    """Whatever the text says, JSON with more values than allowed does not pass."""

    def values(node):
        inner = [*node.keys(), *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
        return 1 + sum(values(each) for each in inner)

    content = json.dumps(tree).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "MOST_VALUES", most)
        if values(tree) > 2 * most + 2:
            with pytest.raises(RequestError):
                scan(content, len(content))


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_answered(content):
    with pytest.raises(VidLaDAError):
        parse(content, ChatRequest, MAX_LENGTH)


def test_values_fit_a_long_conversation():
    message = {"role": "user", "content": [{"type": "text", "text": "red , blue [ { , ?"}]}
    request = json.dumps({**QUESTION, "messages": [message] * 1000}).encode()
    assert len(parse(request, ChatRequest, MAX_LENGTH).messages) == 1000
    assert MOST_VALUES >= 18_000


def test_what_is_not_json_is_not_read(small):
    async def run():
        async with running_app(small) as (app, http):
            for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"):
                call = Call(app, "POST", "/v1/chat/completions", [("Content-Type", kind)] if kind else [])
                status, answer = await call.answer()  # no piece of the body has arrived
                assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
            for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.openai+json"):
                answer = await http.post(
                    "/v1/chat/completions", content=json.dumps(QUESTION), headers={"Content-Type": kind}
                )
                assert answer.status_code == 200, answer.text

    asyncio.run(run())


def test_bodies_on_their_way_take_no_places(small):
    """More of them than there are places, each of one byte, and everybody else is answered."""

    async def run():
        async with running_app(small, {"max_running": 1, "max_queue": 1}) as (app, http):
            calls = [chat(app) for _ in range(20)]
            for call in calls:
                call.body(b"{", more=True)
            answers = [await http.post("/v1/chat/completions", json=QUESTION) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
            assert not any(call.sent for call in calls)
            for call in calls:
                call.body(b"}")
                assert (await call.answer())[0] == 422

    asyncio.run(run())


def test_the_oldest_body_makes_way(small):
    async def run():
        async with running_app(small, {"max_arriving": 3}) as (app, http):
            calls = []
            for _ in range(5):
                calls.append(chat(app))
                calls[-1].body(b"{", more=True)
                await until(calls[-1].incoming.empty)  # it has been read
            for call in calls[:2]:
                assert (await call.answer())[0] == 503
            assert (await http.post("/v1/chat/completions", json=QUESTION)).status_code == 200
            assert (await calls[2].answer())[0] == 503
            assert not calls[3].sent and not calls[4].sent
            for call in calls[3:]:
                call.hang_up()
                await call.task

    asyncio.run(run())


def test_memory_of_bodies_is_bounded(small):
    async def run():
        async with running_app(small, {"max_bodies_mb": 2, "max_body_mb": 2}) as (app, http):
            arrivals = app.state.server.arrivals
            slow = chat(app)
            slow.body(b" " * 1_500_000, more=True)
            await until(lambda: arrivals.nbytes == 1_500_000)
            assert (await http.post("/v1/chat/completions", json=QUESTION)).status_code == 200
            large = chat(app)
            large.body(b" " * 1_500_000)
            assert (await slow.answer())[0] == 503  # it made way
            assert (await large.answer())[0] == 413
            assert arrivals.nbytes == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/chat/completions", "application/json"), ("/v1/files", "multipart/form-data; boundary=b")],
)
def test_slow_bodies_end(small, path, kind):
    """A byte now and then keeps no body alive; the piece that comes is a byte, so no time is added for it."""

    async def run():
        async with running_app(small, {"body_seconds": 1.0}) as (app, _):
            call = Call(app, "POST", path, [("Content-Type", kind)])
            beginning = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
            call.body(beginning if path == "/v1/files" else b"{", more=True)
            while not call.task.done():
                call.body(b"x", more=True)
                await asyncio.sleep(0.02)
            status, answer = await call.answer()
            assert (status, answer["error"]["code"]) == (408, "request_timeout")
            assert app.state.server.service.files.nbytes == 0

    asyncio.run(run())


def test_a_large_body_may_take_longer(small, monkeypatch):
    monkeypatch.setattr(body_module, "SLOWEST", 1)  # a second for every byte

    async def run():
        async with running_app(small, {"body_seconds": 1.0}) as (app, _):
            call, content = chat(app), json.dumps(QUESTION).encode()
            call.body(content[:-1], more=True)
            await asyncio.sleep(1.5)
            assert not call.sent
            call.body(content[-1:])
            assert (await call.answer())[0] == 200

    asyncio.run(run())
