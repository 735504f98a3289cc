"""The description of the interface says what requests may hold and what really comes back."""

import asyncio

import pytest
from serve.inside import QUESTION, running_app

VIDEO = "/v1/files/{file_id}"


def matches(value, schema, description):
    """Whether a value has the described form, with no field more."""
    if "$ref" in schema:
        return matches(value, description["components"]["schemas"][schema["$ref"].rpartition("/")[2]], description)
    if "anyOf" in schema:
        return any(matches(value, each, description) for each in schema["anyOf"])
    if "properties" in schema:
        fields, required = schema["properties"], set(schema["required"])
        return required <= set(value) <= set(fields) and all(
            matches(each, fields[name], description) for name, each in value.items()
        )
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
             "array": list, "object": dict}  # fmt: skip
    if not isinstance(value, kinds[schema["type"]]):
        return False
    inner = schema.get("items") if schema["type"] == "array" else schema.get("additionalProperties")
    inside = value.values() if isinstance(value, dict) else value
    return not isinstance(inner, dict) or all(matches(each, inner, description) for each in inside)


@pytest.mark.parametrize("diffusing", [False, True])
def test_answers_are_as_described(small, clip, diffusing):
    text = {"model": "small", "prompt": ["is it", "red"], "gen_length": 4, "logprobs": 1, "diffusing": diffusing}
    response = {"model": "small", "input": "is it red ?", "gen_length": 4, "diffusing": diffusing}
    chat = {**QUESTION, "logprobs": True, "top_logprobs": 1, "n": 2, "diffusing": diffusing}

    async def run():
        async with running_app(small, api_keys=["secret"]) as (_, http):
            http.headers["Authorization"] = "Bearer secret"
            description = (await http.get("/openapi.json")).json()
            upload = (await http.post("/v1/files", files={"file": ("clip.mp4", clip.read_bytes())})).json()["id"]
            calls = [
                ("get", "/health", {}), ("get", "/version", {}), ("get", "/v1/models", {}),
                ("get", "/v1/models/{name}", {}), ("get", "/v1/files", {}), ("get", VIDEO, {}),
                ("get", f"{VIDEO}/frames", {"params": {"frames": 2}}), ("post", "/v1/chat/completions", {"json": chat}),
                ("post", "/v1/responses", {"json": response}), ("post", "/v1/completions", {"json": text}),
                ("post", "/tokenize", {"json": chat}), ("post", "/detokenize", {"json": {"tokens": [5, 6]}}),
                ("delete", VIDEO, {}),
            ]  # fmt: skip
            for method, route, options in calls:
                answer = await http.request(method, route.format(file_id=upload, name="small"), **options)
                assert answer.status_code == 200, answer.text
                described = description["paths"][route][method]["responses"]["200"]["content"]["application/json"]
                assert matches(answer.json(), described["schema"], description), (route, answer.text)
                failures = description["paths"][route][method]["responses"]["4XX"]["content"]["application/json"]
            refused = await http.get("/v1/models/other")
            assert matches(refused.json(), failures["schema"], description)

    asyncio.run(run())


def test_requests_are_described(small):
    async def run():
        async with running_app(small) as (_, http):
            description = (await http.get("/openapi.json")).json()
        found = description["components"]["schemas"]
        for route, fields in {
            "/v1/chat/completions": {"messages", "model", "cache", "frames", "diffusing"},
            "/v1/responses": {"input", "cache", "frames"},
            "/v1/completions": {"prompt", "echo"},
            "/detokenize": {"tokens"},
        }.items():
            body = description["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert fields <= set(found[body["$ref"].rpartition("/")[2]]["properties"]), route

    asyncio.run(run())
