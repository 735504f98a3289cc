"""The training loop: one function, on accelerate, so that one process, DDP, FSDP and DeepSpeed run the same code."""

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from vidlada.config import VidLaDAConfig
from vidlada.errors import InputError, VidLaDAError
from vidlada.model import VidLaDAForMaskedDiffusion
from vidlada.processor import BOS, END_HEADER, END_OF_TEXT, END_OF_TURN, MASK, START_HEADER, VidLaDAProcessor
from vidlada.shapes.questions import vocabulary
from vidlada.training.config import Stage, TrainingConfig, build
from vidlada.training.data import Collator, LlavaSource, ShapesSource, Source, StepDataset, to_device
from vidlada.training.initialization import initialize
from vidlada.training.objective import diffusion_loss, draw_masking
from vidlada.training.tokenizer import word_tokenizer

SEEDS_PER_RUN = 1000  # stages of runs with different seeds never share one
STATE_FILE = "trainer_state.json"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def new_model(arguments: dict[str, Any], seed: int) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """A model with random weights and a word-level tokenizer of the shapes world.

    Args:
        arguments: of `VidLaDAConfig`; ids of tokens with a role come from the tokenizer.
        seed: of the weights.
    """
    tokenizer = word_tokenizer(vocabulary())
    config = VidLaDAConfig(**{**role_tokens(tokenizer), **arguments})
    config.text_config.vocab_size = len(tokenizer)  # type: ignore[union-attr]
    set_seed(seed)
    model = VidLaDAForMaskedDiffusion(config)
    return model, VidLaDAProcessor.from_config(tokenizer, config)


def role_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens with a role, as arguments of `VidLaDAConfig`."""
    names = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, MASK, END_OF_TURN)
    bos, end_of_text, start_header, end_header, mask, end_of_turn = tokenizer.convert_tokens_to_ids(list(names))
    return {
        "bos_token_id": bos,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "mask_token_id": mask,
        "suppressed_token_ids": [end_of_text, bos, start_header, end_header],
        "stop_token_ids": [end_of_turn],
    }


def make_source(stage: Stage, image_size: int, seed: int) -> Source:
    """The source a stage describes."""
    kind = stage.data.get("kind")
    arguments = {"seed": seed, **{name: value for name, value in stage.data.items() if name != "kind"}}
    where = f"stage {stage.name}: data"
    if kind == "shapes":
        return build(ShapesSource, {"image_size": image_size, **arguments}, where)
    if kind == "llava":
        return build(LlavaSource, {"size": image_size, **arguments}, where)
    raise InputError(f"stage {stage.name}: data.kind must be shapes or llava, not {kind!r}")


def make_optimizers(model: VidLaDAForMaskedDiffusion, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that share a model's parameters; the learning rate of a step is set on all of them."""
    rate, decay = config.stages[0].learning_rate, config.weight_decay
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = config.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
        (matrices if is_matrix else others).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(config.beta1, config.beta2), weight_decay=decay)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return made


class Interrupted(VidLaDAError):  # noqa: N818 - not an error: it went as asked
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 130


