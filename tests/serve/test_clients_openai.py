"""What OpenAI's own client sends and understands: conversations, several answers, probabilities, other routes."""

import base64
import math

import openai
import pytest

pytestmark = pytest.mark.slow


def question_about(clip, question="what color is it ?"):
    return [{"role": "user", "content": [{"type": "text", "text": question}, video(clip)]}]


def video(clip):
    return {"type": "video_url", "video_url": {"url": clip.as_uri()}}


def ask(client, messages, **fields):
    extra = {name: fields.pop(name) for name in ("gen_length", "guided_choice", "remasking") if name in fields}
    return client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **fields)


@pytest.mark.parametrize("dump", [lambda message: message, lambda message: message.model_dump()])
def test_an_answer_is_sent_back(client, clip, dump):
    messages = question_about(clip)
    messages.append(dump(ask(client, messages, gen_length=16).choices[0].message))
    messages.append({"role": "user", "content": "is it red ?"})
    found, alone = ask(client, messages, gen_length=16), ask(client, question_about(clip, "is it red ?"), gen_length=16)
    assert found.choices[0].message.content == alone.choices[0].message.content  # this model sees the last turn alone
    assert found.usage == alone.usage


def test_several_answers(client, clip):
    found = ask(client, question_about(clip, "describe the video ."), gen_length=16, temperature=2, n=3, seed=5)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    sampled = {"gen_length": 16, "temperature": 2}
    alone = [ask(client, question_about(clip, "describe the video ."), seed=seed, **sampled) for seed in (5, 6, 7)]
    assert texts == [each.choices[0].message.content for each in alone]
    assert len(set(texts)) > 1
    assert found.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)
    assert found.usage.prompt_tokens == alone[0].usage.prompt_tokens
    parts = {0: "", 1: "", 2: ""}
    stream = ask(client, question_about(clip, "describe the video ."), n=3, seed=5, stream=True, **sampled)
    for event in stream:
        for choice in event.choices:
            parts[choice.index] += choice.delta.content or ""
    assert list(parts.values()) == texts


def test_logprobs_are_the_confidence_at_commit(client, clip):
    found = ask(client, question_about(clip, "describe the video ."), gen_length=16, logprobs=True, top_logprobs=1)
    tokens = found.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).strip() == found.choices[0].message.content
    assert len(tokens) == found.usage.completion_tokens
    assert all(token.logprob <= 0 and bytes(token.bytes).decode() == token.token for token in tokens)
    assert any(token.logprob < 0 for token in tokens)
    assert [token.top_logprobs[0].token for token in tokens] == [token.token for token in tokens]
    streamed = []
    for event in ask(client, question_about(clip, "describe the video ."), gen_length=16, logprobs=True, stream=True):
        for choice in event.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [(each.token, each.logprob) for each in streamed] == [(each.token, each.logprob) for each in tokens]


def test_given_choices_have_a_distribution(client, clip):
    choices = ["red", "green", "blue", "a yellow cross"]
    found = ask(client, question_about(clip), guided_choice=choices, logprobs=True, top_logprobs=4).choices[0]
    assert found.message.content in choices
    ranked = found.logprobs.content[0].top_logprobs
    assert sorted(each.token for each in ranked) == sorted(choices)
    assert ranked[0].token == found.message.content
    assert sum(math.exp(each.logprob) for each in ranked) == pytest.approx(1, abs=1e-4)
    streamed = ask(client, question_about(clip), guided_choice=choices, stream=True)
    assert "".join(e.choices[0].delta.content or "" for e in streamed) == found.message.content


def test_the_assistants_last_message_is_continued(client, clip):
    whole = ask(client, question_about(clip, "describe the video ."), gen_length=32).choices[0].message.content
    begun = " ".join(whole.split()[:3])
    messages = [*question_about(clip, "describe the video ."), {"role": "assistant", "content": begun}]
    rest = ask(client, messages, gen_length=32).choices[0].message.content
    assert rest
    assert not rest.startswith(begun)


