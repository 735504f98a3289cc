"""An encoded conversation and its visual tokens, as a request for the denoising loop."""

import torch
from torch import Tensor

from vidlada.decoding.merging import merge_visual
from vidlada.decoding.request import Request
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import EncodedConversation, VidLaDAProcessor


def build_request(
    model: VidLaDAForMaskedDiffusion,
    processor: VidLaDAProcessor,
    encoded: EncodedConversation,
    visual_tokens: Tensor,
    settings: GenerationSettings,
) -> Request:
    """Build the decoding request for the next answer of a conversation.

    Args:
        model, processor: that answer.
        encoded: as the processor encodes it.
        visual_tokens: (visual tokens, width) of all its videos, in order.
        settings: of decoding.
    """
    given_frame_index = encoded.frame_index
    with torch.inference_mode():
        if settings.visual_keep < 1:
            encoded, visual_tokens = merge_visual(encoded, visual_tokens, settings.visual_keep, model.config)
        prompt = model.embed(torch.tensor([encoded.input_ids]), visual_tokens)[0]
    words = [tuple(processor.text_ids(word)) for word in settings.stop]
    return Request(
        prompt=prompt,
        settings=settings,
        stop_sequences=(*words, *((token,) for token in model.config.stop_token_ids)),
        suffix_ids=tuple(processor.text_ids(settings.suffix)) if settings.suffix else (),
        frame_index=encoded.frame_index,
        given_frame_index=given_frame_index,
    )
