"""dLLM-Cache as published: prompt and answer at intervals of their own, and in between, in every layer anew, the part
of the answer whose values changed most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import KVCache, attend_grouped, cosine
from vidlada.decoding.policies.base import EVERYTHING, MAX_STEPS, AttentionPattern, Plan, SegmentPolicy, StepContext
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import LanguageModel, Layer
from vidlada.settings import setting


@dataclass(frozen=True)
class DLLM(SegmentPolicy):
    """dLLM-Cache (arXiv 2506.06295), with its settings for LLaDA-V.

    Args:
        prompt: steps between refreshes of text and frames.
        response: steps between refreshes of the whole answer.
        share: of the answer's positions recomputed in the other steps, chosen anew in every layer.
    """

    name: ClassVar[str] = "dllm"
    prompt: int = setting(25, "Steps between refreshes of text and frames.", minimum=1, maximum=MAX_STEPS)
    response: int = setting(7, "Steps between refreshes of the answer.", minimum=1, maximum=MAX_STEPS)
    share: float = setting(0.25, "Of the answer recomputed in the other steps, layer by layer.", above=0, maximum=1)

    def plan(self, context: StepContext) -> Plan:
        """Whatever is due; the answer is left to `LayerwiseUpdate`."""
        prompt, response = context.step % self.prompt == 0, context.step % self.response == 0
        start = (EVERYTHING if response else dict.fromkeys(("text", "visual"), 0)) if prompt else {}
        return Plan(start, layerwise=1.0 if response else self.share)

    def attention(self, frames: FrameMap, prompt: Tensor) -> "LayerwiseUpdate":
        """Full attention, and the answer's own pass after it."""
        return LayerwiseUpdate()

    def pattern_bytes(
        self, config: VidLaDATextConfig, tokens: int, settings: GenerationSettings, value_bytes: int
    ) -> int:
        """What each layer last added to the answer's states."""
        return config.num_hidden_layers * settings.gen_length * config.hidden_size * value_bytes


class LayerwiseUpdate(AttentionPattern):
    """Updates the answer after the pass: each layer recomputes the positions whose values changed most, and adds to the
    others what it added when it last computed them. Values are kept of all positions, keys of those recomputed.

    Attributes:
        added: (layers, slots, width) what each layer last added to each slot's states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 1.0
        self.added: Tensor | None = None

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Note how much of the answer is recomputed."""
        assert plan.layerwise is not None
        self.share = plan.layerwise

    @torch.inference_mode()
    def finish_pass(self, language_model: LanguageModel, kv_cache: KVCache, answer: Tensor) -> None:
        """See `AttentionPattern`."""
        config = language_model.config
        hidden = kv_cache.hidden[0].index_select(0, answer)  # (slots, width)
        table = language_model.rotation(kv_cache.tokens, hidden.dtype, hidden.device)
        rotation = table.index_select(1, kv_cache.rotary_positions(answer))
        if self.added is None:
            self.added = hidden.new_zeros(config.num_hidden_layers, *hidden.shape)
        count, every = max(1, int(self.share * len(answer))), torch.arange(len(answer), device=answer.device)
        for number, layer in enumerate(language_model.layers):
            assert isinstance(layer, Layer)
            queries, states = language_model.enter(layer, hidden, rotation)
            chosen, heads = every, kv_cache.heads
            if count < len(answer):
                stored = kv_cache.select(number, answer)
                similarity = cosine(states[heads:], stored[heads:], (-3, -1))  # (slots,)
                chosen = similarity.topk(count, largest=False, sorted=False).indices
                # values of all, keys of the chosen
                keys = stored[:heads].index_copy_(1, chosen, states[:heads].index_select(1, chosen))
                states = torch.cat((keys, states[heads:]))
            kv_cache.write(number, answer, states)
            asking, entering = queries.index_select(1, chosen), hidden.index_select(0, chosen)
            mixed = attend_grouped(asking, *kv_cache.read(number))
            fresh = language_model.leave(layer, entering, mixed.transpose(0, 1).flatten(1))
            self.added[number].index_copy_(0, chosen, fresh - entering)
            hidden = (hidden + self.added[number]).index_copy_(0, chosen, fresh)
            kv_cache.computed[number] += len(chosen)
        kv_cache.hidden[config.num_hidden_layers].index_copy_(0, answer, language_model.norm(hidden))
