"""The denoising loop: mask tokens to an answer, block by block (LLaDA sampling, as VidLaDA uses it).

What is special about it:
- which slots are still masked is a boolean tensor of the loop, never a comparison of embeddings or ids;
- several requests run as one batch, padded on the left; each keeps its own settings, block, step and random
  numbers, so it gives the same answer as alone, may end earlier, and another may join while it runs;
- only the logits of the current blocks are computed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from vidlada.decoding.cache import RequestCache, VisualCache
from vidlada.decoding.commit import Proposals, commit_rule, measured, within_nucleus
from vidlada.decoding.kv_cache import refresh
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.policies.blockwise import Full
from vidlada.decoding.verify import verify
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion, positions_of


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

    def __add__(self, other: "Statistics") -> "Statistics":
        """What both cost together."""
        names = {*self.refreshes, *other.refreshes}
        phases = [*self.seconds, *(phase for phase in other.seconds if phase not in self.seconds)]
        return Statistics(
            self.steps + other.steps,
            self.forward_passes + other.forward_passes,
            self.tokens + other.tokens,
            tuple(sum(counts) for counts in zip_longest(self.layer_tokens, other.layer_tokens, fillvalue=0)),
            {name: self.refreshes.get(name, 0) + other.refreshes.get(name, 0) for name in sorted(names)},
            {phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0) for phase in phases},
        )

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
        committed: boolean (gen_length,): which of them are final; what a commit rule may still take back is not.
        confidence: (gen_length,) probability of each proposal of this step; 1 where final before, 0 where open.
        stop_at: slot at which a final stop sequence begins, if one was found.
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
        self.ids = torch.tensor(initial, device=device)  # (gen_length,)
        self.masked = self.ids == self.mask_id
        self.revocable = torch.zeros_like(self.masked)  # committed in the current block by a rule that may regret it
        self.rule = commit_rule(settings)
        self.suffix = torch.tensor(list(request.suffix_ids), dtype=torch.long, device=device)
        length = len(request.prompt) + len(self.ids) + len(self.suffix)
        if length > config.max_length:
            raise InputError(
                f"prompt, answer slots and suffix take {length} tokens, more than the model's {config.max_length}; "
                f"use fewer frames or a smaller gen_length"
            )
        self.generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same numbers on every device
        self.caches = self.make_caches(model)
        self.block = -1
        self.stop_at = self.find_stop()
        self.statistics = Statistics()
        self.started = time.perf_counter()
        self.next_block()

    def make_caches(self, model: VidLaDAForMaskedDiffusion) -> list[RequestCache]:
        """One cache, or a second one for the guided pass; none without a policy."""
        policy = parse_policy(self.settings.cache)
        if policy is None and self.rule.revokes:
            policy = Full()  # the same ids; tokens are verified against its keys and values
        if policy is None:
            return []
        prompt, config = self.request.prompt, model.language_model.config
        frames = self.request.frame_index
        frame_index = torch.tensor([-1] * len(prompt) if frames is None else list(frames), device=prompt.device)
        if len(frame_index) != len(prompt):
            raise InputError(f"frame_index has {len(frame_index)} entries for a prompt of {len(prompt)} tokens")
        tokens = len(prompt) + len(self.ids) + len(self.suffix)
        prompts = [prompt]
        if self.settings.cfg_scale > 0:
            prompts.append(self.hidden_prompt(model))
        given = [self.request.visual, None]  # a hidden prompt has no frames
        reuse = self.settings.reuse
        return [
            RequestCache(config, policy, each, frame_index, len(self.ids), tokens, visual, reuse)
            for each, visual in zip(prompts, given, strict=False)
        ]

    def hidden_prompt(self, model: VidLaDAForMaskedDiffusion) -> Tensor:
        """The prompt behind mask embeddings, for guidance."""
        mask = model.language_model.embed_tokens(self.ids.new_tensor([self.mask_id]))
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
        self.rule.begin_block(int(self.masked[self.slots].sum()), self.settings.steps_per_block)

    def embeddings(self, model: VidLaDAForMaskedDiffusion, guided: bool) -> Tensor:
        """The whole sequence, (tokens, width); with `guided` the prompt is hidden behind mask embeddings."""
        embed = model.language_model.embed_tokens
        answer = embed(torch.cat((self.ids, self.suffix)))
        prompt = self.hidden_prompt(model) if guided else self.request.prompt.to(answer.dtype)
        return torch.cat((prompt, answer))

    def layer_tokens(self, layers: int) -> tuple[int, ...]:
        """Positions computed so far, by layer, this step's included."""
        kv_caches = [cache.kv_cache for cache in self.caches if cache.kv_cache is not None]
        if kv_caches:
            return tuple(sum(counts) for counts in zip(*(kv_cache.computed for kv_cache in kv_caches), strict=True))
        length = len(self.request.prompt) + len(self.ids) + len(self.suffix)
        passes = 2 if self.settings.cfg_scale > 0 else 1
        return (length * passes * (self.statistics.steps + 1),) * layers

    def verify(self, model: VidLaDAForMaskedDiffusion, suppressed: Tensor) -> Tensor | None:
        """Probability of every token of the block that may be taken back, predicted without it; 1 for the others.

        Returns:
            (block,), or None where there is nothing to verify.
        """
        drafted = self.revocable[self.slots].nonzero()[:, 0] + self.slots.start
        if not len(drafted):
            return None
        cache = self.caches[0]
        assert cache.kv_cache is not None
        found = torch.ones(len(self.ids), dtype=torch.float64, device=self.ids.device)
        found[drafted] = verify(model, cache.kv_cache, cache.answer[drafted], self.ids[drafted], suppressed)
        return found[self.slots]

    def commit(
        self, logits: Tensor, suppressed: Tensor, passes: int, layers: int, verified: Tensor | None = None
    ) -> State:
        """Propose a token for every masked slot of the block and make some of them final.

        Args:
            logits: (block, vocabulary) float32.
            suppressed: ids that are never proposed.
            passes: forward passes this step took.
            layers: of the language model.
            verified: what `verify` returned.
        """
        settings, slots, rule = self.settings, self.slots, self.rule
        masked = self.masked[slots].clone()  # as it was before this step: snapshots tell these slots' probabilities
        logits = logits.clone()
        logits[:, suppressed] = -torch.inf
        logits = rule.adjust(logits)
        proposed = self.sample(logits).argmax(-1)  # (block,)
        probability = logits.double().softmax(-1).gather(-1, proposed[:, None])[:, 0]
        ranking = probability
        if settings.remasking == "random":
            ranking = torch.rand(1, len(proposed), generator=self.generator)[0].double().to(probability.device)
        open_slots = self.open_slots()[slots]
        figures = None if rule.measure is None else measured(rule.measure, logits)
        revoked = torch.zeros_like(masked)
        if verified is not None:
            revoked = rule.revoke(verified, self.revocable[slots])
        chosen = rule.choose(Proposals(proposed, ranking, open_slots, figures))
        self.ids[slots] = torch.where(chosen, proposed, self.ids[slots])
        self.masked[slots] = (masked & ~chosen) | revoked
        if rule.revokes:
            self.revocable[slots] = (self.revocable[slots] | chosen) & ~revoked
        self.stop_at = self.find_stop()
        if not bool(self.open_slots()[slots].any()):
            self.revocable.zero_()  # the block is complete
        self.statistics = Statistics(
            steps=self.statistics.steps + 1,
            forward_passes=self.statistics.forward_passes + passes,
            tokens=self.statistics.tokens + int(chosen.sum()) - int(revoked.sum()),
            layer_tokens=self.layer_tokens(layers),
            refreshes=dict(self.caches[0].refreshes) if self.caches else {},
            seconds={"denoising": time.perf_counter() - self.started},
        )
        shown = torch.where(masked, proposed, self.ids[slots])
        return self.snapshot(slots, shown, probability.where(masked, 1.0 if verified is None else verified))

    def sample(self, logits: Tensor) -> Tensor:
        """Add Gumbel noise in float64: exp(logits) / (-log u)^temperature; greedy at temperature 0."""
        if self.settings.temperature == 0:
            return logits
        if self.settings.top_p < 1:
            logits = within_nucleus(logits, self.settings.top_p, self.settings.temperature)
        noise = torch.rand(1, *logits.shape, dtype=torch.float64, generator=self.generator)[0].to(logits.device)
        return logits.double().exp() / (-noise.log()) ** self.settings.temperature

    def find_stop(self) -> int | None:
        """First slot at which a stop sequence stands in full.

        The published loop lets the first listed sequence win and forgets the others after a first hit; here the
        earliest occurrence of any of them counts, whatever their order.
        """
        found = None
        for sequence in self.request.stop_sequences:
            if len(sequence) > len(self.ids):
                continue
            windows = self.ids.unfold(0, len(sequence), 1)  # (places, sequence)
            final = (~self.masked).unfold(0, len(sequence), 1).all(-1)
            hits = ((windows == windows.new_tensor(sequence)).all(-1) & final).nonzero()
            if len(hits) and (found is None or int(hits[0]) < found):
                found = int(hits[0])
        return found

    def snapshot(self, slots: slice, proposed: Tensor, probability: Tensor) -> State:
        """The state after a step; `proposed` and `probability` are of the block at `slots`."""
        tokens = self.ids.masked_fill(self.masked, self.mask_id)
        confidence = (~self.masked).float()
        tokens[slots] = proposed
        confidence[slots] = probability.float()
        return State(
            step=self.statistics.steps,
            proposed=tokens.cpu(),
            committed=(~(self.masked | self.revocable)).cpu(),
            confidence=confidence.cpu(),
            stop_at=None if self.stop_at is None or bool(self.revocable[self.stop_at :].any()) else self.stop_at,
            done=self.done,
            statistics=self.statistics,
            visual=self.caches[0].export_visual() if self.done and self.settings.reuse else None,
        )


