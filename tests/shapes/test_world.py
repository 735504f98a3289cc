"""The synthetic world: splits that never meet, frames that show what the clip says, real files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vidlada.errors import InputError
from vidlada.shapes.render import render_frames, write_mp4
from vidlada.shapes.world import COLOURS, HELD_OUT, SIZES, Clip, Thing, clip_for, still
from vidlada.video import Sampling, probe, sample_frames


def looks(clip):
    """Every pair of colour and shape that is ever seen."""
    return {
        (colour, thing.shape)
        for thing in clip.things
        for colour in {thing.colour, thing.turns and thing.turns[1]}
        if colour
    }


def thing(**changes):
    values = {"colour": "red", "shape": "square", "size": "large", "appear": 0, "disappear": None, "motion": "still",
              "start": (0.5, 0.5), "end": (0.5, 0.5)}  # fmt: skip
    return Thing(**{**values, **changes})


def test_held_out_pairs_are_seen_in_half_of_the_test_clips_and_nowhere_else():
    unseen = sum(bool(looks(clip_for("test", index)) & HELD_OUT) for index in range(150))
    assert 55 <= unseen <= 95
    for index in range(150):
        assert not looks(clip_for("train", index)) & HELD_OUT
        assert not looks(clip_for("validation", index)) & HELD_OUT


def test_splits_never_share_a_clip():
    seeds = [{clip_for(split, index).seed for index in range(200)} for split in ("train", "validation", "test")]
    assert not seeds[0] & seeds[1] and not seeds[0] & seeds[2] and not seeds[1] & seeds[2]


@given(index=st.integers(0, 10**6), seconds=st.integers(2, 60), things=st.integers(1, 4))
@hypothesis_settings(max_examples=60)
def test_clips_are_always_the_same_and_consistent(index, seconds, things):
    clip = clip_for("train", index, seconds, things)
    assert clip == clip_for("train", index, seconds, things)
    assert Clip.from_dict(clip.to_dict()) == clip
    assert clip.seconds == seconds and 1 <= len(clip.things) <= things
    seconds_of_events = [event.second for event in clip.events]
    assert seconds_of_events == sorted(set(seconds_of_events))
    for one in clip.things:
        assert 0 <= one.appear < (seconds if one.disappear is None else one.disappear) <= seconds
        for second in range(seconds):
            x, y = clip.position(one, second)
            assert SIZES[one.size] < x < 1 - SIZES[one.size]
            assert SIZES[one.size] < y < 1 - SIZES[one.size]


@pytest.mark.parametrize(
    ("split", "seconds", "things"), [("exam", 5, 2), ("train", 1, 2), ("train", 61, 2), ("train", 5, 5)]
)
def test_impossible_clips_are_refused(split, seconds, things):
    with pytest.raises(InputError):
        clip_for(split, 0, seconds, things)


def test_frames_show_the_thing_where_and_when_it_is():
    moving = thing(motion="move", start=(0.19, 0.5), end=(0.81, 0.5), appear=1, turns=(3, "blue"))
    clip = Clip(5, 0, (moving,), clock=False)
    frames = render_frames(clip, range(5), 100)
    centres = [frame[50, int(100 * clip.position(moving, second)[0])] for second, frame in enumerate(frames)]
    for second, colour in ((1, "red"), (2, "red"), (3, "blue"), (4, "blue")):
        assert np.abs(centres[second].astype(int) - COLOURS[colour]).max() < 20
    assert np.abs(frames[0][50, 19].astype(int) - COLOURS["red"]).max() > 60
    assert clip.place(moving, 1) == "left" and clip.place(moving, 4) == "right"


def test_the_clock_tells_seconds_apart_and_looks_alike_at_any_size():
    clip = Clip(60, 0, ())
    corners = render_frames(clip, range(60), 210)[:, :30, :30].astype(int)
    assert len({corner.tobytes() for corner in corners}) == 60
    small = render_frames(clip, range(60), 70)[:, :10, :10].astype(int)
    shrunk = corners.reshape(60, 10, 3, 10, 3, 3).mean((2, 4))
    distances = np.abs(small[:, None] - shrunk[None]).mean((2, 3, 4))  # (small seconds, large seconds)
    assert distances.argmin(1).tolist() == list(range(60))


def test_a_still_is_one_frame_of_its_clip():
    clip = clip_for("train", 3, seconds=8)
    frame, alone = render_frames(clip, [5], 84)[0], render_frames(still(clip, 5), [0], 84)[0]
    assert np.abs(frame.astype(int) - alone).mean() < 5  # the noise differs


def test_mp4_files_hold_the_frames(tmp_path):
    clip = clip_for("train", 1, seconds=4)
    path = write_mp4(clip, tmp_path / "clip.mp4", size=112)
    info = probe(path)
    assert (info.codec, info.frames, info.duration) == ("h264", 32, pytest.approx(4))
    found = sample_frames(path, Sampling())
    assert found.times == pytest.approx((0, 1, 2, 3))
    assert np.abs(found.images.astype(int) - render_frames(clip, range(4), 112)).mean() < 6
    with pytest.raises(InputError, match="exists"):
        write_mp4(clip, path)
