"""What frames a video file shows and when, from its packets alone: one pass over the file, no picture is decoded."""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from vidlada.errors import InputError
from vidlada.h264 import FrameNumbers
from vidlada.transport import damaged_pieces
from vidlada.truncation import is_cut

UNKNOWN = -(2**63)  # a time stamp that is not there
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS: raw streams
KEY, HIDDEN, CORRUPT, AT_ONCE, BEHIND_LOSS = 1, 2, 4, 8, 16  # flags of packets
TAIL_BYTES = 256  # so little behind the last picture is no further one, whatever FFmpeg takes it for
MOST_MISSING = 0.02  # share of the promised length a readable file may lack before it counts as truncated
STATES_ITS_LENGTH = frozenset({"mov", "matroska", "avi", "asf"})  # a file that `is_cut` denies is whole
HEADERLESS = frozenset({"mpegts", "mpeg"})
RESTARTING_CLOCKS = frozenset({"mpegts", "mpeg", "flv", "matroska", "mov", "ogg"})  # joined recordings begin again at 0
GUESS_SECONDS, GUESS_FRAMES = 0.5, 5  # how far guessed time stamps may be off
LONG_LAST_FRAMES = 5  # a last frame that stays as long as so many others ends no even sequence
JUMPING_CLOCK, JUMP_SECONDS = "mpegts", 3600.0  # a pause may be long; a broadcast that joins another jumps further
UNTIMED_REORDERING = {"h264": frozenset({5}), "hevc": frozenset({20})}  # NAL types every later frame is shown after
NAL_START = re.compile(b"\\0\\0\\x01(.)", re.DOTALL)
NAL_TYPE = {"h264": (0, 0x1F), "hevc": (1, 0x3F)}
MPEG_VIDEO = frozenset({"mpeg1video", "mpeg2video"})
MPEG_PICTURE = re.compile(b"\\0\\0\\x01\\0.(.)", re.DOTALL)  # the header of a picture; it says of which type it is
B_PICTURE = 3


