"""Predicting committed tokens again, each as if its own slot were still masked (WINO).

For every token a mask stands beside the sequence, at the token's position: it sees itself and everything but the token.
Nothing sees it, so the masks run after a step's pass and read the keys and values that it left.
"""

import torch
from torch import Tensor

from vidlada.decoding.kv_cache import KVCache, attend_grouped, attention_kernels
from vidlada.model.language_model import Layer
from vidlada.model.video_model import VidLaDAForMaskedDiffusion


@torch.inference_mode()
def verify(
    model: VidLaDAForMaskedDiffusion, kv_cache: KVCache, positions: Tensor, ids: Tensor, suppressed: Tensor
) -> Tensor:
    """Probability of every committed token, predicted without it.

    Args:
        model: in evaluation mode.
        kv_cache: of the request, after the step's pass.
        positions: (tokens,) of the tokens in the sequence.
        ids: (tokens,) what stands there.
        suppressed: ids that are never proposed.

    Returns:
        (tokens,) float64.
    """
    language_model = model.language_model
    count, tokens = len(positions), kv_cache.keys[0].shape[1]
    hidden = language_model.embed_tokens(torch.full_like(ids, model.config.mask_token_id))  # (count, width)
    own = torch.eye(count, dtype=torch.bool, device=hidden.device)
    seen = torch.ones(count, tokens, dtype=torch.bool, device=hidden.device).scatter_(1, positions[:, None], False)
    mask = torch.cat((seen, own), dim=1)  # (count, tokens + count)
    places = kv_cache.rotary_positions(positions)
    for number, (layer, device) in enumerate(zip(language_model.layers, kv_cache.devices, strict=True)):
        assert isinstance(layer, Layer)
        hidden, mask, places = hidden.to(device), mask.to(device), places.to(device)
        rotation = language_model.rotation(kv_cache.tokens, hidden.dtype, device).index_select(1, places)
        queries, fresh = language_model.enter(layer, hidden, rotation)
        with attention_kernels(device, count):
            mixed = attend_grouped(queries, *kv_cache.read_with(number, fresh), mask)
        hidden = language_model.leave(layer, hidden, mixed.transpose(0, 1).flatten(1))
        kv_cache.computed[number] += count
    logits = model.lm_head(language_model.norm(hidden)).float()
    if len(suppressed):
        logits.index_fill_(-1, suppressed, -torch.inf)
    return logits.double().softmax(-1).gather(-1, ids[:, None])[:, 0]
