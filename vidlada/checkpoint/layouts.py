"""The published namings of tensors, and how they map to ours.

Layouts:
- `vidlada`: ours, as `save_pretrained` writes it;
- `published`: VidLaDA-8B and LLaDA-V, a Llama-style naming with `model.vision_tower`, `model.mm_projector`; or the
  language model of one alone;
- `llada`: the text-only ancestor LLaDA-8B, with its `model.transformer.blocks` naming.

Which one a checkpoint has follows from its tensors' names alone: `model_type` and `architectures` vary between
checkpoints that are the same in everything else.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig

Layout = Literal["vidlada", "published", "llada"]
# Ours → theirs. In the published layout everything else keeps its name.
PUBLISHED_PREFIXES = {
    "vision.tower.": "model.vision_tower.vision_tower.vision_model.",
    "vision.projector.": "model.mm_projector.",
    "vision.newline": "model.image_newline",
    "language_model.": "model.",
}
VISION_PREFIXES = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")
RESAMPLER_PREFIX = "model.vision_resampler."  # of LLaVA's IdentityMap; others are refused by the configuration
LLADA_NAMES = {
    "lm_head": "model.transformer.ff_out",
    "language_model.embed_tokens": "model.transformer.wte",
    "language_model.norm": "model.transformer.ln_f",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LAYER_PREFIXES: dict[Layout, str] = {
    "vidlada": "language_model.layers.",
    "published": "model.layers.",
    "llada": "model.transformer.blocks.",
}
TOWER_PREFIX = "vision_model."  # of a vision tower in a folder of its own


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its file, shape and dtype, without values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Of values."""
        return math.prod(self.shape)


def layout_of(keys: Iterable[str], place: str) -> tuple[Layout, bool]:
    """The layout of a checkpoint, and whether it has a visual half.

    Args:
        keys: names of its tensors.
        place: the checkpoint's, for errors.

    Raises:
        InputError: the names are of no known layout.
    """
    names = list(keys)

    def any_begin(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any_begin(LAYER_PREFIXES["vidlada"]):
        return "vidlada", any_begin("vision.")
    sees = any_begin(*VISION_PREFIXES)
    if any_begin(LAYER_PREFIXES["llada"], "model.transformer."):
        if sees:
            raise InputError(f"{place}: this is a LaViDa checkpoint (LLaDA's names with a vision tower), not supported")
        return "llada", False
    if any_begin(LAYER_PREFIXES["published"]):
        return "published", sees
    raise InputError(
        f"{place}: no checkpoint of this family: none of its {len(names)} tensors has a name that begins with "
        f"{', '.join(LAYER_PREFIXES.values())}"
    )


def tensor_name(layout: Layout, key: str) -> str:
    """Return the name of our tensor `key` in a layout."""
    if layout == "published":
        for ours, theirs in PUBLISHED_PREFIXES.items():
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
    if layout == "llada":
        found = re.fullmatch(r"(language_model\.layers\.(\d+)\.)?(.+)\.weight", key)
        assert found is not None
        block = "" if found[1] is None else f"{LAYER_PREFIXES['llada']}{found[2]}."
        return f"{block}{LLADA_NAMES[found[3]]}.weight"
    return key


def tower_prefix(layout: Layout) -> str:
    """Return the prefix of the vision tower's tensor names in a layout."""
    return PUBLISHED_PREFIXES["vision.tower."] if layout == "published" else "vision.tower."


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Count the layers under a prefix: one more than the highest number."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{1,6}})\.")
    return max((int(found[1]) + 1 for key in keys if (found := pattern.match(key))), default=0)


def is_unused(layout: Layout, key: str, config: VidLaDAConfig) -> bool:
    """Whether a tensor belongs to what the model never runs: the tower's last layer and pooling head, stored
    frequencies and positions, LLaVA's empty resampler."""
    if key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")) or key.startswith(RESAMPLER_PREFIX):
        return True
    prefix = tower_prefix(layout)
    if config.text_only or not key.startswith(prefix):
        return False
    rest = key.removeprefix(prefix)
    layer = re.match(r"encoder\.layers\.(\d+)\.", rest)
    return rest.startswith("head.") or (layer is not None and int(layer[1]) >= config.vision.num_hidden_layers)


def may_be_missing(key: str, config: VidLaDAConfig) -> bool:
    """Return whether a checkpoint may lack our tensor `key`."""
    return (
        key.startswith("vision.tower.post_layernorm.")
        or (key == "vision.newline" and config.newline_position == "no_token")
        or (key == "lm_head.weight" and config.tie_word_embeddings)
    )