@dataclass(frozen=True)
class VideoInfo:
    """What a source is.

    Attributes:
        path: as given.
        frames: how many it has.
        fps: frames a second, on average.
        duration: seconds.
        width, height: pixels as stored, before rotation.
        codec: `h264`, …; `image` for still images.
    """

    path: str
    frames: int
    fps: float
    duration: float
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Packets:
    """Columns of one stream's packets, in the order of the file.

    Attributes:
        pts, dts: presentation and decoding time stamps in stream units; UNKNOWN where there is none.
        durations: in stream units; 0 where unknown.
        flags: KEY, HIDDEN (decoded, but not shown), CORRUPT, AT_ONCE (shown before all pictures that are decoded later;
            looked for only in program streams), BEHIND_LOSS (the one before is corrupt, or others are missing there).
        restarts: numbers of the packets that every later packet is shown after; looked for only where there are no
            presentation times.
    """

    pts: np.ndarray
    dts: np.ndarray
    durations: np.ndarray
    flags: np.ndarray
    restarts: np.ndarray

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def first(self) -> int:
        """Number of the first packet that can be decoded."""
        keys = np.flatnonzero(self.flags & KEY)
        return int(keys[0]) if len(keys) else 0


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in the order they are shown.

    Attributes:
        info: of the file.
        seconds: (frames,) when each is shown, from the first.
        constant: all lie within half a frame of an even grid of `info.fps`.
        packets: (frames,) number of the packet that holds each; in order of decoding where `ordered`.
        starts: numbers of the frames decoding can start at, ascending.
        first: number of the first packet that can be decoded.
        stamps: (all packets,) presentation times as in the file, to know a packet by after a seek; None where they
            are missing or ambiguous.
        seek_to: (all packets,) the times that seeks are asked for.
        ordered: the file does not say in which order its packets are shown: frames are counted as they leave the
            decoder.
        begins_anywhere: recordings in this container may begin between key pictures.
        places: (all packets,) where each begins in the file.
        losses: numbers of the packets in front of which others are missing; see `vidlada.video_losses`.
        instant: no key picture of an H.264 stream is anything but an instant refresh. Where decoding begins at others,
            the decoder takes what lies before for an error.
    """

    info: VideoInfo
    seconds: np.ndarray
    constant: bool
    packets: np.ndarray
    starts: np.ndarray
    first: int
    stamps: np.ndarray | None
    seek_to: np.ndarray
    ordered: bool
    begins_anywhere: bool
    places: Sequence[int] = ()
    losses: frozenset[int] = frozenset()
    instant: bool = True

    def in_decoder_order(self) -> "Timeline":
        """The same for a file whose time stamps, taken together, are right, but not for each packet: frames are
        shown in the order in which they leave the decoder."""
        nothing = np.zeros(0, np.int64)
        return replace(self, packets=np.sort(self.packets), starts=nothing, stamps=None, ordered=True)

    def starting_at(self, number: int) -> "Timeline":
        """The same without the first frames."""
        seconds = self.seconds[number:] - self.seconds[number]
        duration = self.info.duration - float(self.seconds[number])
        starts = self.starts[self.starts >= number] - number
        info = replace(self.info, frames=len(seconds), duration=duration)
        return replace(self, info=info, seconds=seconds, packets=self.packets[number:], starts=starts)


def demux(container: InputContainer, streams: Sequence[VideoStream]) -> Iterator[av.Packet]:
    """Packets of the file from here on; the empty ones that flush decoders are left out."""
    try:
        yield from (packet for packet in container.demux(*streams) if packet.size)
    except IndexError:  # of PyAV, at the end of a file in which further streams have appeared
        return


def index_file(path: Path, container: InputContainer, streams: Sequence[VideoStream]) -> tuple[VideoStream, Timeline]:
    """Read every packet once, and choose the stream to show: the first that is not a mere picture.

    Args:
        path: of the file, for messages and to see whether it was cut.
        container: opened, at its start.
        streams: its candidates.

    Raises:
        InputError: there are no frames, or not all that the file announces.
    """
    columns = {stream.index: _Columns(container, stream) for stream in streams}
    problem = ""
    try:
        for packet in demux(container, streams):
            columns[packet.stream_index].append(packet)
    except av.error.FFmpegError as error:
        if path.stat().st_size - max(column.end for column in columns.values()) > TAIL_BYTES:
            problem = str(error.strerror)
    found = {stream.index: columns[stream.index].packets() for stream in streams}
    spans = [_span(found[stream.index]) * float(stream.time_base or 1) for stream in streams]
    stream = next(stream for stream, span in zip(streams, spans, strict=True) if span >= max(spans) / 2)
    packets, places = found[stream.index], columns[stream.index].places
    if container.format.name == "mpegts":
        _mark_losses(path, stream, packets, places)
    if not len(packets):
        raise InputError(f"{path}: the video stream holds no frames; the file is empty or truncated")
    timeline = _timeline(path, container, stream, packets)
    _refuse_truncated(path, container, stream, packets, timeline, problem)
    losses = frozenset(np.flatnonzero(packets.flags & BEHIND_LOSS).tolist())
    return stream, replace(timeline, places=places, losses=losses, instant=columns[stream.index].instant)


def _mark_losses(path: Path, stream: VideoStream, packets: Packets, places: Sequence[int]) -> None:
    """Mark the damaged packets of a transport stream as corrupt, and only those."""
    if found := damaged_pieces(path, stream.id, places):
        packets.flags[:] &= ~np.uint8(CORRUPT | BEHIND_LOSS)
        packets.flags[found[0]] |= CORRUPT
        packets.flags[found[1]] |= BEHIND_LOSS


class _Columns:
    """Collects the packets of a stream, in little memory: a file may hold millions."""

    def __init__(self, container: InputContainer, stream: VideoStream):
        self.pts, self.dts, self.durations = array("q"), array("q"), array("q")
        self.flags, self.places = bytearray(), array("q")
        self.end = 0  # of the last packet in the file
        self.restarts: list[int] = []
        self.codec, self.instant = stream.codec_context.name, True
        self.numbers = FrameNumbers(stream.codec_context.extradata or b"") if self.codec == "h264" else None
        self.untimed = container.format.name == "avi" or stream.start_time is None
        self.types = container.format.name == "mpeg" and self.codec in MPEG_VIDEO

    def append(self, packet: av.Packet) -> None:
        pts, dts = packet.pts, packet.dts
        self.pts.append(UNKNOWN if pts is None else pts)
        self.dts.append(UNKNOWN if dts is None else dts)
        self.durations.append(packet.duration or 0)
        self.places.append(packet.pos or 0)
        self.end = (packet.pos or 0) + packet.size
        self.flags.append(KEY * packet.is_keyframe | HIDDEN * packet.is_discard | CORRUPT * packet.is_corrupt)
        if packet.is_keyframe and self.numbers is not None:
            self.instant &= self.numbers.is_refresh(memoryview(packet))
        if packet.is_keyframe and self.untimed and self.codec in UNTIMED_REORDERING:
            place, bits = NAL_TYPE[self.codec]
            kinds = {found.group(1)[0] >> place & bits for found in NAL_START.finditer(bytes(packet))}
            if kinds & UNTIMED_REORDERING[self.codec]:
                self.restarts.append(len(self.flags) - 1)
        if self.types and (picture := MPEG_PICTURE.search(bytes(packet))):
            self.flags[-1] |= AT_ONCE * (picture.group(1)[0] >> 3 & 7 == B_PICTURE)

    def packets(self) -> Packets:
        pts, dts, durations = (np.array(column, np.int64) for column in (self.pts, self.dts, self.durations))
        flags = np.frombuffer(bytearray(self.flags), np.uint8)
        flags[1:] |= (flags[:-1] & CORRUPT > 0) * np.uint8(BEHIND_LOSS)
        return Packets(pts, dts, durations, flags, np.array(self.restarts, np.int64))


def _span(packets: Packets) -> int:
    """Stream units from the first time stamp to the last; packets without time stamps count one each."""
    for stamps in (packets.pts, packets.dts):
        known = stamps[stamps != UNKNOWN]
        if len(known):
            return int(np.ptp(known))
    return len(packets)


def _timeline(path: Path, container: InputContainer, stream: VideoStream, packets: Packets) -> Timeline:
    shown = (packets.flags & (HIDDEN | CORRUPT) == 0) & (np.arange(len(packets)) >= packets.first)
    timed = shown & (packets.pts != UNKNOWN)
    reordered = container.format.name == "avi" and stream.codec_context.name in UNTIMED_REORDERING
    raw = bool(container.format.flags & NO_TIMESTAMPS)  # those that FFmpeg makes up are often wrong
    ordered = reordered or raw or timed.sum() < shown.sum() / 2
    unit, found_pts = float(stream.time_base or 1), packets.pts
    if ordered:
        numbers, stamps = np.flatnonzero(shown), packets.dts[shown]
        if raw or (stamps == UNKNOWN).any():
            stamps, unit = np.arange(len(numbers)), 1 / _untimed_rate(stream, packets)
        stamps = np.sort(stamps)
        starts = np.flatnonzero(np.isin(numbers, packets.restarts))
    else:
        if container.format.name == "ogg":
            packets = _ogg_times(packets, stream)
        pts, usable = _one_clock(container, packets, unit)
        numbers = np.flatnonzero(timed & usable)
        numbers = numbers[np.argsort(pts[numbers], kind="stable")]
        stamps = pts[numbers]
        starts = np.flatnonzero(packets.flags[numbers] & KEY)
    if not len(numbers):
        raise InputError(f"{path}: none of its frames can be decoded; the file is damaged")
    seconds = (stamps - stamps[0]) * unit
    last = 0.0 if ordered else float(packets.durations[numbers[-1]]) * float(stream.time_base or 1)
    fps, constant = rate_of(seconds, _stated_rates(stream), last)
    duration = float(seconds[-1]) + (last or 1 / fps)
    context = stream.codec_context
    if not constant:
        fps = len(numbers) / duration
    info = VideoInfo(str(path), len(numbers), fps, duration, context.width, context.height, context.name)
    known = found_pts[found_pts != UNKNOWN]
    stamps_or_none = found_pts if not ordered and len(np.unique(known)) == len(known) else None
    anywhere = container.format.name in HEADERLESS or stream.start_time is None
    seek_to = np.where(packets.dts == UNKNOWN, packets.pts, np.minimum(packets.dts, packets.pts))
    found = Timeline(
        info, seconds, constant, numbers, starts, packets.first, stamps_or_none, seek_to, ordered, anywhere
    )
    if container.format.name != "mpeg" or ordered or constant:
        return found
    if stream.codec_context.name in MPEG_VIDEO:
        numbers = _shown_order(packets, numbers)
        starts = np.flatnonzero(packets.flags[numbers] & KEY)
        return _on_grid(replace(found, packets=numbers, starts=starts, stamps=None), _stated_rates(stream))
    return _on_grid(found.in_decoder_order(), _stated_rates(stream)) if (np.diff(seconds) <= 0).any() else found


def _shown_order(packets: Packets, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the packets of an MPEG video as they are shown: B pictures at once, others when the next comes."""
    numbers = np.sort(numbers)
    at_once = packets.flags[numbers] & AT_ONCE > 0
    places = np.arange(len(numbers))
    shown_at = places - 1
    shown_at[~at_once] = np.append(places[~at_once][1:], len(numbers)) - 1
    return numbers[np.argsort(shown_at, kind="stable")]


