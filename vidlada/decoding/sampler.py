"""The denoising loop: mask tokens to an answer, block by block (LLaDA sampling, as VidLaDA uses it).

What is special about it:
- which slots are still masked is a boolean tensor of the loop, never a comparison of embeddings or ids;
- several requests run as one batch; each keeps its own settings, block, step and random numbers, so it gives the same
  answer as alone, may end earlier, and another may join while it runs;
- only the logits of the current blocks are computed;
- ids, masks and stops live on the CPU. A step takes its proposals and what else it needs of them from a GPU in one
  copy, for all requests together: that copy is the only place where it waits.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.attention import upload
from vidlada.decoding.commit import CommitRule, compute_measure
from vidlada.decoding.kv_cache import attention_kernels, concatenate, refresh
from vidlada.decoding.memory import is_out_of_memory
from vidlada.decoding.request import Request, State, Statistics
from vidlada.decoding.running import Prediction, RunningRequest
from vidlada.decoding.static_step import graphs_of
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

__all__ = ["Denoiser", "Request", "RunningRequest", "State", "Statistics", "denoise"]


class Denoiser:
    """Requests being decoded together, one step at a time.

    Args:
        model: in evaluation mode.
        static: run cached passes over fixed buffers, on a GPU as captured graphs (`vidlada.decoding.static_step`); by
            default on a GPU, unless `vidlada.load` was called with `graphs=False`.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, static: bool | None = None):
        self.model = model
        device = model.lm_head.weight.device
        static = model.language_model.static if static is None else static
        use_static = device.type == "cuda" if static is None else static
        self.graphs = graphs_of(model.language_model) if use_static else None
        self.suppressed = upload({"": np.array(model.config.suppressed_token_ids, dtype=np.int64)}, device)[""]
        self.rows: list[RunningRequest] = []
        self.unusable: set[int] = set()  # numbers of requests that a failed step left in no usable state
        self.count = 0

    def add(self, request: Request) -> tuple[int, State | None]:
        """Let a request join from the next step on.

        Returns:
            Its number, and its final state if there is nothing to decode (every slot was given).
        """
        row = RunningRequest(self.count, request, self.model)
        self.count += 1
        if row.done:
            return row.number, row.snapshot(slice(0, 0), row.ids[:0], row.ids[:0].float())
        self.rows.append(row)
        return row.number, None

    def remove(self, number: int) -> None:
        """Drop a request, whether or not it is complete."""
        self.rows = [row for row in self.rows if row.number != number]

    def clear_graphs(self) -> None:
        """Free the memory of captured graphs; they are captured anew where they pay."""
        if self.graphs is not None:
            self.graphs.clear()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, State]]:
        """One denoising step of every request; the finished ones leave.

        If memory runs out, requests are left as before the step, which may be made again, with fewer of them; except
        those that are not `repeatable`: they must be added anew.

        Returns:
            Number and state of each.
        """
        undo = [row.rollback() for row in self.rows]
        language_model = self.model.language_model
        try:
            with nullcontext() if self.graphs is None else self.graphs.replacing(language_model):
                return self._step(self.rows)
        except Exception as error:
            if is_out_of_memory(error):
                self.unusable = {row.number for row in self.rows if not row.repeatable}
                for restore in undo:
                    restore()
            raise

    def _step(self, rows: Sequence[RunningRequest]) -> list[tuple[int, State]]:
        """See `step`."""
        guided = [row for row in rows if row.settings.cfg_scale > 0]
        parts = dict(zip(rows, self.split(rows, self.block_logits(rows)), strict=True))
        if guided:
            unconditional = self.split(guided, self.block_logits(guided, guided=True))
            for row, without in zip(guided, unconditional, strict=True):
                parts[row] = without + (row.settings.cfg_scale + 1) * (parts[row] - without)
        verified = [row.verify(self.model, self.suppressed) for row in rows]
        layers = self.model.language_model.config.num_hidden_layers
        states = []
        for row, found in zip(rows, self.predict(rows, list(parts.values()), verified), strict=True):
            passes = 1 + (row in guided) + (found.verified is not None)
            states.append((row.number, row.commit(found, passes, layers)))
            row.next_block()
        self.rows = [row for row in rows if not row.done]
        return states

    @staticmethod
    def split(rows: Sequence[RunningRequest], blocks: Tensor) -> Sequence[Tensor]:
        """Each row's part of what was computed for all blocks."""
        return blocks.split([row.settings.block_length for row in rows])

    def predict(
        self, rows: Sequence[RunningRequest], logits: Sequence[Tensor], verified: Sequence[Tensor | None] | None = None
    ) -> list[Prediction]:
        """A token for every slot of every row's block, its probability and what the row's rule measures.

        All of it comes from the device in one copy, the only one of a step that the host waits for.

        Args:
            rows: being decoded.
            logits: (block, vocabulary) float32 of each row.
            verified: what `RunningRequest.verify` returned, of each row; nothing by default.
        """
        whole = concatenate(logits)  # (blocks, vocabulary)
        if len(self.suppressed):
            whole = whole.index_fill(-1, self.suppressed, -torch.inf)
        if any(type(row.rule).adjust is not CommitRule.adjust for row in rows):
            adjusted = zip(rows, self.split(rows, whole), strict=True)
            whole = concatenate([row.rule.adjust(part) for row, part in adjusted])
        parts = self.split(rows, whole)
        if any(row.settings.temperature for row in rows):
            tokens = concatenate([row.sample(part).argmax(-1) for row, part in zip(rows, parts, strict=True)])
        else:
            tokens = whole.argmax(-1)  # (blocks,)
        probability = whole.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
        given: dict[str, list[Tensor | None]] = {
            "measured": [
                None if row.rule.measure is None else compute_measure(row.rule.measure, part)
                for row, part in zip(rows, parts, strict=True)
            ],
            "verified": list(verified or [None] * len(rows)),
        }
        columns = {"tokens": tokens.double(), "probability": probability}  # ids are exact in float64
        for name, found in given.items():
            if any(own is not None for own in found):
                nothing = [probability.new_zeros(row.settings.block_length) for row in rows]
                columns[name] = concatenate(
                    [empty if own is None else own for own, empty in zip(found, nothing, strict=True)]
                )
        caches = [cache for row in rows for cache in row.caches]
        drifts = [cache.compare_probes() for cache in caches]
        packed = torch.cat(
            [*columns.values(), *(drift for drift in drifts if drift is not None)]
        ).cpu()  # it waits here
        *values, rest = packed.split([len(tokens)] * len(columns) + [len(packed) - len(tokens) * len(columns)])
        for cache, drift in zip(caches, drifts, strict=True):
            if drift is not None:
                own, rest = rest.tensor_split([len(drift)])
                cache.take_drift(own)
        split = {name: self.split(rows, column) for name, column in zip(columns, values, strict=True)}
        return [
            Prediction(
                split["tokens"][number].long(),
                split["probability"][number],
                **{name: split[name][number] for name, found in given.items() if found[number] is not None},
            )
            for number in range(len(rows))
        ]

    def block_logits(self, rows: Sequence[RunningRequest], guided: bool = False) -> Tensor:
        """Logits of every row's current block, one after another: (blocks, vocabulary)."""
        hidden: dict[int, Tensor] = {}
        for cached in (False, True):
            chosen = [row for row in rows if bool(row.caches) == cached]
            if chosen:
                states = self.cached_states(chosen, guided) if cached else self.plain_states(chosen, guided)
                sizes = [row.settings.block_length for row in chosen]
                hidden.update(zip((row.number for row in chosen), states.split(sizes), strict=True))
        return self.model.lm_head(concatenate([hidden[row.number] for row in rows])).float()

    def cached_states(self, rows: Sequence[RunningRequest], guided: bool) -> Tensor:
        """Normed states of the rows' blocks, (blocks, width), recomputing what their policies say."""
        caches = [row.caches[guided] for row in rows]
        embed = self.model.language_model.embed_tokens
        passes = [
            cache.next_pass(row.upload_ids(), row.slots, row.masked, embed, row.suffix)
            for cache, row in zip(caches, rows, strict=True)
        ]
        refresh(self.model.language_model, passes)
        for each, cache in zip(passes, caches, strict=True):
            with attention_kernels(cache.answer.device, len(cache.answer)):
                cache.attention.finish_pass(self.model.language_model, each.kv_cache, cache.answer)
        return concatenate([cache.block_states(row.slots) for cache, row in zip(caches, rows, strict=True)])

    def plain_states(self, rows: Sequence[RunningRequest], guided: bool) -> Tensor:
        """The same by running every position through every layer. Sequences of one length form a batch, so that none
        is padded: a mask would keep attention from its fastest kernel."""
        sequences = [row.embeddings(self.model, guided) for row in rows]
        states: dict[RunningRequest, Tensor] = {}
        for length in dict.fromkeys(len(sequence) for sequence in sequences):
            alike = [row for row, sequence in zip(rows, sequences, strict=True) if len(sequence) == length]
            batch = torch.stack([sequence for sequence in sequences if len(sequence) == length])
            starts = [len(row.request.prompt) + row.slots.start for row in alike]
            sizes = [row.settings.block_length for row in alike]
            first, last = min(starts), max(start + size for start, size in zip(starts, sizes, strict=True))
            with attention_kernels(batch.device, length):
                found = self.model.language_model(batch, wanted=slice(first, last))
            for row, hidden, start, size in zip(alike, found, starts, sizes, strict=True):
                states[row] = hidden[start - first : start - first + size]
        return concatenate([states[row] for row in rows])


def denoise(
    model: VidLaDAForMaskedDiffusion, requests: Sequence[Request], static: bool | None = None
) -> Iterator[tuple[int, State]]:
    """Decode requests together.

    Args:
        model: in evaluation mode.
        requests: any prompts and settings.
        static: as of `Denoiser`.

    Yields:
        Place of a request in `requests` and its state, after each of its steps; the last one has `done` set.

    Raises:
        InputError: a request does not fit the model.
    """
    denoiser = Denoiser(model, static)
    for request in requests:
        number, state = denoiser.add(request)
        if state is not None:
            yield number, state
    while denoiser.rows:
        yield from denoiser.step()
