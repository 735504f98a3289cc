"""The model as lmms-eval calls it, inside this process."""

import sys

import pytest
import torch
from miniature import Miniature
from PIL import Image

import vidlada
from vidlada.evaluation.folder import RECORD_FOLDER, read_record
from vidlada.evaluation.likelihood import negative_log_likelihood

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make eval-env")

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models import get_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with two clips of the shapes world."""
    folder = tmp_path_factory.mktemp("videos")
    for number in (1, 2):
        Miniature(folder, clips=2, number=1).video(number, f"clip{number}.mp4")
    return folder


@pytest.fixture(scope="module")
def small_lm(small_folder):
    return get_model("vidlada")(
        pretrained=str(small_folder), max_frames_num=2, device="cpu", batch_size="2", mc_num=8, max_batch_size=None
    )


def request_of(number, to_messages, arguments, kind="generate_until", task="t"):
    metadata = {"task": task, "doc_id": number, "repeats": 1}
    return Instance(kind, (f"question {number}", to_messages, arguments, number, task, "test"), 0, metadata)


def about(path, text):
    parts = [{"type": "video", "url": str(path)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


GENERATION = {"gen_length": 4, "block_length": 4, "until": ["\n\n"], "temperature": 0}


def test_both_names_and_both_interfaces():
    assert get_model("vidlada") is get_model("llava_llada_video")
    assert not get_model("vidlada").is_simple and get_model("vidlada", force_simple=True).is_simple


def test_answers_are_cached_as_they_come(videos, small_lm, tmp_path, monkeypatch):
    paths = [videos / f"clip{n}.mp4" for n in (1, 2)]
    small_lm.task_dict["t"] = {"test": [{"video": paths[n // 2]} for n in range(4)]}
    requests = [request_of(n, lambda doc: about(doc["video"], "is it red ?"), GENERATION) for n in range(4)]
    replies = small_lm.answerer.replies

    def interrupted(questions):
        for number, reply in enumerate(replies(questions)):
            if number == 2:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr(small_lm.answerer, "replies", interrupted)
    cache = ResponseCache(str(tmp_path / "a.db"), str(tmp_path / "a.jsonl"), "m")
    with pytest.raises(KeyboardInterrupt):
        cache.execute(small_lm, "generate_until", requests)
    monkeypatch.undo()
    assert cache.get_stats()["total_cached_entries"] == 2
    answers = cache.execute(small_lm, "generate_until", requests)
    assert cache.get_stats()["hits"] == 2
    alone = small_lm.vidlada.ask(paths[0], "is it red ?", frames=2, gen_length=4, block_length=4, stop=("\n\n",))
    text = alone.text.removesuffix(".").strip()
    assert [getattr(answer, "text", answer) for answer in answers[:2]] == [text, text]


def test_rounds(videos, small_lm, monkeypatch):
    video = videos / "clip1.mp4"
    small_lm.task_dict["t"] = {"test": [{}]}
    given = []

    def to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        given.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == 2:
            return None, True, previous_output, previous_round_info
        text = [{"role": "user", "content": [{"type": "text", "text": "is it blue ?"}]}]
        return (about(video, "is it red ?") if round_idx == 0 else text), False, previous_output, round_idx

    encode, encoded = small_lm.vidlada.encode_media, []

    def record(media, *rest, **options):
        encoded.append([type(medium).__name__ for medium in media])
        return encode(media, *rest, **options)

    monkeypatch.setattr(small_lm.vidlada, "encode_media", record)
    request = request_of(0, to_messages, GENERATION, "generate_until_multi_round")
    (answers,) = small_lm.generate_until_multi_round([request])
    monkeypatch.undo()
    assert encoded.count(["Frames"]) == 1
    assert [entry[0] for entry in given] == [0, 1, 2] and given[2][1] == answers and given[2][2] == 1
    alone = [small_lm.vidlada.ask(video, text, frames=2, gen_length=4, block_length=4) for text in
             ("is it red ?", "is it blue ?")]  # fmt: skip
    assert answers == [answer.text.removesuffix(".").strip() for answer in alone]


def conversation(first, rounds=2):
    """A task of several rounds; later ones name no video."""

    def to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx == rounds:
            return None, True, previous_output, previous_round_info
        text = [{"role": "user", "content": [{"type": "text", "text": "is it blue ?"}]}]
        return (first() if round_idx == 0 else text), False, previous_output, round_idx

    return to_messages


def test_a_task_that_cannot_read_a_video_costs_its_question(videos, small_lm):
    video = videos / "clip1.mp4"
    small_lm.task_dict["t"] = {"test": [{}] * 2}

    def broken(doc):
        raise RuntimeError("Error reading\nclip.mp4")  # as decord does

    requests = [
        request_of(0, broken, GENERATION),
        request_of(1, lambda doc: about(video, "is it red ?"), GENERATION),
    ]
    first, second = (answer.text for answer in small_lm.generate_until(requests))
    assert first == "" != second
    assert small_lm.read_request(requests[0]).error == "Error reading clip.mp4"


def missing():
    sys.exit("video path: x.mp4 does not exist, please check")


def test_conversations_that_fail_cost_one_sample(videos, small_lm, tmp_path, monkeypatch):
    video = videos / "clip1.mp4"
    small_lm.task_dict["t"] = {"test": [{}] * 5}
    sound = [{"type": "audio", "url": "a.wav"}]
    firsts = [
        lambda: about(video, "is it red ?"),
        lambda: [{"role": "user", "content": [*sound, {"type": "text", "text": "is it red ?"}]}],
        missing,
        lambda: about(tmp_path / "nowhere.mp4", "is it red ?"),
        lambda: about(video, "is it red ?"),
    ]
    requests = [request_of(number, conversation(first), GENERATION, "generate_until_multi_round")
                for number, first in enumerate(firsts)]  # fmt: skip
    monkeypatch.setenv(RECORD_FOLDER, str(tmp_path))
    answers = list(small_lm.generate_until_multi_round(requests))
    assert answers[0] == answers[4] and all(answers[0]) and len(answers[0]) == 2
    assert answers[1:4] == [["", ""], [""], ["", ""]]  # not asked without their video
    errors = [entry["error"] for _, entry in sorted(read_record(tmp_path).items())]
    assert errors[0] is errors[4] is None
    assert "sound" in errors[1] and "x.mp4 does not exist" in errors[2] and "nowhere.mp4" in errors[3]
    assert read_record(tmp_path)["t", 0]["tokens"] > 2  # of both rounds


def test_a_conversation_about_images(small_lm):
    small_lm.task_dict["t"] = {"test": [{}]}
    image = Image.new("RGB", (40, 40), "red")
    first = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "is it red ?"}]}]
    request = request_of(0, conversation(lambda: first), GENERATION, "generate_until_multi_round")
    (answers,) = small_lm.generate_until_multi_round([request])
    alone = [small_lm.vidlada.ask(image, text, gen_length=4, block_length=4).text.removesuffix(".").strip()
             for text in ("is it red ?", "is it blue ?")]  # fmt: skip
    assert answers == alone


def test_samples_that_cannot_be_asked_cost_only_themselves(videos, small_lm):
    video = videos / "clip1.mp4"
    small_lm.task_dict["t"] = {"test": [{}] * 3}
    mixed = [{"type": "video", "url": str(video)}, {"type": "audio", "url": "a.wav"}]
    conversations = [
        about(video, "is it red ?"),
        [{"role": "user", "content": mixed}],
        about(video, "is it red ?"),
    ]
    requests = [request_of(n, lambda doc, n=n: conversations[n], GENERATION) for n in range(3)]
    first, second, third = (answer.text for answer in small_lm.generate_until(requests))
    assert first == third != "" and second == ""


@pytest.mark.parametrize(
    "content, why",
    [
        ([{"type": "audio", "url": "a.wav"}], "sound"),
        ([{"type": "video", "url": {"video_start": 1}}], "dict"),
    ],
)
def test_what_the_model_cannot_be_asked(content, why, small_lm):
    question = small_lm.question([{"role": "user", "content": [*content, {"type": "text", "text": "q"}]}], GENERATION)
    assert why in question.error


def test_wrong_arguments_stop_the_run(small_lm):
    small_lm.task_dict["t"] = {"test": [{}]}
    request = request_of(0, lambda doc: about("x.mp4", "q"), {"gen_length": 4, "num_beams": 5})
    with pytest.raises(vidlada.errors.InputError, match="num_beams 5"):
        list(small_lm.generate_until([request]))


@pytest.mark.parametrize(
    "given, loaded, options",
    [
        ({"cache": "mars:text=8;ratio=2", "threshold": 0.9}, {}, {"cache": "mars:text=8,ratio=2", "threshold": 0.9}),
        ({"add_time_instruction": True, "system_prompt": "red or blue"}, {},
         {"time_instruction": True, "system": "red or blue"}),
        ({"force_sample": True, "video_fps": 2}, {}, {"force_sample": True, "fps": 2}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {}),
        ({"quantization": "int8"}, {"quantization": "int8"}, {}),
        ({"quantization": "int8-dynamic"}, {"quantization": "int8-dynamic"}, {}),
    ],
)  # fmt: skip
def test_model_arguments_reach_the_model(videos, small_folder, given, loaded, options):
    if "quantization" in given:
        pytest.importorskip("torchao")
    video = videos / "clip1.mp4"
    lm = get_model("llava_llada_video")(pretrained=str(small_folder), max_frames_num=3, device="cpu", **given)
    lm.task_dict["t"] = {"test": [{}]}
    arguments = {"gen_length": 16, "block_length": 8}
    (answer,) = lm.generate_until([request_of(0, lambda doc: about(video, "is it red ?"), arguments)])
    model = vidlada.load(small_folder, device="cpu", **loaded)
    direct = model.ask(video, "is it red ?", frames=3, **arguments, **options)
    assert answer.text == direct.text.removesuffix(".").strip() != ""
    assert answer.token_counts.output_tokens == direct.statistics.tokens
    types = [type(each.model.language_model.layers[0].mlp.down_proj.weight.data) for each in (lm.vidlada, model)]
    assert types[0] is types[1] and (types[0] is torch.Tensor) == ("quantization" not in given)


def test_likelihoods_are_as_asked(videos, small_folder, small):
    video = videos / "clip1.mp4"
    lm = get_model("vidlada", force_simple=True)(
        pretrained=str(small_folder), max_frames_num=2, device="cpu", mc_num=3, mc_seed=5
    )
    lm.task_dict["t"] = {"test": [{}, {}]}
    visuals = [lambda doc: [str(video)], lambda doc: missing()]
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    requests = [
        Instance("loglikelihood", ("is it red ?", text, visuals[number], number, "t", "test"), 0, metadata)
        for number, text in ((0, "red circle"), (0, "blue star"), (1, "red circle"))
    ]
    *found, lost = (result.text for result in lm.loglikelihood(requests))
    prompt = small.chat(video, frames=2).request("is it red ?").prompt
    texts = [small.processor.text_ids(text) for text in ("red circle", "blue star")]
    assert [value for value, _ in found] == [
        negative_log_likelihood(small.model, prompt, ids, 3, seed=5) for ids in texts
    ]
    assert found[0][0] != negative_log_likelihood(small.model, prompt, texts[0], 3, seed=6)
    assert lost == (float("inf"), False)


def test_conversations_need_messages(small_folder):
    lm = get_model("vidlada", force_simple=True)(pretrained=str(small_folder), device="cpu")
    with pytest.raises(vidlada.errors.InputError, match="leave --force_simple out"):
        lm.generate_until_multi_round([])


def test_adapters(videos, small_folder, small_lm, adapter):
    video = videos / "clip1.mp4"
    small_lm.task_dict["t"] = {"test": [{}]}
    request = request_of(0, lambda doc: about(video, "is it red ?"), GENERATION)

    def answer(lm):
        lm.task_dict = small_lm.task_dict
        (result,) = lm.generate_until([request])
        return result.text

    options = {"max_frames_num": 2, "device": "cpu"}
    alone = answer(get_model("vidlada")(pretrained=str(adapter), **options))
    beside = answer(get_model("vidlada")(pretrained=str(small_folder), adapter=str(adapter), **options))
    merged = vidlada.load(adapter, device="cpu").ask(video, "is it red ?", frames=2, gen_length=4, block_length=4)
    assert alone == beside == merged.text.removesuffix(".").strip() != answer(small_lm)
