"""Whether a video file ends where its container says it does.

Containers are built of elements that state their length: boxes, chunks, pages, packets. A file that was cut (a broken
download, a full disk) ends in the middle of one, whatever its header promises. FFmpeg reads such files to the last
whole frame and says nothing.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MP4_BOXES = frozenset(
    b"ftyp styp moov moof mdat mfra sidx ssix free skip wide uuid meta udta emsg prft pdin pnot".split()
)
EBML, SEGMENT, CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
IN_BOTH = frozenset({b"\xec", b"\xbf"})  # padding and checksums
IN_SEGMENT = IN_BOTH | {
    bytes.fromhex(name)
    for name in ("1f43b675", "114d9b74", "1549a966", "1654ae6b", "1c53bb6b", "1941a469", "1043a770", "1254c367")
}
IN_CLUSTER = IN_BOTH | {bytes.fromhex(name) for name in ("e7", "5854", "a7", "ab", "a3", "a0", "af")}
ASF_HEADER, ASF_FILE = (
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"),
)
TS_SIZES, TS_SYNC, TS_PAYLOAD = (188, 192, 204), 0x47, 188
OGG_MOST_PAGE = 27 + 255 + 255 * 255
MXF_KEY = b"\x06\x0e\x2b\x34"
PS_PACK, PS_END = 0xBA, 0xB9
PS_TAIL = 2**18  # bytes, more than the longest packet of a program stream
GXF_START, GXF_LAST = b"\0\0\0\0\x01", 0xFB
WTV_SECTOR = 2**12
NUT_INDEX = bytes.fromhex("4e58dd672f23e64e")
DV_FRAMES = {0: 120000, 1: 144000}  # bytes of a frame, 60 or 50 fields a second


def is_cut(path: Path, container: str) -> bool | None:
    """Whether a file ends in the middle of an element of its container.

    Args:
        path: of the file.
        container: FFmpeg's name of it.

    Returns:
        None where the container does not show it: it states no lengths, or this file leaves them out.
    """
    check = next((check for name, check in CHECKS.items() if name in container.split(",")), None)
    if check is None:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return check(data)
        except IndexError:  # it ends inside a header
            return True


def _mp4(data: mmap.mmap) -> bool | None:
    """Top-level boxes, fragments whose index (`sidx`) names more of them, and one whose data does not follow."""
    place, size, name = 0, len(data), b""
    while place + 8 <= size:
        length, name = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if name == b"sidx" and place + length + _referenced_bytes(data, place) > size:
            return True
        if name not in MP4_BOXES:
            return False  # what cameras append behind the last box
        if length == 1:
            length = int.from_bytes(data[place + 8 : place + 16])
        if length == 0:  # up to the end of the file
            return None if name == b"mdat" else False
        if length < 8:
            return False
        place += length
    return place > size or name == b"moof" or (0 < size - place < 8 and any(data[place:size]))


def _referenced_bytes(data: mmap.mmap, place: int) -> int:
    """Bytes that the index of fragments at a place says follow it."""
    wide = 16 if data[place + 8] else 8  # of its times and offsets, with version 1
    first = int.from_bytes(data[place + 20 + wide // 2 : place + 20 + wide])
    table = place + 20 + wide + 4
    count = int.from_bytes(data[table - 2 : table])
    sizes = (int.from_bytes(data[table + 12 * n : table + 12 * n + 4]) & 0x7FFFFFFF for n in range(count))
    return first + sum(sizes)


def _element(data: mmap.mmap, place: int) -> tuple[bytes, int, int | None] | None:
    """Name, start and end of the content of an element of Matroska; the end is None where its length is unknown, all is
    where there is no element. `IndexError` at the end of the file."""
    name_length = 9 - data[place].bit_length()
    if name_length > 4:
        return None
    name = data[place : place + name_length]
    place += name_length
    length_length = 9 - data[place].bit_length()
    if length_length > 8:
        return None
    bits = 7 * length_length
    length = int.from_bytes(data[place : place + length_length]) & ((1 << bits) - 1)
    place += length_length
    return name, place, None if length == (1 << bits) - 1 else place + length


def _matroska(data: mmap.mmap) -> bool | None:
    """Elements of the segment; those of unknown length (live recordings) are entered."""
    place, size = 0, len(data)
    while place < size:
        found = _element(data, place)
        if found is None:
            return None
        name, place, end = found
        if end is None:
            if name not in (SEGMENT, CLUSTER):
                return None
        else:
            place = end
            if name == SEGMENT:  # what stands behind it is not of this video
                return place > size or _has_hole_at_end(data, place)
    return place > size


def _has_hole_at_end(data: mmap.mmap, segment_end: int) -> bool:
    """Whether what follows the last cluster's beginning are no elements, as where a download was never finished."""
    last, found = data.rfind(CLUSTER, 0, segment_end), list[int]()
    if last >= 0:
        _follow_elements(data, last, segment_end, found)
    return bool(found)


