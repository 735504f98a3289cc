"""Clients that nobody here wrote hold conversations about a video: litellm, LangChain, LlamaIndex, lmms-eval."""

import base64

import pytest
from serve.running import KEY

pytestmark = pytest.mark.slow

QUESTION = "describe the video ."


def parts(clip, question=QUESTION):
    """A question about a video in the request itself."""
    content = base64.b64encode(clip.read_bytes()).decode()
    url = f"data:video/mp4;base64,{content}"
    return [{"type": "text", "text": question}, {"type": "video_url", "video_url": {"url": url}}]


@pytest.fixture(scope="module")
def expected(client, clip):
    """What the model says through OpenAI's client."""
    messages = [{"role": "user", "content": parts(clip)}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=32, temperature=0)
    return found.choices[0].message.content


def test_litellm(server, clip, expected):
    litellm = pytest.importorskip("litellm")
    options = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": KEY,
        "max_tokens": 32,
        "temperature": 0,
    }
    messages = [{"role": "user", "content": parts(clip)}]
    found = litellm.completion(messages=messages, **options)
    assert found.choices[0].message.content == expected
    messages += [found.choices[0].message.model_dump(), {"role": "user", "content": "is it red ?"}]
    assert litellm.completion(messages=messages, **options).choices[0].message.content
    stream = litellm.completion(messages=messages[:1], stream=True, **options)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == expected


def test_langchain(server, clip, expected):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage

    model = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, max_tokens=32, max_retries=0
    )
    messages = [HumanMessage(content=parts(clip))]
    found = model.invoke(messages)
    assert found.content == expected
    assert model.invoke([*messages, found, HumanMessage(content="is it red ?")]).content
    assert "".join(event.content for event in model.stream(messages)) == expected


def test_langchain_through_responses(server):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key=KEY, use_responses_api=True, max_retries=0
    )
    assert model.invoke("is it red ?").text


def test_llama_index(server, clip, expected):
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage, MessageRole, TextBlock, VideoBlock
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model="tiny", api_base=f"{server.url}/v1", api_key=KEY, is_chat_model=True, max_tokens=32, temperature=0,
        max_retries=0,
    )  # fmt: skip
    message = ChatMessage(role=MessageRole.USER, content="is it red ?")
    found = model.chat([message])
    assert found.message.content
    assert model.chat([message, found.message, message]).message.content
    assert [event.message.content for event in model.stream_chat([message])][-1] == found.message.content
    assert model.complete("is it red ?").text
    video = VideoBlock(video=clip.read_bytes(), video_mimetype="video/mp4")
    try:
        shown = model.chat([ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text=QUESTION), video])])
    except ValueError as error:  # it knows of no videos yet; then no request is sent
        assert "VideoBlock" in str(error)
    else:
        assert shown.message.content == expected


class Instance:
    """What lmms-eval hands to a model."""

    def __init__(self, clip, settings):
        def messages(doc):
            return [{"role": "user", "content": [{"type": "video", "url": doc}, {"type": "text", "text": QUESTION}]}]

        self.args = (QUESTION, messages, settings, 0, "task", "test")


@pytest.mark.parametrize("video_url", [True, False])
def test_lmms_evals_openai_model(server, allowed, clip, video_url):
    pytest.importorskip("lmms_eval")
    if not video_url:
        pytest.importorskip("qwen_vl_utils")  # lmms-eval samples the frames with it, and it pulls torchvision in
    from lmms_eval.models.chat.openai import OpenAICompatible

    model = OpenAICompatible(
        model="tiny", base_url=f"{server.url}/v1", api_key=KEY, max_retries=1, num_concurrent=2, max_frames_num=10,
        pass_video_url=video_url, timeout=300,
    )  # fmt: skip
    model.task_dict = {"task": {"test": [str(clip) if not video_url else clip.as_uri()]}}
    settings = {"max_new_tokens": 32, "temperature": 0, "top_p": 1.0}
    (found,) = model.generate_until([Instance(clip, settings)])
    assert found.text
    assert "LMMS_EVAL_REQUEST_FAILED" not in found.text
