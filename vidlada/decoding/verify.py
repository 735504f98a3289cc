"""Predicting committed tokens again, each as if its own slot were still masked (WINO).

For every token a mask stands beside the sequence, at the token's position: it sees itself and everything but the token.
Nothing sees it, so the masks run after a step's pass and read the keys and values that it left.
"""

import torch
from torch import Tensor

from vidlada.decoding.kv_cache import KVCache, attend_grouped
from vidlada.model.language_model import Layer, rotary_angles
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
    language_model, config = model.language_model, model.language_model.config
    count, tokens = len(positions), kv_cache.keys[0].shape[1]
    hidden = language_model.embed_tokens(torch.full_like(ids, model.config.mask_token_id))  # (count, width)
    rotation = rotary_angles(positions[None], config.head_dim, config.rope_theta, hidden.dtype)
    own = torch.eye(count, dtype=torch.bool, device=hidden.device)
    seen = torch.ones(count, tokens, dtype=torch.bool, device=hidden.device).scatter_(1, positions[:, None], False)
    mask = torch.cat((seen, own), dim=1)  # (count, tokens + count)
    for number, layer in enumerate(language_model.layers):
        assert isinstance(layer, Layer)
        queries, keys, values = (states[0] for states in language_model.enter(layer, hidden[None], rotation))
        keys, values = torch.cat((kv_cache.keys[number], keys), 1), torch.cat((kv_cache.values[number], values), 1)
        mixed = attend_grouped(queries, keys, values, mask)
        hidden = language_model.leave(layer, hidden, mixed.transpose(0, 1).flatten(1))
        kv_cache.computed[number] += count
    logits = model.lm_head(language_model.norm(hidden)).float()
    logits[:, suppressed] = -torch.inf
    return logits.double().softmax(-1).gather(-1, ids[:, None])[:, 0]
