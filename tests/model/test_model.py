"""The model against transformers' own modules, and as a Hugging Face citizen."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.language_model import LanguageModel
from vidlada.model.rotary import rotary_angles, rotate, rotate_, rotation_table
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

SHAPE = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}  # fmt: skip


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_language_model_is_llama_without_a_causal_mask(key_value_heads):
    torch.manual_seed(0)
    ours = LanguageModel(VidLaDATextConfig(**SHAPE, num_key_value_heads=key_value_heads, rope_theta=500000.0)).eval()
    config = LlamaConfig(**SHAPE, num_key_value_heads=key_value_heads, pad_token_id=None,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    llama = LlamaModel(config).eval()
    llama.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 60, (2, 37))
    with torch.no_grad():
        expected = llama(input_ids=ids, attention_mask=torch.zeros(2, 1, 37, 37)).last_hidden_state
        hidden = ours(ours.embed_tokens(ids))
        parts = [ours(ours.embed_tokens(ids), wanted=slice(30, 34))]
        ours.pack()
        parts.append(ours(ours.embed_tokens(ids), wanted=slice(30, 34)))
    assert torch.allclose(hidden, expected, atol=2e-5)
    for part in parts:
        assert torch.allclose(part, expected[:, 30:34], atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(small, side):
    model = small.model
    ids = torch.randint(10, 200, (1, 20))
    padding = torch.full((1, 7), 1)
    parts = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat([torch.full_like(part, int(part is ids)) for part in parts], 1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        padded = model(input_ids=torch.cat(parts, 1), attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(padded, alone[0], atol=1e-5)


def test_every_position_sees_every_other(small):
    ids = torch.randint(10, 200, (1, 12))
    with torch.no_grad():
        base = small.model(input_ids=ids).hidden
        for place in range(12):
            other = ids.clone()
            other[0, place] = 5
            changed = (small.model(input_ids=other).hidden - base).abs().amax(-1)[0]
            assert (changed > 0).all()


def test_rotary_angles_are_exact_far_out_in_bfloat16():
    position = torch.tensor([[13_000]])
    cos, _ = rotary_angles(position, 128, 500000.0, torch.bfloat16)
    exact = (13_000 * 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)).cos()
    assert (cos[0, 0, 0, :64].double() - exact).abs().max() < 0.01  # the published module, cast, is off by up to 1.97


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_angles_are_the_published_ones_at_large_positions(head_dim):
    """1 / theta ** (2i / d), as published: theta ** (-2i / d) rounds otherwise, and is off by 5e-3 far out."""
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    positions = torch.tensor([[0, 1, 9_999, 10_001, 13_567, 32_767, 131_071]])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1, 1, head_dim), positions)
    found = rotary_angles(positions, head_dim, 500000.0, torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours[:, 0], theirs, rtol=0, atol=5e-5)


def test_packed_projections_are_the_published_ones_under_their_names(small_folder):
    plain = VidLaDAForMaskedDiffusion.from_pretrained(small_folder)
    packed = VidLaDAForMaskedDiffusion.from_pretrained(small_folder)
    packed.language_model.pack()
    packed.language_model.pack()  # harmless
    weights = plain.state_dict()
    assert packed.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in packed.state_dict().items())
    ids = torch.randint(10, 200, (2, 20))
    with torch.no_grad():
        assert torch.allclose(packed(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
        doubled = {key: 2 * tensor for key, tensor in weights.items()}
        packed.load_state_dict(doubled)
        assert torch.equal(packed.state_dict()["language_model.layers.0.mlp.up_proj.weight"],
                           doubled["language_model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_rotation_in_place_is_the_published_one():
    states, positions = torch.randn(3, 5, 8), torch.tensor([0, 2, 3, 7, 40])
    expected = rotate(states[None], rotary_angles(positions[None], 8, 10000.0, torch.float32))[0]
    rotate_(states, rotation_table(41, 8, 10000.0, torch.float32, torch.device("cpu"))[:, positions])
    torch.testing.assert_close(states, expected)


def test_only_chosen_logits(small):
    ids = torch.randint(10, 200, (2, 9))
    chosen = torch.rand(2, 9) < 0.4
    with torch.no_grad():
        kept = small.model(input_ids=ids, logits_to_keep=chosen).logits
        torch.testing.assert_close(kept, small.model(input_ids=ids).logits[chosen])


def test_visual_tokens_must_fit_their_places(small):
    ids = torch.full((1, 8), small.model.config.video_token_id)
    with pytest.raises(InputError, match="places for 8 visual tokens, but 3"):
        small.model.embed(ids, torch.zeros(3, 32))


def test_videos_of_different_length_are_encoded_as_alone(small):
    pixels = torch.randn(5, 3, 36, 36)
    with torch.no_grad():
        first, second = small.model.encode_media(pixels, [2, 3])
        (alone,) = small.model.encode_media(pixels[2:], [3])
    assert first.shape == (12, 32)
    assert torch.allclose(second, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "mode", "count"),
    [("grid", "bilinear", 2 * 6), ("frame", "bilinear", 2 * 5), ("one_token", "bilinear", 9),
     ("no_token", "bilinear", 8), ("grid", "average", 2 * 2), ("grid", "max", 2 * 2)],
)  # fmt: skip
def test_layouts_of_visual_tokens(small, position, mode, count):
    config = VidLaDAConfig(**{**small.model.config.to_dict(), "newline_position": position, "spatial_pool_mode": mode})
    model = VidLaDAForMaskedDiffusion(config)
    with torch.no_grad():
        model.vision.newline.fill_(7)
        (visual,) = model.encode_media(torch.zeros(2, 3, 36, 36), [2])
    assert len(visual) == config.visual_tokens(2) == count
    assert (visual == 7).all(-1).tolist() == config.newlines(2)


def test_auto_classes_and_round_trip(small, small_folder, tmp_path):
    assert isinstance(AutoConfig.from_pretrained(small_folder), VidLaDAConfig)
    model = AutoModel.from_pretrained(small_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = VidLaDAForMaskedDiffusion.from_pretrained(tmp_path)
    for key, tensor in small.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(small, small_folder):
    import vidlada

    ids = torch.randint(10, 200, (2, 30))
    with torch.no_grad():
        expected = small.model(input_ids=ids).logits
        found = vidlada.load(small_folder, device="cuda", dtype="float32").model(input_ids=ids.cuda()).logits.cpu()
    assert torch.allclose(found, expected, atol=1e-3)
