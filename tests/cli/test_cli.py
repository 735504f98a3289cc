"""The command line as a user runs it: real files, real processes, output and exit codes."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from media import write_video
from processes import run_vidlada

from vidlada.cli import main
from vidlada.conversation import Conversation


def run_here(*arguments, stdin=None):
    """The same without a new process: starting Python and torch takes seconds."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, prog_name="vidlada")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=75, audio=True)


@pytest.mark.slow
def test_ask_prints_the_answer(clip, small_folder):
    """And nothing that libraries say while they are imported: in a new process."""
    command = ["-m", "vidlada", "ask", clip, "is it red ?", "--model", small_folder, "--gen-length", "16"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_ask_json(clip, small_folder):
    code, out, _ = run_vidlada("ask", clip, "is it red ?", "--model", small_folder, "--json", "--threshold", 0.9,
                       "--frames", 2, "--force-sample")  # fmt: skip
    assert code == 0
    answer = json.loads(out)
    assert set(answer) == {
        "answer", "finish_reason", "model", "video", "media", "question", "frames", "settings", "statistics"
    }  # fmt: skip
    assert [frame["time"] for frame in answer["frames"]] == [0.0, pytest.approx(74 / 25)]
    assert answer["settings"]["threshold"] == 0.9
    assert answer["statistics"]["forward_passes"] >= 1
    assert set(answer["statistics"]["seconds"]) == {"video", "vision", "denoising"}


@pytest.mark.slow
def test_ask_show(clip, small_folder):
    code, out, _ = run_vidlada("ask", clip, "is it red ?", "--model", small_folder, "--show", "--gen-length", 16)
    assert code == 0
    assert "tokens per forward pass" in out


@pytest.mark.slow
def test_chat(clip, small_folder):
    code, out, err = run_vidlada(
        "chat", clip, "--model", small_folder, "--gen-length", 16, stdin="is it red ?\nis it small ?\n\n"
    )
    assert code == 0
    assert out.count("\n") == 2
    assert "3 frames" in err


def test_info(small_folder):
    code, out, _ = run_here("info", small_folder, "--frames", 8, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["checkpoint"]["layout"] == "vidlada"
    assert facts["checkpoint"]["memory_estimate"]["tokens"] >= 8 * facts["checkpoint"]["tokens_per_frame"]
    assert facts["machine"]["torch"]
    assert "tokens per frame: 6" in run_here("info", small_folder)[1]


def test_convert_and_ask_the_result(clip, small_folder, tmp_path):
    code, _, _ = run_here("convert", small_folder, tmp_path / "copy", "--to", "vidlada")
    assert code == 0
    first = run_here("ask", clip, "is it red ?", "--model", small_folder, "--gen-length", 16)
    assert run_here("ask", clip, "is it red ?", "--model", tmp_path / "copy", "--gen-length", 16) == first
    code, _, err = run_here("convert", small_folder, tmp_path / "copy")
    assert code == 2
    assert "in use" in err


def test_shapes_write_and_evaluate(small_folder, tmp_path):
    code, out, _ = run_here(
        "shapes", "write", tmp_path / "set", "--clips", 2, "--seconds", 3, "--questions", 3, "--size", 64
    )
    assert code == 0
    questions = out.strip()
    assert len(list((tmp_path / "set" / "videos").glob("*.mp4"))) == 2
    code, out, _ = run_here("shapes", "evaluate", questions, "--model", small_folder, "--gen-length", 8,
                       "--report", tmp_path / "report.json")  # fmt: skip
    assert code == 0
    assert "all short answers" in out
    assert json.loads((tmp_path / "report.json").read_text())["scores"]["all short answers"]["number"] > 0
    code, _, err = run_here("shapes", "evaluate", questions, "--report", tmp_path / "report.json")
    assert code == 2
    assert "exists" in err


@pytest.mark.slow
def test_train_resume_and_ask(clip, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        """
output: unused
checkpoint_every: 2
workers: 0
warmup_steps: 1
log_every: 1
model:
  text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}
  vision_config: {hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, image_size: 60, patch_size: 12, vision_use_head: false}
  generation: {gen_length: 8, block_length: 8}
stages:
  - {name: only, steps: 3, learning_rate: 1.0e-3, data: {kind: shapes, pictures: true, frames_per_batch: 2, questions: 1, families: [picture]}}
"""  # noqa: E501
    )
    code, out, err = run_vidlada("train", config, "--output", tmp_path / "out")
    assert code == 0
    assert "step 3/3" in err
    assert run_vidlada("ask", clip, "is it red ?", "--model", out.strip())[0] == 0
    code, _, err = run_vidlada("train", config, "--output", tmp_path / "out")
    assert code == 2
    assert "--resume" in err


def test_completion():
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = run_here("completion", shell)
        assert code == 0
        assert "_VIDLADA_COMPLETE" in out


def test_help_and_version():
    code, out, _ = run_here("--help")
    assert code == 0
    for command in ("ask", "chat", "info", "convert", "train", "shapes", "bench", "completion"):
        assert command in out
        assert run_here(command, "-h")[0] == 0
    assert run_here("--version")[1].startswith("vidlada, version ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing.mp4", "short.mp4"])
def test_bad_videos_are_one_line(name, clip, small_folder, tmp_path):
    path = tmp_path / name
    if name == "short.mp4":
        path.write_bytes(clip.read_bytes()[:2000])
    code, out, err = run_vidlada("ask", path, "is it red ?", "--model", small_folder)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert str(path) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask"], "Missing argument"),
        (["ask", "{clip}", ""], "question is empty"),
        (["ask", "{clip}", "hi", "--frames", "0"], "frames must be a whole number"),
        (["ask", "{clip}", "hi", "--steps", "7"], "steps 7 is not a multiple"),
        (["ask", "{clip}", "hi", "--block-length", "7"], "does not divide"),
        (["ask", "{clip}", "hi", "--threshold", "0.9", "--steps", "8"], "steps is fixed"),
        (["ask", "{clip}", "hi", "--json", "--show"], "exclude each other"),
        (["ask", "{clip}", "hi", "--device", "warp"], "device 'warp'"),
        (["ask", "{clip}", "hi", "--model", "nowhere"], "no such model folder"),
        (["info", "nowhere"], "no such model folder"),
        (["convert", "nowhere", "there"], "no such model folder"),
        (["train", "nowhere.yaml"], "cannot be read"),
        (["shapes", "evaluate", "nowhere.json"], "no such file"),
        (["swim"], "No such command"),
    ],
)
def test_bad_arguments(arguments, message, clip, small_folder):
    filled = [argument.format(clip=clip) for argument in arguments]
    if arguments[0] == "ask" and "--model" not in arguments:
        filled += ["--model", small_folder]
    code, out, err = run_here(*filled)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def commands(group, path=()):
    """Every command, as the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("words", list(commands(main)), ids=" ".join)
def test_every_command_has_help_and_no_option_twice(words):
    code, out, err = run_here(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: vidlada {' '.join(words)} ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "expected"), [((), 0), (("--cache", "mars"), 1), (("--cache", "mars", "--reuse", 0), 0)]
)
def test_chat_with_a_cache_reuses_a_third_of_the_layers(clip, small_folder, monkeypatch, given, expected):
    depths = []
    answer = Conversation.ask
    monkeypatch.setattr(
        Conversation, "ask", lambda self, text: depths.append(self.settings.reuse) or answer(self, text)
    )
    code, out, _ = run_here("chat", clip, "--model", small_folder, "--gen-length", 8, *given, stdin="is it red ?\n")
    assert (code, depths) == (0, [expected])
    assert out
