"""How much memory requests take while they are decoded, from their shapes alone: to be asked before they start. And how
to tell that there was too little of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidlada.decoding.choices import policy_of
from vidlada.decoding.commit import commit_rule
from vidlada.decoding.kv_cache import key_value_bytes
from vidlada.decoding.small_kv import stored_bytes
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDATextConfig

PROMPT_TOKENS = 128  # room for a question, its header and the system message, in estimates
# cuBLAS, the driver and PyTorch's allocator on a CPU raise plain RuntimeErrors
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def kept_bytes(
    config: VidLaDATextConfig,
    tokens: int,
    visual: int,
    settings: GenerationSettings,
    value_bytes: int,
    processes: int = 1,
) -> int:
    """Return what a request keeps between its steps, and leaves for a further question.

    Args:
        config: of the language model.
        tokens: of the whole sequence, answer slots included.
        visual: how many of them are visual.
        settings: of the request.
        value_bytes: bytes a value in the type it runs in.
        processes: that every layer's heads are divided among; the result is of one of them.
    """
    policy, rule = policy_of(settings), commit_rule(settings)
    of_rule = rule.kept_bytes(settings.block_length, config.vocab_size)
    if policy is None:
        return of_rule
    states = 2 + len(joining_layers(config, settings))  # entering the first layer, leaving the last
    spare = settings.block_length if rule.revokes and settings.kv_dtype == "auto" else 0
    kept = stored_bytes(config, tokens + spare, value_bytes, settings.kv_dtype) // processes
    kept += states * tokens * config.hidden_size * value_bytes
    kept += policy.pattern_bytes(config, tokens, settings, value_bytes)
    if settings.cfg_scale > 0:
        kept *= 2
    return kept + of_rule + reused_bytes(config, visual, settings, value_bytes, processes)


def joining_layers(config: VidLaDATextConfig, settings: GenerationSettings) -> set[int]:
    """Return the layers between the first and the last at whose entry hidden states are kept."""
    policy, layers = policy_of(settings), config.num_hidden_layers
    return set() if policy is None else {*policy.entries(layers), min(settings.reuse, layers)} - {0, layers}


def reused_bytes(
    config: VidLaDATextConfig, visual: int, settings: GenerationSettings, value_bytes: int, processes: int = 1
) -> int:
    """Return what a request leaves for a further question about its frames; the arguments are those of `kept_bytes`."""
    layers = config.num_hidden_layers
    reuse = min(settings.reuse, layers)
    states = len([layer for layer in joining_layers(config, settings) if layer <= reuse])
    keys_values = key_value_bytes(config, visual, value_bytes) * reuse // layers // processes
    return keys_values + states * visual * config.hidden_size * value_bytes


def pass_bytes(config: VidLaDATextConfig, tokens: int, blocks: int, value_bytes: int, processes: int = 1) -> int:
    """Return the largest activations of a pass over every position.

    Counted are the tensors alive at once in the widest place of a layer: the residual stream, its normed copy, and
    either queries, keys and values with the attention's output or the gate and up projections; and the logits.

    Args:
        config: of the language model.
        tokens: of all sequences.
        blocks: slots of all current blocks.
        value_bytes: bytes a value in the type it runs in.
        processes: that every layer's heads and features are divided among.
    """
    width = config.hidden_size
    divided = max(4 * width, 3 * config.intermediate_size) // processes
    layer = divided * value_bytes + 2 * width * value_bytes + 4 * width
    return tokens * layer + blocks * config.vocab_size * (4 + 8)  # float32, and float64 for the probabilities


@dataclass(frozen=True)
class DecodingBytes:
    """Memory of sequences that are decoded together, besides the weights.

    Attributes:
        kept: between steps, and for further questions.
        working: largest activations of a step, the first, which recomputes all.
    """

    kept: int
    working: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.kept + self.working


def decoding_bytes(
    config: VidLaDATextConfig,
    shapes: Sequence[tuple[int, int, GenerationSettings]],
    value_bytes: int,
    processes: int = 1,
) -> DecodingBytes:
    """Return what sequences that are decoded together take.

    Args:
        config: of the language model.
        shapes: of each sequence its tokens, answer slots included, how many of them are visual, and its settings.
        value_bytes: bytes a value in the type they run in.
        processes: as for `kept_bytes`.
    """
    kept = sum(
        kept_bytes(config, tokens, visual, settings, value_bytes, processes) for tokens, visual, settings in shapes
    )
    tokens = sum(tokens for tokens, _, _ in shapes)
    blocks = sum(settings.block_length for _, _, settings in shapes)
    return DecodingBytes(kept, pass_bytes(config, tokens, blocks, value_bytes, processes))


def merged_shape(tokens: int, visual: int, settings: GenerationSettings) -> tuple[int, int, GenerationSettings]:
    """Return the shape of a sequence, for `decoding_bytes`, once visual tokens are merged before the first step."""
    left = round(settings.visual_keep * visual)
    return tokens - visual + left, left, settings