class Denoiser:
    """Requests being decoded together, one step at a time.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion):
        self.model = model
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
        logits = self.block_logits(rows)
        if guided:
            scales = torch.cat([row.ids.new_full((row.settings.block_length,), 1).float() * row.settings.cfg_scale
                                for row in guided])[:, None]  # fmt: skip
            unconditional = self.block_logits(guided, guided=True)
            places = torch.cat([torch.full((row.settings.block_length,), row.settings.cfg_scale > 0) for row in rows])
            conditional = logits[places]
            logits[places] = unconditional + (scales + 1) * (conditional - unconditional)
        layers = self.model.language_model.config.num_hidden_layers
        suppressed = logits.new_tensor(list(self.model.config.suppressed_token_ids), dtype=torch.long)
        parts = logits.split([row.settings.block_length for row in rows])
        states = []
        for row, part in zip(rows, parts, strict=True):
            verified = row.verify(self.model, suppressed)
            passes = 1 + (row in guided) + (verified is not None)
            states.append((row.number, row.commit(part, suppressed, passes, layers, verified)))
            row.next_block()
        self.rows = [row for row in rows if not row.done]
        return states

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
            c.next_pass(embed(row.ids), embed(row.suffix), row.slots, row.masked)
            for c, row in zip(caches, rows, strict=True)
        ]
        refresh(self.model.language_model, passes)
        for each, cache in zip(passes, caches, strict=True):
            cache.attention.finish_pass(self.model.language_model, each.kv_cache, cache.answer)
        return torch.cat([cache.block_states(row.slots) for cache, row in zip(caches, rows, strict=True)])

    def plain_states(self, rows: Sequence[RunningRequest], guided: bool) -> Tensor:
        """The same by running every position through every layer, in one padded batch."""
        sequences = [row.embeddings(self.model, guided) for row in rows]
        longest = max(len(sequence) for sequence in sequences)
        batch = sequences[0].new_zeros(len(rows), longest, sequences[0].shape[-1])
        attention_mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=batch.device)
        in_block = torch.zeros_like(attention_mask)
        for number, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            first = longest - len(sequence)
            batch[number, first:] = sequence
            attention_mask[number, first:] = True
            answer = first + len(row.request.prompt)
            in_block[number, answer + row.slots.start : answer + row.slots.stop] = True
        padded = any(len(sequence) < longest for sequence in sequences)
        mask = attention_mask if padded else None
        positions = positions_of(attention_mask) if padded else None
        return self.model.language_model(batch, positions, mask)[in_block]


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
