"""Cached passes over fixed buffers: run eagerly the first time, then captured as a CUDA graph, then replayed.

A cached step of the 8B model launches some 430 kernels, each of which takes the host about as long as it takes the
GPU. A graph launches all of them at once. What makes that possible: nothing in such a pass depends on values, its
inputs and outputs are the requests' own buffers, and which positions join at which layer repeats from step to step.

On other devices the same path runs without capture: the pass over the fixed buffers runs again.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidlada.decoding.kv_cache import KVCache, PartialPass, full_attention, refresh
from vidlada.model.language_model import LanguageModel

MAX_POSITIONS = 256  # of a pass; longer ones are bound by arithmetic, not by launches
MAX_RECORDS = 64  # graphs kept; the one used longest ago goes first

log = logging.getLogger("vidlada.decoding")


@dataclass
class Record:
    """A kind of pass that has been met.

    Attributes:
        caches: what it reads and writes; once one is gone, so is the record.
        joins: fixed positions of each request, by layer; None before the capture.
        replay: runs the pass; None before the capture.
        computed: positions it computes of each request, by layer.
        eager: the capture failed; not to be tried again.
        table: rotary angles that the graph reads.
    """

    caches: list["weakref.ref[KVCache]"]
    joins: list[dict[int, Tensor]] | None = None
    replay: Callable[[], None] | None = None
    computed: list[list[int]] = field(default_factory=list)
    eager: bool = False
    table: Tensor | None = None


class StaticStep:
    """Runs passes like `refresh`, with the same result.

    Args:
        language_model: whose layers run.

    Attributes:
        eager, captures, replays: passes of each kind so far.
    """

    def __init__(self, language_model: LanguageModel):
        self.language_model = language_model
        self.records: OrderedDict[Hashable, Record] = OrderedDict()
        self.pool: Any = None  # of memory, one for all graphs
        self.eager = self.captures = self.replays = 0

    @torch.inference_mode()
    def __call__(self, passes: Sequence[PartialPass]) -> None:
        """See `refresh`."""
        key = pass_key(passes)
        record = None if key is None else self.records.get(key)
        if record is None or record.eager:
            if key is not None and record is None:
                self._add(key, passes)
            self.eager += 1
            refresh(self.language_model, passes)
            return
        self.records.move_to_end(key)
        if record.replay is None and not self._capture(record, passes):
            self.eager += 1
            refresh(self.language_model, passes)
            return
        assert record.replay is not None
        assert record.joins is not None
        for each, fixed in zip(passes, record.joins, strict=True):
            for layer, positions in each.joins.items():
                fixed[layer].copy_(positions)
        record.replay()
        self.replays += 1
        for each, done in zip(passes, record.computed, strict=True):
            each.kv_cache.computed = [a + b for a, b in zip(each.kv_cache.computed, done, strict=True)]

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        self.records.clear()
        self.pool = None

    def _add(self, key: Hashable, passes: Sequence[PartialPass]) -> None:
        """Note a kind of pass; forget those whose requests are gone, or that were used longest ago."""
        gone = [old for old, record in self.records.items() if any(cache() is None for cache in record.caches)]
        for old in gone:
            del self.records[old]
        self.records[key] = Record([weakref.ref(each.kv_cache) for each in passes])
        while len(self.records) > MAX_RECORDS:
            self.records.popitem(last=False)

    def _capture(self, record: Record, passes: Sequence[PartialPass]) -> bool:
        """Make the record replayable; False if that is impossible."""
        before = [list(each.kv_cache.computed) for each in passes]
        record.joins = [{layer: places.clone() for layer, places in each.joins.items()} for each in passes]
        fixed = [replace(each, joins=joins) for each, joins in zip(passes, record.joins, strict=True)]
        first = passes[0].kv_cache.hidden[0]
        longest = max(each.kv_cache.tokens for each in passes)
        record.table = self.language_model.rotation(longest, first.dtype, first.device)
        record.computed = [_work(each, len(before[0])) for each in passes]
        if first.is_cuda:
            try:
                record.replay = self._graph(fixed)
            except RuntimeError as error:
                log.warning("a cached pass could not be captured as a CUDA graph and runs eagerly: %s", error)
                record.eager = True
            self._restore(passes, before)  # capturing counts what it does not run
            self.captures += record.replay is not None
            return record.replay is not None
        # not the passes themselves: they hold the caches, whose end is the record's
        weak = [(ref, replace(each, kv_cache=None)) for ref, each in zip(record.caches, fixed, strict=True)]  # type: ignore[arg-type]

        def again() -> None:
            alive = [replace(each, kv_cache=ref()) for ref, each in weak]  # type: ignore[arg-type]
            counts = [list(each.kv_cache.computed) for each in alive]
            refresh(self.language_model, alive)
            self._restore(alive, counts)

        record.replay = again
        self.captures += 1
        return True

    def _graph(self, passes: Sequence[PartialPass]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads may use the GPU meanwhile: a server encodes videos
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            refresh(self.language_model, passes)
        self.pool = self.pool or graph.pool()
        return graph.replay

    @staticmethod
    def _restore(passes: Sequence[PartialPass], counts: Sequence[list[int]]) -> None:
        for each, count in zip(passes, counts, strict=True):
            each.kv_cache.computed = count


def _work(each: PartialPass, layers: int) -> list[int]:
    """Positions a pass computes in every layer."""
    counts, active = [], 0
    for layer in range(layers):
        if layer == 1 and each.narrow is not None:
            active = min(active, each.narrow)
        active += len(each.joins.get(layer, ()))
        counts.append(active)
    return counts


def pass_key(passes: Sequence[PartialPass]) -> Hashable:
    """What must be the same for a pass to be replayed; None if it never can."""
    parts: list[Hashable] = []
    for each in passes:
        attention = each.attention
        pattern = () if attention is full_attention else getattr(attention, "static_key", lambda: None)()
        if pattern is None or len(set(each.kv_cache.devices)) > 1:
            return None
        shape = tuple((layer, len(positions)) for layer, positions in sorted(each.joins.items()))
        answer = None if each.answer is None else (each.answer[0].data_ptr(), each.answer[1].start)
        parts.append((each.kv_cache.serial, shape, each.narrow, pattern, answer))
    positions = sum(len(places) for each in passes for places in each.joins.values())
    return tuple(parts) if positions <= MAX_POSITIONS else None
