"""The attack, small enough for every day: crowds of mixed requests, damaged files, slow clients in the background."""

import asyncio
import base64
import json
import random
from contextlib import ExitStack

import httpx2
import pytest
from media import write_video
from processes import wait_for
from serve.running import HEAD, JSON, KEY, running_server

from vidlada.serve.decoder import Decoders
from vidlada.serve.errors import RequestError
from vidlada.serve.limits import Limits
from vidlada.video import Sampling

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
SETTINGS = (
    {"gen_length": 4}, {"gen_length": 16, "steps": 4, "block_length": 8}, {"gen_length": 64, "block_length": 8},
    {"gen_length": 16, "threshold": 0.5}, {"gen_length": 8, "cache": "dual"}, {"gen_length": 8, "cfg_scale": 1.0},
    {"gen_length": 16, "temperature": 0.8, "seed": 5}, {"gen_length": 8, "cache": "mars:window=1,anchors=2"},
    {"max_tokens": 3}, {"gen_length": 16, "stream": True}, {"gen_length": 8, "stream": True, "diffusing": True},
)  # fmt: skip
HOSTILE = (
    {"steps": 10**18}, {"cfg_scale": 1e39}, {"fps": 1e-320}, {"gen_length": 10**9}, {"messages": []},
    {"cache": "x:y=z"}, {"temperature": "hot"}, {"model": "other"},
)  # fmt: skip


def requests_of(clip):
    """Every kind of request, each twice at most: with and without a video, and those to be refused."""
    uri = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    videos = [None, f"file://{clip}", uri]
    found = []
    for number, settings in enumerate(SETTINGS * 2):
        parts = [{"type": "text", "text": f"is number {number} red ?"}]
        if url := videos[number % 3]:
            parts.append({"type": "video_url", "video_url": {"url": url}})
        found.append({"model": "small", "messages": [{"role": "user", "content": parts}], **settings})
    return [*found, *({**found[0], **change} for change in HOSTILE)]


def outcome(response):
    """Status, and the answer or the refusal."""
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        return response.status_code, text, choices[-1]["finish_reason"]
    content = response.json()
    if "error" in content:
        return response.status_code, content["error"]["message"], None
    choice = content["choices"][0]
    return response.status_code, choice["message"]["content"], choice["finish_reason"]


def test_crowds_of_mixed_requests_beside_slow_clients(small_folder, allowed, tmp_path):
    """Twice 150 requests at once: each gets what it gets alone, nothing is refused for want of a place, and
    whoever watches the server is answered between them."""
    clip = write_video(allowed / "crowd.mp4", frames=50)
    generator = random.Random(0)

    async def attack(server):
        async with httpx2.AsyncClient(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300,
            limits=httpx2.Limits(max_connections=220),
        ) as http:  # fmt: skip
            bodies = requests_of(clip)
            alone = [outcome(await http.post(CHAT, json=body)) for body in bodies]
            assert [status for status, *_ in alone] == [200] * 22 + [422] * 7 + [404]
            probes = 0
            for _ in range(2):
                chosen = [generator.randrange(len(bodies)) for _ in range(150)]
                crowd = asyncio.gather(*(http.post(CHAT, json=bodies[number]) for number in chosen))
                while not crowd.done():
                    assert (await http.get("/health")).status_code == 200
                    probes += 1
                    await asyncio.sleep(0.1)
                answers = [outcome(response) for response in await crowd]
                assert answers == [alone[number] for number in chosen]
            return probes

    with (
        running_server(
            "--model", small_folder, "--name", "small", "--allow-dir", allowed, "--max-queue", 300,
            "--body-seconds", 300, VIDLADA_API_KEYS=KEY,
        ) as server,
        ExitStack() as stack,
    ):  # fmt: skip
        for number in range(80):
            connection = stack.enter_context(server.connect())
            form = HEAD.replace(CHAT, "/v1/files").replace("application/json", "multipart/form-data; boundary=b")
            head = HEAD if number % 2 else form
            connection.sendall(f"{head}Content-Length: 5000\r\n\r\n-".encode())
        assert asyncio.run(attack(server)) > 1
        wait_for(lambda: server.metric("vidlada_admitted_requests") == 0)
        assert server.metric("vidlada_running_requests") == 0
        assert "Traceback" not in server.log


