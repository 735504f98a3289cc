"""One request to an endpoint, and what is read in a reply."""

import json
import socket
import threading
from contextlib import suppress

import pytest
from endpoint_stub import QUESTIONS

from vidlada.data_engine.endpoints import Endpoint, complete
from vidlada.data_engine.questions import candidates_in
from vidlada.errors import InputError, VidLaDAError

HALF_A_CHARACTER = '[{"question": "\\ud800", "answer": "a", "wrong": ["b"]}]'


def test_no_key_no_header(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    stub.raw = b'{"choices": [{"message": {"content": "A"}}]}'
    assert complete(Endpoint(f"http://127.0.0.1:{stub.server_port}/v1", "m"), "hello") == "A"
    assert [authorization for _, authorization, _ in stub.requests] == [None]


@pytest.mark.parametrize(
    "reply",
    ["", "[", "no json", '[{"question": "a"}]', "[1]", '{"question": "a"}', HALF_A_CHARACTER, '[{"a": ' + "[" * 10**5],
)
def test_unusable_replies(reply):
    assert candidates_in(reply) == []


def test_questions_after_other_brackets():
    written = json.dumps(QUESTIONS)
    for reply in (f"<think>Perhaps [{{1}}]?</think>{written}", f"Frames [1] to [3]: {written} [end]"):
        assert [candidate.question for candidate in candidates_in(reply)] == [q["question"] for q in QUESTIONS[:3]]


@pytest.mark.parametrize(
    ("raw", "match"),
    [(b"{", "not a chat completion"), (b"[" * 10**5, "not a chat completion"), (b'{"choices": []}', "not a chat"),
     (b'{"choices": [{"message": {"content": ["A"]}}]}', "not a chat completion"), (b" " * 2**25, "no whole reply")],
)  # fmt: skip
def test_what_is_no_completion_is_named(stub, raw, match):
    stub.raw = raw
    with pytest.raises(VidLaDAError, match=match):
        complete(Endpoint(f"http://127.0.0.1:{stub.server_port}/v1", "m", tries=1), "hello")


def test_a_model_that_says_nothing_says_nothing(stub):
    stub.raw = b'{"choices": [{"message": {"content": null}}]}'
    assert complete(Endpoint(f"http://127.0.0.1:{stub.server_port}/v1", "m"), "hello") == ""


def test_a_reply_that_never_ends_is_not_waited_for():
    """Every byte comes in time, the whole does not."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with server.accept()[0] as connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
                while not done.wait(0.1):
                    connection.sendall(b" ")

        threading.Thread(target=drip, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", timeout=0.5, tries=1)
        with pytest.raises(VidLaDAError, match="no whole reply in 0.5 seconds"):
            complete(endpoint, "hello")  # the bytes go on until it has given up
        done.set()


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(stub, monkeypatch):
    endpoint = Endpoint(f"http://127.0.0.1:{stub.server_port}/v1", "m")
    for key in ("sk-secret\n", "sk-secretü"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(InputError, match="OPENAI_API_KEY holds") as caught:
            complete(endpoint, "hello")
        assert "secret" not in str(caught.value)
    assert not stub.requests
