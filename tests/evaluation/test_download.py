"""Fetching from a hub on this machine: what is asked of it, where things land, what goes wrong."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from hub import running_hub
from huggingface_hub import HfApi

from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation.benchmarks import BENCHMARKS
from vidlada.evaluation.data import check
from vidlada.evaluation.download import archives, download, unpack

pytestmark = pytest.mark.slow


def ask_at(endpoint, monkeypatch):
    """HF_ENDPOINT, which the hub's client reads only once."""
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=endpoint))


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as server:
        ask_at(server.endpoint, monkeypatch)
        yield server


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def files_below(folder, *inside):
    """Names and contents, without the hub's own notes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.joinpath(*inside).rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def publish(hub, root, benchmark):
    """A miniature as the hub has it: tables, and videos in archives or on a branch."""
    questions = files_below(root / benchmark.repository)
    videos = files_below(root / benchmark.folder)
    if benchmark.unpacked:
        hub.repositories[benchmark.repository, "main"] = questions
        hub.repositories[benchmark.repository, benchmark.unpacked] = {**questions, **videos}
    elif benchmark.repository.startswith("longvideobench"):
        whole = tar_of(videos)
        cuts = [whole[: len(whole) // 3], whole[len(whole) // 3 :]]
        parts = {f"videos.tar.part.a{letter}": part for letter, part in zip("ab", cuts, strict=True)}
        hub.repositories[benchmark.repository, "main"] = {**questions, **parts}
    else:
        names = list(videos)
        packed = {f"videos_chunked_{n:02d}.zip": zip_of({name: videos[name] for name in names[n::2]}) for n in (0, 1)}
        hub.repositories[benchmark.repository, "main"] = {**questions, **packed}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "shapes"])
def test_a_download_is_complete(root, hub, tmp_path, name):
    benchmark = BENCHMARKS[name]
    publish(hub, root, benchmark)
    download(tmp_path, benchmark)
    assert all(found.complete for found in check(tmp_path, [benchmark])[name])
    assert files_below(tmp_path / benchmark.folder) == files_below(root / benchmark.folder)
    fetched = len(hub.fetched)
    download(tmp_path, benchmark)
    assert len(hub.fetched) == fetched  # nothing is fetched twice


def test_only_what_is_missing_is_fetched(root, hub, tmp_path):
    benchmark = BENCHMARKS["lvbench"]
    publish(hub, root, benchmark)
    shutil.copytree(root / benchmark.folder, tmp_path / benchmark.folder)
    download(tmp_path, benchmark)
    assert sorted(hub.fetched) == ["README.md", "data/train-00000-of-00001.parquet"]
    shutil.rmtree(tmp_path / benchmark.folder)
    mine = tmp_path / benchmark.folder / "mine.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    download(tmp_path, benchmark)
    assert sorted(hub.fetched)[2:] == ["videos_chunked_00.zip", "videos_chunked_01.zip"]
    assert mine.read_bytes() == b"mine" and (tmp_path / benchmark.folder / "clip0.mp4").exists()


def test_from_the_command_line(root, hub, tmp_path):
    publish(hub, root, BENCHMARKS["egoschema_subset"])
    arguments = ["download", "--tasks", "egoschema_subset", "--data-root", str(tmp_path)]
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vidlada", "eval", *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| egoschema_subset | 2 | 500 | 2 | 0 |" in done.stdout and "Everything is there." in done.stdout


def test_nothing_is_fetched_unless_asked(root, hub, tmp_path, vidlada_eval):
    publish(hub, root, BENCHMARKS["lvbench"])
    options = ["--tasks", "lvbench", "--data-root", tmp_path]
    assert vidlada_eval("check", *options)[0] == 0
    assert vidlada_eval("run", *options, "--output", tmp_path / "run")[0] == 2
    assert hub.fetched == [] and not (tmp_path / "lmms-eval").exists()
    assert "Everything is there." in vidlada_eval("download", *options)[1]


@pytest.mark.parametrize("there", [False, True])
def test_terms_have_to_be_accepted(root, hub, tmp_path, vidlada_eval, there):
    name = "longvideobench/LongVideoBench"
    hub.repositories[name, "main"] = {}
    hub.gated = True
    if there:  # the questions, from elsewhere
        shutil.copytree(root / name, tmp_path / name)
    code, _, err = vidlada_eval("download", "--tasks", "longvideobench_val_v", "--data-root", tmp_path)
    assert code == 1 and "accept its terms" in err and "hf auth login" in err


def test_unknown_to_the_hub(hub, tmp_path):
    with pytest.raises(VidLaDAError, match="lmms-eval/LVBench could not be fetched from http://127.0.0.1:.*404"):
        download(tmp_path, BENCHMARKS["lvbench"])


@pytest.mark.parametrize("there", [False, True])
def test_offline(root, tmp_path, monkeypatch, vidlada_eval, there):
    ask_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits longer before every further try
    if there:  # the questions; only videos would be fetched
        shutil.copytree(root / "lmms-eval/LVBench", tmp_path / "lmms-eval/LVBench")
    code, _, err = vidlada_eval("download", "--tasks", "lvbench", "--data-root", tmp_path)
    assert code == 1 and "error: lmms-eval/LVBench could not be fetched from http://127.0.0.1:9: " in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = vidlada_eval("download", "--tasks", "lvbench", "--data-root", tmp_path)
    assert code == 1 and "HF_HUB_OFFLINE" in err.splitlines()[-1]


def test_tars_of_their_own_and_tars_in_parts(tmp_path):
    whole = tar_of({"b/2.mp4": b"2" * 5000, "b/3.mp4": b"3"})
    (tmp_path / "one_1.tar").write_bytes(tar_of({"a/0.mp4": b"0"}))
    (tmp_path / "one_2.tar").write_bytes(tar_of({"a/1.mp4": b"1"}))
    for letter, start in zip("abc", (0, 1000, 4000), strict=True):
        end = {0: 1000, 1000: 4000, 4000: None}[start]
        (tmp_path / f"two.tar.part.a{letter}").write_bytes(whole[start:end])
    groups = archives(tmp_path)
    assert [[path.name for path in group] for group in groups] == [
        ["one_1.tar"], ["one_2.tar"], ["two.tar.part.aa", "two.tar.part.ab", "two.tar.part.ac"]]  # fmt: skip
    for group in groups:
        unpack(group, tmp_path / "out")
    assert files_below(tmp_path / "out") == {
        "a/0.mp4": b"0", "a/1.mp4": b"1", "b/2.mp4": b"2" * 5000, "b/3.mp4": b"3"}  # fmt: skip


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_archives_write_nowhere_else(tmp_path, pack):
    packed = tmp_path / f"evil.{'zip' if pack is zip_of else 'tar'}"
    packed.write_bytes(pack({"../outside.mp4": b"x"}))
    with pytest.raises(InputError, match="outside of"):
        unpack([packed], tmp_path / "out")
    assert not (tmp_path / "outside.mp4").exists()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_damaged_archives(tmp_path, pack):
    packed = tmp_path / f"cut.{'zip' if pack is zip_of else 'tar'}"
    packed.write_bytes(
        pack({"a.mp4": b"a" * 3000, "b.mp4": bytes(range(256)) * 30})[: -3000 if pack is zip_of else 6000]
    )
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack([packed], tmp_path / "out")
    assert not (Path(tmp_path) / "out/b.mp4").exists()
