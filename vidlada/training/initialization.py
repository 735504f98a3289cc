"""Initial weights of a model trained from nothing."""

import torch
from torch import nn

from vidlada.model.video_model import VidLaDAForMaskedDiffusion

# Token embeddings as large as fresh visual tokens. At the size of the other weights, two layers of random mixing
# drown which token a position holds, and binding colours and shapes to places never gets off the ground.
EMBEDDING_STD = 0.5
# At SigLIP's own 1 / sqrt(width) positions drown in the patch embeddings: after 100 steps on single frames, places are
# still at chance where this has 70 % of them right.
POSITION_STD = 0.3
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "mlp.fc2.weight")


@torch.no_grad()
def initialize(model: VidLaDAForMaskedDiffusion) -> None:
    """Let every layer begin as the identity: whatever it adds to the residual stream starts at zero.

    Args:
        model: fresh from its configuration, which sets the size of all other weights.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(RESIDUAL_OUTPUTS) and ".layers." in name:
            nn.init.zeros_(parameter)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    if not model.config.text_only:
        nn.init.normal_(model.vision.newline, std=EMBEDDING_STD)
        nn.init.normal_(model.vision.tower.embeddings.position_embedding.weight, std=POSITION_STD)
