"""Single passes: a full one beside transformers' Llama, and a cached one as the video grows."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from vidlada.bench.decoding import measure
from vidlada.bench.sizes import subject
from vidlada.decoding.kv_cache import key_value_bytes
from vidlada.decoding.policies.blockwise import Frozen
from vidlada.generation import GenerationSettings
from vidlada.machine import machine, now
from vidlada.markdown import table
from vidlada.model.language_model import LanguageModel

PASSES = ("vidlada", "Llama, all-true mask", "Llama, causal")


def llama_like(language_model: LanguageModel) -> LlamaModel:
    """transformers' Llama with the same weights, sdpa attention."""
    own, weight = language_model.config, language_model.embed_tokens.weight
    config = LlamaConfig(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers, num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads, rms_norm_eps=own.rms_norm_eps, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope_theta}, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaModel(config)
    llama.load_state_dict(language_model.state_dict(), assign=True)
    llama.rotary_emb = type(llama.rotary_emb)(config).to(weight.device)  # its buffer is not in the state dict
    return llama.eval()


@torch.inference_mode()
def pass_figures(
    size: str, frames: int | None = None, repeats: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one pass over a whole prompt, interleaved: ours, and transformers' Llama with an all-true mask (what
    bidirectional attention takes there) and causal as it is made (half the attention, a different result).

    Args:
        size, frames, device, dtype: as in `vidlada.bench.decoding.decoding_figures`.
        repeats: of each.
        progress: called with what is measured next.

    Raises:
        InputError: an unknown size.
    """
    measured = subject(size, frames, device, dtype)
    language_model = measured.model.language_model
    llama = llama_like(language_model)
    hidden = measured.request(GenerationSettings()).prompt[None]  # (1, tokens, width)
    everywhere = torch.ones(1, 1, hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device)
    ours, masked, causal = PASSES
    ways: dict[str, Callable[[], Tensor]] = {
        ours: lambda: language_model(hidden),
        masked: lambda: llama(inputs_embeds=hidden, attention_mask=everywhere).last_hidden_state,
        causal: lambda: llama(inputs_embeds=hidden).last_hidden_state,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    for repeat in range(repeats):
        for name, way in ways.items():
            progress(f"{name}, {repeat + 1} of {repeats}")
            started = now(device)
            results[name] = way()
            seconds[name].append(now(device) - started)
    difference = (results[ours] - results[masked]).abs().max()
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "machine": machine(device), "size": size, "tokens": hidden.shape[1],
        "dtype": str(dtype).removeprefix("torch."), "repeats": repeats,
        "rows": [
            {"way": name, "median_s": median[name], "least_s": min(taken), "most_s": max(taken),
             "times_faster": median[masked] / median[name]}
            for name, taken in seconds.items()
        ],
        "largest_difference": float(difference),
    }  # fmt: skip


def pass_table(figures: dict[str, Any]) -> str:
    """Markdown of `pass_figures`."""
    title = (
        f"{figures['machine']}; size {figures['size']}, one pass over {figures['tokens']} tokens, {figures['dtype']}, "
        f"{figures['repeats']} interleaved repeats; vidlada and Llama with the all-true mask differ by at most "
        f"{figures['largest_difference']:.1e}"
    )
    rows = [
        [row["way"], f"{row['median_s']:.3f}", f"{row['least_s']:.3f} to {row['most_s']:.3f}",
         f"{row['times_faster']:.2f}"]
        for row in figures["rows"]
    ]  # fmt: skip
    return "\n".join([title, "", *table(("pass", "median, s", "range, s", "times faster"), rows)])


def scaling_figures(
    size: str, frames: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """A cached step (the answer's tokens alone, one block of 32) as the video grows.

    Args:
        size, device, dtype: as in `vidlada.bench.decoding.decoding_figures`.
        frames: videos to measure.
        progress: called with what is measured next.

    Raises:
        InputError: an unknown size, or more frames than it can see.
    """
    settings = GenerationSettings(gen_length=32, block_length=32, cache=Frozen.name)
    rows = []
    for count in frames:
        progress(f"{count} frames")
        measured = subject(size, count, device, dtype)
        request = measured.request(settings)
        run = measure(measured.model, request)
        tokens = len(request.prompt) + settings.gen_length
        rows.append(
            {
                "frames": count,
                "visual_tokens": measured.visual_tokens,
                "first_step_s": run.seconds[0],
                "cached_step_s": statistics.median(run.seconds[1:]),
                "key_value_bytes": key_value_bytes(measured.model.language_model.config, tokens, dtype.itemsize),
            }
        )
    return {"machine": machine(device), "size": size, "dtype": str(dtype).removeprefix("torch."), "rows": rows}


def scaling_table(figures: dict[str, Any]) -> str:
    """Markdown of `scaling_figures`."""
    first = figures["rows"][0]
    title = f"{figures['machine']}; size {figures['size']}, {figures['dtype']}, 32 answer tokens a step"
    head = ("frames", "visual tokens", "full step, s", "cached step, s", "keys and values, MB",
            "cached step, times the first row", "keys and values, times the first row")  # fmt: skip
    rows = [
        [row["frames"], row["visual_tokens"], f"{row['first_step_s']:.3f}", f"{row['cached_step_s']:.4f}",
         f"{row['key_value_bytes'] / 1e6:.0f}", f"{row['cached_step_s'] / first['cached_step_s']:.2f}",
         f"{row['key_value_bytes'] / first['key_value_bytes']:.2f}"]
        for row in figures["rows"]
    ]  # fmt: skip
    return "\n".join([title, "", *table(head, rows)])
