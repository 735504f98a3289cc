"""Where packets are missing in the middle of a video, as far as its container and its times tell."""

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

import numpy as np

from vidlada.errors import InputError
from vidlada.truncation import gaps_of
from vidlada.video_index import MOST_MISSING, MPEG_VIDEO, Timeline

EVEN_STEPS = 2.5  # times the usual one, that MPEG-1 and -2 never take: a frame may be repeated, but none left out
GUESSED_TIMES = "mpeg"  # a program stream times few of its packets


def with_losses(path: Path, container: str, timeline: Timeline) -> Timeline:
    """A timeline that knows the packets in front of which others are missing.

    Args:
        path: of the file.
        container: FFmpeg's name of it.
        timeline: of the file.

    Raises:
        InputError: more is missing at once than the last frame may stand for.
    """
    if timeline.constant or timeline.ordered:
        return timeline
    losses = {bisect_left(timeline.places, gap) for gap in gaps_of(path, container)} - {len(timeline.places)}
    if timeline.info.codec in MPEG_VIDEO and container != GUESSED_TIMES:
        losses |= _uneven(timeline)
    for number in losses:
        later = np.flatnonzero(timeline.packets >= number)
        if not len(later) or not later[0]:
            continue
        before, behind = timeline.seconds[later[0] - 1 : later[0] + 1].tolist()
        if behind - before > MOST_MISSING * timeline.info.duration:
            raise InputError(
                f"{path}: the file is damaged: what was shown between {before:.2f} s and {behind:.2f} s is missing"
            )
    return replace(timeline, losses=timeline.losses | losses)


def _uneven(timeline: Timeline) -> set[int]:
    """Numbers of the packets that follow a step in the times that the codec does not have; recordings that were stopped
    for a while go on with a key picture."""
    steps = np.diff(timeline.seconds)
    behind = np.flatnonzero(steps > EVEN_STEPS * np.median(steps)) + 1
    first = np.minimum.accumulate(timeline.packets[::-1])[::-1]  # decoded, of all that are shown from a frame on
    keys = set(timeline.packets[timeline.starts].tolist())
    return set(first[behind].tolist()) - keys
