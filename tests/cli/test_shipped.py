"""The model in the package, asked as the README says."""

import json
from pathlib import Path

from click.testing import CliRunner

from vidlada.cli import main
from vidlada.shapes.questions import vocabulary

VIDEO = Path(__file__).parents[2] / "examples" / "shapes.mp4"
MOST_BYTES = 10 * 2**20  # of the weights


def test_it_answers_in_words_of_its_world():
    done = CliRunner().invoke(main, ["ask", str(VIDEO), "what colour is the star ?", "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert len(answer["frames"]) == 10
    assert answer["finish_reason"] == "stop"
    assert set(answer["answer"].split()) <= set(vocabulary())


def test_its_weights_are_small():
    import vidlada

    folder = Path(vidlada.__file__).parent / "weights" / "tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
