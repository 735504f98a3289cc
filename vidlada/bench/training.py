"""Training: what the trainer costs beside a plain loop, and packed rows beside padded ones."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.machine import machine, now
from vidlada.markdown import table
from vidlada.shapes.questions import vocabulary
from vidlada.training.config import CollateSettings, Stage, TrainingConfig
from vidlada.training.data.collate import rows_of
from vidlada.training.figures import Figures, Progress
from vidlada.training.models import initial_model
from vidlada.training.objective import diffusion_loss, draw_masking, draw_times
from vidlada.training.optimizers import make_optimizers
from vidlada.training.parallel import make_accelerator
from vidlada.training.stages import prepare_run
from vidlada.training.trainer import Run

MODEL = {
    "text_config": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    },
    "text_only": True,
    "system_message": "",
    "max_length": 2048,
}  # fmt: skip
CLIPS = {"kind": "shapes", "seconds": [4, 8], "frames_per_batch": 24, "questions": 4}
VISION = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 84,
    "patch_size": 14,
}  # fmt: skip
CONVERSATIONS = 512
WARM_UP = 3  # steps that are not counted
SHORTEST, LONGEST = 8, 700  # words of an answer
TOKENS_PER_ROW = 1024
PADDED, GROUPED, PACKED = "padded", "padded, grouped by length", "packed"
BOUNDED = f"packed, at most {TOKENS_PER_ROW} tokens a row"


def training_config(output: str, data: dict[str, Any], model: dict[str, Any], **changes: Any) -> TrainingConfig:
    """A run of one stage that never ends by itself."""
    stage = Stage("bench", 1e-4, data, 10**6, collate=changes.pop("collate", CollateSettings(force_up_to=2)))
    values = {"precision": "bf16", "workers": 0, "log_every": 1, "tracker": "none", "warmup_steps": 0, **changes}
    return TrainingConfig(output=output, stages=(stage,), model=model, **values)


def new_run(config: TrainingConfig, say: Callable[[str], None] = lambda line: None) -> Run:
    """A run that is ready for its first step."""
    run = Run(prepare_run(config), make_accelerator(config), say)
    run.model.train()
    return run


def overhead_figures(steps: int = 40, progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Seconds of a step by the trainer, with a report after each, and by a plain loop of the same arithmetic, on the
    same batches, one after the other in turn. Making the batches is part of neither.

    Args:
        steps: that are counted.
        progress: called with what is measured next.
    """
    progress("trainer and plain loop")
    with TemporaryDirectory() as folder:
        model = {**MODEL, "text_only": False, "vision_config": VISION}
        config = training_config(folder, CLIPS, model)
        run = new_run(config)
        plain = plain_loop(config)
        seconds: dict[str, list[float]] = {"trainer": [], "plain loop": []}
        state = Progress()

        def trainer(step: int, batches: list[dict[str, Any]]) -> None:
            window = Figures()
            rate = run.optimizers.set_rate(config, step)
            window.add(run.step(step, len(batches), batches, state, []))
            run.log(window, rate, step + 1)

        ways = {"trainer": trainer, "plain loop": plain}
        for step, _, parts in run.batches.steps(run.sources, 0):
            batches = list(parts)
            for name in sorted(ways, reverse=bool(step % 2)):  # none always comes first
                started = now("cpu")
                ways[name](step, batches)
                if step >= WARM_UP:
                    seconds[name].append(now("cpu") - started)
            if step + 1 == WARM_UP + steps:
                break
        run.close()
    ratios = [mine / theirs for mine, theirs in zip(seconds["trainer"], seconds["plain loop"], strict=True)]
    return {
        "machine": machine("cpu"),
        "steps": steps,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "overhead": statistics.median(ratios) - 1,
        "overhead_of_sums": sum(seconds["trainer"]) / sum(seconds["plain loop"]) - 1,
    }


