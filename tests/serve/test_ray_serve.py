"""The Ray Serve example, asked through OpenAI's client."""

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from processes import free_port
from serve.test_server import data_uri, text, video

pytestmark = pytest.mark.slow

pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)

SLOW = {"gen_length": 32}  # a token a step
EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import sys, ray
from ray import serve
from ray_serve import app
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(app)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.fixture(scope="module")
def replicas():
    """A client of two replicas."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "RAY_USAGE_STATS_ENABLED": "0", "VIDLADA_GPUS": "0",
                   "VIDLADA_REPLICAS": "2"}  # fmt: skip
    command = [sys.executable, "-c", RUN, port]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert any(line == "ready\n" for line in process.stdout)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    process.communicate(timeout=120)


def test_answers_whole_and_streamed(replicas, clip):
    messages = [{"role": "user", "content": [text(), video(data_uri(clip.read_bytes()))]}]
    assert [model.id for model in replicas.models.list()] == ["tiny"]
    whole = replicas.chat.completions.create(model="tiny", messages=messages, extra_body=SLOW)
    for _ in range(4):  # whichever replica answers
        stream = replicas.chat.completions.create(
            model="tiny", messages=messages, stream=True, extra_body={**SLOW, "diffusing": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert sum(hasattr(chunk, "diffusion") for chunk in chunks) > 1
    with pytest.raises(openai.UnprocessableEntityError, match="unknown cache"):
        replicas.chat.completions.create(model="tiny", messages=messages, extra_body={"cache": "nonsense"})
