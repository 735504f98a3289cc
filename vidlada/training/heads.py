"""Attention heads that start with a purpose: they look at the frame before, or at the frame a question names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vidlada.errors import InputError
from vidlada.model.language_model import Attention, Layer
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.shapes.world import MAX_SECONDS
from vidlada.training.config import CollateSettings, NewHeads
from vidlada.training.data.collate import PADDING, Collator
from vidlada.training.data.samples import Item
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.objective import IGNORED

REACH = 512  # tokens over which a pair of dimensions may turn by at most one radian to carry a code
FIT_STEPS = 500
RIDGE = 10.0
STEPS = 60  # batches of clips the heads are fitted to
PAIRS = 8  # pairs of dimensions, the fastest of rotary embedding, that tell one token's distance from the next
SHARPNESS = 60.0  # attention score at the very distance; a token beside it gets about 7 less
DATA = ShapesSource(
    seed=9, frames_per_batch=120, seconds=(2, 8), families=("at", "quiet", "spot", "where", "inventory"), questions=1,
    choice_share=0.0, single_share=1.0, shifted_share=0.8,
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What a layer's attention reads in some batches of clips, padding left out.

    Attributes:
        states: (tokens, width), normed.
        visual: (tokens,) boolean, the visual tokens.
        named: (tokens,) second that a question's word names, -1 for none.
        shown: (tokens,) second that the clock of a frame's first token shows, -1 for none.
        contributions: (heads,) mean square of what each head adds to the residual stream.
    """

    states: Tensor
    visual: Tensor
    named: Tensor
    shown: Tensor
    contributions: Tensor


def add_heads(model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, heads: NewHeads) -> None:
    """Turn some attention heads into heads with a purpose, to be trained on.

    A head of `previous_frame` looks from each visual token to the same place in the frame before: what appeared,
    disappeared or changed is the difference. A head of `seconds` looks from the number in a question to the first
    visual token of the frame whose clock shows it. Of a layer's heads the one that adds least to the residual stream is
    replaced. The new one reads the principal components of visual tokens and adds nothing yet.

    Args:
        model: changed in place.
        processor: of it.
        heads: in which layers.

    Raises:
        InputError: there is no such layer, or heads of the model share keys, or the tokenizer lacks the numbers.
    """
    layers = model.language_model.layers
    beyond = [number for number in (*heads.previous_frame, *heads.seconds) if number >= len(layers)]
    if beyond:
        raise InputError(f"new_heads: {beyond}, but the model's layers are 0 to {len(layers) - 1}")
    if cast(Layer, layers[0]).self_attn.groups > 1:
        raise InputError("new_heads: heads of this model share keys and cannot be replaced one by one")
    words = number_tokens(processor)
    training = model.training
    model.eval()
    for number in sorted({*heads.previous_frame, *heads.seconds}):
        attention = cast(Layer, layers[number]).self_attn
        frequencies = rotary_frequencies(attention.head_dim, model.config.text.rope_theta)
        seen = observe(model, processor, number, words)
        kept = seen.contributions.argsort().tolist()  # those that add least first
        if number in heads.previous_frame:
            maps = fit_distance(seen, len(processor.media_frame_index(1)), frequencies)
            set_head(attention, kept.pop(0), maps, seen)
        if number in heads.seconds:
            maps = fit_lookup(seen, frequencies, attention.head_dim**-0.5)
            set_head(attention, kept.pop(0), maps, seen)
    model.train(training)


@torch.no_grad()
def set_head(attention: Attention, head: int, maps: tuple[Tensor, Tensor], seen: Seen) -> None:
    """Give a head its queries and keys; its values are the principal components of visual tokens, its output zero.

    Args:
        attention: of the layer, changed in place.
        head: number of it.
        maps: of queries and keys, (head_dim, width).
        seen: what the layer reads.
    """
    size = attention.head_dim
    place = slice(head * size, (head + 1) * size)
    visual = seen.states[seen.visual]
    components = torch.linalg.eigh((visual - visual.mean(0)).T.cov()).eigenvectors[:, -size:].T
    for linear, fitted in zip((attention.q_proj, attention.k_proj, attention.v_proj), (*maps, components), strict=True):
        linear.weight[place] = fitted.to(linear.weight)
    attention.o_proj.weight[:, place] = 0


