"""The denoising loop: mask tokens to an answer, block by block (LLaDA sampling, as VidLaDA uses it).

What is special about it:
- which slots are still masked is a boolean tensor of the loop, never a comparison of embeddings or ids;
- several requests run as one batch, padded on the left; each keeps its own settings, block, step and random
  numbers, so it gives the same answer as alone, may end earlier, and another may join while it runs;
- only the logits of the current blocks are computed;
- ids, masks and stops live on the host. Of a GPU it takes each step's proposals and their probabilities, of all
  requests in one copy: that copy is the one place of a step where it waits.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.attention import upload
from vidlada.decoding.cache import RequestCache, VisualCache
from vidlada.decoding.commit import above_threshold, by_factor, most_confident, spread
from vidlada.decoding.counter_noise import uniform
from vidlada.decoding.kv_cache import concatenated, refresh
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.static_step import StaticStep
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion


@dataclass(frozen=True)
class Request:
    """One answer to be decoded.

    Args:
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        settings: how to decode.
        stop_sequences: token ids that end the answer; the earliest occurrence of any of them counts.
        suffix_ids: fixed tokens after the answer slots, visible from the first step.
        initial_ids: `gen_length` ids the slots start with, the mask id where they are open (infilling).
        frame_index: frame of each position of the prompt, -1 for text; none are frames by default. Only caches that
            tell frames from text need it.
        visual: what an earlier request about the same video left (`State.visual`); needs a cache.
    """

    prompt: Tensor
    settings: GenerationSettings = GenerationSettings()
    stop_sequences: Sequence[tuple[int, ...]] = ()
    suffix_ids: Sequence[int] = ()
    initial_ids: Sequence[int] | None = None
    frame_index: Sequence[int] | None = None
    visual: VisualCache | None = None


@dataclass(frozen=True)
class Statistics:
    """What an answer cost.

    Attributes:
        steps: denoising steps.
        forward_passes: passes through the model; guidance takes two a step.
        tokens: slots committed.
        layer_tokens: positions computed, by layer.
        refreshes: how often the prompt's text and frames were recomputed; empty without a cache, where every pass does.
        seconds: by phase; `denoising` is the wall time the request spent in the loop.
    """

    steps: int = 0
    forward_passes: int = 0
    tokens: int = 0
    layer_tokens: tuple[int, ...] = ()
    refreshes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_forward(self) -> float:
        """Slots committed in a forward pass, on average."""
        return self.tokens / max(1, self.forward_passes)

    def with_seconds(self, seconds: dict[str, float]) -> "Statistics":
        """A copy with further phases in front."""
        return replace(self, seconds={**seconds, **self.seconds})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "steps": self.steps,
            "forward_passes": self.forward_passes,
            "tokens": self.tokens,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "layer_tokens": list(self.layer_tokens),
            "refreshes": self.refreshes,
            "seconds": {phase: round(seconds, 4) for phase, seconds in self.seconds.items()},
        }


@dataclass(frozen=True)
class State:
    """An answer after a step; all but `visual` on the CPU.

    Attributes:
        step: steps done.
        proposed: (gen_length,) final tokens, this step's proposals in the current block, the mask id elsewhere.
        committed: boolean (gen_length,): which of them are final.
        confidence: (gen_length,) probability of each proposal of this step; 1 where final before, 0 where open.
        stop_at: slot at which a stop sequence begins, if one was found.
        done: the answer is complete.
        statistics: so far.
        visual: when done and asked for by the settings, what a further question about the video may reuse.
    """

    step: int
    proposed: Tensor
    committed: Tensor
    confidence: Tensor
    stop_at: int | None
    done: bool
    statistics: Statistics
    visual: VisualCache | None = None

    def answer_ids(self) -> list[int]:
        """Final tokens before the stop, in order; open slots are left out."""
        kept = self.proposed[: self.stop_at][self.committed[: self.stop_at]]
        return [int(token) for token in kept]


class RunningRequest:
    """A request while it is decoded."""

    def __init__(self, number: int, request: Request, model: VidLaDAForMaskedDiffusion):
        config, settings = model.config, request.settings
        self.number, self.request, self.settings = number, request, settings
        self.mask_id = config.mask_token_id
        device = request.prompt.device
        initial = request.initial_ids if request.initial_ids is not None else [self.mask_id] * settings.gen_length
        if len(initial) != settings.gen_length:
            raise InputError(f"{len(initial)} initial ids were given for gen_length {settings.gen_length} answer slots")
        self.ids = torch.tensor(initial, pin_memory=device.type == "cuda")  # (gen_length,)
        self.masked = self.ids == self.mask_id
        self.device_ids = torch.empty_like(self.ids, device=device)  # as of the last pass
        self.suffix = upload({"": np.array(request.suffix_ids, dtype=np.int64)}, device)[""]
        length = len(request.prompt) + len(self.ids) + len(self.suffix)
        if length > config.max_length:
            raise InputError(
                f"prompt, answer slots and suffix take {length} tokens, more than the model's {config.max_length}; "
                f"use fewer frames or a smaller gen_length"
            )
        self.counter = settings.noise == "counter" or (settings.noise == "auto" and device.type != "cpu")
        self.draws = 0  # of the counter-based generator
        self.generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same numbers on every device
        self.caches = self.make_caches(model)
        self.block, self.plan = -1, [0]
        self.stop_at = self.find_stop()
        self.statistics = Statistics()
        self.started = time.perf_counter()
        self.next_block()

    def make_caches(self, model: VidLaDAForMaskedDiffusion) -> list[RequestCache]:
        """One cache, or a second one for the guided pass; none without a policy."""
        policy = parse_policy(self.settings.cache)
        if policy is None:
            return []
        prompt, config = self.request.prompt, model.language_model.config
        frame_index = self.request.frame_index if self.request.frame_index is not None else [-1] * len(prompt)
        if len(frame_index) != len(prompt):
            raise InputError(f"frame_index has {len(frame_index)} entries for a prompt of {len(prompt)} tokens")
        tokens = len(prompt) + len(self.ids) + len(self.suffix)
        prompts = [prompt]
        if self.settings.cfg_scale > 0:
            prompts.append(self.hidden_prompt(model))
        given = [self.request.visual if self.settings.reuse else None, None]  # a hidden prompt has no frames
        devices = [layer.input_layernorm.weight.device for layer in model.language_model.layers]  # type: ignore[union-attr]
        return [
            RequestCache(config, policy, each, frame_index, len(self.ids), tokens, visual, devices)  # type: ignore[arg-type]
            for each, visual in zip(prompts, given, strict=False)
        ]

    def hidden_prompt(self, model: VidLaDAForMaskedDiffusion) -> Tensor:
        """The prompt behind mask embeddings, for guidance."""
        mask = model.language_model.embed_tokens.weight[self.mask_id]
        return mask.expand(len(self.request.prompt), -1)

    @property
    def slots(self) -> slice:
        """The current block's slots."""
        return slice(self.block * self.settings.block_length, (self.block + 1) * self.settings.block_length)

    def open_slots(self) -> Tensor:
        """Masked slots before the stop, (gen_length,)."""
        open_slots = self.masked.clone()
        if self.stop_at is not None:
            open_slots[self.stop_at :] = False
        return open_slots

    @property
    def done(self) -> bool:
        """Nothing before the stop is masked."""
        return not bool(self.open_slots().any())

    def next_block(self) -> None:
        """Move to the first block that has something to decide."""
        open_slots = self.open_slots()
        if self.done or (self.block >= 0 and bool(open_slots[self.slots].any())):
            return
        self.block = int(open_slots.nonzero()[0]) // self.settings.block_length
        self.plan = spread(int(self.masked[self.slots].sum()), self.settings.steps_per_block)

    def embeddings(self, model: VidLaDAForMaskedDiffusion, guided: bool) -> Tensor:
        """The whole sequence, (tokens, width); with `guided` the prompt is hidden behind mask embeddings."""
        embed = model.language_model.embed_tokens
        answer = embed(torch.cat((self.upload_ids(), self.suffix)))
        prompt = self.hidden_prompt(model) if guided else self.request.prompt.to(answer.dtype)
        return torch.cat((prompt, answer))

    def upload_ids(self) -> Tensor:
        """The ids on the model's device; the host does not wait."""
        return self.device_ids.copy_(self.ids, non_blocking=True)

    def layer_tokens(self, layers: int) -> tuple[int, ...]:
        """Positions computed so far, by layer, this step's included."""
        kv_caches = [cache.kv_cache for cache in self.caches if cache.kv_cache is not None]
        if kv_caches:
            return tuple(sum(counts) for counts in zip(*(kv_cache.computed for kv_cache in kv_caches), strict=True))
        length = len(self.request.prompt) + len(self.ids) + len(self.suffix)
        passes = 2 if self.settings.cfg_scale > 0 else 1
        return (length * passes * (self.statistics.steps + 1),) * layers

    def commit(self, proposed: Tensor, probability: Tensor, passes: int, layers: int) -> State:
        """Make some of the proposals for the block's masked slots final.

        Args:
            proposed: (block,) token of every slot, on the CPU as all here.
            probability: (block,) float64, of each.
            passes: forward passes this step took.
            layers: of the language model.
        """
        settings, slots = self.settings, self.slots
        masked = self.masked[slots]
        ranking = probability
        if settings.remasking == "random":
            ranking = self.uniform(1, len(proposed), torch.float32, torch.device("cpu"))[0].double()
        open_slots = self.open_slots()[slots]
        if settings.threshold is not None:
            chosen = above_threshold(ranking, open_slots, settings.threshold)
        elif settings.factor is not None:
            chosen = by_factor(ranking, open_slots, settings.factor)
        else:
            # steps left without a token to place (fewer masks than steps) would change nothing, so they are not taken
            chosen = most_confident(ranking, open_slots, max(1, self.plan.pop(0) if self.plan else 1))
        self.ids[slots] = torch.where(chosen, proposed, self.ids[slots])
        self.masked[slots] = masked & ~chosen
        self.stop_at = self.find_stop()
        self.statistics = Statistics(
            steps=self.statistics.steps + 1,
            forward_passes=self.statistics.forward_passes + passes,
            tokens=self.statistics.tokens + int(chosen.sum()),
            layer_tokens=self.layer_tokens(layers),
            refreshes=dict(self.caches[0].refreshes) if self.caches else {},
            seconds={"denoising": time.perf_counter() - self.started},
        )
        return self.snapshot(slots, torch.where(masked, proposed, self.ids[slots]), probability.where(masked, 1.0))

    def sample(self, logits: Tensor) -> Tensor:
        """Add Gumbel noise in float64: exp(logits) / (-log u)^temperature; greedy at temperature 0."""
        if self.settings.temperature == 0:
            return logits
        block, vocabulary = logits.shape
        noise = self.uniform(block, vocabulary, torch.float64, logits.device)
        return logits.double().exp() / (-noise.log()) ** self.settings.temperature

    def uniform(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next uniform numbers of this answer, by the generator that its settings ask for."""
        if not self.counter:
            drawn = torch.rand(1, rows, columns, dtype=dtype, generator=self.generator)[0]
            return drawn.to(device, non_blocking=True)
        self.draws += 1
        return uniform(self.settings.seed, self.draws, rows, columns, device).to(dtype)

    def find_stop(self) -> int | None:
        """First slot at which a stop sequence stands in full.

        The published loop lets the first listed sequence win and forgets the others after a first hit; here the
        earliest occurrence of any of them counts, whatever their order.
        """
        ids = [None if masked else token for token, masked in zip(self.ids.tolist(), self.masked.tolist(), strict=True)]
        stops = [list(sequence) for sequence in self.request.stop_sequences]
        places = (place for place in range(len(ids)) if any(ids[place : place + len(stop)] == stop for stop in stops))
        return next(places, None)

    def snapshot(self, slots: slice, proposed: Tensor, probability: Tensor) -> State:
        """The state after a step; `proposed` and `probability` are of the block at `slots`."""
        tokens = self.ids.masked_fill(self.masked, self.mask_id)
        confidence = (~self.masked).float()
        tokens[slots] = proposed
        confidence[slots] = probability.float()
        return State(
            step=self.statistics.steps,
            proposed=tokens,
            committed=~self.masked,
            confidence=confidence,
            stop_at=self.stop_at,
            done=self.done,
            statistics=self.statistics,
            visual=self.caches[0].export_visual() if self.done and self.settings.reuse else None,
        )


class Denoiser:
    """Requests being decoded together, one step at a time.

    Args:
        model: in evaluation mode.
        static: run repeated passes over fixed buffers, on a GPU as captured graphs (`vidlada.decoding.static_step`); by
            default on a GPU, unless `vidlada.load` was told otherwise.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, static: bool | None = None):
        self.model = model
        device = model.lm_head.weight.device
        static = model.language_model.static if static is None else static
        use_static = device.type == "cuda" if static is None else static
        self.refresh = StaticStep(model.language_model) if use_static else partial(refresh, model.language_model)
        self.suppressed = upload({"": np.array(model.config.suppressed_token_ids, dtype=np.int64)}, device)[""]
        self.rows: list[RunningRequest] = []
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

    @torch.inference_mode()
    def step(self) -> list[tuple[int, State]]:
        """One denoising step of every request; the finished ones leave.

        Returns:
            Number and state of each.
        """
        rows = self.rows
        guided = [row for row in rows if row.settings.cfg_scale > 0]
        sizes = [row.settings.block_length for row in rows]
        logits = self.block_logits(rows)
        if guided:
            unconditional = dict(
                zip(
                    guided,
                    self.block_logits(guided, guided=True).split([row.settings.block_length for row in guided]),
                    strict=True,
                )
            )
            parts = dict(zip(rows, logits.split(sizes), strict=True))
            for row, without in unconditional.items():
                parts[row] = without + (row.settings.cfg_scale + 1) * (parts[row] - without)
            logits = torch.cat(list(parts.values()))
        layers = self.model.language_model.config.num_hidden_layers
        states = []
        for row, (proposed, probability) in zip(rows, self.propose(rows, logits), strict=True):
            states.append((row.number, row.commit(proposed, probability, 2 if row in guided else 1, layers)))
            row.next_block()
        self.rows = [row for row in rows if not row.done]
        return states

    def propose(self, rows: Sequence[RunningRequest], logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A token for every slot of every row's block, and its probability. Waits for the device, once.

        Args:
            rows: as many as the blocks of `logits`.
            logits: (blocks, vocabulary) float32; written to.

        Returns:
            Tokens (block,) and float64 probabilities (block,) of each row, on the CPU.
        """
        sizes = [row.settings.block_length for row in rows]
        if len(self.suppressed):
            logits.index_fill_(-1, self.suppressed, -torch.inf)
        if any(row.settings.temperature for row in rows):
            proposed = torch.cat(
                [row.sample(part).argmax(-1) for row, part in zip(rows, logits.split(sizes), strict=True)]
            )
        else:
            proposed = logits.argmax(-1)  # (blocks,)
        probability = logits.double().softmax(-1).gather(-1, proposed[:, None])
        packed = torch.cat((proposed[:, None].double(), probability), dim=-1).cpu()  # ids are exact in float64
        return [(part[:, 0].long(), part[:, 1]) for part in packed.split(sizes)]

    def block_logits(self, rows: Sequence[RunningRequest], guided: bool = False) -> Tensor:
        """Logits of every row's current block, one after another: (blocks, vocabulary)."""
        hidden: dict[int, Tensor] = {}
        for cached in (False, True):
            chosen = [row for row in rows if bool(row.caches) == cached]
            if chosen:
                states = self.cached_states(chosen, guided) if cached else self.plain_states(chosen, guided)
                sizes = [row.settings.block_length for row in chosen]
                hidden.update(zip((row.number for row in chosen), states.split(sizes), strict=True))
        return self.model.lm_head(torch.cat([hidden[row.number] for row in rows])).float()

    def cached_states(self, rows: Sequence[RunningRequest], guided: bool) -> Tensor:
        """Normed states of the rows' blocks, (blocks, width), recomputing what their policies say."""
        caches = [row.caches[guided] for row in rows]
        embed = self.model.language_model.embed_tokens
        passes = [
            cache.next_pass(row.upload_ids(), row.slots, embed, row.suffix)
            for cache, row in zip(caches, rows, strict=True)
        ]
        self.refresh(passes)
        return concatenated([cache.block_states(row.slots) for cache, row in zip(caches, rows, strict=True)])

    def plain_states(self, rows: Sequence[RunningRequest], guided: bool) -> Tensor:
        """The same by running every position through every layer. Sequences of one length form a batch, so that none
        is padded: a mask would keep attention from its fastest kernel."""
        sequences = [row.embeddings(self.model, guided) for row in rows]
        states: dict[RunningRequest, Tensor] = {}
        for length in dict.fromkeys(len(sequence) for sequence in sequences):
            alike = [row for row, sequence in zip(rows, sequences, strict=True) if len(sequence) == length]
            batch = torch.stack([sequence for sequence in sequences if len(sequence) == length])
            for row, hidden in zip(alike, self.model.language_model(batch), strict=True):
                first = len(row.request.prompt)
                states[row] = hidden[first + row.slots.start : first + row.slots.stop]
        return concatenated([states[row] for row in rows])


def denoise(model: VidLaDAForMaskedDiffusion, requests: Sequence[Request]) -> Iterator[tuple[int, State]]:
    """Decode requests together.

    Args:
        model: in evaluation mode.
        requests: any prompts and settings.

    Yields:
        Place of a request in `requests` and its state, after each of its steps; the last one has `done` set.

    Raises:
        InputError: a request does not fit the model.
    """
    denoiser = Denoiser(model)
    for request in requests:
        number, state = denoiser.add(request)
        if state is not None:
            yield number, state
    while denoiser.rows:
        yield from denoiser.step()
