"""Whether pictures of an H.264 stream were lost: every slice carries a frame number that runs on."""

import re

SLICES = bytes(reference << 5 | kind for kind in (1, 2, 5) for reference in range(4))
SLICE_START = re.compile(b"\\0\\0\\x01([" + re.escape(SLICES) + b"])", re.DOTALL)
SPS_START = re.compile(b"\\0\\0\\x01[\\x07\\x27\\x47\\x67]")
HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
HEADER_BYTES = 64  # more than the fields of a slice that are read here
SPS_BYTES = 1024
IDR = 5
HOLE, MOST_PADDING = bytes(16), 256


class Bits:
    """Reads the bits of a NAL unit, without the bytes that keep start codes out of it."""

    def __init__(self, data: bytes):
        data = data.replace(b"\0\0\x03", b"\0\0")
        self.value, self.left = int.from_bytes(data), 8 * len(data)

    def take(self, count: int) -> int:
        """An unsigned number of so many bits; `IndexError` at the end."""
        self.left -= count
        if self.left < 0:
            raise IndexError
        return self.value >> self.left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned number in Exp-Golomb code."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def signed_golomb(self) -> int:
        """A signed one."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -code // 2


def frame_number_bits(sps: bytes) -> tuple[int, bool] | None:
    """Bits of a frame number, and whether a colour plane's number precedes it; None where numbers may have gaps.

    Args:
        sps: a sequence parameter set, behind the first byte of its NAL unit.
    """
    bits = Bits(sps)
    profile = bits.take(24) >> 16
    bits.golomb()
    separate = False
    if profile in HIGH_PROFILES:
        chroma = bits.golomb()
        separate = chroma == 3 and bool(bits.take(1))
        bits.golomb(), bits.golomb(), bits.take(1)
        if bits.take(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    skip_scaling_list(bits, 16 if number < 6 else 64)
    width = bits.golomb() + 4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1), bits.golomb(), bits.golomb()
        for _ in range(bits.golomb()):
            bits.golomb()
    bits.golomb()
    return None if bits.take(1) else (width, separate)


def skip_scaling_list(bits: Bits, size: int) -> None:
    """Read over a scaling list of a parameter set."""
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last


def length_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of the length in front of each unit of H.264 or HEVC; 0 where start codes stand there instead."""
    place = {"h264": 4, "hevc": 21}.get(codec, len(extradata))
    return extradata[place] % 4 + 1 if len(extradata) > place and extradata[0] == 1 else 0


def has_hole(packet: bytes, length_bytes: int) -> bool:
    """Whether zeros stand where a picture was, as in a download that was never finished: inside a unit, no three follow
    each other; behind one, some encoders fill up a few.

    Args:
        packet: of H.264 or HEVC.
        length_bytes: of the length in front of each unit.
    """
    if HOLE not in packet:
        return False
    place = 0
    while place + length_bytes <= len(packet):
        length = int.from_bytes(packet[place : place + length_bytes])
        place += length_bytes
        unit = packet[place : place + length]
        inside = unit.rstrip(b"\0")
        if not inside or HOLE in inside or len(unit) - len(inside) > MOST_PADDING:
            return True
        place += length
    return False


class FrameNumbers:
    """Follows the frame numbers of packets in order of decoding.

    Args:
        extradata: of the stream: parameter sets of mp4's kind, with start codes, or none.
    """

    def __init__(self, extradata: bytes):
        self.length_bytes = length_bytes("h264", extradata)
        self.forms: set[tuple[int, bool] | None] = set()  # of all parameter sets
        self.reference: int | None = None  # frame number of the last picture that others may lean on
        if self.length_bytes:
            self._learn(extradata[9:])
        else:
            self._learn_all(extradata)

    def is_refresh(self, packet: bytes | memoryview) -> bool:
        """Whether a packet's picture is one of instant refresh: no later picture leans on one before it."""
        start = self._slice(packet)
        return start < 0 or packet[start] & 0x1F == IDR

    def restart(self) -> None:
        """Forget what came before: decoding begins elsewhere."""
        self.reference = None

    def skips(self, packet: bytes | memoryview, is_key: bool) -> bool:
        """Whether pictures that this one may lean on are missing before a packet.

        Args:
            packet: its content.
            is_key: it holds a key picture, which leans on none.
        """
        if is_key and not self.length_bytes:
            self._learn_all(bytes(packet[:SPS_BYTES]))
        form = next(iter(self.forms)) if len(self.forms) == 1 else None
        start = self._slice(packet)
        if form is None or start < 0:
            return False
        head = packet[start]
        try:
            bits = Bits(bytes(packet[start + 1 : start + HEADER_BYTES]))
            bits.golomb(), bits.golomb(), bits.golomb()
            bits.take(2 if form[1] else 0)
            number = bits.take(form[0])
        except IndexError:
            return False
        before = self.reference
        if head >> 5:
            self.reference = number
        if before is None or is_key or head & 0x1F == IDR:
            return (
                False  # (pictures other than key pictures could start numbers anew too, but no common encoder does so)
            )
        return number not in (before, (before + 1) % (1 << form[0]))

    def _slice(self, packet: bytes | memoryview) -> int:
        """Where the first slice of a packet begins; -1 if there is none."""
        if not self.length_bytes:
            found = SLICE_START.search(packet)
            return found.start(1) if found else -1
        place = 0
        while place + self.length_bytes < len(packet):
            length = int.from_bytes(packet[place : place + self.length_bytes])
            place += self.length_bytes
            if packet[place] in SLICES:
                return place
            place += length
        return -1

    def _learn(self, sps: bytes) -> None:
        try:
            self.forms.add(frame_number_bits(sps))
        except IndexError:
            self.forms.add(None)

    def _learn_all(self, data: bytes) -> None:
        for found in SPS_START.finditer(data):
            self._learn(data[found.end() : found.end() + SPS_BYTES])
