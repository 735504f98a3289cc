"""EgoSchema's submission file, and a server on this machine that judges it; lmms-eval is not needed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation import run as running
from vidlada.evaluation import submission
from vidlada.evaluation.benchmarks import BENCHMARKS
from vidlada.evaluation.data import documents
from vidlada.evaluation.folder import SUBMISSION_FILE, VERDICT_FILE
from vidlada.evaluation.results import read_run
from vidlada.evaluation.run import RunSettings, start_run
from vidlada.evaluation.submission import letter_place, submit, write_submission

REPLY = "Total result: 1 correct, 1 wrong, 5029 missing, 0 invalid, accuracy: 0.5"


@pytest.fixture
def server(monkeypatch):
    """Takes answers; `replies` says with what status and text, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.received.append(json.loads(body))
            replies = self.server.replies
            status, text = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    running_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running_server.received, running_server.replies = [], [(200, REPLY)]
    thread = threading.Thread(target=running_server.serve_forever)
    thread.start()
    monkeypatch.setenv(submission.SERVER_VARIABLE, f"http://127.0.0.1:{running_server.server_port}/api/upload/")
    yield running_server
    running_server.shutdown()
    running_server.server_close()
    thread.join()


@pytest.fixture
def output(root, tmp_path):
    """A finished run of EgoSchema: one answer with a letter, one without."""
    folder = tmp_path / "run"
    start_run(folder, RunSettings("tiny"), [BENCHMARKS["egoschema"]])
    finish(folder)
    write_submission(folder, root)
    return folder


def finish(folder):
    """What lmms-eval leaves."""
    below = folder / "lmms-eval" / "tiny"
    below.mkdir(parents=True, exist_ok=True)
    (below / "20260101_000000_results.json").write_text(json.dumps({"results": {"egoschema": {}}}))
    lines = [{"doc_id": 0, "filtered_resps": "B"}, {"doc_id": 1, "filtered_resps": "right"}]
    (below / "20260101_000000_samples_egoschema.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def answers_of(root):
    first, second = documents(root / "lmms-eval/egoschema", "GENERATION", "test")
    return {first["video_idx"]: 1, second["video_idx"]: -1}


def test_the_file(root, output):
    assert json.loads((output / SUBMISSION_FILE).read_text()) == answers_of(root)
    assert read_run(output).results["egoschema"].score.number == 0


def test_the_verdict_becomes_the_score(root, output, server):
    assert submit(output)["accuracy"] == 0.5
    assert server.received == [answers_of(root)]
    score = read_run(output).results["egoschema"].score
    assert (score.percent, score.number) == (50.0, 2) and score.standard_error == pytest.approx(50.0)


def test_the_same_answers_are_sent_once(root, output, server):
    assert submit(output) == submit(output) and len(server.received) == 1
    samples = next(output.rglob("*_samples_egoschema.jsonl"))
    samples.write_text(samples.read_text().replace('"right"', '"C"'))
    write_submission(output, root)
    assert read_run(output).results["egoschema"].score.number == 0  # the verdict was on other answers
    submit(output)
    assert len(server.received) == 2


def test_a_server_that_sleeps_is_asked_again(output, server):
    server.replies = [(502, "waking up"), (503, "waking up"), (200, REPLY)]
    assert submit(output, wait=0)["accuracy"] == 0.5 and len(server.received) == 3


@pytest.mark.parametrize(
    "reply, why, times",
    [((400, "no"), "HTTP 400", 1), ((500, "no"), "HTTP 500", submission.ATTEMPTS), ((200, "thanks"), "thanks", 1)],
)
def test_failures_are_reported_and_the_answers_stay(output, server, reply, why, times):
    server.replies = [reply]
    with pytest.raises(VidLaDAError, match=why):
        submit(output, wait=0)
    assert len(server.received) == times
    assert (output / SUBMISSION_FILE).exists() and not (output / VERDICT_FILE).exists()


def test_no_server(output, monkeypatch):
    monkeypatch.setenv(submission.SERVER_VARIABLE, "http://127.0.0.1:9/")
    with pytest.raises(VidLaDAError, match="did not take the answers .*refused"):
        submit(output, wait=0)
    with pytest.raises(InputError, match="holds no egoschema_submission.json"):
        submit(output / "lmms-eval")


@pytest.mark.parametrize("submit", [False, True])
def test_only_submit_sends(root, server, tmp_path, monkeypatch, vidlada_eval, submit):
    monkeypatch.setattr(running, "require_lmms_eval", lambda: None)
    monkeypatch.setattr(running, "keep_interrupted", lambda cache: None)
    launched = []

    def lmms_eval(arguments, place, output, variables, lock):
        launched.append(arguments)
        finish(output)

    monkeypatch.setattr(running, "execute", lmms_eval)
    options = ["run", "--tasks", "egoschema", "--data-root", root, "--output", tmp_path / "run"]
    code, out, err = vidlada_eval(*options, *(["--submit"] if submit else []))
    assert code == 0, err
    assert "--predict_only" in launched[0]  # or lmms-eval itself would send
    assert len(server.received) == submit
    assert ("| EgoSchema * | 2 | 50.0 |" if submit else "| EgoSchema * | 2 | – |") in out


@pytest.mark.parametrize("options", [["--tasks", "egoschema", "--limit", 3], ["--tasks", "egoschema_subset"]])
def test_only_whole_evaluations_are_sent(root, tmp_path, vidlada_eval, options):
    code, _, err = vidlada_eval("run", *options, "--submit", "--data-root", root, "--output", tmp_path / "run")
    assert code == 2 and "--submit sends the answers of the whole task egoschema" in err


@pytest.mark.parametrize("answer, place", [("B", 1), ("(C)", 2), ("The answer is D.", 3), ("right", -1), ("", -1)])
def test_letters(answer, place):
    assert letter_place(answer) == place