def _on_grid(timeline: Timeline, rates: Sequence[float]) -> Timeline:
    """The same with even times, if all are within a few frames of those. Program streams time few of their packets;
    begun between those, the first times are guesses that run into the first true ones."""
    numbers = np.arange(len(timeline.seconds))
    for rate in rates:
        off = timeline.seconds * rate - numbers
        if np.abs(off - np.median(off)).max() < GUESS_FRAMES:
            info = replace(timeline.info, fps=rate, duration=len(numbers) / rate)
            return replace(timeline, info=info, seconds=numbers / rate, constant=True)
    return timeline


def _ogg_times(packets: Packets, stream: VideoStream) -> Packets:
    """True times of frames in Ogg. It states when a packet ends; FFmpeg takes that for the start of the next, though
    there may be a gap in between."""
    last = (stream.start_time or 0) + stream.duration if stream.duration else packets.pts[-1] + packets.durations[-1]
    ends = np.append(packets.pts[1:], last)
    known = (ends != UNKNOWN) & (packets.pts != UNKNOWN)
    pts = np.where(known, np.maximum(packets.pts, ends - packets.durations), packets.pts)
    return replace(packets, pts=pts)


def _stated_rates(stream: VideoStream) -> list[float]:
    """Frames a second as the file says, the likeliest first."""
    stated = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return [float(rate) for rate in stated if rate]


