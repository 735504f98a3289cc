"""What a cached pass runs of every layer, over fixed buffers: eagerly at first, then captured as CUDA graphs.

A cached step of the 8B model launches some 430 kernels, each of which takes the host about as long as it takes the GPU.
Three quarters of them are in the two parts of a layer that know nothing of requests: all before positions meet, and all
after. Their only shape is the number of rows, those of all requests together. So each part is captured once for every
number of rows, in multiples of 16, and serves whoever runs: requests of any length join and leave, blocks and caches
change, and no graph is lost. Between the two, attention stays eager, request by request over its own keys: it needs no
mask and no padding, which would cost more than the launches.

On other devices the same path runs without capture: the parts over the fixed buffers run again.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vidlada.model.language_model import LanguageModel, Layer

MAX_ROWS = 256  # of all requests together; more are bound by arithmetic, not by launches
MULTIPLE = 16  # rows are padded to, on a GPU: its products take as long for fewer
Run = Callable[[], None]

log = logging.getLogger("vidlada.decoding")


@dataclass(eq=False)
class RowBuffers:
    """Fixed buffers for so many rows, and what runs over them.

    Attributes:
        rows: of all requests together, padding included.
        tensors: buffers by name.
        sources: what was last copied into some of them.
        runs: how often each part has run.
        graphs: replay parts.
    """

    rows: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)
    runs: dict[Hashable, int] = field(default_factory=dict)
    graphs: dict[Hashable, Run] = field(default_factory=dict)

    def fill(self, name: str, values: Tensor, dim: int) -> None:
        """Copy rows into a buffer, unless they are what was copied there last."""
        if self.sources.get(name) is values:
            return
        if name not in self.tensors:
            self.tensors[name] = values.new_zeros([*values.shape[:dim], self.rows, *values.shape[dim + 1 :]])
        self.tensors[name].narrow(dim, 0, values.shape[dim]).copy_(values)
        self.sources[name] = values

    def put(self, name: str, values: Tensor) -> None:
        """Copy a part's result into a buffer of its shape: a graph's own memory is other graphs' too."""
        if name not in self.tensors:
            self.tensors[name] = torch.empty_like(values, memory_format=torch.contiguous_format)
        self.tensors[name].copy_(values)


