"""Any value in any field: a refusal that names it, or an answer; and what an answer costs is bounded by its slots."""

import asyncio
import json
import math
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.inside import QUESTION, running_app

from vidlada.errors import InputError
from vidlada.serve.body import validate
from vidlada.serve.errors import RequestError
from vidlada.serve.limits import Limits
from vidlada.serve.schema import ChatRequest

MAX_SLOTS = 64
CHAT = "/v1/chat/completions"
FIELDS = sorted(set(ChatRequest.model_fields) - {"model", "messages"})
NUMBERS = [
    10**18, -(10**18), 2 * 10**8, 2**63, 10**400, 1e39, 1e308, -1e308, 5e-324, 1e-320, -0.0, 0, -1, 1, 1.5, math.nan,
    math.inf, -math.inf,
]  # fmt: skip
OTHERS = ["", "x", "\ud83d", "\u0000", "a" * 100_000, [], [[]], {}, {"a": {}}, True, False, None, ["a"] * 1000]
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(OTHERS), st.integers(), st.floats(), st.text())


@pytest.fixture(scope="module")
def ask(small):
    """A function that puts requests to an application that stays."""
    loop = asyncio.new_event_loop()
    context = running_app(small, {"max_tokens": MAX_SLOTS, "max_thought": MAX_SLOTS, "max_frames": 8})
    app, http = loop.run_until_complete(context.__aenter__())

    def post_body(body):
        content = json.dumps(body).encode()
        tracemalloc.start()
        response = loop.run_until_complete(
            http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return response, peak

    post_body.engine = app.state.server.service.engine
    yield post_body
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


def check(ask, field, value):
    """A refusal that names the field, or an answer of no more steps than it has slots; little memory either way."""
    steps, failed = ask.engine.totals.steps, ask.engine.totals.failed
    response, peak = ask({**QUESTION, field: value})
    taken = ask.engine.totals.steps - steps
    assert peak < 64 * 2**20
    assert taken <= MAX_SLOTS + QUESTION["gen_length"]  # a thought and an answer
    if response.status_code == 200:
        assert response.content
        return response
    assert response.status_code in (400, 422), response.text
    error = response.json()["error"]
    assert len(error["message"]) < 500
    names = {field, *(("max_tokens", "answer slots") if "tokens" in field or field == "gen_length" else ())}
    assert response.status_code == 400 or any(name in f"{error['message']} {error['param']}" for name in names), error
    assert (taken, ask.engine.totals.failed) == (0, failed)
    return response


@pytest.mark.parametrize("field", FIELDS)
def test_hostile_values_of_every_field(ask, field):
    for value in [*NUMBERS, *OTHERS]:
        check(ask, field, value)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field(ask, field, value):
    check(ask, field, value)


HALF, ASKED = "a\ud83d", QUESTION["messages"][0]
SCHEMA = {"type": "object", "properties": {HALF: {"enum": [HALF]}}, "required": [HALF], "additionalProperties": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{**ASKED, HALF: HALF}]},
        {"messages": [{**ASKED, "name": HALF}]},
        {"messages": [{"role": "system", "content": HALF}, ASKED]},
        {"messages": [ASKED, {"role": "assistant", "content": HALF}], "continue_final_message": True},
        {"messages": [ASKED, {"role": "assistant", "content": "a", "reasoning_content": HALF}, ASKED]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"messages": [{"role": "user", "content": [{"type": HALF}]}]},
        *[
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]}
            for url in (HALF, f"data:{HALF},a", f"http://127.0.0.1:9/{HALF}", f"http://{HALF}/", f"file:/{HALF}")
        ],
        {"response_format": {"type": HALF}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": HALF, "schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"guided_choice": ["a", HALF]},
        {"tools": [{"type": "function", "function": {"name": HALF}}]},
        {"chat_template_kwargs": {HALF: HALF}},
        {"metadata": {HALF: HALF}},
        {HALF: HALF},
    ],
)  # fmt: skip
def test_half_characters_anywhere_are_no_failure_of_the_server(ask, changes):
    response, _ = ask({**QUESTION, **changes})
    assert response.status_code in (200, 400, 404, 422), response.text
    response.content.decode()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "gen_length": st.sampled_from([1, 3, 4, 16, 64]),
            "block_length": st.sampled_from([1, 3, 4, 16, 64]),
            "steps": st.sampled_from([1, 2, 64, 2**17]),
            "threshold": st.sampled_from([5e-324, 0.5, 1]),
            "factor": st.sampled_from([5e-324, 1, 10**6]),
            "temperature": st.sampled_from([0, 5e-324, 1, 2]),
            "cfg_scale": st.sampled_from([0, 5e-324, 1, 100]),
            "cache": st.sampled_from(
                ["none", "dual", "frozen", "interval", "sparse", "mars", "mars:text=0", ":", "dual:=9"]
            ),
            "remasking": st.sampled_from(["low_confidence", "random"]),
            "reuse": st.booleans(),
            "think": st.booleans(),
            "think_length": st.sampled_from([1, 7, 64, 65, 2**17]),
            "stop": st.sampled_from(["a", ["a" * 1000] * 16, [" "]]),
            "suffix": st.sampled_from(["", "red", "x" * 10_000]),
        },
    )
)
def test_bounded_values_together(ask, extra):
    """Extremes that are allowed each on its own: never a failure of the model, never more work than slots."""
    steps = ask.engine.totals.steps
    response, _ = ask({**QUESTION, **extra})
    assert response.status_code in (200, 422), response.text
    thought = min(extra.get("think_length", MAX_SLOTS), MAX_SLOTS) if extra.get("think") else 0
    assert ask.engine.totals.steps - steps <= extra.get("gen_length", QUESTION["gen_length"]) + thought


@pytest.mark.parametrize("scale", [1e39, 1e308, 101])
def test_guidance_that_leaves_no_numbers_is_refused(ask, scale):
    response, _ = ask({**QUESTION, "cfg_scale": scale})
    assert response.status_code == 422
    assert "cfg_scale" in response.json()["error"]["message"]


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=20), VALUES, max_size=5), VALUES)
def test_any_object_is_refused_in_one_short_sentence(extra, messages):
    try:
        validate({"model": "x", "messages": messages, **extra}, ChatRequest)
    except RequestError as error:
        assert len(str(error)) < 500
        assert error.status == 422


@pytest.mark.parametrize("name", list(vars(Limits())))
@pytest.mark.parametrize("value", [0, -1, math.nan, -math.inf])
def test_limits_of_the_server_are_checked_too(name, value):
    with pytest.raises(InputError, match=name):
        Limits(**{name: value})
