"""The server as OpenAI's own client sees it, with the model in the package."""

import base64
import io
import json

import openai
import pytest
from PIL import Image
from processes import run_vidlada, wait_for
from serve.running import JSON, KEY

pytestmark = pytest.mark.slow

QUESTION = "what happens in the video ?"
FAST = {"gen_length": 32, "threshold": 0.5}


def text(question=QUESTION):
    return {"type": "text", "text": question}


def video(url):
    return {"type": "video_url", "video_url": {"url": str(url)}}


def ask(client, *parts, extra=None, **options):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": list(parts)}],
        extra_body={**FAST, **(extra or {})},
        **options,
    )


def data_uri(content, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def expected(clip):
    """What the command line answers."""
    code, out, err = run_vidlada("ask", clip, QUESTION, "--gen-length", 32, "--threshold", 0.5, "--json")
    assert code == 0, err
    return json.loads(out)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_the_answer_is_the_command_lines_however_the_video_comes(client, clip, expected):
    content = clip.read_bytes()
    upload = client.files.create(file=("clip.mp4", content), purpose="user_data")
    parts = [
        video(f"file://{clip}"),
        video(data_uri(content)),
        video(upload.id),
        {"type": "file", "file": {"file_id": upload.id}},
    ]
    for part in parts:
        completion = ask(client, text(), part)
        choice = completion.choices[0]
        assert choice.message.content == expected["answer"]
        assert choice.finish_reason == expected["finish_reason"]
        usage = completion.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens > usage.prompt_tokens_details.visual_tokens == 4 * 12
    client.files.delete(upload.id)
    with pytest.raises(openai.NotFoundError, match="no file"):
        ask(client, text(), video(upload.id))


def test_usage_counts_what_is_left_of_merged_tokens(client, clip):
    whole, half = (
        ask(client, text(), video(f"file://{clip}"), n=2, extra={"visual_keep": keep}).usage for keep in (1.0, 0.5)
    )
    assert half.prompt_tokens_details.visual_tokens == 4 * 12 // 2
    assert whole.prompt_tokens - half.prompt_tokens == 4 * 12 // 2


def test_a_stream_tells_the_same_and_takes_nothing_back(client, clip, expected):
    chunks = list(
        ask(client, text(), video(f"file://{clip}"), stream=True, stream_options={"include_usage": True})
    )  # fmt: skip
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == expected["answer"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected["finish_reason"]
    assert chunks[-1].usage.completion_tokens > 0
    assert not chunks[-1].choices


def test_diffusing_tells_every_step(client, clip, expected):
    stream = ask(client, text(), video(f"file://{clip}"), stream=True, extra={"diffusing": True})
    drafts, content_so_far = [], ""
    for chunk in stream:
        if chunk.choices:
            content_so_far += chunk.choices[0].delta.content or ""
        if hasattr(chunk, "diffusion"):
            draft = chunk.diffusion
            stable = ""
            for token in draft["tokens"]:
                if not token["final"]:
                    break
                stable += token["text"]
            assert stable.startswith(content_so_far)
            drafts.append(draft)
    assert [draft["step"] for draft in drafts] == list(range(1, expected["statistics"]["steps"] + 1))
    assert all(0 <= token["confidence"] <= 1 for draft in drafts for token in draft["tokens"])
    last = drafts[-1]
    assert last["statistics"]["forward_passes"] == expected["statistics"]["forward_passes"]
    assert last["frame_times"] == [frame["time"] for frame in expected["frames"]]
    assert {"queue", "vision", "denoising", "video", "fetch"} <= set(last["statistics"]["seconds"])


def test_settings_reach_the_decoding(client, clip):
    extra = {"diffusing": True, "threshold": None, "steps": 8, "block_length": 8, "cache": "dual", "frames": 2,
             "force_sample": True, "suffix": " !"}  # fmt: skip
    completion = ask(client, text(), video(f"file://{clip}"), extra=extra, seed=5, temperature=0.5)
    settings = completion.diffusion["settings"]
    assert (settings["steps"], settings["cache"], settings["seed"], settings["temperature"]) == (8, "dual", 5, 0.5)
    assert len(completion.diffusion["frame_times"]) == 2
    assert completion.choices[0].message.content.endswith(" !")


def test_max_tokens_and_stop(client, clip):
    part = video(f"file://{clip}")
    whole = ask(client, text("describe the video ."), part).choices[0].message.content
    words = whole.split()
    short = ask(client, text("describe the video ."), part, max_tokens=2, extra={"gen_length": 32})
    assert short.usage.completion_tokens <= 2
    assert whole.startswith(short.choices[0].message.content)
    if len(words) > 2:
        assert short.choices[0].finish_reason == "length"
        stopped = ask(client, text("describe the video ."), part, stop=[words[2]])
        assert words[2] not in stopped.choices[0].message.content.split()
        assert stopped.choices[0].finish_reason == "stop"


def test_images_systems_and_turns(client):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 10, 10)).save(buffer, "PNG")
    image = {"type": "image_url", "image_url": {"url": data_uri(buffer.getvalue(), "image/png"), "detail": "low"}}
    messages = [
        {"role": "system", "content": "answer shortly"},
        {"role": "user", "content": [image, text("what colour is it ?")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and the shape ?"},
    ]
    completion = client.chat.completions.create(model="tiny", messages=messages, extra_body=FAST)
    assert completion.usage.prompt_tokens_details.visual_tokens == 12
    only_text = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "is it red ?"}], extra_body=FAST
    )
    assert only_text.usage.prompt_tokens_details.visual_tokens == 0