class LayerGraphs:
    """Stands for `LanguageModel.enter` and `LanguageModel.leave` while a step runs. Rows are independent of each other,
    so that padding changes nothing.

    Args:
        multiple: rows are padded to.
        capture: makes a replay of a function; by default without a graph, the function itself.

    Attributes:
        eager, captures, replays: parts of layers that ran in each way so far, those of too many rows not counted.
    """

    def __init__(self, multiple: int = MULTIPLE, capture: Callable[[Run], Run] | None = None):
        self.multiple, self.capture = multiple, capture or (lambda run: run)
        self.sizes: dict[int, RowBuffers] = {}
        self.lock = threading.Lock()  # the buffers are for one step at a time
        self.model_state: Hashable = None
        self.plain: tuple[Callable[..., Any], Callable[..., Any]]
        self.eager = self.captures = self.replays = 0

    @contextmanager
    def replacing(self, language_model: LanguageModel) -> Iterator[None]:
        """Let the model's cached passes run over fixed buffers."""
        with self.lock:
            self.plain = language_model.enter, language_model.leave
            state = (*self.plain, *map(_identity, (language_model.layers[0], language_model.layers[-1])))
            if state != self.model_state:  # its weights were moved, or made smaller: graphs would read the old ones
                self.clear()
                self.model_state = state
            language_model.enter, language_model.leave = self.enter, self.leave  # type: ignore[assignment]
            try:
                yield
            finally:
                language_model.enter, language_model.leave = self.plain

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        self.sizes.clear()
        if isinstance(self.capture, GraphCapture):
            self.capture.clear()

    def enter(self, layer: nn.Module, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """See `vidlada.model.language_model.Layer.enter_rows`; the result is valid up to the next call."""
        rows, plain = len(hidden), self.plain[0]
        if rows > MAX_ROWS:
            return plain(layer, hidden, rotation)
        buffers = self._buffers(rows)
        buffers.fill("hidden", hidden, 0)
        buffers.fill("rotation", rotation, 1)

        def run() -> None:
            queries, keys_values = plain(layer, buffers.tensors["hidden"], buffers.tensors["rotation"])
            buffers.put("queries", queries)
            buffers.put("keys_values", keys_values)

        self._run(buffers, ("enter", layer), run)
        return buffers.tensors["queries"][:, :rows], buffers.tensors["keys_values"][:, :rows]

    def leave(self, layer: nn.Module, hidden: Tensor, mixed: Tensor) -> Tensor:
        """See `vidlada.model.language_model.Layer.leave`; the result is valid up to the next call."""
        rows, plain = len(hidden), self.plain[1]
        if rows > MAX_ROWS:
            return plain(layer, hidden, mixed)
        buffers = self._buffers(rows)
        buffers.fill("hidden", hidden, 0)
        buffers.fill("mixed", mixed, 0)

        def run() -> None:
            states = buffers.tensors["hidden"]
            states.copy_(plain(layer, states, buffers.tensors["mixed"]))

        self._run(buffers, ("leave", layer), run)
        buffers.sources["hidden"] = result = buffers.tensors["hidden"][:rows]
        return result

    def _buffers(self, rows: int) -> RowBuffers:
        padded = -(-rows // self.multiple) * self.multiple
        return self.sizes.setdefault(padded, RowBuffers(padded))

    def _run(self, buffers: RowBuffers, part: Hashable, run: Run) -> None:
        """Eagerly the first time, which lets libraries choose their kernels; then captured, then replayed."""
        runs = buffers.runs.get(part, 0)
        buffers.runs[part] = runs + 1
        if runs and part not in buffers.graphs:
            buffers.graphs[part] = self.capture(run)
            self.captures += 1
        if runs:
            buffers.graphs[part]()
            self.replays += 1
        else:
            run()
            self.eager += 1


class GraphCapture:
    """Captures functions as CUDA graphs, all in one memory pool. `torch.cuda.graph` would wait for the GPU and give the
    allocator's memory back at every capture, of which a step has one for each part of a layer.

    Args:
        device: on which they run.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self.failed = device, torch.cuda.Stream(device), False
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A replay of the function; the function itself once a capture has failed.

        Raises:
            torch.OutOfMemoryError: there is no memory for the graph.
        """
        if self.failed:
            return run
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                # other threads may use the GPU meanwhile: a server encodes videos
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = True
            log.warning("CUDA graphs are off, steps run eagerly: a part of a layer could not be captured: %s", error)
            return run
        current.wait_stream(self.stream)
        return graph.replay

    def clear(self) -> None:
        """Begin a new pool, once the graphs of the last one are gone."""
        self.pool = torch.cuda.graph_pool_handle()


def _identity(layer: nn.Module) -> Hashable:
    """What changes when a layer's weights are moved, or replaced by smaller ones."""
    assert isinstance(layer, Layer)
    norm = layer.input_layernorm.weight
    return id(layer.self_attn.o_proj.weight), layer.mlp.packed, norm.device, norm.dtype, norm.data_ptr()


GRAPHS: WeakKeyDictionary[LanguageModel, LayerGraphs] = WeakKeyDictionary()


def graphs_of(language_model: LanguageModel) -> LayerGraphs | None:
    """The graphs of a model, shared by all that decode with it; None where its layers are on several devices."""
    devices = set(language_model.devices)
    if len(devices) > 1:
        return None
    device = devices.pop()
    if language_model not in GRAPHS:  # elsewhere than on a GPU products of other shapes may round differently
        on_gpu = device.type == "cuda"
        GRAPHS[language_model] = LayerGraphs(MULTIPLE, GraphCapture(device)) if on_gpu else LayerGraphs(1)
    return GRAPHS[language_model]