def gaps_of(path: Path, container: str) -> list[int]:
    """Where elements of a Matroska file do not follow each other; what stands there up to the next cluster is lost.

    Args:
        path: of the file.
        container: FFmpeg's name of it; of others, nothing is known.
    """
    if "matroska" not in container.split(","):
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found: list[int] = []
        with suppress(IndexError):  # the end
            _matroska_gaps(data, found)
        return found


def _matroska_gaps(data: mmap.mmap, found: list[int]) -> None:
    head = _element(data, 0)
    segment = _element(data, head[2]) if head and head[0] == EBML and head[2] else None
    if segment is None or segment[0] != SEGMENT:
        return
    _, place, segment_end = segment
    _follow_elements(data, place, min(len(data), segment_end or len(data)), found)


def _follow_elements(data: mmap.mmap, place: int, segment_end: int, found: list[int]) -> None:
    cluster_end: int | None = None  # of the one that is entered
    while place < segment_end:
        inside = cluster_end is not None and place < cluster_end
        element = _element(data, place)
        known = element and element[0] in (IN_CLUSTER | IN_SEGMENT if inside else IN_SEGMENT)
        end = element and (element[2] or segment_end)
        if element and known and end and end <= (cluster_end if inside and cluster_end else segment_end):
            name, start, length = element
            if name == CLUSTER:
                place, cluster_end = start, length or segment_end
            else:
                place = end
            continue
        found.append(place)
        place, cluster_end = data.find(CLUSTER, place + 1), None
        if place < 0:
            return


def _riff(data: mmap.mmap) -> bool | None:
    """RIFF chunks; an avi of more than 1 GB has several. One that was never finished states no length; in one whose
    download was not, zeros stand where the next chunk should begin."""
    place, size = 0, len(data)
    while place + 12 <= size and data[place : place + 4] == b"RIFF":
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if length in (0, 0xFFFFFFFF):
            return None
        inner, place = place + 12, place + 8 + length + length % 2
        while inner + 8 <= min(place, size):
            if data[inner : inner + 4] == bytes(4):
                return True
            inside = int.from_bytes(data[inner + 4 : inner + 8], "little")
            inner += 8 + inside + inside % 2
    return place - size > 1  # the last byte of padding is often left out


def _ogg(data: mmap.mmap) -> bool | None:
    """The last page."""
    size = len(data)
    place = data.rfind(b"OggS", max(0, size - OGG_MOST_PAGE))
    if place < 0:
        return None
    if size - place < 27 or size - place < 27 + data[place + 26]:
        return True
    return place + 27 + data[place + 26] + sum(data[place + 27 : place + 27 + data[place + 26]]) > size


def _asf(data: mmap.mmap) -> bool | None:
    """Top-level objects, and the size of the file that the header states."""
    place, size = 0, len(data)
    while place + 24 <= size:
        name, length = data[place : place + 16], int.from_bytes(data[place + 16 : place + 24], "little")
        if name == ASF_HEADER:
            properties = data.find(ASF_FILE, place, place + length)
            live = properties >= 0 and data[properties + 88] & 1
            if live:
                return None
        if length < 24:
            return None
        place += length
    return place > size


def _flv(data: mmap.mmap) -> bool | None:
    """The last tag, whose length stands behind it."""
    size = len(data)
    length = int.from_bytes(data[size - 4 : size])
    start = size - 4 - length
    return not (length >= 11 and start >= 9 and int.from_bytes(data[start + 1 : start + 4]) + 11 == length)


def _mpegts(data: mmap.mmap) -> bool | None:
    """Packets of one size; the first may be cut too."""
    size = len(data)
    for step in TS_SIZES:
        for start in range(min(step, size)):
            if all(data[place] == TS_SYNC for place in range(start, min(size, start + 8 * step), step)):
                ends_in_packets = any(data[size - step - rest] == TS_SYNC for rest in range(min(step, size - step)))
                return not ends_in_packets or 0 < (size - start) % step < TS_PAYLOAD
    return None


