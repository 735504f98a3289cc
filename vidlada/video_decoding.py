"""Some frames of a video file, each known by the packet it was decoded from.

Decoding can start at any key picture. Getting there is a seek, if that skips enough. Where seeks are refused, or lead
past their target, the packets before it are read and not decoded; and where even that does not give the frame, all is
decoded from the start.

Behind a damaged packet, what follows leans on a picture that is not there: up to the next key picture, no frame counts.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from vidlada.errors import InputError
from vidlada.h264 import FrameNumbers, has_hole, length_bytes
from vidlada.video_index import MOST_MISSING, Timeline, demux

SEEK_WORTH_FRAMES = 12  # skip to a key picture only if that saves so many frames; see `vidlada bench video`
FRAMELESS = 2  # packets in a row that may give no frame of their own in a sound file (second fields, hidden frames)

Opener = Callable[[], AbstractContextManager[tuple[InputContainer, VideoStream]]]
NumberedFrame = tuple[int, av.VideoFrame]
NEED_PARAMETER_SETS = frozenset({"h264", "hevc", "vvc"})
SEES_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave out what makes places transparent
NEVER = 2**62  # number of no packet
MOST_LEADING = 16  # frames shown before the key picture they are decoded after
MOST_DISORDER = 3  # frames that may leave the decoder too late, as the first of a stream do, before its times are wrong


class LostError(Exception):
    """A seek was refused or led past its target, or decoding from a key picture does not give the wanted frame."""


class WrongTimesError(Exception):
    """Frames leave the decoder in another order than their time stamps say."""


class LateStartError(Exception):
    """A recording begins with frames that cannot be decoded.

    Args:
        number: of the first frame that can.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def decode_frames(opener: Opener, timeline: Timeline, wanted: Sequence[int]) -> Iterator[NumberedFrame]:
    """Wanted frames in their order.

    Args:
        opener: opens the file anew, at its start.
        timeline: of the file.
        wanted: numbers of frames, ascending, each once.

    Yields:
        For each wanted frame its number and picture. Where its packet gives no frame of its own, it is the last one
        shown before, with the number of that.

    Raises:
        InputError: too much before a wanted frame cannot be decoded.
        WrongTimesError, LateStartError: the timeline is wrong; see its `in_decoder_order` and `starting_at`.
    """
    readers: list[type[Reader]] = [SkippingReader, Reader]
    if timeline.stamps is not None:
        readers.insert(0, SeekingReader)
    done = 0
    for reader in readers:
        with opener() as (container, stream):
            try:
                for found in reader(container, stream, timeline).frames(wanted[done:]):
                    yield found
                    done += 1
                return
            except LostError:
                continue


