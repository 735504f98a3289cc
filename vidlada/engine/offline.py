"""Answering requests in the caller's thread: what `ask`, `ask_many`, evaluation and the trainer's score are made of."""

from collections.abc import Iterable, Iterator

from vidlada.engine.core import EngineCore
from vidlada.engine.entry import ReadyEntry, Update
from vidlada.engine.limits import EngineLimits
from vidlada.errors import VidLaDAError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

MOST_WAITING = 2  # requests, whose prompts take memory, that are made before there is room for them


def decode(
    model: VidLaDAForMaskedDiffusion, entries: Iterable[ReadyEntry], together: int = 1, static: bool | None = None
) -> Iterator[tuple[int, Update | VidLaDAError]]:
    """Answer requests; one that is complete makes room for the next.

    Args:
        model: in evaluation mode.
        entries: taken as there is room for them.
        together: most of them that are decoded at a time; fewer where memory does not allow it.
        static: as for `Denoiser`.

    Yields:
        Number of a request, counted as they are taken, and what a step brought: the last update has a finish reason, or
        is the error for which there is no answer.
    """
    core = EngineCore(model, EngineLimits(max_running=max(1, together)), static)
    source = enumerate(entries)
    taken: dict[int, ReadyEntry] = {}
    while True:
        while len(taken) < core.limits.max_running and len(core.waiting) < MOST_WAITING:
            following = next(source, None)
            if following is None:
                break
            number, entry = following
            taken[number] = entry
            core.waiting.append(entry)
            while core.prepare():
                pass
        if not taken:
            return
        while core.prepare():
            pass
        core.step()
        for number, entry in list(taken.items()):
            while entry.updates:
                update = entry.updates.popleft()
                if isinstance(update, VidLaDAError) or update.stable.finish_reason is not None:
                    del taken[number]
                yield number, update
