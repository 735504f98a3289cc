"""The training loop: one function, on accelerate, so that one process, DDP, FSDP2 and DeepSpeed run the same code."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from vidlada.errors import InputError, VidLaDAError
from vidlada.machine import keep_freed_memory, resident_memory, return_free_memory
from vidlada.model.masks import PackedMask
from vidlada.tiling import pictures_of
from vidlada.training.batches import Batches
from vidlada.training.checkpoints import NotSaved, load_checkpoint, save_checkpoint, save_final, write_folder
from vidlada.training.config import TrainingConfig
from vidlada.training.data.collate import rows_of
from vidlada.training.evaluation import BEST, EvaluationResult, HeldOut, best_so_far, summary
from vidlada.training.event_supervision import EventLoss
from vidlada.training.figures import Figures, Progress, figures_of, line_of, parameter_counts
from vidlada.training.flops import FlopCount
from vidlada.training.losses import BatchLoss
from vidlada.training.models import add_lora, initial_config, initial_model, save_dtype
from vidlada.training.optimizers import Optimizers, drop_gradients, make_optimizers
from vidlada.training.output import check_output, clear_output, lock_output, newest_checkpoint
from vidlada.training.parallel import (
    is_deepspeed,
    is_sharded,
    lost_peers,
    make_accelerator,
    on_main,
    total,
    weights_come_from_main,
    weights_place,
)
from vidlada.training.records import Records
from vidlada.training.signals import StopSignals
from vidlada.training.stages import PreparedRun, prepare_run
from vidlada.training.trackers import start_tracker

TRIM_EVERY = 100  # steps between looks at the memory
TRIM_GROWTH = 1.25  # of the resident memory since freed memory was last returned
FEWEST_SEEN = 200  # samples before a share of broken ones means anything


def train(
    config: TrainingConfig, resume: bool = False, report: Callable[[str], Any] = print, overwrite: bool = False
) -> Path:
    """Run every stage; returns the folder of the final model.

    Every process of a launch calls this. The loss curve depends on how many parts a step is split into (processes
    times passes), not on which process works on which part.

    Args:
        config: the run.
        resume: continue from the newest checkpoint in `config.output`; without it a non-empty folder is refused.
        report: called with one line of text at every log step, in the main process.
        overwrite: replace what an earlier run left in `config.output`.

    Raises:
        InputError: the output folder is in use, `resume` finds nothing to continue, or the data cannot be used.
        VidLaDAError: the loss is not finite, too many samples are broken, nothing can be saved, or another process of
            the launch is gone.
        Interrupted: SIGTERM or SIGINT; a checkpoint was saved first.
    """
    return run_training(prepare_run(config), resume, report, overwrite)


def run_training(
    prepared_run: PreparedRun, resume: bool = False, report: Callable[[str], Any] = print, overwrite: bool = False
) -> Path:
    """`train`, for a run whose data were read before."""
    config = prepared_run.config
    initial_config(config)  # refuses a model that cannot be, before any process waits for another
    output = Path(config.output)
    with lost_peers(), ExitStack() as stack:
        accelerator = make_accelerator(config)
        say = report if accelerator.is_main_process else (lambda line: None)
        on_main(accelerator, lambda: check_output(output, resume, overwrite))
        run = Run(prepared_run, accelerator, say)
        on_main(accelerator, lambda: stack.enter_context(lock_output(output)))
        if not resume:  # only now, when all else is known to be right
            on_main(accelerator, lambda: clear_output(output))
            say(
                f"{run.trainable:,} trainable parameters, {run.frozen:,} frozen, "
                f"precision {accelerator.mixed_precision}"
            )
        start_tracker(accelerator, config, {"trainable_parameters": run.trainable, "frozen_parameters": run.frozen})
        progress = Progress()
        if resume:
            checkpoint = newest_checkpoint(output)
            assert checkpoint is not None
            progress = load_checkpoint(accelerator, config, checkpoint, say)
            run.best = on_main(accelerator, lambda: best_so_far(output))
        final = output / "model"
        try:
            run.steps(progress)
            save_final(accelerator, run.model, run.processor, config, final, run.dtype)
        finally:
            run.close()
        if progress.skipped:
            say(
                f"{progress.skipped} of {progress.seen} samples were broken, and others taken; see "
                f"{output}/skipped*.jsonl"
            )
    return final


class Run:
    """A prepared run: model, optimizers, data.

    Args:
        prepared_run: its settings and data.
        accelerator: of all processes.
        say: takes lines for the user.
    """

    def __init__(self, prepared_run: PreparedRun, accelerator: Accelerator, say: Callable[[str], Any]):
        self.config = config = prepared_run.config
        self.sources = prepared_run.sources
        self.accelerator, self.say = accelerator, say
        self.output = Path(config.output)
        model, self.processor = initial_model(
            config, not weights_come_from_main(accelerator), *weights_place(accelerator)
        )
        self.dtype = save_dtype(config)
        if not model.config.text_only:
            # transformers' fused attention is several times slower than plain products in a CPU's bfloat16 backward
            kind = "eager" if accelerator.device.type == "cpu" else "sdpa"
            model.vision.tower.set_attn_implementation(kind)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for layer in model.language_model.layers:
                layer.compile_parts()  # type: ignore[operator]
            if not model.config.text_only:
                for layer in model.vision.tower.encoder.layers:
                    layer.compile(dynamic=True)
        model_config = model.config
        if config.lora is not None:
            assert config.init_from is not None
            model = add_lora(model, config.lora, config.init_from, config.seed)
        self.events: EventLoss | None = None
        if config.event_supervision is not None:
            if accelerator.num_processes > 1:
                raise InputError(f"event_supervision is for one process, not {accelerator.num_processes}")
            self.events = EventLoss(config.event_supervision, model.language_model)
            accelerator.register_for_checkpointing(self.events)
        optimizers = make_optimizers(model, config)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.flops = FlopCount(model, model_config)
        self.trainable, self.frozen = parameter_counts(model)
        self.trimmed = 0  # bytes that were resident when freed memory was last returned
        self.model, *prepared = accelerator.prepare(model, *optimizers.optimizers)
        self.optimizers = Optimizers(prepared, optimizers.parts)
        if is_sharded(accelerator) and not is_deepspeed(accelerator):
            self.optimizers.begin()
        self.records = Records(self.output, accelerator.process_index)
        self.batches = Batches(config, self.processor, accelerator, model_config.text_only)
        self.loss = BatchLoss(config, model_config.mask_token_id, self.model, accelerator, self.events)
        self.best: EvaluationResult | None = None
        self.held_out: HeldOut | None = None
        if config.evaluation is not None and prepared_run.held_out is not None:
            self.held_out = HeldOut(
                config.evaluation, prepared_run.held_out, self.model, self.processor, self.batches, self.loss,
                self.records, accelerator,
            )  # fmt: skip

    def close(self) -> None:
        """Let go of the model, then end the log and the process group; nothing can be done with the run afterwards.

        In this order: DDP's reducer would be the last to hold the process group, and, going with it, wait for a thread
        of gloo's that can itself wait for Python (pytorch issue 56297): the process would never end.
        """
        del self.model, self.loss, self.held_out
        self.accelerator.free_memory()
        with suppress(OSError):  # a full disk does not let the log be closed
            self.accelerator.end_training()

    def steps(self, progress: Progress) -> None:
        """Train from where `progress` stands to the end of the run; keeps `progress` up to date."""
        config = self.config
        self.model.train()
        window = Figures()
        with StopSignals() as signals, closing(self.batches.steps(self.sources, progress.step)) as run:
            # several processes stop after the step in which all know of the signal
            alone = signals.received if self.accelerator.num_processes == 1 else []
            for step, passes, batches in run:
                rate = self.optimizers.set_rate(config, step)
                figures = self.step(step, passes, batches, progress, signals.received)
                window.add(figures)
                progress.step = done = step + 1
                last = done == config.total_steps
                if done % config.log_every == 0 or last:
                    self.log(window, rate, done)
                    window = Figures()
                with window.paused():
                    due = config.evaluation is not None and (done % config.evaluation.every == 0 or last)
                    if due and not (figures.signals or alone):  # who asked waits for the checkpoint only
                        self.evaluate(done)
                    stop = figures.signals > 0 or bool(alone)
                    if done % config.checkpoint_every == 0 or last or stop:
                        self.checkpoint(progress, needed=last or stop)
                if stop:
                    raise signals.interruption(done)

    def step(
        self,
        step: int,
        passes: int,
        batches: Iterable[dict[str, Any]],
        progress: Progress,
        stop_requested: list[int],
    ) -> Figures:
        """Mask, predict, update.

        Args:
            step: its number.
            passes: how many batches this process works on in this step.
            batches: those.
            progress: counts of samples are kept in it.
            stop_requested: signals this process got.

        Returns:
            The step's figures over all processes.

        Raises:
            VidLaDAError: the loss or its gradient is not finite (nothing was updated), or too many samples are broken.
        """
        accelerator, config = self.accelerator, self.config
        accelerator.gradient_accumulation_steps, accelerator.step = passes, 0
        # accelerate averages over processes and, but for DeepSpeed, over passes; losses are shares of a mean already
        shares = accelerator.num_processes * (1 if is_deepspeed(accelerator) else passes)
        own = Figures(steps=1)
        for batch in batches:
            rows = rows_of(batch)
            with accelerator.accumulate(self.model):
                for row in rows:
                    # processes may have different numbers of rows: only after the last do they meet
                    with nullcontext() if row is rows[-1] else accelerator.no_sync(self.model):
                        loss = self.loss(row, step)
                        accelerator.backward(loss * shares)
                    self.count(own, row, float(loss.detach()))
                    if not math.isfinite(own.loss):
                        self.records.save_batch(step, row)
            self.records.note_skipped(step, batch["skipped"])
            samples = batch["total_samples"]
        own.signals = float(len(stop_requested))
        names = ("loss", "tokens", "flops", "skipped", "signals", "frames")
        sums = total(accelerator, [getattr(own, name) for name in names])
        figures = Figures(**dict(zip(names, sums, strict=True)), steps=1, samples=samples)
        self.check(step, figures, progress)
        drop_gradients(self.model, config.stage_at(step)[0].frozen)
        # frames that only stand in leave gradients of zero, on which an optimizer's momentum would still move
        if not figures.frames:
            drop_gradients(self.model, ("tower", "projector"))
        self.clip(step, figures)
        self.optimizers.step()
        if self.events is not None:
            self.events.step()
        if accelerator.device.type == "cpu" and (step + 1) % TRIM_EVERY == 0:
            self.trim()
        return figures

    def count(self, figures: Figures, batch: dict[str, Any], loss: float) -> None:
        """Add a batch of this process to a step's figures."""
        rows, length = batch["input_ids"].shape
        frames = sum(map(pictures_of, batch.get("media_shapes", ())))
        figures.loss += loss
        figures.tokens += int((batch["sample_index"] >= -1).sum())
        figures.skipped += len(batch["skipped"])
        figures.frames += 0 if "stands_in" in batch else frames
        mask = batch["attention_mask"]
        sequences = mask.sizes if isinstance(mask, PackedMask) else (length,) * rows
        figures.flops += sum(self.flops(1, size, 0) for size in sequences) + self.flops(0, 0, frames)

    def clip(self, step: int, figures: Figures) -> None:
        """Clip the gradient and note its norm; a gradient that is not finite ends the run."""
        accelerator, config = self.accelerator, self.config
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        # under fp16 the scaler skips such a step; DeepSpeed knows the norm only when it has updated the weights
        if norm is not None and accelerator.mixed_precision != "fp16" and not is_deepspeed(accelerator):
            figures.gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if not math.isfinite(figures.gradient_norm):
                raise VidLaDAError(
                    f"the gradient of step {step} is {figures.gradient_norm}; it ended before it changed any weight"
                )

    def check(self, step: int, figures: Figures, progress: Progress) -> None:
        """End a run whose loss is not finite or whose samples are broken too often; keeps count of the samples."""
        config = self.config
        if not math.isfinite(figures.loss):
            where = self.records.saved_batches(step)
            raise VidLaDAError(f"the loss at step {step} is {figures.loss}; its batch is {where}")
        progress.skipped += int(figures.skipped)
        progress.seen += int(figures.samples + figures.skipped)  # another was looked at for each broken one
        if progress.skipped > config.max_skipped_share * max(progress.seen, FEWEST_SEEN):
            raise VidLaDAError(
                f"{progress.skipped} of {progress.seen} samples are broken, more than max_skipped_share "
                f"{config.max_skipped_share}; see {config.output}/skipped*.jsonl, and run vidlada data check"
            )

    def trim(self) -> None:
        """Return freed memory to the system where the process has grown: looking is cheap, returning is not."""
        if resident_memory() >= TRIM_GROWTH * self.trimmed:
            return_free_memory()
            self.trimmed = resident_memory()

    def evaluate(self, done: int) -> None:
        """Report how the held-out samples are done, and keep the model if it is the best so far."""
        assert self.held_out is not None
        found = self.held_out.evaluate(done)
        best = self.held_out.settings.best
        better = best != "none" and found.beats(self.best, best)
        self.say(summary(found, better))
        scores = {} if found.score is None else {"evaluation_score": found.score}
        self.track({"evaluation_loss": found.loss, **scores}, done)
        if better:
            try:
                write_folder(self.accelerator, self.model, self.processor, self.output / BEST, self.dtype, found.write)
                self.best = found
            except NotSaved as error:
                self.say(f"{error}; training goes on")

    def log(self, window: Figures, rate: float, done: int) -> None:
        """Report how the steps since the last report went."""
        figures = figures_of(
            window, rate, self.batches.waited, self.epoch(done), self.accelerator.device, self.accelerator.num_processes
        )
        self.batches.waited = 0.0
        stage, _ = self.config.stage_at(done - 1)
        figures["stage"] = 1 + self.config.stages.index(stage)
        self.say(line_of(figures, done, self.config.total_steps, stage.name))
        self.track(figures, done)

    def epoch(self, done: int) -> float | None:
        """Passes over the data of the current stage; None where these never end."""
        first = 0
        for stage, source in zip(self.config.stages, self.sources, strict=True):
            if done <= first + stage.length:
                with suppress(InputError):
                    return (done - first) / source.steps_of(1.0)
                return None
            first += stage.length
        return None

    def track(self, figures: dict[str, float], done: int) -> None:
        """Hand figures to the tracker."""
        try:
            self.accelerator.log(figures, step=done)
        except OSError as error:
            self.say(f"figures of step {done} were not logged: {error.strerror or error}")

    def checkpoint(self, progress: Progress, needed: bool) -> None:
        """Save; a failure ends the run only if there is no later chance."""
        try:
            save_checkpoint(self.accelerator, self.model, self.processor, self.config, asdict(progress), self.dtype)
        except NotSaved as error:
            if needed:
                raise
            self.say(f"{error}; training goes on")
