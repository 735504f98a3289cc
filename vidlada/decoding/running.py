"""One request while it is decoded: its ids and masks, its caches, its random numbers, what it commits in a step."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.attention import upload
from vidlada.decoding.cache import RequestCache, VisualCache
from vidlada.decoding.choices import policy_of
from vidlada.decoding.commit import Proposals, commit_rule, within_nucleus
from vidlada.decoding.counter_noise import uniform
from vidlada.decoding.memory import is_out_of_memory
from vidlada.decoding.pruning import parse_pruning
from vidlada.decoding.request import Request, State, Statistics
from vidlada.decoding.verify import verify
from vidlada.errors import InputError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

log = logging.getLogger("vidlada.decoding")


@dataclass(frozen=True)
class Prediction:
    """What a step found out about the slots of one block, on the CPU; all (block,).

    Attributes:
        tokens: proposed for each slot.
        probability: float64, of each.
        measured: float64, what the commit rule's `measure` asks for; None if it asks for nothing.
        verified: float64, what `RunningRequest.verify` returned.
    """

    tokens: Tensor
    probability: Tensor
    measured: Tensor | None = None
    verified: Tensor | None = None


class RunningRequest:
    """A request while it is decoded. Its ids, masks and stops live on the CPU.

    Args:
        number: of the request, among all of its batch.
        request: what is asked for.
        model: that decodes it.

    Raises:
        InputError: the request does not fit the model.
    """

    def __init__(self, number: int, request: Request, model: VidLaDAForMaskedDiffusion):
        config, settings = model.config, request.settings
        self.number, self.request, self.settings = number, request, settings
        self.mask_id = config.mask_token_id
        device = request.prompt.device
        initial = request.initial_ids if request.initial_ids is not None else [self.mask_id] * settings.gen_length
        if len(initial) != settings.gen_length:
            raise InputError(f"{len(initial)} initial ids were given for gen_length {settings.gen_length} answer slots")
        self.ids = torch.tensor(initial, pin_memory=device.type != "cpu")  # (gen_length,)
        self.masked = self.ids == self.mask_id
        self.revocable = torch.zeros_like(self.masked)  # committed in the current block by a rule that may regret it
        self.rule = commit_rule(settings)
        self.device_ids = torch.empty_like(self.ids, device=device)  # as of the last pass
        self.suffix = upload({"": np.array(request.suffix_ids, dtype=np.int64)}, device)[""]
        length = len(request.prompt) + len(self.ids) + len(self.suffix)
        if length > config.max_length:
            raise InputError(
                f"prompt, answer slots and suffix take {length} tokens, more than the model's {config.max_length}; "
                f"use fewer frames or a smaller gen_length"
            )
        self.counter = settings.noise == "counter" or (settings.noise == "auto" and device.type != "cpu")
        self.pruning, self.pruned = parse_pruning(settings.visual_prune), 0  # visual tokens
        self.visual_tokens, self.merged = request.visual_tokens, request.merged
        self.draws = 0  # of the counter-based generator
        self.generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same numbers on every device
        self.caches = self.make_caches(model)
        self.block = -1
        self.stop_at = self.find_stop()
        self.statistics = Statistics()
        self.started = time.perf_counter()
        self.next_block()

    def make_caches(self, model: VidLaDAForMaskedDiffusion) -> list[RequestCache]:
        """One cache, or a second one for the guided pass; none without a policy."""
        policy = policy_of(self.settings)
        if policy is None:
            return []
        prompt, config = self.request.prompt, model.language_model.config
        given = self.request.given_frames
        policy.check(len(set(given)), len(given))
        frame_index = self.request.frame_index if self.request.frame_index is not None else [-1] * len(prompt)
        if len(frame_index) != len(prompt):
            raise InputError(f"frame_index has {len(frame_index)} entries for a prompt of {len(prompt)} tokens")
        tokens = len(prompt) + len(self.ids) + len(self.suffix)
        settings = self.settings
        inputs: list[tuple[Tensor, VisualCache | None, bool]] = [
            (prompt, self.request.visual, self.pruning is not None)
        ]
        if settings.cfg_scale > 0:
            inputs.append((self.hidden_prompt(model), None, False))  # which has no frames
        return [
            RequestCache(
                config,
                policy,
                each,
                frame_index,
                len(self.ids),
                tokens,
                visual=visual,
                reuse=settings.reuse,
                devices=model.language_model.devices,
                observe=observe,
                kv_dtype=settings.kv_dtype,
                heads=model.language_model.key_value_heads,
                spare=settings.block_length if self.rule.revokes else 0,
            )
            for each, visual, observe in inputs
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
        self.rule.begin_block(int(self.masked[self.slots].sum()), self.settings.steps_per_block)

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

    def verify(self, model: VidLaDAForMaskedDiffusion, suppressed: Tensor) -> Tensor | None:
        """Probability of every token of the block that may be taken back, predicted without it; 1 for the others.

        Returns:
            (block,) on the model's device, or None where there is nothing to verify.
        """
        drafted = self.revocable[self.slots].nonzero()[:, 0].numpy()
        if not len(drafted):
            return None
        cache = self.caches[0]
        places = upload({"block": drafted, "answer": drafted + self.slots.start}, self.device_ids.device)
        positions, ids = (each.index_select(0, places["answer"]) for each in (cache.answer, self.device_ids))
        found = verify(model, cache.write_back(), positions, ids, suppressed)
        return found.new_ones(self.settings.block_length).index_copy_(0, places["block"], found)

    def commit(self, found: Prediction, passes: int, layers: int) -> State:
        """Make some of the proposals for the block's masked slots final.

        Args:
            found: in this step about the block.
            passes: forward passes this step took.
            layers: of the language model.
        """
        slots, rule, verified = self.slots, self.rule, found.verified
        masked = self.masked[slots].clone()  # as it was before this step: snapshots tell these slots' probabilities
        ranking = found.probability
        if self.settings.remasking == "random":
            ranking = self.uniform(1, len(ranking), torch.float32, torch.device("cpu"))[0].double()
        revoked = torch.zeros_like(masked)
        if verified is not None:
            revoked = rule.revoke(verified, self.revocable[slots])
        chosen = rule.choose(Proposals(found.tokens, ranking, self.open_slots()[slots], found.measured))
        self.ids[slots] = torch.where(chosen, found.tokens, self.ids[slots])
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
            visual_tokens=self.visual_tokens,
            merged=self.merged,
            pruned=self.pruned,
        )
        if self.statistics.steps == 1 and not self.done:
            self.prune()
        shown = torch.where(masked, found.tokens, self.ids[slots])
        return self.snapshot(slots, shown, found.probability.where(masked, 1.0 if verified is None else verified))

    def prune(self) -> None:
        """Drop the visual tokens that the first step attended to least, from the guided pass too."""
        if self.pruning is None or self.caches[0].observed is None:
            return
        observed = self.caches[0].observed
        count = self.pruning.count(len(observed.received))
        numbers = observed.most_attended(count).cpu().numpy()  # the host waits, once an answer
        self.pruned = len(observed.received) - count
        for cache in self.caches:
            cache.prune(numbers)

    def sample(self, logits: Tensor) -> Tensor:
        """Add Gumbel noise in float64: exp(logits) / (-log u)^temperature; greedy at temperature 0."""
        if self.settings.temperature == 0:
            return logits
        if self.settings.top_p < 1:
            logits = within_nucleus(logits, self.settings.top_p, self.settings.temperature)
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

    def rollback(self) -> Callable[[], None]:
        """Return a function that takes back the step that is about to be made, should it fail for lack of memory.

        What a pass wrote into the KV cache stays: the same pass writes the same again. See `repeatable`.
        """
        parts = [self, self.rule, *self.caches, *(cache.attention for cache in self.caches)]
        before = [(part, {name: shallow_copy(value) for name, value in vars(part).items()}) for part in parts]
        counts = [(cache.kv_cache, list(cache.kv_cache.computed)) for cache in self.caches if cache.kv_cache]
        tensors = {name: getattr(self, name).clone() for name in ("ids", "masked", "revocable")}
        numbers = self.generator.get_state() if not self.counter else None

        def restore() -> None:
            for part, values in before:
                vars(part).clear()
                vars(part).update(values)
            for kv_cache, computed in counts:
                kv_cache.computed = computed
            for name, values in tensors.items():
                getattr(self, name).copy_(values)  # in place: on a GPU they are pinned
            if numbers is not None:
                self.generator.set_state(numbers)

        return restore

    @property
    def repeatable(self) -> bool:
        """Whether a step that failed may be made again after `rollback`."""
        return all(cache.repeatable for cache in self.caches)

    def find_stop(self) -> int | None:
        """First slot at which a stop sequence stands in full.

        The published loop lets the first listed sequence win and forgets the others after a first hit; here the
        earliest occurrence of any of them counts, whatever their order.
        """
        return first_occurrence(self.ids.numpy(), ~self.masked.numpy(), self.request.stop_sequences)

    def snapshot(self, slots: slice, proposed: Tensor, probability: Tensor) -> State:
        """The state after a step; `proposed` and `probability` are of the block at `slots`."""
        tokens = self.ids.masked_fill(self.masked, self.mask_id)
        confidence = (~self.masked).float()
        tokens[slots] = proposed
        confidence[slots] = probability.float()
        return State(
            step=self.statistics.steps,
            proposed=tokens,
            committed=~(self.masked | self.revocable),
            confidence=confidence,
            stop_at=None if self.stop_at is None or bool(self.revocable[self.stop_at :].any()) else self.stop_at,
            done=self.done,
            statistics=self.statistics,
            visual=self.export_visual() if self.done and self.settings.reuse else None,
        )

    def export_visual(self) -> VisualCache | None:
        """What a further question may reuse; nothing where there is no memory for a copy."""
        try:
            return self.caches[0].export_visual()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory to keep a video's keys and values: a further question computes them again")
            return None


def first_occurrence(ids: np.ndarray, known: np.ndarray, sequences: Sequence[Sequence[int]]) -> int | None:
    """Where the first of some sequences begins.

    Args:
        ids: (tokens,).
        known: boolean (tokens,); a sequence stands only where all of its tokens are known.
        sequences: of ids.
    """
    places = []
    for sequence in sequences:
        starts = np.ones(max(0, len(ids) - len(sequence) + 1), dtype=bool)
        for offset, token in enumerate(sequence):
            here = slice(offset, offset + len(starts))
            starts &= known[here] & (ids[here] == token)
        places.extend(starts.nonzero()[0][:1].tolist())
    return min(places, default=None)


def shallow_copy(value: Any) -> Any:
    """A copy of a list or dictionary, else the value itself."""
    return value.copy() if isinstance(value, list | dict) else value
