"""EgoSchema's answers: its truths are not public, a server judges. Nothing is sent unless asked."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation.benchmarks import BENCHMARKS, UNSENT
from vidlada.evaluation.data import documents, repository_folder
from vidlada.evaluation.folder import SUBMISSION_FILE, VERDICT_FILE, results_files, samples_file
from vidlada.files import read_json, read_json_lines, write_json
from vidlada.letters import read_letter

SERVER = "https://validation-server.onrender.com/api/upload/"  # of the benchmark's authors; the one lmms-eval asks
SERVER_VARIABLE = "VIDLADA_EGOSCHEMA_SERVER"  # another one
VERDICT = re.compile(r"Total result: .*accuracy: ([\d.]+)")
ATTEMPTS, WAIT, TIMEOUT = 8, 5.0, 60.0  # the server sleeps when unused, and takes a minute to wake


def write_submission(output: Path, root: Path) -> None:
    """The submission file of a run: the place of the chosen option by video; -1 where no letter was given."""
    benchmark = BENCHMARKS[UNSENT]
    folder = repository_folder(root, benchmark.repository)
    assert folder is not None
    rows = documents(folder, benchmark.tasks[0].config, benchmark.split)
    newest = max(
        (f for f in results_files(output) if samples_file(f, UNSENT).exists()), key=lambda f: f.stat().st_mtime
    )
    chosen = {}
    for sample in read_json_lines(samples_file(newest, UNSENT)):
        chosen[rows[sample["doc_id"]]["video_idx"]] = letter_place(str(sample["filtered_resps"]))
    write_json(output / SUBMISSION_FILE, chosen)


def letter_place(answer: str, letters: str = "ABCDE") -> int:
    """Place of the letter that an answer chooses, or -1."""
    letter = read_letter(answer, letters)
    return -1 if letter is None else letters.index(letter)


def submit(output: Path, wait: float = WAIT) -> dict[str, Any]:
    """Send a run's submission file to the server, once, and keep what it says in the run folder.

    Args:
        output: run folder, with all answers.
        wait: seconds before the second attempt; grows with every further one.

    Returns:
        `accuracy`, 0 to 1, `reply` and `server`.

    Raises:
        InputError: there is nothing to send.
        VidLaDAError: the server cannot be reached, or does not understand.
    """
    try:
        answers = (output / SUBMISSION_FILE).read_bytes()
    except OSError as error:
        raise InputError(f"{output} holds no {SUBMISSION_FILE}: evaluate the task {UNSENT} first") from error
    if (known := verdict_of(output)) is not None:
        return known
    server = os.environ.get(SERVER_VARIABLE, SERVER)
    reply = _post(server, answers, wait)
    accuracy = VERDICT.search(reply)
    if accuracy is None:
        raise VidLaDAError(f"{server} took {output / SUBMISSION_FILE} but gave no accuracy: {reply[:300]}")
    verdict = {
        "accuracy": float(accuracy[1]), "number": len(json.loads(answers)), "reply": reply, "server": server,
        "answers": hashlib.sha256(answers).hexdigest(),
    }  # fmt: skip
    write_json(output / VERDICT_FILE, verdict)
    return verdict


def verdict_of(output: Path) -> dict[str, Any] | None:
    """What the server said about the answers of a run, if it was asked about just these."""
    try:
        verdict: dict[str, Any] = read_json(output / VERDICT_FILE)
        answers = (output / SUBMISSION_FILE).read_bytes()
    except (OSError, InputError):
        return None
    return verdict if verdict.get("answers") == hashlib.sha256(answers).hexdigest() else None


def _post(server: str, answers: bytes, wait: float) -> str:
    """What the server answers; while it wakes up it fails, and is asked again."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request = Request(server, answers, {"Content-Type": "application/json"})
            with urlopen(request, timeout=TIMEOUT) as response:
                text: str = response.read().decode(errors="replace")
                return text
        except HTTPError as error:
            failure = f"HTTP {error.code}"
            if error.code < 500:
                break
        except (URLError, OSError, ValueError) as error:
            failure = str(getattr(error, "reason", error))
        if attempt < ATTEMPTS:
            time.sleep(wait * attempt)
    raise VidLaDAError(f"{server} did not take the answers ({failure}); they stay in the run folder, send them later")
