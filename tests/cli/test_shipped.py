"""The model in the package, asked as the README says."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import vidlada
from vidlada.cli import main
from vidlada.shapes.questions import vocabulary

pytestmark = pytest.mark.slow

VIDEO = Path(__file__).parents[2] / "examples" / "shapes.mp4"
MOST_BYTES = 10 * 2**20  # of the weights


def test_it_answers_in_words_of_its_world():
    done = CliRunner().invoke(main, ["ask", str(VIDEO), "what colour is the star ?", "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert len(answer["frames"]) == 10
    assert answer["finish_reason"] == "stop"
    assert set(answer["answer"].split()) <= set(vocabulary())


EXACT = ["full", "prefix:every=1", "dual:every=1", "interval:prompt=1",
         "mars:text=1,ratio=1,pyramid=1,window=-1", "mars:text=1,ratio=1,pyramid=1,window=-1,group=2"]  # fmt: skip


def test_caches_that_recompute_everything_answer_the_same_alone_and_together():
    model = vidlada.load()
    video = model.encode_video(VIDEO)
    questions = ["what colour is the star ?", "describe the video ."]
    options = {"gen_length": 32, "block_length": 16}
    expected = [model.ask(video, question, **options).token_ids for question in questions]
    for cache in EXACT:
        together = model.ask_many([(video, question) for question in questions], cache=cache, **options)
        assert [answer.token_ids for answer in together] == expected, cache
        alone = model.ask(video, questions[1], cache=cache, threshold=0.9, **options)
        assert alone.token_ids == model.ask(video, questions[1], threshold=0.9, **options).token_ids, cache


def test_its_weights_are_small():
    folder = Path(vidlada.__file__).parent / "weights" / "tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
