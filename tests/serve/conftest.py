"""The model in the package behind a really started server, one for all tests."""

import json
import shutil

import openai
import pytest
from media import write_video
from serve.running import KEY, LIMITS, running_server

from vidlada.model.hub import SHIPPED, model_folder


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
def endless_folder(tmp_path_factory):
    """The model, but it may not end an answer before the last slot: the one way to be sure of a long answer."""
    folder = shutil.copytree(model_folder(SHIPPED), tmp_path_factory.mktemp("endless") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["suppressed_token_ids"] += config["stop_token_ids"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def endless(allowed, endless_folder):
    """A server of that model."""
    with running_server("--model", endless_folder, "--allow-dir", allowed, *LIMITS, VIDLADA_API_KEYS=KEY) as started:
        yield started
        assert "Traceback" not in started.log


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def clip(allowed):
    """Four seconds of video in the allowed folder."""
    return write_video(allowed / "clip.mp4", frames=100)
