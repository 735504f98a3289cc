"""Where a transport stream lost packets: in every packet of a stream there is a counter that runs on.

FFmpeg notices this too, but then marks the picture before the one that is damaged. A packet may be sent twice; FFmpeg
reads both, so that damages a picture too.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZES, SYNC, BYTES = (188, 192, 204), 0x47, 188  # 192: four bytes of a clock in front; 204: checks behind
CLOCK_BYTES = 4
SURE = 5  # marks in a row that show where packets begin
CHUNK = 2**16  # packets looked at together
SEARCHED = 2**20  # bytes that are searched together for the next packet
STUFFING = 8  # bytes, more than what else stands in a packet that is filled up


@dataclass(frozen=True)
class TransportLoss:
    """Lost packets.

    Attributes:
        place: where the packet behind them, or the damaged one, begins in the file.
        tail_is_there: what was sent before is whole, as its last packet was filled up.
    """

    place: int
    tail_is_there: bool


def transport_losses(path: Path, stream: int) -> list[TransportLoss] | None:
    """Losses in one stream of a file.

    Args:
        path: of the file.
        stream: its number in the packets (PID).

    Returns:
        In order; None where no packets can be made out.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        try:
            return _losses(data, stream)
        finally:
            del data  # else the file cannot be closed


def damaged_pieces(path: Path, stream: int, places: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Numbers of the pictures that are damaged, and of those in front of which something is missing.

    Args:
        path, stream: see `transport_losses`.
        places: where each picture begins in the file, in its order; 0 where it is not known.
    """
    losses = transport_losses(path, stream)
    if losses is None:
        return None
    damaged: list[int] = []
    behind: list[int] = []
    begins = np.maximum.accumulate(np.array(places, np.int64))  # several may have come in one piece
    for loss in losses:
        number = int(np.searchsorted(begins, loss.place))
        if number and not loss.tail_is_there:
            damaged += range(int(np.searchsorted(begins, begins[number - 1])), number)
        if number < len(begins):
            behind.append(number)
    return damaged, behind


def _losses(data: np.ndarray, stream: int) -> list[TransportLoss] | None:
    step = next((size for size in SIZES if _begin(data[: 2 * SURE * size], 0, size) is not None), None)
    if step is None:
        return None
    starts, breaks = [], []
    for run in _runs(data, step):
        high, low = (data[run[0] + byte : run[-1] + byte + 1 : step] for byte in (1, 2))
        own = run[(high & 0x1F == stream >> 8) & (low == stream & 0xFF)]
        extended = own[(data[own + 3] & 0x20 > 0) & (data[own + 4] > 0)]
        starts.append(own[data[own + 3] & 0x10 > 0])
        breaks.append(extended[data[extended + 5] & 0x80 > 0])  # counters that are said to begin anew
    payloads, announced = np.concatenate(starts), np.concatenate(breaks)
    counters = data[payloads + 3] & 0xF
    steps = (np.diff(counters.astype(int)) & 0xF) if len(payloads) else np.zeros(0, int)
    news = np.diff(np.searchsorted(announced, payloads, side="right")) > 0
    found = []
    for number in np.flatnonzero((steps != 1) & ~news).tolist():
        before, behind = int(payloads[number]), int(payloads[number + 1])
        begins = bool(data[behind + 1] & 0x40)
        found.append(TransportLoss(behind, begins and _is_filled_up(data, before)))
    found += [TransportLoss(place, False) for place in payloads[data[payloads + 1] & 0x80 > 0].tolist()]
    before_sync = CLOCK_BYTES if step == 192 else 0
    return sorted(
        (TransportLoss(loss.place - before_sync, loss.tail_is_there) for loss in found), key=lambda x: x.place
    )


def _is_filled_up(data: np.ndarray, place: int) -> bool:
    """Whether a packet ends in a part that is filled up with bytes of no meaning."""
    length = int(data[place + 4]) if data[place + 3] & 0x20 else 0
    return length > STUFFING and bool((data[place + 5 + length - STUFFING // 2 : place + 5 + length] == 0xFF).all())


def _begin(data: np.ndarray, place: int, step: int) -> int | None:
    """Where the next packets begin from a place on."""
    while place < len(data):
        for offset in np.flatnonzero(data[place : place + SEARCHED] == SYNC).tolist():
            marks = data[place + offset : place + offset + SURE * step : step]
            if len(marks) == SURE and (marks == SYNC).all():
                return int(place + offset)
        place += SEARCHED
    return None


def _runs(data: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Where packets begin, those together that follow each other."""
    place = _begin(data, 0, step)
    while place is not None:
        whole = (len(data) - place - BYTES) // step + 1
        marks = data[place : place + min(whole, CHUNK) * step : step][: max(0, whole)]
        count = len(marks) if (marks == SYNC).all() else int(np.argmin(marks == SYNC))
        if count == 0:
            place = _begin(data, place, step)
            continue
        yield place + step * np.arange(count)
        place += count * step
        if place + BYTES > len(data):
            return
