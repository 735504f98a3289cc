"""Thoughts through HTTP: as in Python, beside the answer and never in it, in every interface."""

import asyncio

import httpx2
import openai
import pytest
from serve.inside import running_app

import vidlada
from vidlada.training.vocabulary import add_think_tokens

MESSAGES = [{"role": "user", "content": "is it red ?"}]
SLOTS = {"gen_length": 8, "block_length": 4}
THINKS = {**SLOTS, "think": True, "think_length": 12}


@pytest.fixture(scope="module")
def thinker(small_folder):
    """The small model with the think-mode tokens, as a training stage adds them."""
    loaded = vidlada.load(small_folder)
    loaded.processor = add_think_tokens(loaded.model, loaded.processor)
    return loaded


@pytest.fixture(scope="module", params=["tokens", "text"])
def model(request, thinker, small):
    """With tags that are tokens, and with tags that are text."""
    return thinker if request.param == "tokens" else small


def with_client(model, work):
    """Run some work with OpenAI's client of an application inside this process."""

    async def run():
        async with running_app(model) as (app, _):
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as http:
                client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
                return await work(client)

    return asyncio.run(run())


def chat(model, stream=False, messages=MESSAGES, **extra):
    async def work(client):
        given = {"model": "small", "messages": messages, "extra_body": extra}
        if not stream:
            return await client.chat.completions.create(**given)
        return [event async for event in await client.chat.completions.create(**given, stream=True)]

    return with_client(model, work)


def test_a_thought_stands_beside_the_answer(model):
    expected = model.ask(None, "is it red ?", **THINKS)
    found = chat(model, **THINKS)
    message = found.choices[0].message
    assert expected.reasoning
    assert (message.content, message.reasoning_content) == (expected.text, expected.reasoning)
    details = found.usage.completion_tokens_details
    assert found.usage.completion_tokens == details.reasoning_tokens + len(expected.token_ids)
    assert 0 < details.reasoning_tokens <= 12


def test_as_other_servers_are_asked(thinker):
    on = chat(thinker, reasoning_effort="low", thinking_token_budget=12, **SLOTS).choices[0].message
    expected = thinker.ask(None, "is it red ?", **THINKS)
    assert (on.content, on.reasoning_content) == (expected.text, expected.reasoning)
    off = chat(thinker, chat_template_kwargs={"enable_thinking": False}, **SLOTS).choices[0].message
    assert off.content == thinker.ask(None, "is it red ?", think=False, **SLOTS).text
    hidden = chat(thinker, include_reasoning=False, **THINKS).choices[0].message
    assert hidden.content == expected.text
    assert not hasattr(hidden, "reasoning_content")


def test_a_stream_gives_the_thought_first(model):
    expected = model.ask(None, "is it red ?", **THINKS)
    events = chat(model, stream=True, diffusing=True, logprobs=True, **THINKS)
    thought, text, drafts = "", "", []
    for event in events:
        delta = event.choices[0].delta
        reasoning = getattr(delta, "reasoning_content", None) or ""
        assert not (reasoning and text)
        thought, text = thought + reasoning, text + (delta.content or "")
        if hasattr(event, "diffusion"):
            drafts.append(event.diffusion)
    assert (text, thought) == (expected.text, expected.reasoning)
    thinking = [draft["thinking"] for draft in drafts]
    assert thinking == sorted(thinking, reverse=True)
    assert {draft["slots"] for draft in drafts if draft["thinking"]} == {12}
    assert drafts[-1]["slots"] == 8
    assert drafts[-1]["statistics"]["steps"] == expected.statistics.steps


def test_an_answer_that_has_begun_is_not_thought_about(thinker):
    begun = [*MESSAGES, {"role": "assistant", "content": "it is"}]
    message = chat(thinker, messages=begun, **THINKS).choices[0].message
    assert not hasattr(message, "reasoning_content")


def test_several_answers_have_several_thoughts(thinker):
    options = {**THINKS, "temperature": 1.0}
    found = chat(thinker, n=2, seed=3, **options).choices
    for number, choice in enumerate(found):
        alone = thinker.ask(None, "is it red ?", seed=3 + number, **options)
        assert choice.message.content == alone.text
        assert (choice.message.model_extra or {}).get("reasoning_content", "") == alone.reasoning


def test_responses_have_a_reasoning_item(thinker):
    expected = thinker.ask(None, "is it red ?", **THINKS)
    given = {"model": "small", "input": "is it red ?", "reasoning": {"effort": "high"},
             "extra_body": {**SLOTS, "think_length": 12}}  # fmt: skip

    async def work(client):
        whole = await client.responses.create(**given)
        async with client.responses.stream(**given) as stream:
            events = [event async for event in stream]
            streamed = events[-1].response
        again = await client.responses.create(
            model="small", input=[{"role": "user", "content": "is it red ?"}, *whole.output,
                                  {"role": "user", "content": "and now ?"}], extra_body=SLOTS,
        )  # fmt: skip
        return whole, events, streamed, again

    whole, events, streamed, again = with_client(thinker, work)
    for response in (whole, streamed):
        thought, message = response.output
        assert (thought.type, message.type) == ("reasoning", "message")
        assert thought.content[0].text == expected.reasoning
        assert message.content[0].text == expected.text
        assert response.usage.output_tokens_details.reasoning_tokens > 0
    deltas = {kind: "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
              for kind in ("reasoning_text", "output_text")}  # fmt: skip
    assert deltas == {"reasoning_text": expected.reasoning, "output_text": expected.text}
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert done == ["reasoning", "message"]
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == sorted(
        {event.sequence_number for event in events if hasattr(event, "sequence_number")}
    )
    assert again.output[-1].type == "message"


def test_a_text_is_continued_without_a_thought(thinker):
    async def work(client):
        with pytest.raises(openai.UnprocessableEntityError, match="without a thought"):
            await client.completions.create(model="small", prompt="it is", extra_body=THINKS)

    with_client(thinker, work)
