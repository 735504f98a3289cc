"""The text of an answer in the making that can no longer change.

A denoised answer appears all over at once, and tokens before a hole may still turn out to belong to a stop string.
What is settled is the run of final tokens from the left, less whatever a later token could take back: the beginning of
a stop string, an unfinished character, white space that the end of the answer would strip.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vidlada.decoding.sampler import State


@dataclass(frozen=True)
class StableText:
    """What is certain about an answer.

    Attributes:
        text: a prefix of the answer, and of every later settled text.
        tokens: answer tokens it was made from.
        finish_reason: `stop` or `length` once the text is the whole answer, else None.
        reasoning: a prefix of the thought before the answer; see `vidlada.decoding.thinking`.
        reasoning_tokens: tokens, not counted in `tokens`, of a thought in slots of its own.
        thinking: the state it was made from is that of such a thought.
    """

    text: str
    tokens: int
    finish_reason: str | None
    reasoning: str = ""
    reasoning_tokens: int = 0
    thinking: bool = False


def stable_text(
    state: State,
    decode: Callable[[Sequence[int]], str],
    stop_sequences: Sequence[tuple[int, ...]],
    stop_words: Sequence[str],
    max_tokens: int | None = None,
) -> StableText:
    """The settled part of a state.

    Args:
        state: after any step.
        decode: token ids to text.
        stop_sequences: token ids that end the answer, as the request has them.
        stop_words: strings that end it, which may also stand inside other tokens.
        max_tokens: most tokens of the answer; the rest is cut off.
    """
    committed = state.committed
    run = len(committed) if bool(committed.all()) else int(committed.long().argmin())
    slots = len(committed) if state.stop_at is None else min(state.stop_at, len(committed))
    stopped = state.stop_at is not None and run >= slots
    run = min(run, slots)
    cut = max_tokens is not None and run >= max_tokens and not (stopped and run == max_tokens)
    if cut:
        run, stopped = max_tokens or 0, False
    ids = state.proposed[:run].tolist()
    complete = cut or stopped or run == len(committed)
    if not complete:
        ids = ids[: len(ids) - overlap(ids, stop_sequences)]
    text = decode(ids)
    if not complete:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    sure = len(text) if complete else len(text) - overlap(text, stop_words)
    end = min((place for place in (text.find(word) for word in stop_words) if place >= 0), default=None)
    if end is not None and end <= sure:
        return StableText(text[:end].strip(), len(ids), "stop")
    reason = ("stop" if stopped else "length") if complete else None
    return StableText(text[:sure].strip(), len(ids), reason)


def overlap(sequence: Sequence, ends: Sequence[Sequence]) -> int:
    """Length of the longest end of `sequence` that one of `ends` begins with, without being all of it."""
    longest = 0
    sequence = sequence if isinstance(sequence, str) else list(sequence)
    for end in ends:
        end = end if isinstance(end, str) else list(end)  # slices of texts compare fast: stop strings may be long
        for length in range(min(len(end) - 1, len(sequence)), longest, -1):
            if sequence[len(sequence) - length :] == end[:length]:
                longest = length
                break
    return longest