@pytest.mark.parametrize(
    ("extra", "status", "word"),
    [
        ({"gen_length": 4096}, 422, "answer slots"),
        ({"gen_length": 30, "block_length": 7}, 422, "divide"),
        ({"threshold": 2}, 422, "threshold"),
        ({"cache": "nonsense"}, 422, "unknown cache"),
        ({"frames": 1000}, 422, "frames"),
        ({"frames": 0}, 422, "frames"),
        ({"blocklength": 3}, 422, "blocklength"),
        ({"top_p": 1.5}, 422, "top_p"),
        ({"n": 0}, 422, "n:"),
        ({"tools": [{}]}, 422, "tools"),
        ({"temperature": -1}, 422, "temperature"),
        ({"stop": ["a"] * 17}, 422, "stop"),
        ({"stop": "a" * 1001}, 422, "stop"),
        ({"stop": [""]}, 422, "stop"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 422, "empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 422, "user"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 422, "messages"),
        ({"messages": [{"role": "user", "content": [video("file:///etc/passwd")]}]}, 422, "empty"),
        ({"messages": [{"role": "user", "content": [text(), video("file:///etc/passwd")]}]}, 403, "outside"),
        ({"messages": [{"role": "user", "content": [text(), video("http://127.0.0.1/x")]}]}, 403, "not public"),
        ({"messages": [{"role": "user", "content": [text(), video("data:;base64,AAAA")]}]}, 422, "cannot be used"),
        ({"messages": [{"role": "user", "content": [text(), *[video("file-x")] * 129]}]}, 422, "129 videos"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 422, "tokens"),
        ({"model": "gpt-4"}, 404, "gpt-4"),
        ({"time_instruction": True}, 422, "exactly one"),
    ],
)  # fmt: skip
def test_refusals(server, extra, status, word):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "is it red ?"}], "gen_length": 16, **extra}
    response = server.http().post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert word in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_time_instruction(client, clip):
    plain = ask(client, text(), video(f"file://{clip}"))
    instructed = ask(client, text(), video(f"file://{clip}"), extra={"time_instruction": True})
    assert instructed.usage.prompt_tokens > plain.usage.prompt_tokens + 30


def test_keys(server, clip):
    for key in (None, "wrong"):
        http = server.http(key)
        for method, path in [("GET", "/v1/models"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/metrics"),
                             ("POST", "/v1/chat/completions"), ("DELETE", "/v1/files/x")]:  # fmt: skip
            response = http.request(method, path)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/").status_code == 200


def test_files(client, server, clip):
    upload = client.files.create(file=clip, purpose="user_data")
    assert (upload.bytes, upload.filename) == (clip.stat().st_size, "clip.mp4")
    assert upload.id in [file.id for file in client.files.list().data]
    assert client.files.retrieve(upload.id).purpose == "user_data"
    assert client.files.content(upload.id).read() == clip.read_bytes()
    strip = server.http().get(f"/v1/files/{upload.id}/frames", params={"frames": 2}).json()
    assert [frame["time"] for frame in strip["frames"]] == [0, pytest.approx(3.96)]
    picture = base64.b64decode(strip["frames"][0]["image"].partition(",")[2])
    assert Image.open(io.BytesIO(picture)).size == (84, 84)
    assert client.files.delete(upload.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(upload.id)


def test_upload_limits(server):
    http = server.http()
    large = http.post("/v1/files", files={"file": ("x", b"x" * 5 * 2**20)})
    assert large.status_code == 413
    assert "4 MiB" in large.json()["error"]["message"]

    def pieces():
        for _ in range(60):
            yield b"x" * 100_000

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert http.post("/v1/files", content=pieces(), headers=kind).status_code in (400, 413)
    assert http.post("/v1/files", json={}).status_code == 422
    body = b'{"model": "' + b"x" * 9 * 2**20 + b'"}'
    assert http.post("/v1/chat/completions", content=body, headers=JSON).status_code == 413


def test_uploads_on_their_way_take_up_room(server):
    """Two of them that do not fit together: the second is refused until the first is given up."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    before, http = server.metric("vidlada_upload_bytes"), server.http()
    with server.connect() as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {4 * 2**20}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
            + head
            + b"x" * 3 * 2**20
        )
        wait_for(lambda: server.metric("vidlada_upload_bytes") >= before + 3 * 2**20)
        refused = http.post("/v1/files", files={"file": ("y", b"y" * 7 * 2**19)})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "storage_full"
    wait_for(lambda: server.metric("vidlada_upload_bytes") == before)
    kept = http.post("/v1/files", files={"file": ("y", b"y" * 7 * 2**19)})
    assert kept.status_code == 200
    assert server.metric("vidlada_upload_bytes") == before + 7 * 2**19
    http.delete(f"/v1/files/{kept.json()['id']}")


def test_unknown_routes_and_methods(server):
    http = server.http()
    for method, path, status in [("GET", "/v1/nothing", 404), ("POST", "/v1/models", 405)]:
        response = http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_metrics(server, client, clip):
    before = server.metric("vidlada_finished_answers_total")
    ask(client, text(), video(f"file://{clip}"))
    assert server.metric("vidlada_finished_answers_total") == before + 1
    assert server.metric("vidlada_generated_tokens_total") > 0
    assert server.metric('vidlada_request_seconds_count{phase="denoising"}') > 0
    assert server.metric("process_resident_memory_bytes") > 1e6
    assert server.metric("vidlada_feature_store_hits_total") > 0


def test_the_log_keeps_questions_to_itself(server, client):
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "is the secretword red ?"}], extra_body=FAST
    )
    assert "chatcmpl-" in server.log
    assert "secretword" not in server.log