def train(config: TrainingConfig, resume: bool = False, report: Any = print) -> Path:
    """Run every stage; returns the folder of the final model.

    Args:
        config: the run.
        resume: continue from the newest checkpoint in `config.output`; without it a non-empty folder is refused.
        report: called with one line of text at every log step.

    Raises:
        InputError: the output folder is in use, or `resume` finds nothing to continue.
        VidLaDAError: the loss is not finite.
        Interrupted: SIGTERM or SIGINT; a checkpoint was saved first.
    """
    output = Path(config.output)
    checkpoint = newest_checkpoint(output)
    if not resume and output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; continue that run with --resume, or choose another --output")
    if resume and checkpoint is None:
        raise InputError(f"{output} holds no checkpoint to resume from")
    output.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator(mixed_precision=config.precision, log_with="tensorboard", project_dir=output)
    if config.init_from is not None:
        from vidlada.checkpoint import load_model

        model = load_model(Path(config.init_from))
        processor = VidLaDAProcessor.from_pretrained(config.init_from)
    else:
        assert config.model is not None
        model, processor = new_model(config.model, config.seed)
        initialize(model)
    # transformers' fused attention is several times slower than plain products in a CPU's bfloat16 backward pass
    model.vision.tower.set_attn_implementation("eager" if accelerator.device.type == "cpu" else "sdpa")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, config))
    accelerator.init_trackers("logs")
    step = 0
    if resume and checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        step = json.loads((checkpoint / STATE_FILE).read_text())["step"]
        report(f"resumed from {checkpoint.name}")

    stop_requested: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: stop_requested.append(n)) for number in STOP_SIGNALS}
    model.train()
    window: list[float] = []
    tokens, started = 0, time.monotonic()
    try:
        for number, batch in training_batches(config, processor, step):
            step = number
            rate = config.learning_rate(step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            loss, batch_tokens = training_step(accelerator, model, optimizers, batch, config, step)
            window.append(loss)
            tokens += batch_tokens
            done = step + 1
            if not math.isfinite(loss):
                torch.save(batch, output / f"not_finite_{step}.pt")
                raise VidLaDAError(f"the loss at step {step} is {loss}; its batch is saved in {output}")
            if done % config.log_every == 0 or done == config.total_steps:
                seconds = time.monotonic() - started
                mean = sum(window) / len(window)
                left = (config.total_steps - done) * seconds / len(window)
                stage = config.stage_at(step)[0].name
                report(
                    f"step {done}/{config.total_steps} {stage} loss {mean:.4f} lr {rate:.2e} "
                    f"{tokens / seconds:.0f} tokens/s {seconds / len(window):.2f} s/step left {left / 60:.0f} min"
                )
                accelerator.log({"loss": mean, "learning_rate": rate, "tokens_per_second": tokens / seconds}, step=done)
                window, tokens, started = [], 0, time.monotonic()
            if done % config.checkpoint_every == 0 or done == config.total_steps or stop_requested:
                save_checkpoint(accelerator, model, processor, config, done)
            if stop_requested:
                raise Interrupted(f"stopped by signal {stop_requested[0]} after step {done}; continue with --resume")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        accelerator.end_training()
    final = output / "model"
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model), processor, final)
    return final


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: dict[str, Any],
    config: TrainingConfig,
    step: int,
) -> tuple[float, int]:
    """Mask, predict, update; returns the loss and the number of tokens in the batch."""
    generator = torch.Generator().manual_seed((config.seed * 1000 + accelerator.process_index) * 10**9 + step)
    labels, sample_index = batch["labels"], batch["sample_index"]
    masking = draw_masking(labels >= 0, sample_index, generator, batch["force"], config.stratified)
    mask_id = accelerator.unwrap_model(model).config.mask_token_id
    inputs = to_device(
        {
            "input_ids": batch["input_ids"].masked_fill(masking.masked, mask_id),
            "position_ids": batch["position_ids"],
            "attention_mask": batch["attention_mask"],
            "pixel_values": batch.get("pixel_values"),
            "logits_at": masking.masked,
        },
        accelerator.device,
    )
    with accelerator.autocast():
        output = model(frame_counts=batch.get("frame_counts"), **inputs)
    loss = diffusion_loss(output.logits, labels, sample_index, masking)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach()), int((sample_index != -2).sum())


def training_batches(
    config: TrainingConfig, processor: VidLaDAProcessor, first: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step numbers and batches from `first` to the end of the run, stage after stage."""
    start = 0
    for number, stage in enumerate(config.stages):
        steps = range(max(0, first - start), stage.steps)
        if len(steps):
            seed = config.seed * SEEDS_PER_RUN + number
            dataset = StepDataset(
                make_source(stage, processor.image_size, seed), Collator(processor, stage.collate), seed
            )
            loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=steps,
                num_workers=config.workers,
                prefetch_factor=4 if config.workers else None,
                worker_init_fn=leave_signals_to_main,
            )
            for within, batch in zip(steps, loader, strict=True):
                yield start + within, batch
        start += stage.steps


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and a killed process group reach workers too, but they must go on until the checkpoint is written."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def save_checkpoint(
    accelerator: Accelerator, model: Any, processor: VidLaDAProcessor, config: TrainingConfig, step: int
) -> None:
    """Write everything needed to continue, under a temporary name first; then delete the oldest checkpoints."""
    folder = Path(config.output) / f"checkpoint-{step:07d}"
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model), processor, partial / "model")
        (partial / STATE_FILE).write_text(json.dumps({"step": step, "config": asdict(config)}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
        for old in checkpoints(Path(config.output))[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, folder: Path) -> None:
    """Weights, configuration and processor, as `vidlada.load` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in output.glob("checkpoint-*") if p.suffix != ".partial" and (p / STATE_FILE).is_file())


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint to resume from, if any."""
    found = checkpoints(output)
    return found[-1] if found else None
