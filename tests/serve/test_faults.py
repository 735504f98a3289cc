"""What goes wrong in the field: malformed requests, clients that vanish or are slow, crowds, dead workers, signals."""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import threading
import time

import httpx2
import numpy as np
import pytest
from processes import wait_for
from serve.running import HEAD, JSON, KEY, LONG, SHORT, idle, running_server, send_body

from vidlada.serve.temporary import temporary_folder

pytestmark = pytest.mark.slow


def about(path):
    """A question about a local file."""
    shown = {"type": "video_url", "video_url": {"url": f"file://{path}"}}
    return {**SHORT, "messages": [{"role": "user", "content": [{"type": "text", "text": "is it red ?"}, shown]}]}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 10_000, b'{"model": "tiny"}']
)
def test_malformed_bodies(server, body):
    response = server.http().post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(endless, stream):
    cancelled = endless.metric("vidlada_cancelled_answers_total")
    with endless.connect() as connection:
        send_body(connection, {**LONG, "stream": stream})
        wait_for(lambda: endless.metric("vidlada_running_requests") == 1)
    wait_for(lambda: idle(endless))
    assert endless.metric("vidlada_cancelled_answers_total") == cancelled + 1


def test_a_crowd_is_answered_or_refused(server):
    async def crowd():
        async with httpx2.AsyncClient(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300,
            limits=httpx2.Limits(max_connections=200),
        ) as http:  # fmt: skip
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=SHORT) for _ in range(200)))

    responses = asyncio.run(crowd())
    answers = [r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200]
    refused = [response for response in responses if response.status_code != 200]
    assert len(answers) >= 60
    assert len(set(answers)) == 1
    assert all(response.status_code == 429 and response.headers["Retry-After"] for response in refused)
    wait_for(lambda: idle(server))


def test_a_killed_worker_does_no_harm(server, clip):
    body = about(clip)
    assert server.http().post("/v1/chat/completions", json=body).status_code == 200
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in listed.stdout.split()]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    other = {**body, "fps": 3.0}  # not in the stores yet
    assert server.http().post("/v1/chat/completions", json=other).status_code == 200


def test_bad_videos_do_no_harm(server, clip, allowed):
    content = clip.read_bytes()
    http = server.http()
    for number, damaged in enumerate([content[:5000], content[:1000] * 5, np.random.default_rng(0).bytes(5000)]):
        (allowed / f"bad-{number}").write_bytes(damaged)
        response = http.post("/v1/chat/completions", json=about(allowed / f"bad-{number}"))
        assert response.status_code == 422
        assert str(allowed) not in response.text


def test_sigterm_lets_answers_end_and_leaves_nothing_behind(endless_folder, tmp_path):
    with running_server("--model", endless_folder, "--drain-seconds", 300, TMPDIR=str(tmp_path)) as server:
        events, started, order = [], threading.Event(), {**LONG, "gen_length": 128, "block_length": 128}

        def read():
            with server.http() as http, http.stream("POST", "/v1/chat/completions", json=order) as response:
                for line in response.iter_lines():
                    events.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(300)
        assert list(tmp_path.glob("vidlada-*"))
        server.stop()
        reader.join(300)
        lines = [line for line in events if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert list(tmp_path.glob("vidlada-*")) == []
        with pytest.raises(httpx2.ConnectError):
            server.http().get("/health")


def test_answers_that_do_not_end_in_time_get_an_error(endless_folder, tmp_path):
    with (
        running_server("--model", endless_folder, "--drain-seconds", 1, TMPDIR=str(tmp_path)) as server,
        server.connect() as streaming,
        server.connect() as waiting,
        server.connect() as sending,
    ):
        send_body(streaming, LONG)
        send_body(waiting, {**LONG, "stream": False})
        wait_for(lambda: server.metric("vidlada_running_requests") == 2)
        sending.sendall(f"{HEAD}Content-Length: 5000\r\n\r\n{{".encode())
        wait_for(lambda: server.metric("vidlada_arriving_bodies") == 1)
        server.stop()
        for connection, status in [(streaming, b"200"), (waiting, b"503"), (sending, b"503")]:
            with connection.makefile("rb") as file:
                response = file.read()
            assert response.split(b" ")[1] == status
            assert b'"code": "shutting_down"' in response.replace(b'":"', b'": "')
        assert "Traceback" not in server.log
        assert list(tmp_path.glob("vidlada-*")) == []


def test_startup_errors_are_one_line(server, tmp_path):
    port = server.url.rpartition(":")[2]
    (tmp_path / "keys").write_text("\n")
    for arguments, word in [
        (["--port", port], "cannot listen"),
        (["--allow-dir", tmp_path / "none"], "no such folder"),
        (["--api-key-file", tmp_path / "keys"], "no key"),
        (["--max-queue", "0"], "at least 1"),
        (["--port", "0", "--model", tmp_path / "none"], "no such model"),
    ]:
        from click.testing import CliRunner

        from vidlada.cli import main

        done = CliRunner().invoke(main, ["serve", *map(str, arguments)])
        assert done.exit_code == 2
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert word in error
        assert "Traceback" not in done.stderr


def test_folders_of_dead_servers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as alive:
        (alive / "upload").write_text("x")
        dead = tmp_path / "vidlada-serve-dead"
        dead.mkdir()
        (dead / "lock").touch()
        other = tmp_path / "vidlada-serve-starting"
        other.mkdir()
        with temporary_folder() as second:
            assert alive.exists()
            assert second.exists()
            assert not dead.exists()
            assert other.exists()
    assert set(tmp_path.iterdir()) == {other}