class Reader:
    """Decodes everything from the first key picture to the last wanted frame.

    Args:
        container, stream: just opened.
        timeline: of the file.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: Timeline):
        self.container, self.stream, self.timeline = container, stream, timeline
        self.starts = timeline.starts.tolist()
        self.restarts = frozenset(self.starts) if timeline.ordered else frozenset()
        self.frame_of = np.full(len(timeline.seek_to), -1)  # number of the frame that a packet holds
        self.frame_of[timeline.packets] = np.arange(len(timeline.packets))
        context = self.decoder = stream.codec_context
        tags = {name.lower(): value for name, value in stream.metadata.items()}
        if tags.get("alpha_mode") == "1" and context.name in SEES_ALPHA:
            self.decoder = cast(VideoCodecContext, av.CodecContext.create(SEES_ALPHA[context.name], "r"))
        self.numbers = FrameNumbers(context.extradata or b"") if context.name == "h264" else None
        self.length_bytes = length_bytes(context.name, context.extradata or b"")
        self.behind_loss = NEVER  # number of the first packet behind some that are missing
        self.demuxed = self.packets()
        self.position = 0  # number of the next packet
        self.decoded: Iterator[NumberedFrame] = iter(())
        self.shown: NumberedFrame | None = None  # the last frame before or at the wanted one
        self.ahead: NumberedFrame | None = None  # a decoded frame behind it

    def frames(self, wanted: Sequence[int]) -> Iterator[NumberedFrame]:
        """See `decode_frames`."""
        self.begin_at(self.start_of(wanted[0]))
        for number in wanted:
            self.approach(number)
            self.advance(number)
            if not self.found(number):
                self.retry(number)
            if self.shown is None and self.ahead is not None and self.may_start_at(self.ahead[0]):
                raise LateStartError(self.ahead[0])
            if self.shown is None or self.too_far(number):
                raise InputError(f"{self.timeline.info.path}: {self.problem_at(number)}")
            yield self.shown

    def start_of(self, number: int, earlier: int = 0) -> int:
        """Number of the packet where decoding begins for a frame."""
        return self.timeline.first

    def approach(self, number: int) -> None:
        """Skip what need not be decoded."""

    def retry(self, number: int) -> None:
        """Try to get a frame that did not come."""

    def begin_at(self, start: int) -> None:
        """Decode from a packet on."""
        while self.position < start:
            self.read()
        self.decoded, self.shown, self.ahead = self.decode(start), None, None

    def advance(self, number: int) -> None:
        """Decode until a frame, or one behind it, comes."""
        while self.shown is None or self.shown[0] < number:
            self.ahead = self.ahead or next(self.decoded, None)
            if self.ahead is None or self.ahead[0] > number:
                return
            self.shown, self.ahead = self.ahead, None

    def found(self, number: int) -> bool:
        """Whether a frame came, or its packet has none of its own."""
        return self.shown is not None and number - self.shown[0] <= FRAMELESS

    def may_start_at(self, number: int) -> bool:
        """Whether a recording may begin with frames that cannot be decoded, up to this one: cut without re-encoding,
        the first lean on a picture that is not there."""
        timeline = self.timeline
        little = timeline.seconds[number] <= MOST_MISSING * timeline.info.duration
        return timeline.begins_anywhere or number <= MOST_LEADING or bool(little)

    def too_far(self, number: int) -> bool:
        """Whether so much is missing before a frame that the last one cannot stand for it."""
        assert self.shown is not None
        gap = self.timeline.seconds[number] - self.timeline.seconds[self.shown[0]]
        return not self.found(number) and bool(gap > MOST_MISSING * self.timeline.info.duration)

    def problem_at(self, number: int) -> str:
        """What to say of a frame that did not come."""
        if number or self.ahead is not None:
            return f"the frame at {self.timeline.seconds[number]:.2f} s cannot be decoded; it is damaged"
        if self.stream.codec_context.name in NEED_PARAMETER_SETS and not self.stream.codec_context.extradata:
            return (
                "no frame can be decoded: the parameter sets are missing. It begins behind them, or was cut out of an "
                "mp4 into a transport stream without re-encoding: cut it anew into an mp4 or mkv, or re-encode"
            )
        return "no frame can be decoded: the file is damaged, or not of the codec it claims"

    def packets(self) -> Iterator[av.Packet]:
        """Packets of the file from here on."""
        try:
            yield from demux(self.container, [self.stream])
        except av.error.FFmpegError:  # what there is before was found worth reading
            return

    def read(self) -> tuple[int, av.Packet | None]:
        """The next packet and its number; -1 if it is not known, None at the end."""
        packet = next(self.demuxed, None)
        if packet is None:
            return -1, None
        self.position += 1
        return self.position - 1, packet

    def decode(self, start: int) -> Iterator[NumberedFrame]:
        """Frames from a packet on, which is the next to be read."""
        count, last, disorder = int(self.frame_of[start]), -1, 0
        damaged, packet, loss = False, -1, -1
        for label, frame in self.labelled_frames():
            if frame is not None and label == packet >= 0:
                continue  # decoders that learn late of reordering give the first frame twice
            packet = label
            number = int(self.frame_of[label]) if label >= 0 else -1
            if label >= self.behind_loss:
                damaged, loss, self.behind_loss = True, self.behind_loss, NEVER
            if frame is None or frame.is_corrupt:
                damaged = True
            elif frame.key_frame and (label < 0 or (number >= 0 and label >= loss)):  # a key picture may come late
                damaged = False
            if label < 0 or frame is None:
                continue
            if self.timeline.ordered:
                count = number if number in self.restarts else max(count, 0)
                if not damaged:
                    yield count, frame
                count += 1
            elif number >= 0:
                disorder += number < last
                if disorder > MOST_DISORDER:
                    raise WrongTimesError
                last = number
                if not damaged:
                    yield number, frame

    def labelled_frames(self) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Decoded frames with the numbers of their packets, None in the place of one that is damaged. Decoders carry
        the time stamp of a packet to its frame, whatever it means."""
        ended, self.behind_loss = False, NEVER
        if self.numbers is not None:
            self.numbers.restart()
        while not ended:
            label, packet = self.read()
            ended = packet is None
            if packet is not None and self.misses_before(label, packet):
                self.behind_loss = min(self.behind_loss, label)
            if packet is not None and self.length_bytes and has_hole(bytes(packet), self.length_bytes):
                self.behind_loss = min(self.behind_loss, label)
                continue
            try:
                if packet is None:
                    frames = self.decoder.decode(None)
                else:
                    packet.pts = label if label >= 0 else None
                    frames = self.decoder.decode(packet)
            except MemoryError:
                raise
            except av.error.FFmpegError:
                yield label, None
                continue
            for frame in frames:
                yield (-1 if frame.pts is None else frame.pts), frame

    def misses_before(self, label: int, packet: av.Packet) -> bool:
        """Whether packets that this one may lean on are missing before it."""
        if label in self.timeline.losses and not packet.is_keyframe:
            return True
        return self.numbers is not None and self.numbers.skips(memoryview(packet), packet.is_keyframe)


