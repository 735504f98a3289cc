"""Answers that follow a JSON schema: always valid, or refused by name; chosen values are those the model likes best."""

import asyncio
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serve.inside import running_app

import vidlada
from vidlada.engine.forms import FormTurn, Hole, form_slots
from vidlada.errors import InputError, VidLaDAError
from vidlada.serve.errors import RequestError
from vidlada.serve.json_schema import form_of, schema_of

SCENE = {
    "type": "object",
    "title": "Scene",
    "properties": {
        "color": {"$ref": "#/$defs/Color"},
        "large": {"type": "boolean"},
        "shape": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "note": {"type": "string"},
        "kind": {"const": "scene"},
    },
    "required": ["color", "large"],
    "additionalProperties": False,
    "$defs": {"Color": {"enum": ["red", "green", "blue"], "type": "string"}},
}
QUESTION = {"role": "user", "content": "describe the video ."}


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "scene", "strict": True, "schema": schema}}


def post(model, path="/v1/chat/completions", limits=None, **body):
    async def run():
        async with running_app(model, limits) as (app, http):
            response = await http.post(path, json={"model": "small", **body})
            return response, app.state.server.service.engine.totals

    return asyncio.run(run())


def ask(model, schema, **extra):
    response, totals = post(model, messages=[QUESTION], response_format=response_format(schema), **extra)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0], totals


def test_an_object(small):
    choice, totals = ask(small, SCENE)
    found = json.loads(choice["message"]["content"])
    assert list(found) == list(SCENE["properties"])
    assert found["color"] in ("red", "green", "blue")
    assert isinstance(found["large"], bool)
    assert found["count"] in range(10)
    assert isinstance(found["shape"], str) and len(found["shape"]) <= 12
    assert isinstance(found["note"], str)
    assert found["kind"] == "scene"
    assert choice["finish_reason"] == "stop"
    assert (totals.finished, totals.failed) == (1, 0)
    assert totals.steps == 4 + 12 + 16  # a pass for every choice, then a slot of the strings a step


def test_a_stream_gives_it_at_once(small):
    whole = ask(small, SCENE)[0]["message"]["content"]
    response, _ = post(small, messages=[QUESTION], response_format=response_format(SCENE), stream=True, diffusing=True)
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole


def test_objects_of_choices_need_no_decoding(small):
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}, "size": {"enum": ["small", "large"]}}}
    choice, totals = ask(small, schema)
    assert set(json.loads(choice["message"]["content"])) == {"red", "size"}
    assert totals.steps == 2


def test_a_top_level_choice_is_a_guided_choice(small):
    schema, texts = {"type": "string", "enum": ["red", "blue"]}, ['"red"', '"blue"']
    choice, _ = ask(small, schema, logprobs=True, top_logprobs=2)
    guided, _ = post(small, messages=[QUESTION], guided_choice=texts)
    assert choice["message"]["content"] == guided.json()["choices"][0]["message"]["content"]
    assert json.loads(choice["message"]["content"]) in ("red", "blue")
    chances = [math.exp(each["logprob"]) for each in choice["logprobs"]["content"][0]["top_logprobs"]]
    assert sum(chances) == pytest.approx(1, abs=1e-4)


@torch.inference_mode()
def test_the_likeliest_value_is_chosen(small):
    """By brute force: the tokens of each value, and the first behind it, judged where the whole hole is masked."""
    form, _ = form_of({"type": "object", "properties": {"color": SCENE["$defs"]["Color"], "n": {"type": "string"}}})
    request = small.chat(None).request("describe the video .")
    turn = FormTurn(small.model, small.processor, request, form)
    before, hole, *after = turn.form
    first, rest = turn.ids([before]), turn.ids(after)
    tokens = {value: [*small.processor.text_ids(value), rest[0]] for value in hole.choices}
    masks = [small.model.config.mask_token_id] * max(map(len, tokens.values()))
    embedded = small.model.language_model.embed_tokens(torch.tensor([*first, *masks, *rest[1:]]))
    states = small.model.language_model(torch.cat((request.prompt, embedded))[None])[0]
    chances = small.model.lm_head(states[len(request.prompt) + len(first) :]).float().log_softmax(-1)
    scores = {value: sum(float(chances[n, token]) for n, token in enumerate(ids)) for value, ids in tokens.items()}
    turn.step()
    assert turn.form[1] == max(scores, key=scores.get)
    assert not turn.choosing and len(turn.request.initial_ids) == turn.request.settings.gen_length