def _untimed_rate(stream: VideoStream, packets: Packets) -> float:
    """Frames a second where most packets have no times: the stated rate that fits those that have."""
    stated = [float(rate) for rate in (stream.guessed_rate, stream.codec_context.framerate) if rate] or [25.0]
    timed = np.flatnonzero(packets.dts != UNKNOWN)
    if len(timed) < 2:
        return stated[0]
    measured = float(timed[-1] - timed[0]) / (max(1, _span(packets)) * float(stream.time_base or 1))
    return min(stated, key=lambda rate: abs(np.log(rate / measured)))


def rate_of(seconds: np.ndarray, stated: Sequence[float], last: float = 0.0) -> tuple[float, bool]:
    """Frames a second, and whether all frames lie within half a frame of an even grid of that rate.

    Args:
        seconds: (frames,) of each frame, ascending from 0.
        stated: rates the file claims; one that fits is exact, where time stamps are rounded.
        last: seconds the last frame is shown; one that stays much longer than the others breaks the grid.
    """
    count, span = len(seconds), float(seconds[-1])
    if count == 1 or span <= 0:
        return next(iter(stated), 1.0), True
    measured = (count - 1) / span
    for rate in (*stated, measured):
        if np.abs(seconds * rate - np.arange(count)).max() < 0.5:
            return rate, last * rate < LONG_LAST_FRAMES
    return measured, False


def _parts(container: InputContainer, packets: Packets, unit: float) -> list[tuple[int, int]]:
    """First and last + 1 packet of each stretch over which the clock runs on: joined recordings begin again at 0.

    Args:
        container: of the packets.
        packets: of one stream.
        unit: seconds a stream unit.
    """
    name = container.format.name.split(",")[0]
    known = np.flatnonzero(packets.dts != UNKNOWN)
    if name not in RESTARTING_CLOCKS or len(known) < 2:
        return [(packets.first, len(packets))]
    steps = np.diff(packets.dts[known])
    # a guessed time stamp may be a few frames off; a recording begins again at a key picture, or far back
    guess = GUESS_FRAMES * np.median(steps[steps > 0]) if (steps > 0).any() else 0
    begins = (packets.flags[known[1:]] & KEY > 0) & (steps < -guess)
    breaks = begins | (steps * unit < -GUESS_SECONDS)
    if name == JUMPING_CLOCK:
        breaks |= steps * unit > JUMP_SECONDS
    edges = [packets.first, *(edge for edge in known[1:][breaks].tolist() if edge > packets.first), len(packets)]
    return list(pairwise(edges))


