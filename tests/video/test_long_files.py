"""Files of very many frames: known by their packets, decoded where a frame is wanted."""

import json

import av
import pytest
import yaml
from click.testing import CliRunner
from media import write_video
from trainings import MODEL

from vidlada import video, video_decoding
from vidlada.cli import main

H264, MPEG2 = {"codec": "libx264", "options": {"bf": "2"}}, {"codec": "mpeg2video"}
KINDS = {
    "mp4": H264, "mov": H264, "mkv": H264, "avi": H264, "flv": H264, "ts": H264, "m2ts": H264, "nut": H264,
    "h264": H264, "hevc": {"codec": "libx265"}, "mpg": MPEG2, "m2v": MPEG2, "mxf": MPEG2, "wtv": MPEG2,
    "wmv": {"codec": "wmv2"}, "webm": {"codec": "libvpx"}, "ogv": {"codec": "libvpx"}, "ivf": {"codec": "libvpx"},
    "3gp": {"codec": "mpeg4"}, "m4v": {"codec": "mpeg4"}, "mjpeg": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "gif": {"codec": "gif", "pixel_format": "rgb8", "fps": 10},
}  # fmt: skip
LENGTH, GROUP = 200_000, 250


@pytest.mark.parametrize("suffix", KINDS)
def test_indexing_opens_no_decoder(tmp_path, suffix, monkeypatch):
    path = write_video(tmp_path / f"c.{suffix}", frames=40, **KINDS[suffix])
    opened = []
    original = video.index_file

    def index_file(path, container, streams):
        found = original(path, container, streams)
        opened.extend(stream.codec_context.is_open for stream in streams)
        return found

    monkeypatch.setattr(video, "index_file", index_file)
    monkeypatch.setattr(video, "decode_frames", lambda *_: pytest.fail("decoded"))
    assert video.probe(path).frames == 40 and opened == [False]


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """One group of pictures again and again, as its packets."""
    folder = tmp_path_factory.mktemp("long")
    short = write_video(
        folder / "short.mp4", frames=GROUP, size=(16, 16), keyframe_every=GROUP, codec="libx264", options={"bf": "0"}
    )
    path = folder / "long.mp4"
    with av.open(str(short)) as source, av.open(str(path), "w") as target:
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = source.streams.video[0].time_base
        step = round(1 / (25 * stream.time_base))
        for number in range(LENGTH):
            content, is_key = packets[number % GROUP]
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, stream.time_base, is_key
            packet.pts = packet.dts = number * step
            target.mux(packet)
    return path


@pytest.mark.slow
def test_data_check_decodes_little_of_a_long_file(long_file, tmp_path, monkeypatch):
    decoded = 0
    original = video_decoding.Reader.labelled_frames

    def counting(reader):
        nonlocal decoded
        for found in original(reader):
            decoded += 1
            yield found

    monkeypatch.setattr(video_decoding.Reader, "labelled_frames", counting)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    entries = [{"id": n, "video": str(path), "conversations": turns} for n, path in enumerate([long_file, long_file])]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    data = {"kind": "llava", "json_path": str(tmp_path / "d.json"), "sampling": {"max_frames": 16}}
    stage = {"name": "only", "learning_rate": 1e-3, "steps": 1, "data": data}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), "model": MODEL, "stages": [stage]}))
    result = CliRunner().invoke(main, ["data", "check", "--json", str(path)])
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert len(report["lengths"]) == 2 and not report["problems"]
    assert decoded <= 16 * (GROUP + 20)