def plain_loop(config: TrainingConfig) -> Callable[[int, list[dict[str, Any]]], None]:
    """A step as it is written by hand: mask, forward, backward, clip, update. No figures, checks or processes."""
    model, _ = initial_model(config)
    model.vision.tower.set_attn_implementation("eager")  # as the trainer does on a CPU
    model.train()
    (optimizer,) = make_optimizers(model, config).optimizers
    generator = torch.Generator().manual_seed(0)

    def step(number: int, batches: list[dict[str, Any]]) -> None:
        (batch,) = batches
        labels, sample_index = batch["labels"], batch["sample_index"]
        times = draw_times(batch["total_samples"], generator)
        masking = draw_masking(labels >= 0, sample_index, times, generator, batch["force"])
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(
                input_ids=batch["input_ids"].masked_fill(masking.masked, model.config.mask_token_id),
                position_ids=batch["position_ids"], attention_mask=batch["attention_mask"],
                pixel_values=batch["pixel_values"], media_shapes=batch["media_shapes"], logits_to_keep=masking.masked,
            ).logits  # fmt: skip
        diffusion_loss(logits, labels, sample_index, masking).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def write_conversations(path: Path) -> None:
    """Conversations without media whose answers differ in length as those of instruction data do (log-normal)."""
    generator = np.random.default_rng(0)
    words = sorted(word for word in vocabulary() if word.isalpha())
    lengths = np.clip(generator.lognormal(4.0, 1.0, CONVERSATIONS), SHORTEST, LONGEST).astype(int)
    entries = [
        {"id": str(number), "conversations": [
            {"from": "human", "value": " ".join(generator.choice(words, 12))},
            {"from": "gpt", "value": " ".join(generator.choice(words, length))},
        ]}
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    path.write_text(json.dumps(entries), encoding="utf-8")


def packing_figures(
    steps: int = 12, batch_size: int = 8, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Tokens a second (padding not counted) of padded, grouped and packed rows of the same conversations, step by step
    in turn; making the batches is part of each.

    Args:
        steps: of each that are counted.
        batch_size: conversations a step.
        progress: called with what is measured next.
    """
    progress("packed and padded rows")
    with TemporaryDirectory() as folder:
        write_conversations(Path(folder) / "conversations.json")
        data = {"kind": "llava", "json_path": str(Path(folder) / "conversations.json"), "batch_size": batch_size}
        plain = training_config(folder, data, MODEL)
        packing = CollateSettings(force_up_to=2, packing=True)
        bounded = replace(packing, tokens_per_row=TOKENS_PER_ROW)
        configs = {
            PADDED: plain,
            GROUPED: replace(plain, stages=(replace(plain.stages[0], data={**data, "group_by_length": True}),)),
            PACKED: replace(plain, stages=(replace(plain.stages[0], collate=packing),)),
            BOUNDED: replace(plain, stages=(replace(plain.stages[0], collate=bounded),)),
        }
        runs = {name: new_run(config) for name, config in configs.items()}
        streams = {name: run.batches.steps(run.sources, 0) for name, run in runs.items()}
        tokens, slots, seconds = (dict.fromkeys(configs, 0.0) for _ in range(3))
        for number in range(WARM_UP + steps):
            for name, run in runs.items():
                started = now("cpu")
                step, passes, parts = next(streams[name])
                batches = list(parts)
                figures = run.step(step, passes, batches, Progress(), [])
                if number >= WARM_UP:
                    seconds[name] += now("cpu") - started
                    tokens[name] += figures.tokens
                    slots[name] += sum(row["input_ids"].numel() for batch in batches for row in rows_of(batch))
        for run in runs.values():
            run.close()
    return {
        "machine": machine("cpu"),
        "steps": steps,
        "batch_size": batch_size,
        "rows": {
            name: {"tokens_per_second": tokens[name] / seconds[name], "padding": 1 - tokens[name] / slots[name]}
            for name in configs
        },
    }


def overhead_table(figures: dict[str, Any]) -> str:
    """Markdown."""
    rows = [(name, f"{1000 * seconds:.0f}") for name, seconds in figures["seconds"].items()]
    lines = table(("loop", "ms a step, median"), rows)
    overhead, of_sums = figures["overhead"], figures["overhead_of_sums"]
    lines.append(f"\nthe trainer takes {overhead:+.1%} (median of {figures['steps']} pairs; {of_sums:+.1%} in sum)")
    return "\n".join([*lines, figures["machine"]])


def packing_table(figures: dict[str, Any]) -> str:
    """Markdown."""
    base = figures["rows"][PADDED]["tokens_per_second"]
    rows = [
        (name, f"{row['tokens_per_second']:.0f}", f"{row['tokens_per_second'] / base:.2f}", f"{row['padding']:.0%}")
        for name, row in figures["rows"].items()
    ]
    return "\n".join([*table(("rows", "tokens/s", "against padded", "padding"), rows), "", figures["machine"]])