def test_a_file_in_the_request(client, clip):
    content = base64.b64encode(clip.read_bytes()).decode()
    for data in (content, f"data:video/mp4;base64,{content}"):
        part = {"type": "file", "file": {"filename": "clip.mp4", "file_data": data}}
        inline = ask(client, [{"role": "user", "content": [part, {"type": "text", "text": "is it red ?"}]}])
        assert (
            inline.choices[0].message.content
            == ask(client, question_about(clip, "is it red ?")).choices[0].message.content
        )


def test_refusals_name_the_field(client):
    for fields in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"logit_bias": {"1": 1}},
                   {"response_format": {"type": "json_object"}}):  # fmt: skip
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            ask(client, [{"role": "user", "content": "hi"}], **fields)
        assert refused.value.param == next(iter(fields))


def test_responses(client, clip):
    inline = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    content = [{"type": "input_text", "text": "describe the video ."}, {"type": "input_file", "file_data": inline}]
    given = [{"role": "user", "content": content}]
    chat = ask(client, question_about(clip, "describe the video ."), max_tokens=128)
    found = client.responses.create(model="tiny", input=given, max_output_tokens=128)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")
    with client.responses.stream(model="tiny", input=given, max_output_tokens=128) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == found.output_text
    further = {"role": "user", "content": "is it red ?"}
    again = client.responses.create(model="tiny", input=[*given, *found.output, further], instructions="be short")
    messages = [{"role": "system", "content": "be short"}, *question_about(clip, "describe the video ."),
                {"role": "assistant", "content": found.output_text}, further]  # fmt: skip
    expected = ask(client, messages)
    assert again.output_text == expected.choices[0].message.content
    assert again.usage.input_tokens == expected.usage.prompt_tokens
    with pytest.raises(openai.UnprocessableEntityError, match="nothing is stored"):
        client.responses.create(model="tiny", input="hi", previous_response_id=found.id)


def test_images_through_responses(client, allowed):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(allowed / "red.png")
    content = [{"type": "input_text", "text": "how many things are in the video ?"},
               {"type": "input_image", "image_url": (allowed / "red.png").as_uri(), "detail": "auto"}]  # fmt: skip
    assert client.responses.create(model="tiny", input=[{"role": "user", "content": content}]).output_text


def test_legacy_completions(client):
    fields = {"model": "tiny", "max_tokens": 16, "n": 2, "logprobs": 1, "echo": True}
    found = client.completions.create(prompt=["the star is", "it moves"], **fields)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text
    assert found.choices[0].text.startswith("the star is")
    assert found.choices[2].text.startswith("it moves")
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    texts = dict.fromkeys(range(4), "")
    for event in client.completions.create(prompt=["the star is", "it moves"], stream=True, **fields):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in found.choices]


def test_the_tokenizer(server, client, clip):
    with server.http() as http:
        messages = question_about(clip)
        counted = http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()
        assert counted["count"] == len(counted["tokens"]) == ask(client, messages).usage.prompt_tokens
        plain = http.post("/tokenize", json={"model": "tiny", "prompt": "the red star"}).json()
        read = http.post("/detokenize", json={"model": "tiny", "tokens": plain["tokens"]}).json()["prompt"]
        assert read.endswith("the red star")
        assert http.post("/detokenize", json={"tokens": [10**9]}).status_code == 422
        assert http.get("/version").json()["version"]


def test_as_many_images_as_fit(client, allowed):
    from PIL import Image

    Image.new("RGB", (32, 32), "blue").save(allowed / "blue.png")
    part = {"type": "image_url", "image_url": {"url": (allowed / "blue.png").as_uri()}}
    question = {"type": "text", "text": "is it red ?"}
    assert ask(client, [{"role": "user", "content": [*[part] * 12, question]}]).choices[0].message.content
    with pytest.raises(openai.UnprocessableEntityError, match="more than the 128"):
        ask(client, [{"role": "user", "content": [*[part] * 129, question]}])
