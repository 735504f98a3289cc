"""States to a transformers streamer: final text by `put`, the draft behind it by `put_draft`."""

from collections.abc import Iterable, Iterator
from typing import Any

from vidlada.decoding.sampler import State


def feed(streamer: Any, states: Iterable[State], mask_token_id: int) -> Iterator[State]:
    """Pass states on and show them to a streamer such as `transformers.TextDiffusionStreamer`.

    Tokens are `put` once everything before them is final too, since a streamer cannot take text back.

    Args:
        streamer: with `put`, `end` and, for drafts, `put_draft`.
        states: of one request, in order.
        mask_token_id: left out of drafts.
    """
    shown = 0
    for state in states:
        committed = state.committed[: state.stop_at]
        final = len(committed) if bool(committed.all()) else int(committed.long().argmin())
        if final > shown:
            streamer.put(state.proposed[shown:final])
            shown = final
        draft = state.proposed[shown : state.stop_at]
        draft = draft[draft != mask_token_id]
        if len(draft) and hasattr(streamer, "put_draft"):
            streamer.put_draft(draft)
        yield state
    streamer.end()