class SkippingReader(Reader):
    """Reads everything, but decodes from the last key picture before each wanted frame."""

    def start_of(self, number: int, earlier: int = 0) -> int:
        place = bisect_right(self.starts, number) - 1 - earlier
        return int(self.timeline.packets[self.starts[place]]) if place >= 0 else self.timeline.first

    def approach(self, number: int) -> None:
        start = self.start_of(number)
        if start - self.position >= SEEK_WORTH_FRAMES and (self.ahead is None or self.ahead[0] < number):
            self.skip_to(start)

    def skip_to(self, start: int) -> None:
        """Go on at a key picture further on."""
        self.decoder.flush_buffers()
        self.begin_at(start)

    def retry(self, number: int) -> None:
        raise LostError


class SeekingReader(SkippingReader):
    """Seeks to the last key picture before each wanted frame."""

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: Timeline):
        super().__init__(container, stream, timeline)
        assert timeline.stamps is not None
        self.packet_by_stamp = np.argsort(timeline.stamps, kind="stable")
        self.sorted_stamps = timeline.stamps[self.packet_by_stamp]

    def skip_to(self, start: int) -> None:
        try:
            self.container.seek(int(self.timeline.seek_to[start]), stream=self.stream, backward=True)
        except av.error.FFmpegError as error:
            raise LostError from error
        self.demuxed = self.packets()
        self.position = -1
        self.begin_at(start)

    def begin_at(self, start: int) -> None:
        self.waiting: tuple[int, av.Packet | None] | None = None
        label, packet = self.read()
        while label < start:
            if packet is None:
                raise LostError
            label, packet = self.read()
        if label > start:
            raise LostError
        self.waiting = (label, packet)
        self.decoded, self.shown, self.ahead = self.decode(start), None, None

    def read(self) -> tuple[int, av.Packet | None]:
        if self.waiting is not None:
            found, self.waiting = self.waiting, None
            return found
        _, packet = super().read()
        if packet is None or packet.pts is None:
            return -1, packet
        place = int(np.searchsorted(self.sorted_stamps, packet.pts))
        if place == len(self.sorted_stamps) or self.sorted_stamps[place] != packet.pts:
            return -1, packet
        label = int(self.packet_by_stamp[place])
        self.position = label + 1
        return label, packet

    def retry(self, number: int) -> None:
        for earlier in (1, 2):
            self.skip_to(self.start_of(number, earlier))
            self.advance(number)
            if self.found(number):
                return
