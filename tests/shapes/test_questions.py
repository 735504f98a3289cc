"""Answers are true of their clips, questions give nothing away, scores are what they say."""

import re

import numpy as np
import pytest

from vidlada.errors import InputError
from vidlada.shapes.benchmark import evaluate, read_questions
from vidlada.shapes.captions import caption_of, events_recovered, timeline_of
from vidlada.shapes.dataset import question_of, write_dataset
from vidlada.shapes.questions import (
    BENCHMARK_FAMILIES,
    FAMILIES,
    LONG_FAMILIES,
    ask,
    questions_for,
    vocabulary,
)  # fmt: skip
from vidlada.shapes.world import HELD_OUT, Clip, Thing, clip_for, still
from vidlada.training.tokenizer import word_tokenizer

BALL = Thing("red", "circle", "small", 0, None, "move", (0.19, 0.5), (0.81, 0.5))
BOX = Thing("blue", "square", "large", 2, 6, "still", (0.5, 0.19), (0.5, 0.19), (4, "white"))
CLIP = Clip(8, 0, (BALL, BOX))
TRUE = {
    "how many things are in the video ?": "2",
    "what colour is the circle ?": "red",
    "which way does the red circle move first ?": "right",
    "which is faster , the red circle or the blue square ?": "red circle",
    "which is faster , the blue square or the red circle ?": "red circle",
    "what happens first ?": "blue square appears",
    "what happens last ?": "blue square disappears",
    "what happens after the blue square appears ?": "blue square turns white",
    "what happens before the blue square disappears ?": "blue square turns white",
    "does the blue square appear before the blue square turns white ?": "yes",
    "does the blue square disappear before the blue square appears ?": "no",
    "what happens at second 4 ?": "blue square turns white",
    "what happens at second 3 ?": "nothing",
    "at which second does the blue square disappear ?": "6",
    "which colour does the blue square turn ?": "white",
    "does the red circle change colour ?": "no",
    "is there a red circle in the video ?": "yes",
    "where is the red circle at the end ?": "right",
    "what is at top at second 3 ?": "large blue square",
    "what is at top at second 5 ?": "large white square",
}  # fmt: skip


def all_questions(clip, rounds=400, choice_share=0.0):
    generator = np.random.default_rng(0)
    found = [
        ask(clip, family, generator, choice_share) for _ in range(rounds) for family in FAMILIES if family != "picture"
    ]
    return [question for question in found if question is not None]


def test_answers_are_true():
    answers = {question.question: question.answer for question in all_questions(CLIP)}
    assert {question: answers[question] for question in TRUE} == TRUE


def test_captions_and_timelines():
    assert caption_of(CLIP) == (
        "small red circle moves right from left to right . "
        "large blue square appears at 2 and stays at top , turns white at 4 , disappears at 6 ."
    )
    assert timeline_of(CLIP).startswith(
        "0 : small red circle at left . 2 : blue square appears . 4 : blue square turns white"
    )
    assert events_recovered(caption_of(CLIP), CLIP) == (1.0, 1.0, 1.0)
    assert events_recovered(caption_of(CLIP).split(" .")[0] + " .", CLIP) == (1.0, 0.5, pytest.approx(2 / 3))
    assert events_recovered("it rains .", CLIP) == (0.0, 0.0, 0.0)


def test_no_is_never_the_answer_about_a_held_out_pair():
    for index in range(150):
        for question in all_questions(clip_for("train", index), rounds=3):
            pair = re.match(r"is there a (\w+) (\w+) in", question.question)
            assert not (pair and (pair[1], pair[2]) in HELD_OUT)


def test_choices_hold_the_answer_once():
    questions = [q for q in all_questions(CLIP, 100, choice_share=1.0) if q.choices]
    assert {question.family for question in questions} >= {"count", "colour", "direction", "order", "when"}
    for question in questions:
        assert len(set(question.choices)) == len(question.choices) <= 4
        assert question.question.count(f"{question.answer} {question.choices['ABCD'.index(question.answer)]}")


def test_every_word_is_known():
    tokenizer = word_tokenizer(vocabulary())
    for index in range(60):
        clip = clip_for("test", index)
        for question in all_questions(clip, 2, 0.5) + all_questions(still(clip, 0), 1):
            ids = tokenizer(question.question + " " + question.answer)["input_ids"]
            assert tokenizer.unk_token_id not in ids