def _mpeg(data: mmap.mmap) -> bool | None:
    """Packets of a program stream, from one of the last packs on."""
    size = len(data)
    place = data.find(bytes([0, 0, 1, PS_PACK]), max(0, size - PS_TAIL))
    while place >= 0 and place + 6 <= size and data[place : place + 3] == b"\0\0\1":
        kind = data[place + 3]
        if kind == PS_END:
            return False
        if kind == PS_PACK:
            second = data[place + 4] >> 6 == 1  # MPEG-2
            if second and place + 14 > size:
                return True
            place += 14 + (data[place + 13] & 7) if second else 12
        else:
            place += 6 + int.from_bytes(data[place + 4 : place + 6])
    if place < 0:
        return None
    return place > size or 0 < size - place < 6


def _mxf(data: mmap.mmap) -> bool | None:
    """Elements of key, length and value; where one does not follow another, something is missing in between."""
    place, size = 0, len(data)
    while place + 17 <= size:
        if data[place : place + 4] != MXF_KEY:
            return None if place == 0 or not any(data[place:]) else True
        length, place = data[place + 16], place + 17
        if length >= 0x80:
            wide = length & 0x7F
            length, place = int.from_bytes(data[place : place + wide]), place + wide
        place += length
    return place != size


def _gxf(data: mmap.mmap) -> bool | None:
    """Packets with their lengths, up to one that marks the end of the stream."""
    place, size, kind = 0, len(data), 0
    while place < size:
        if data[place : place + 5] != GXF_START:
            return None
        kind = data[place + 5]
        place += max(16, int.from_bytes(data[place + 6 : place + 10]))
    return place != size or kind != GXF_LAST


def _wtv(data: mmap.mmap) -> bool | None:
    """Sectors, whose number the header states."""
    return len(data) < WTV_SECTOR * int.from_bytes(data[0x5C:0x60], "little")


def _nut(data: mmap.mmap) -> bool | None:
    """The index at its end, whose last bytes but a checksum tell how long it is."""
    start = len(data) - int.from_bytes(data[-12:-4])
    return start < 0 or data[start : start + len(NUT_INDEX)] != NUT_INDEX


def _swf(data: mmap.mmap) -> bool | None:
    """The length in the header; of a compressed one it is that of the content."""
    return len(data) < int.from_bytes(data[4:8], "little") if data[:1] == b"F" else None


def _obu(data: mmap.mmap) -> bool | None:
    """Units of AV1 with their lengths."""
    place, size = 0, len(data)
    while place < size:
        head, length = data[place], 0
        place += 2 if head & 4 else 1
        if not head & 2:
            return None
        for shift in range(0, 56, 7):
            part = data[place]
            length, place = length | (part & 0x7F) << shift, place + 1
            if part < 0x80:
                break
        place += length
    return place != size


def _gif(data: mmap.mmap) -> bool | None:
    """The trailer; some programs put zeros behind it."""
    end = len(data)
    while end and data[end - 1] == 0:
        end -= 1
    return data[end - 1] != 0x3B


def _mjpeg(data: mmap.mmap) -> bool | None:
    """The last picture's end mark; cameras pad behind it."""
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xd8\xff")


def _y4m(data: mmap.mmap) -> bool | None:
    """Frames of one size."""
    header = data.find(b"\n") + 1
    second = data.find(b"FRAME", header + 5)
    return None if second < 0 else (len(data) - header) % (second - header) != 0


def _dv(data: mmap.mmap) -> bool | None:
    """Frames of one size."""
    return len(data) % DV_FRAMES[data[3] >> 7] != 0


def _ivf(data: mmap.mmap) -> bool | None:
    """Frames with their lengths."""
    place, size = int.from_bytes(data[6:8], "little"), len(data)
    while place + 12 <= size:
        place += 12 + int.from_bytes(data[place : place + 4], "little")
    return place != size


CHECKS: dict[str, Callable[[mmap.mmap], bool | None]] = {
    "mov": _mp4,
    "matroska": _matroska,
    "avi": _riff,
    "ogg": _ogg,
    "asf": _asf,
    "flv": _flv,
    "mpegts": _mpegts,
    "mpeg": _mpeg,
    "mxf": _mxf,
    "gxf": _gxf,
    "wtv": _wtv,
    "nut": _nut,
    "swf": _swf,
    "obu": _obu,
    "gif": _gif,
    "mjpeg": _mjpeg,
    "yuv4mpegpipe": _y4m,
    "dv": _dv,
    "ivf": _ivf,
}