def _one_clock(container: InputContainer, packets: Packets, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Presentation times on a clock that runs on through joined recordings, and which packets can be shown by them."""
    pts = packets.pts.copy()
    usable = np.zeros(len(pts), bool)
    at_once = packets.flags & AT_ONCE > 0
    types_known = bool(at_once.any())
    end = None
    for start, stop in _parts(container, packets, unit):
        part = pts[start:stop]
        stamped = part != UNKNOWN
        keys = np.flatnonzero(packets.flags[start:stop] & KEY)
        if not stamped.any() or (start > packets.first and not len(keys)):
            continue
        key = int(keys[0]) if len(keys) else 0
        # what is shown before the first key picture leans on pictures that are not there
        fit = stamped & (np.arange(len(part)) >= key)
        if types_known:
            others = fit & ~at_once[start:stop]
            fit &= others | (np.cumsum(others) > 1)
        else:
            fit &= part >= part[key]
        usable[start:stop] = fit
        # FFmpeg lets what several edits show follow one another; what they hide reaches beyond
        shown = np.sort(part[fit & (packets.flags[start:stop] & HIDDEN == 0)])
        if not len(shown):
            continue
        if end is not None and (shown[0] <= end or container.format.name == JUMPING_CLOCK):
            step = int(np.median(np.diff(shown))) if len(shown) > 1 else 1
            moved = end + step - shown[0]
            part[stamped] += moved
            shown += moved
        end = int(shown[-1])
    return pts, usable


def _refuse_truncated(
    path: Path, container: InputContainer, stream: VideoStream, packets: Packets, timeline: Timeline, problem: str
) -> None:
    """A silently shortened video gives wrong answers: refuse one that ends in the middle of something, or long
    before the end that its header announces."""
    name = container.format.name
    cut = is_cut(path, name)
    there = f"{timeline.info.duration:.1f} seconds"
    if problem:
        raise InputError(f"{path}: the file is damaged behind its first {there}: {problem}")
    if cut is False and not STATES_ITS_LENGTH.isdisjoint(name.split(",")):
        return
    if cut or (cut is None and packets.flags[-1] & CORRUPT):
        reason = "its last part is incomplete"
    else:
        promised, seconds = _promised_duration(container, stream, packets), timeline.seconds
        span = _span(packets) + int(packets.durations[-1])
        seen = seconds[-1] if timeline.ordered else span * float(stream.time_base or 1)
        # how long the last picture is shown, nobody may have written down
        longest = float(np.diff(seconds).max()) if len(seconds) > 1 else promised
        if promised - seen <= max(1.0, MOST_MISSING * promised, 2 * longest):
            return
        reason, there = "it ends early", f"{there} of {promised:.1f}"
    raise InputError(
        f"{path}: the file is truncated ({reason}): {there} can be used; to do so, copy them into a new file "
        f"(ffmpeg -i FILE -c copy NEW)"
    )


def _promised_duration(container: InputContainer, stream: VideoStream, packets: Packets) -> float:
    """Seconds that the header or an index promises; 0 if there is neither."""
    if container.format.name in HEADERLESS:  # what FFmpeg says of them, it saw at their ends
        return 0.0
    unit = float(stream.time_base or 1)
    entries, known = stream.index_entries, packets.dts[packets.dts != UNKNOWN]
    indexed = (entries[-1].timestamp - int(known[0])) * unit if len(entries) and len(known) else 0.0
    if stream.duration:
        return max(indexed, stream.duration * unit)
    if container.duration and len(container.streams) == 1:
        before = max(0.0, (stream.start_time or 0) * unit)  # some count from 0, some from the first frame
        return max(indexed, container.duration / av.time_base - before)
    return indexed
