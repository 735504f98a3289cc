"""Clients that dawdle at the socket: the others are served meanwhile, and the dawdlers' connections end."""

import json
import socket
import time

import pytest
from serve.running import KEY
from serve.test_faults import LONG, SHORT, idle, wait_for

# every event tells all slots, so that nobody's buffers hold the stream
LARGE = {**LONG, "block_length": 1024, "temperature": 2, "remasking": "random"}
SECONDS = 10  # to send a head, and a body
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"


@pytest.fixture
def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    connections = []

    def connect(buffer=None):
        connection = socket.socket()
        connections.append(connection)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(300)
        connection.connect((host, int(port)))
        return connection

    yield connect
    for connection in connections:
        connection.close()


def send_body(connection, body):
    content = json.dumps(body).encode()
    connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def ended(connection):
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


def drip(connections, content, server):
    """A byte a moment to each, while somebody else is answered; how long it took until the first was closed."""
    started = time.monotonic()
    answered = False
    for byte in content:
        for connection in connections:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return time.monotonic() - started
        connections[0].settimeout(0.5)
        try:
            if connections[0].recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            pass
        if not answered:
            assert server.http().post("/v1/chat/completions", json=SHORT).status_code == 200
            answered = True
    assert answered
    return time.monotonic() - started


def test_heads_that_never_end(server, connect):
    connections, silent = [connect() for _ in range(30)], connect()
    assert SECONDS - 2 < drip(connections, HEAD.encode() * 10, server) < SECONDS + 60
    for connection in [*connections, silent]:
        connection.settimeout(60)
        assert ended(connection)
    assert idle(server)


def test_a_second_head_that_never_ends(server, connect):
    connection = connect()
    send_body(connection, SHORT)
    assert b" 200 " in connection.recv(65536)
    assert SECONDS - 2 < drip([connection], HEAD.encode() * 10, server) < SECONDS + 60
    assert ended(connection)


def test_bodies_that_never_end(server, connect):
    connections = [connect() for _ in range(30)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: 5000\r\n\r\n".encode())
    assert SECONDS - 2 < drip(connections, b" " * 1000, server) < SECONDS + 60
    for connection in connections:
        connection.settimeout(60)
        assert b" 408 " in connection.recv(4096)
    wait_for(lambda: idle(server))


def test_a_client_that_does_not_read(server, connect):
    connection = connect(buffer=4096)
    send_body(connection, LARGE)
    wait_for(lambda: server.metric("vidlada_admitted_requests") == 1)
    assert server.http().post("/v1/chat/completions", json=SHORT).status_code == 200
    wait_for(lambda: idle(server), seconds=120)
    with pytest.raises(ConnectionResetError):  # it was broken off, not answered
        while connection.recv(2**20):
            pass


def test_a_client_that_reads_slowly(server, connect):
    connection = connect(buffer=4096)
    send_body(connection, {**LARGE, "gen_length": 128, "block_length": 128})
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        some = connection.recv(4096)
        assert some, received[-500:]
        received += some
        time.sleep(0.005)
    assert b" 200 " in received[:20]