def test_a_choice_by_predictions_that_are_not_numbers_is_refused(small_folder):
    damaged = vidlada.load(small_folder)
    damaged.model.language_model.norm.weight.data[0] = float("nan")
    form, _ = form_of({"type": "object", "properties": {"color": SCENE["$defs"]["Color"]}})
    request = damaged.chat(None).request("is it red ?")
    with pytest.raises(VidLaDAError, match=r"predictions are not numbers \(NaN\)"):
        FormTurn(damaged.model, damaged.processor, request, form).step()


def test_an_integer_that_is_none_is_an_error_by_name(small):
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}}
    response, totals = post(small, messages=[QUESTION], response_format=response_format(schema))
    if response.status_code == 200:  # random weights may write one
        assert isinstance(json.loads(response.json()["choices"][0]["message"]["content"])["count"], int)
    else:
        assert response.status_code == 422
        assert "'count', which is no integer" in response.json()["error"]["message"]
        assert totals.failed == 1


@given(st.text())
def test_what_is_written_into_a_hole_is_json(text):
    written = Hole("note", slots=4).value(text)
    assert isinstance(json.loads(f'"{written}"'), str)


@given(st.text(alphabet="0123456789-. ,x", max_size=12))
def test_integers(text):
    try:
        written = Hole("count", slots=4, kind="integer").value(text)
    except InputError:
        return
    assert isinstance(json.loads(written), int)


def test_responses_and_vllm_spell_it_differently(small):
    wanted = ask(small, SCENE)[0]["message"]["content"]
    text = {"format": {"type": "json_schema", "name": "scene", "schema": SCENE}}
    response, _ = post(small, "/v1/responses", input=QUESTION["content"], text=text)
    assert response.json()["output"][0]["content"][0]["text"] == wanted
    for extra in ({"guided_json": SCENE}, {"structured_outputs": {"json": SCENE}}):
        response, _ = post(small, messages=[QUESTION], **extra)
        assert response.json()["choices"][0]["message"]["content"] == wanted


def of(**properties):
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "items": {"type": "string"}}, "'array' cannot be kept"),
        ({"type": "string"}, "at its top"),
        (of(), "1 to 32 properties"),
        (of(a=of(b={"enum": [1]})), "a: use an"),
        (of(a={"type": "number"}), "'number' cannot be kept"),
        (of(a={"type": "string", "pattern": "x"}), "'pattern' cannot be kept"),
        (of(a={"anyOf": [{"type": "string"}]}), "'anyOf' cannot be kept"),
        (of(a={"type": "integer", "minimum": 0}), "both bounds or none"),
        (of(a={"type": "integer", "minimum": 0, "maximum": 10**30}), "both bounds"),
        (of(a={"enum": []}), "1 to 100 values"),
        (of(a={"enum": [float("nan")]}), "not valid JSON"),
        (of(**{"\ud800": {"enum": [1]}}), "not valid JSON"),
        ({**of(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"$ref": "#/$defs/b"}}}, "'$ref'"),
        (of(a={"$ref": "http://x"}), "there is no 'http://x'"),
        ({**of(a={"enum": [1]}), "required": ["b"]}, "requires 'b'"),
        (of(a={"enum": ["x" * 30_000]}), "20000 characters"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(schema, reason):
    with pytest.raises(RequestError) as refused:
        form_of(schema)
    assert reason in str(refused.value)
    assert (refused.value.status, refused.value.param) == (422, "response_format")


@pytest.mark.parametrize("given", [
    {"type": "json_object"}, {"type": "json_schema"}, "json", {"type": "json_schema", "json_schema": {"name": "x"}},
    {"type": "json_schema", "json_schema": 3},
])  # fmt: skip
def test_json_needs_a_schema(given):
    with pytest.raises(RequestError, match="response_format"):
        schema_of(given)


def test_forms_are_bounded(small):
    many = of(**{f"property{n}": {"type": "string"} for n in range(32)})
    form, _ = form_of(many)
    assert 512 < form_slots(form, small.processor.text_ids) < 20_000
    limits = {"max_tokens": 64}
    response, totals = post(small, messages=[QUESTION], response_format=response_format(many), limits=limits)
    assert response.status_code == 422 and "slots" in response.json()["error"]["message"]
    assert totals.steps == 0
    response, totals = post(small, messages=[QUESTION], response_format=response_format(SCENE), suffix="!")
    assert response.status_code == 422 and "suffix" in response.json()["error"]["message"]
    assert totals.steps == 0
