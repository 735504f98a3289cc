"""The Hugging Face model: vision and language joined, video spliced into the prompt, logits, loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import ModelOutput

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.language_model import LanguageModel, RMSNorm
from vidlada.model.masks import AnyMask
from vidlada.model.vision import Vision
from vidlada.tiling import MediaShape


@dataclass
class VidLaDAOutput(ModelOutput):
    """`logits` (batch, tokens, vocabulary) in float32, `hidden` (batch, tokens, width)."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class VidLaDAForMaskedDiffusion(PreTrainedModel):
    """Video, text in; a distribution over tokens at every position out (arXiv 2601.17868, section 3)."""

    config: VidLaDAConfig
    config_class = VidLaDAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # where tie_word_embeddings says so
    _no_split_modules = ["Layer", "SiglipEncoderLayer", "SiglipVisionEmbeddings"]

    def __init__(self, config: VidLaDAConfig):
        super().__init__(config)
        if not config.text_only:
            self.vision = Vision(config)
        self.language_model = LanguageModel(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights for the language model and projector; the tower initialises itself as SigLIP does."""
        std = self.config.text.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Vision):
            nn.init.normal_(module.newline, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def encode_media(self, pixel_values: Tensor, shapes: Sequence[MediaShape]) -> list[Tensor]:
        """Visual tokens of several videos and images whose pictures are stacked.

        Args:
            pixel_values: (all pictures, 3, image_size, image_size).
            shapes: number of frames of each video, shape of each image, in order.

        Returns:
            One (visual tokens, width) tensor a medium.

        Raises:
            InputError: the model has no visual half.
        """
        if self.config.text_only:
            raise InputError("this checkpoint is text-only; it cannot see videos")
        return self.vision.encode(pixel_values, shapes)

    def embed(self, input_ids: Tensor, visual_tokens: Tensor | None = None) -> Tensor:
        """Embeddings of a prompt, visual tokens in the places of the video stand-ins.

        Args:
            input_ids: (batch, tokens), on the model's device or, so that nothing waits for it, on the host; every place
                of `config.video_token_id` takes one visual token.
            visual_tokens: (visual tokens of the whole batch in order, width).

        Returns:
            (batch, tokens, width).

        Raises:
            InputError: the number of places differs from the number of visual tokens.
        """
        places = int((input_ids == self.config.video_token_id).sum())
        given = 0 if visual_tokens is None else visual_tokens.shape[0]
        if places != given:
            raise InputError(f"the prompt has places for {places} visual tokens, but {given} were given")
        if input_ids.device.type == "cpu" != self.device.type:
            input_ids = input_ids.pin_memory().to(self.device, non_blocking=True)
        is_video = input_ids == self.config.video_token_id
        embeddings = self.language_model.embed_tokens(input_ids.masked_fill(is_video, 0))
        if visual_tokens is None or places == 0:
            return embeddings
        return embeddings.masked_scatter(is_video[..., None], visual_tokens.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media_shapes: Sequence[MediaShape] | None = None,
        attention_mask: AnyMask = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        **kwargs: Any,
    ) -> VidLaDAOutput:
        """Logits of a whole sequence, or of chosen positions.

        Args:
            input_ids: (batch, tokens), or give `inputs_embeds`.
            pixel_values: (all pictures, 3, image_size, image_size), with `media_shapes`.
            media_shapes: number of frames of each video, shape of each image; one video by default.
            attention_mask: boolean or 0/1 (batch, tokens) or (batch, 1, tokens, tokens), True may be attended; or of
                rows that share a prefix or are packed.
            position_ids: (batch, tokens); counted over unpadded tokens by default.
            inputs_embeds: (batch, tokens, width) instead of ids.
            logits_to_keep: boolean (batch, tokens): logits only there, shape (chosen, vocabulary). Saves the largest
                activation of training, (tokens, 126464) in float32.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("give input_ids or inputs_embeds")
            visual = None
            if pixel_values is not None:
                visual = torch.cat(self.encode_media(pixel_values, media_shapes or [pixel_values.shape[0]]))
            inputs_embeds = self.embed(input_ids, visual)
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = positions_of(attention_mask)
        hidden = self.language_model(inputs_embeds, position_ids, attention_mask)
        chosen = hidden if logits_to_keep is None else hidden[logits_to_keep]
        return VidLaDAOutput(logits=self.lm_head(chosen).float(), hidden=hidden)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions counted over unpadded tokens, 0 at padding: (batch, tokens) → (batch, tokens)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


AutoConfig.register("vidlada_text", VidLaDATextConfig)
AutoConfig.register("vidlada", VidLaDAConfig)
AutoModel.register(VidLaDAConfig, VidLaDAForMaskedDiffusion)
AutoModelForImageTextToText.register(VidLaDAConfig, VidLaDAForMaskedDiffusion)