def fit_distance(seen: Seen, distance: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of queries and keys by which every visual token attends to the visual token so many tokens before it.

    Args:
        seen: what the layer reads.
        distance: tokens.
        frequencies: (pairs,) radians a token by which rotary embedding turns pairs of dimensions.

    Returns:
        Two (2 × pairs, width of the model) tensors, the first dimensions of all pairs before the second ones.
    """
    # the direction in which visual tokens are 1 and all others 0
    square = seen.states.T @ seen.states + RIDGE * torch.eye(seen.states.shape[1])
    direction = torch.linalg.solve(square, seen.states.T @ seen.visual.float())
    amplitude = torch.zeros(len(frequencies))
    amplitude[:PAIRS] = (SHARPNESS * (2 * len(frequencies)) ** 0.5 / PAIRS) ** 0.5
    angle = frequencies * distance  # the key is turned ahead by as much as the query's place is ahead of its own
    key = torch.cat((amplitude * angle.cos(), amplitude * angle.sin()))
    query = torch.cat((amplitude, torch.zeros(len(frequencies))))
    return query[:, None] * direction, key[:, None] * direction


def number_tokens(processor: VidLaDAProcessor) -> dict[int, int]:
    """Token id → second, for all seconds a clock may show."""
    found = {processor.tokenizer.convert_tokens_to_ids(str(second)): second for second in range(MAX_SECONDS + 1)}
    if len(found) <= MAX_SECONDS:
        raise InputError(
            "new_heads: the tokenizer has no token for each second; they are for models of the shapes world"
        )
    return found


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """(pairs,) radians a token."""
    return 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)


def fit_lookup(seen: Seen, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Maps of queries and keys whose products are large where a word names what a visual token shows.

    Fitted by gradient descent on the probability that attention of a word goes to tokens that show what it names,
    among those that show anything else and those that show nothing, in the pairs of dimensions that rotary embedding
    hardly turns.

    Args:
        seen: what the layer reads.
        frequencies: (pairs,) radians a token by which rotary embedding turns pairs of dimensions.
        scale: what attention multiplies products by.

    Returns:
        Two (2 × pairs, width of the model) tensors, the first dimensions of all pairs before the second ones.
    """
    states, named, shown = seen.states, seen.named, seen.shown
    pairs, slow = len(frequencies), (REACH * frequencies <= 1).nonzero()[:, 0]
    frequencies = frequencies[slow]
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2 * len(frequencies), states.shape[1], generator=generator).mul_(0.05).requires_grad_()
        for _ in range(2)
    ]
    optimizer = torch.optim.AdamW(maps, lr=0.02, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, FIT_STEPS)
    words, clocks, others = ((kind).nonzero()[:, 0] for kind in (named >= 0, shown >= 0, (named < 0) & (shown < 0)))

    def some(places: Tensor, number: int) -> Tensor:
        return places[torch.randint(len(places), (number,), generator=generator)]

    def turned(states: Tensor) -> Tensor:  # by positions anywhere in a clip, so that the product depends on none
        angles = torch.randint(REACH, (len(states), 1), generator=generator) * frequencies.repeat(2)
        first, second = states.chunk(2, dim=1)
        return states * angles.cos() + torch.cat((-second, first), dim=1) * angles.sin()

    for _ in range(FIT_STEPS):
        asked, found, rest = some(words, 256), some(clocks, 512), some(others, 256)
        keys = turned(states[torch.cat((found, rest))] @ maps[1].T)
        scores = scale * turned(states[asked] @ maps[0].T) @ keys.T
        right = named[asked][:, None] == shown[torch.cat((found, rest))][None]
        usable = right.any(1)
        hits = scores.masked_fill(~right, -torch.inf).logsumexp(1) - scores.logsumexp(1)
        # a word that is no number, and a mask, should look nowhere in particular
        quiet = scale * (states[some(others, 64)] @ maps[0].T) @ keys.T
        loss = -hits[usable].mean() + 0.01 * quiet.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    whole = [torch.zeros(2 * pairs, states.shape[1]) for _ in maps]
    for place, fitted in zip(whole, maps, strict=True):
        place[torch.cat((slow, slow + pairs))] = fitted.detach()
    return whole[0], whole[1]


@torch.no_grad()
def observe(model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, number: int, words: dict[int, int]) -> Seen:
    """Run clips with questions, and see what a layer reads.

    Args:
        model: in evaluation mode.
        processor: of it.
        number: of the layer.
        words: second that a token names.
    """
    layer = cast(Layer, model.language_model.layers[number])
    collator = Collator(processor, CollateSettings(force_up_to=99, end_targets=2))
    found: list[tuple[Tensor, ...]] = []
    for step in range(STEPS):
        items = DATA.plan(step)
        batch = collator([DATA.load(item, processor.image_size) for item in items], np.random.default_rng(step))
        ids = batch["input_ids"]
        ids[batch["labels"] != IGNORED] = collator.mask
        with _watch(layer) as seen:
            model(
                input_ids=ids, pixel_values=batch["pixel_values"], media_shapes=batch["media_shapes"],
                attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
                logits_to_keep=torch.zeros_like(ids, dtype=torch.bool),
            )  # fmt: skip
        named = torch.full_like(ids, -1)
        for token, second in words.items():
            named[ids == token] = second
        clock = torch.full_like(ids, -1)
        for row, item in enumerate(items):
            clock[row] = _clock_of(item, ids[row] == processor.video_token_id)
        valid = batch["sample_index"] != PADDING
        visual = ids == processor.video_token_id
        found.append((seen["states"][valid], visual[valid], named[valid], clock[valid], seen["contributions"][None]))
    states, is_visual, all_named, shown, contributions = (torch.cat(column) for column in zip(*found, strict=True))
    return Seen(states, is_visual, all_named, shown, contributions.mean(0))


def _clock_of(item: Item, is_video: Tensor) -> Tensor:
    """(tokens,) what the clock shows at the first visual token of every frame of a clip, −1 elsewhere."""
    clip, times = item.media
    places = is_video.nonzero()[:, 0]
    shown = torch.full(is_video.shape, -1)
    shown[places[:: len(places) // len(times)]] = torch.tensor([clip.clock_at(time) for time in times])
    return shown


@contextmanager
def _watch(layer: Layer) -> Iterator[dict[str, Tensor]]:
    """Keep what a layer's attention reads, and the mean square of what each head adds."""
    seen: dict[str, Tensor] = {}
    attention: Attention = layer.self_attn

    def keep_states(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["states"] = output

    def keep_contributions(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        heads = inputs[0].unflatten(-1, (-1, attention.head_dim))
        maps = attention.o_proj.weight.unflatten(-1, (-1, attention.head_dim))
        added = torch.einsum("bthd,whd->bthw", heads, maps)
        seen["contributions"] = added.square().mean(dim=(0, 1, 3))

    hooks = [
        layer.input_layernorm.register_forward_hook(keep_states),
        attention.o_proj.register_forward_pre_hook(keep_contributions),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
