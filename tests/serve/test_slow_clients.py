"""Clients that are slow at the socket: the others are served meanwhile, and their connections end."""

import socket
import time
from contextlib import ExitStack
from http.client import HTTPResponse

import pytest
from processes import wait_for
from serve.running import HEAD, LONG, SHORT, idle, send_body

pytestmark = pytest.mark.slow


@pytest.fixture
def connect():
    with ExitStack() as stack:
        yield lambda server, buffer=None: stack.enter_context(server.connect(buffer))


def has_ended(connection):
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


def drip(connections, content, server):
    """Send a byte a moment to each until the first is closed, which it must be; somebody else is answered meanwhile."""
    answered = False
    connections[0].settimeout(0.5)
    for byte in content:
        try:
            for connection in connections:
                connection.sendall(bytes([byte]))
            connections[0].recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:  # still open
            pass
        except OSError:
            break
        if not answered:
            assert server.http().post("/v1/chat/completions", json=SHORT).status_code == 200
            answered = True
    else:
        pytest.fail("the connection was never closed")
    assert answered


def test_heads_that_never_end(server, connect):
    connections, silent = [connect(server) for _ in range(30)], connect(server)
    drip(connections, HEAD.encode() * 10, server)
    for connection in [*connections, silent]:
        connection.settimeout(60)
        assert has_ended(connection)
    assert idle(server)


def test_a_second_head_that_never_ends(server, connect):
    connection = connect(server)
    send_body(connection, SHORT)
    response = HTTPResponse(connection)
    response.begin()
    assert response.status == 200
    response.read()
    drip([connection], HEAD.encode() * 10, server)
    assert has_ended(connection)


def test_bodies_that_never_end(server, connect):
    connections = [connect(server) for _ in range(30)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: 5000\r\n\r\n".encode())
    drip(connections, b" " * 1000, server)
    for connection in connections:
        connection.settimeout(60)
        assert b" 408 " in connection.recv(4096)
    wait_for(lambda: idle(server))


def test_a_client_that_does_not_read(endless, connect):
    connection = connect(endless, buffer=4096)
    send_body(connection, LONG)
    wait_for(lambda: endless.metric("vidlada_admitted_requests") == 1)
    assert endless.http().post("/v1/chat/completions", json=SHORT).status_code == 200
    wait_for(lambda: idle(endless), seconds=120)
    with pytest.raises(ConnectionResetError):  # it was broken off, not answered
        while connection.recv(2**20):
            pass


def test_a_client_that_reads_slowly(endless, connect):
    connection = connect(endless, buffer=4096)
    send_body(connection, {**LONG, "gen_length": 128, "block_length": 128})
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        some = connection.recv(4096)
        assert some, received[-500:]
        received += some
        time.sleep(0.005)
    assert b" 200 " in received[:20]
