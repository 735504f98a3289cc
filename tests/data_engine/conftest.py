"""Endpoints of language models."""

import threading

import pytest
from endpoint_stub import Stub


@pytest.fixture
def stub():
    server = Stub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
