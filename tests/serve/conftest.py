"""The model in the package behind a really started server, one for all tests."""

import openai
import pytest
from media import write_video
from serve.running import KEY, LIMITS, running_server


@pytest.fixture(scope="session")
def allowed(tmp_path_factory):
    """The folder whose files may be named."""
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="session")
def server(allowed):
    with running_server("--allow-dir", allowed, *LIMITS, VIDLADA_API_KEYS=KEY) as started:
        yield started
        assert "Traceback" not in started.log


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def clip(allowed):
    """Four seconds of video in the allowed folder."""
    return write_video(allowed / "clip.mp4", frames=100)