def test_bodies_of_every_size_of_nonsense(small_folder):
    """Hostile JSON from many clients at once; the probe is answered while it is still being sent and judged."""

    async def attack(server):
        parts = [{"type": "x"}] * 300_000
        bodies = [
            json.dumps({"model": "small", "messages": [{"role": "user", "content": parts}]}).encode(),
            b'{"model": "small", "messages": [' + b"0," * 2_000_000 + b"0]}",
            b"[" * 5_000_000,
            b'"' * 5_000_000,
        ]
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as http:
            crowd = asyncio.gather(*(http.post(CHAT, content=body, headers=JSON) for body in bodies * 2))
            probes = 0
            while not crowd.done():
                assert (await http.get("/health")).status_code == 200
                probes += 1
                await asyncio.sleep(0.01)
            assert {response.status_code for response in await crowd} == {413}
            return probes

    with running_server("--model", small_folder, "--name", "small") as server:
        before = server.metric("process_resident_memory_bytes")
        assert asyncio.run(attack(server)) > 1
        assert server.metric("process_resident_memory_bytes") < before + 400 * 2**20


KINDS = (
    ("mp4", {}), ("mkv", {}), ("avi", {"codec": "mpeg4"}), ("webm", {"codec": "libvpx"}),
    ("gif", {"codec": "gif", "pixel_format": "rgb8"}),
)  # fmt: skip


def damaged(content, generator):
    """One of the ways in which files arrive broken."""
    content = bytearray(content)
    match generator.randrange(5):
        case 0:
            del content[generator.randrange(len(content)) :]
        case 1:
            start = generator.randrange(len(content))
            del content[start : start + generator.randrange(1, 200)]
        case 2:
            start = generator.randrange(len(content))
            content[start:start] = generator.randbytes(generator.randrange(1, 200))
        case 3:
            for _ in range(generator.choice([1, 5, 100])):
                content[generator.randrange(min(len(content), 600))] = generator.randrange(256)
        case _:
            for _ in range(generator.choice([1, 20, 300])):
                content[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(content)


def test_damaged_files(tmp_path):
    """800 of them: each gives frames, or a refusal that names it; a whole file between them is read right."""
    generator = random.Random(1)
    whole = [write_video(tmp_path / f"whole.{kind}", frames=12, size=(64, 48), **options) for kind, options in KINDS]
    contents = [path.read_bytes() for path in whole]

    async def run():
        decoders = Decoders(Limits(decode_workers=1), 64)
        try:
            expected = await decoders.decode(whole[0], Sampling(max_frames=4))
            refused = 0
            for number in range(800):
                path = tmp_path / f"damaged-{number}"
                path.write_bytes(damaged(contents[number % len(contents)], generator))
                try:
                    frames = await decoders.decode(path, Sampling(max_frames=4))
                    assert frames.images.shape[1:] == (64, 64, 3)
                except RequestError as error:
                    refused += 1
                    assert error.status == 422
                    assert str(tmp_path) not in str(error)
                path.unlink()
                if number % 100 == 99:
                    again = await decoders.decode(whole[0], Sampling(max_frames=4))
                    assert (again.images == expected.images).all()
            return refused
        finally:
            await decoders.close()

    assert 100 < asyncio.run(run()) < 800


def test_a_short_answer_beside_four_long_ones(endless_folder):
    """In steps, not seconds: while a short answer is made, the long ones together take as much work as it does."""

    async def run(server):
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as http:
            question = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "describe the video ."}],
                "stream": True,
            }
            started, free = [asyncio.Event() for _ in range(4)], asyncio.Event()
            steps = [0] * 4

            async def long(number):
                body = {**question, "gen_length": 512, "block_length": 512, "diffusing": True}
                async with http.stream("POST", CHAT, json=body) as response:
                    async for line in response.aiter_lines():
                        if '"diffusion"' in line:
                            steps[number] = json.loads(line.removeprefix("data: "))["diffusion"]["step"]
                            started[number].set()
                        if free.is_set():
                            return

            tasks = [asyncio.ensure_future(long(number)) for number in range(4)]
            for event in started:
                await event.wait()
            before = list(steps)
            short = await http.post(CHAT, json={**question, "gen_length": 32, "block_length": 32, "stream": False})
            taken = max(later - earlier for earlier, later in zip(before, steps, strict=True))
            free.set()
            await asyncio.gather(*tasks)
            assert short.status_code == 200
            return taken

    with running_server("--model", endless_folder, "--name", "tiny") as server:
        # 32 if every turn stepped them all; where the machine is busy, a client may read late what was stepped before
        assert min(asyncio.run(run(server)) for _ in range(3)) <= 12