def test_lengths_of_captions_and_timelines():
    clips = [clip_for("test", index) for index in range(300)]
    tokens = [len(tell(clip).split()) for clip in clips for tell in (caption_of, timeline_of)]
    assert max(tokens) <= 127
    assert np.mean([count >= 40 for count in tokens]) > 0.3


def test_questions_of_a_clip_are_all_different():
    one = questions_for(clip_for("train", 5), np.random.default_rng(0), 12, "colour")
    assert one and {question.family for question in one} == {"colour"}
    questions = questions_for(clip_for("train", 5), np.random.default_rng(0), 12)
    assert len({question.question for question in questions}) == len(questions) > 8


def test_a_shifted_clock_moves_the_seconds_of_questions_and_answers(tmp_path):
    """The clock starts anywhere, within two digits' reach of the last second; the rest of the clip is the same."""
    families = ("when", "clock", "timeline")
    plain = read_questions(write_dataset(tmp_path / "plain", "test", 4, 6, seconds=5, size=50, families=families))
    shifted = read_questions(
        write_dataset(tmp_path / "shifted", "test", 4, 6, seconds=5, size=50, shifted_clock=True, families=families)
    )
    assert {entry["family"] for entry in shifted} == set(families) and len(plain) == len(shifted)
    firsts = set()
    for one, other in zip(plain, shifted, strict=True):
        first = other["clip"]["first_second"]
        firsts.add(first)
        assert one["clip"]["things"] == other["clip"]["things"] and one["family"] == other["family"]
        assert (tmp_path / "shifted" / other["video"]).exists() and "shifted-clock" in other["video"]
        before, after = (entry["conversations"][1]["value"] for entry in (one, other))
        if one["choices"] is None and one["family"] != "timeline":
            assert int(after) == int(before) + first
        elif one["family"] == "timeline":
            assert after.startswith(f"{first} : ") and before.startswith("0 : ")
    assert len(firsts) > 2
    truth = {(entry["video"], question_of(entry)): entry["conversations"][1]["value"] for entry in shifted}
    clocks = [entry for entry in shifted if entry["family"] == "clock"]
    report = evaluate(
        clocks,
        tmp_path,
        lambda video, asked: [truth[str(video.relative_to(tmp_path)), question] for question, _ in asked],
    )
    assert list(report.rows()) == ["clock", "all questions"] and report.families["clock"].mean == 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"families": ("when", "why")}, "no questions are called why; use existence"),
        ({"clock": False, "shifted_clock": True}, "cannot start at another second"),
        ({"size": 51}, "even number of pixels a side, not 51; use 52"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path, "test", clips=1, **wrong)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("videos/*"))


def test_the_benchmark_scores_answers(tmp_path):
    path = write_dataset(tmp_path, "test", clips=2, questions=4, seconds=3, size=64)
    entries = read_questions(path)
    truth = {}
    for entry in entries:
        question, answer = (turn["value"] for turn in entry["conversations"])
        question = question.removeprefix("<image>\n")
        truth[tmp_path / entry["video"], question] = answer
        if entry["choices"]:
            open_question = question.split(" choices : ")[0]
            truth[tmp_path / entry["video"], open_question] = entry["choices"]["ABCD".index(answer)]
    shown = []

    def knows(video, questions):
        shown.append(video)
        for question, choices in questions:
            assert choices is None or truth[video, question] in choices
        answers = [truth[video, question] for question, _ in questions]
        return [answer.upper() + "." if len(answer) < 20 else answer for answer in answers]

    perfect = evaluate(entries, tmp_path, knows, letters=True)
    assert len(perfect.letters.points) == sum(entry["choices"] is not None for entry in entries) > 0
    assert perfect.letters.mean == 100 and "by letter" in perfect.to_markdown()
    assert perfect.short.mean == 100 and all(score.mean == 100 for score in perfect.families.values())
    assert set(perfect.families) <= {*BENCHMARK_FAMILIES, *LONG_FAMILIES}
    assert all(video.is_file() for video in shown)
    silent = evaluate(entries, tmp_path, lambda video, questions: [""] * len(questions), blind=True)
    assert silent.short.mean == 0
    assert "all short answers | 8 | 0.0" in silent.to_markdown() and "nan" not in silent.to_markdown()
