"""The training loop: one function, on accelerate, so that one process, DDP, FSDP2 and DeepSpeed run the same code."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from vidlada.checkpoint.load import save_model
from vidlada.errors import InputError, VidLaDAError
from vidlada.machine import keep_freed_memory, peak_memory, resident_memory, return_free_memory
from vidlada.tiling import pictures_of
from vidlada.training.checkpoints import READ_ERRORS, WRITE_ERRORS, NotSaved, save_checkpoint
from vidlada.training.config import CollateSettings, TrainingConfig
from vidlada.training.data.collate import Collator, PartSampler, StepDataset, to_device
from vidlada.training.data.samples import Source
from vidlada.training.data.workers import STOP_SIGNALS, prefetch_batches
from vidlada.training.flops import FlopCount, peak_of
from vidlada.training.models import add_lora, initial_config, initial_model
from vidlada.training.objective import (
    before_targets,
    causal_mask,
    complement,
    diffusion_loss,
    draw_masking,
    draw_times,
    next_token_loss,
)
from vidlada.training.optimizers import Optimizers, drop_gradients, make_optimizers
from vidlada.training.output import (
    PARTIAL,
    STATE_FILE,
    check_output,
    clear_output,
    lock_output,
    newest_checkpoint,
    put_in_place,
    remove_partial,
)
from vidlada.training.parallel import (
    is_deepspeed,
    is_sharded,
    make_accelerator,
    on_main,
    total,
    weights_come_from_main,
)
from vidlada.training.stages import EVALUATION, PreparedRun, prepare_run, stage_seed

# Settings that do not change what is learned
BESIDE_THE_CURVE = ("output", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "tracker", "layouts")
TRIM_EVERY = 100  # steps between looks at the memory
TRIM_GROWTH = 1.25  # of the resident memory since freed memory was last returned
FEWEST_SEEN = 200  # samples before a share of broken ones means anything


class Interrupted(VidLaDAError):  # noqa: N818 - not an error: it went as asked
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 130


@dataclass
class Figures:
    """What one step, or several, came to, over all processes."""

    loss: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    skipped: float = 0.0
    signals: float = 0.0
    frames: float = 0.0
    samples: float = 0.0
    gradient_norm: float = 0.0
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, other: "Figures") -> None:
        """Count a step in."""
        for name in ("loss", "tokens", "flops", "skipped", "samples", "gradient_norm", "steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Progress:
    """Where a run stands, as checkpoints keep it.

    Attributes:
        step: finished steps.
        seen, skipped: samples looked at so far, and broken ones among them.
    """

    step: int = 0
    seen: int = 0
    skipped: int = 0


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
        VidLaDAError: the loss is not finite, too many samples are broken, or nothing can be saved.
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
    accelerator = make_accelerator(config)
    say = report if accelerator.is_main_process else (lambda line: None)
    on_main(accelerator, lambda: check_output(output, resume, overwrite))
    run = Run(prepared_run, accelerator, say)
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(lock_output(output)))
        if not resume:  # only now, when all else is known to be right
            on_main(accelerator, lambda: clear_output(output))
        if config.tracker != "none":
            accelerator.init_trackers("logs", {name: str(value) for name, value in asdict(config).items()})
        progress = Progress()
        if resume:
            checkpoint = newest_checkpoint(output)
            assert checkpoint is not None
            progress = run.load(checkpoint)
        if not resume:
            say(f"{run.trainable:,} trainable parameters, {run.frozen:,} frozen")
        final = output / "model"
        try:
            run.steps(progress)
            run.save(final)
        finally:
            run.close()
    if progress.skipped:
        say(f"{progress.skipped} of {progress.seen} samples were broken, and others taken; see {output}/skipped*.jsonl")
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
        self.sources, self.held_out = prepared_run.sources, prepared_run.held_out
        self.accelerator, self.say = accelerator, say
        model, self.processor = initial_model(config, weights=not weights_come_from_main(accelerator))
        self.model_config = model.config
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
        if config.lora is not None:
            assert config.init_from is not None
            model = add_lora(model, config.lora, config.init_from, config.seed)
        optimizers = make_optimizers(model, config)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.flops = FlopCount(model, self.model_config)
        self.trainable, self.frozen = parameter_counts(model)
        self.waited = 0.0  # seconds for data, since the last report
        self.trimmed = 0  # bytes that were resident when freed memory was last returned
        self.model, *prepared = accelerator.prepare(model, *optimizers.optimizers)
        self.optimizers = Optimizers(prepared, optimizers.parts)
        if is_sharded(accelerator) and not is_deepspeed(accelerator):
            self.optimizers.begin()

    def load(self, checkpoint: Path) -> Progress:
        """Continue from a checkpoint, and tell which settings changed since.

        Raises:
            InputError: it is damaged, or of a run whose weights or optimizer have another form.
        """
        try:
            self.accelerator.load_state(str(checkpoint))
            state = json.loads((checkpoint / STATE_FILE).read_text())
        except READ_ERRORS as error:
            raise InputError(
                f"{checkpoint} is damaged, or not of this run, whose model, optimizer and learning rates of parts must "
                f"be as they were: {str(error).splitlines()[0]}"
            ) from error
        now = json.loads(json.dumps(asdict(self.config), default=str))
        before = state.get("config", now)
        changed = [name for name in now if name not in BESIDE_THE_CURVE and now[name] != before.get(name)]
        self.say(f"resumed from {checkpoint.name}{'; changed since: ' * bool(changed)}{', '.join(changed)}")
        return Progress(**{name: state[name] for name in ("step", "seen", "skipped") if name in state})

    def save(self, folder: Path) -> None:
        """Write the final model, in every layout asked for: each is complete, or not there.

        Raises:
            VidLaDAError: the disk is full or cannot be written.
        """
        weights = self.accelerator.get_state_dict(self.model)
        partial = folder.with_name(folder.name + PARTIAL)

        def write() -> None:
            remove_partial(folder.parent)
            try:
                save_model(self.accelerator.unwrap_model(self.model), self.processor, partial, weights)
                put_in_place(partial, folder)
                if "published" in self.config.layouts:
                    from vidlada.checkpoint.convert import convert

                    published = folder.with_name("model-published")
                    shutil.rmtree(published, ignore_errors=True)  # of the same run, which was continued after its end
                    convert(folder, published, "published")
            except WRITE_ERRORS as error:
                remove_partial(folder.parent)
                raise VidLaDAError(
                    f"the model was not written: {str(error).splitlines()[0]}; all is in the last checkpoint: make "
                    "room, and continue with --resume"
                ) from error

        on_main(self.accelerator, write)

    def close(self) -> None:
        """Let go of the model, then end the log and the process group; nothing can be done with the run afterwards.

        In this order: DDP's reducer would be the last to hold the process group, and, going with it, wait for a thread
        of gloo's that can itself wait for Python (pytorch issue 56297): the process would never end.
        """
        del self.model
        self.accelerator.free_memory()
        with suppress(OSError):  # a full disk does not let the log be closed
            self.accelerator.end_training()

    def steps(self, progress: Progress) -> None:
        """Train from where `progress` stands to the end of the run; keeps `progress` up to date."""
        config = self.config
        stop_requested: list[int] = []
        # several processes stop after the step in which all know of the signal
        alone = stop_requested if self.accelerator.num_processes == 1 else []
        previous = {number: signal.signal(number, lambda n, _: stop_requested.append(n)) for number in STOP_SIGNALS}
        self.model.train()
        window = Figures()
        try:
            with closing(self.batches(progress.step)) as run:
                for step, passes, batches in run:
                    rate = self.optimizers.set_rate(config, step)
                    figures = self.step(step, passes, batches, progress, stop_requested)
                    window.add(figures)
                    progress.step = done = step + 1
                    last = done == config.total_steps
                    if done % config.log_every == 0 or last:
                        self.log(window, rate, done)
                        window = Figures()
                    due = config.evaluation is not None and (done % config.evaluation.every == 0 or last)
                    if due and not (figures.signals or alone):  # who asked waits for the checkpoint only
                        self.evaluate(done)
                    stop = figures.signals > 0 or bool(alone)
                    if done % config.checkpoint_every == 0 or last or stop:
                        self.checkpoint(progress, needed=last or stop)
                    if stop:
                        number = (stop_requested or [signal.SIGTERM])[0]
                        raise Interrupted(f"stopped by signal {number} after step {done}; continue with --resume")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stage_batches(
        self, source: Source, collate: CollateSettings, number: int, steps: range
    ) -> Generator[dict[str, Any]]:
        """Batches of this process's parts of some steps.

        Args:
            source: of samples.
            collate: how they become tensors.
            number: of the stage; seeds the random choices.
            steps: numbers within the stage.
        """
        config, processes, process = self.config, self.accelerator.num_processes, self.accelerator.process_index
        in_step = (processes > 1 or is_sharded(self.accelerator)) and not self.model_config.text_only
        collator = Collator(self.processor, collate, self.processor.image_size if in_step else None)
        dataset = StepDataset(source, collator, stage_seed(config, number))
        parts = PartSampler(steps, source, config.per_device_batch, processes, process)
        return prefetch_batches(dataset, parts, config.workers)

    def batches(self, first: int) -> Generator[tuple[int, int, Iterator[dict[str, Any]]]]:
        """Step numbers, passes of this process and their batches, from `first` to the end of the run."""
        start = 0
        for number, (stage, source) in enumerate(zip(self.config.stages, self.sources, strict=True)):
            steps = range(max(0, first - start), stage.length)
            if len(steps):
                with closing(self.stage_batches(source, stage.collate, number, steps)) as batches:
                    for within in steps:
                        started = time.monotonic()
                        head = next(batches)
                        self.waited += time.monotonic() - started
                        passes = head["parts"] // self.accelerator.num_processes
                        yield start + within, passes, chain([head], islice(batches, passes - 1))
            start += stage.length

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
            with accelerator.accumulate(self.model):
                loss = self.loss(batch, step)
                accelerator.backward(loss * shares)
            value = float(loss.detach())
            own.loss += value
            own.tokens += int((batch["sample_index"] >= -1).sum())
            rows, length = batch["input_ids"].shape
            own.flops += self.flops(rows, length, sum(map(pictures_of, batch.get("media_shapes", ()))))
            own.skipped += len(batch["skipped"])
            own.frames += 0 if "stands_in" in batch else sum(map(pictures_of, batch.get("media_shapes", ())))
            self.note_skipped(step, batch["skipped"])
            if not math.isfinite(value):
                self.keep_batch(step, batch)
            progress_seen = batch["total_samples"]
        own.signals = float(len(stop_requested))
        names = ("loss", "tokens", "flops", "skipped", "signals", "frames")
        sums = total(accelerator, [getattr(own, name) for name in names])
        figures = Figures(**dict(zip(names, sums, strict=True)), steps=1)
        if not math.isfinite(figures.loss):
            kept = sorted(path.name for path in Path(config.output).glob(f"not_finite_{step}[.-]*"))
            where = f"saved as {', '.join(kept)} in {config.output}" if kept else "could not be saved"
            raise VidLaDAError(f"the loss at step {step} is {figures.loss}; its batch is {where}")
        figures.samples = progress_seen
        progress.skipped += int(figures.skipped)
        progress.seen += progress_seen + int(figures.skipped)  # another was looked at for each broken one
        if progress.skipped > config.max_skipped_share * max(progress.seen, FEWEST_SEEN):
            raise VidLaDAError(
                f"{progress.skipped} of {progress.seen} samples are broken, more than max_skipped_share "
                f"{config.max_skipped_share}; see {config.output}/skipped*.jsonl, and run vidlada data check"
            )
        drop_gradients(self.model, config.stage_at(step)[0].frozen)
        # frames that only stand in leave gradients of zero, on which an optimizer's momentum would still move
        if not figures.frames:
            drop_gradients(self.model, ("tower", "projector"))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        # under fp16 the scaler skips such a step; DeepSpeed knows the norm only when it has updated the weights
        if norm is not None and config.precision != "fp16" and not is_deepspeed(accelerator):
            norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            figures.gradient_norm = norm
            if not math.isfinite(norm):
                raise VidLaDAError(f"the gradient of step {step} is {norm}; it ended before it changed any weight")
        self.optimizers.step()
        if accelerator.device.type == "cpu" and (step + 1) % TRIM_EVERY == 0:
            self.trim()
        return figures

    def trim(self) -> None:
        """Return freed memory to the system where the process has grown: looking is cheap, returning is not."""
        if resident_memory() >= TRIM_GROWTH * self.trimmed:
            return_free_memory()
            self.trimmed = resident_memory()

    def loss(self, batch: dict[str, Any], step: int, stream: int = 0) -> Tensor:
        """A batch's share of the step's mean loss.

        Args:
            batch: from `StepDataset`.
            step: seeds what is hidden.
            stream: another stream of random numbers, for evaluation.
        """
        config, device = self.config, self.accelerator.device
        labels, sample_index = batch["labels"], batch["sample_index"]
        if config.objective == "autoregressive":
            mask = causal_mask(batch["attention_mask"], labels.shape[1])
            logits = self.predict({**batch, "attention_mask": mask}, batch["input_ids"], before_targets(labels))
            loss = next_token_loss(logits, labels.to(device), sample_index.to(device), batch["total_samples"])
            return loss * batch["weight"]
        # a step in one part draws its times and its masks from one stream; parts share only the times
        seed = config.seed + stream
        generator = masking_generator(seed, 0, step)
        count = int(sample_index.max()) + 1
        times = draw_times(batch["total_samples"], generator, config.stratified)
        if batch["parts"] > 1:
            generator = masking_generator(seed, batch["part"] + 1, step)
        times = times[batch["first_sample"] : batch["first_sample"] + count]
        targets = labels >= 0
        maskings = [draw_masking(targets, sample_index, times, generator, batch["force"])]
        if config.complementary:
            maskings.append(complement(maskings[0], targets, sample_index))
        weight = batch["sample_weight"].to(device) if "sample_weight" in batch else None
        losses = []
        for masking in maskings:
            hidden = batch["input_ids"].masked_fill(masking.masked, self.model_config.mask_token_id)
            logits = self.predict(batch, hidden, masking.masked)
            placed = replace(masking, masked=masking.masked.to(device))
            losses.append(
                diffusion_loss(
                    logits, labels.to(device), sample_index.to(device), placed, batch["total_samples"], weight
                )
            )
        return torch.stack(losses).mean() * batch["weight"] if len(losses) > 1 else losses[0] * batch["weight"]

    def predict(self, batch: dict[str, Any], input_ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        """Logits (chosen positions, vocabulary) of a batch with other token ids."""
        inputs = to_device(
            {
                "input_ids": input_ids,
                "position_ids": batch["position_ids"],
                "attention_mask": batch["attention_mask"],
                "pixel_values": batch.get("pixel_values"),
                "logits_to_keep": logits_to_keep,
            },
            self.accelerator.device,
        )
        with self.accelerator.autocast():
            return self.model(media_shapes=batch.get("media_shapes"), **inputs).logits

    def keep_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Save the batch whose loss is not finite; a full disk does not hide that it is not."""
        path = Path(self.config.output) / f"not_finite_{step}{rank_suffix(self.accelerator)}.pt"
        try:
            # plain values only, which torch.load reads without executing anything
            torch.save({name: asdict(value) if is_dataclass(value) else value for name, value in batch.items()}, path)  # type: ignore[arg-type]
        except WRITE_ERRORS:
            path.unlink(missing_ok=True)

    def note_skipped(self, step: int, problems: list[str]) -> None:
        """Add broken samples to the run's list."""
        if problems:
            path = Path(self.config.output) / f"skipped{rank_suffix(self.accelerator)}.jsonl"
            with suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "problem": problem}) + "\n" for problem in problems)

    @torch.no_grad()
    def evaluate(self, done: int) -> float:
        """Loss on the held-out samples."""
        config = self.config
        assert config.evaluation is not None and self.held_out is not None
        self.model.eval()
        loss = 0.0
        steps = range(config.evaluation.steps)
        with closing(self.stage_batches(self.held_out, config.evaluation.collate, EVALUATION, steps)) as batches:
            for batch in batches:
                loss += float(self.loss(batch, batch["step"], stream=EVALUATION))
                self.note_skipped(done, batch["skipped"])
        self.model.train()
        loss = total(self.accelerator, [loss])[0] / config.evaluation.steps
        self.say(f"evaluation after step {done}: loss {loss:.4f}")
        self.track({"evaluation_loss": loss}, done)
        return loss

    def log(self, window: Figures, rate: float, done: int) -> None:
        """Tell how the steps since the last report went."""
        config = self.config
        seconds = time.monotonic() - window.started
        left = (config.total_steps - done) * seconds / window.steps
        flops = window.flops / seconds / self.accelerator.num_processes
        peak, memory = peak_of(self.accelerator.device), peak_memory(str(self.accelerator.device)) / 2**30
        figures = {
            "loss": window.loss / window.steps,
            "learning_rate": rate,
            "tokens_per_second": window.tokens / seconds,
            "tflops_per_device": flops / 1e12,
            "peak_memory_gib": memory,
            "samples_per_second": window.samples / seconds,
            "data_waiting_share": self.waited / seconds,
        }
        if window.gradient_norm:  # known before the update, which DeepSpeed's and fp16's are not
            figures["gradient_norm"] = window.gradient_norm / window.steps
        if (epoch := self.epoch(done)) is not None:
            figures["epoch"] = epoch
        named = "".join(
            f"{label} {figures[name]:.2f} "
            for name, label in (("gradient_norm", "norm"), ("epoch", "epoch"))
            if name in figures
        )
        waiting, self.waited = figures["data_waiting_share"], 0.0
        speed = f"{flops / 1e12:.3g} TFLOP/s"
        if peak is not None:
            figures["mfu"] = flops / peak
            speed += f" MFU {flops / peak:.1%}"
        self.say(
            f"step {done}/{config.total_steps} {config.stage_at(done - 1)[0].name} loss {figures['loss']:.4f} "
            f"lr {rate:.2e} {named}{window.tokens / seconds:.0f} tokens/s "
            f"{figures['samples_per_second']:.2f} samples/s {seconds / window.steps:.2f} s/step waiting {waiting:.0%} "
            f"{speed} peak {memory:.1f} GiB left {left / 60:.0f} min"
        )
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
            save_checkpoint(self.accelerator, self.model, self.processor, self.config, vars(progress))
        except NotSaved as error:
            if needed:
                raise
            self.say(f"{error}; training goes on")


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many are not."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]


def masking_generator(seed: int, part: int, step: int) -> torch.Generator:
    """Of what is hidden in one part of one step."""
    return torch.Generator().manual_seed((seed * 1000 + part) * 10**9 + step)


def rank_suffix(accelerator: Accelerator) -> str:
    """Keeps files of processes apart; empty in the main one."""
    return "" if accelerator.is_main_process else f"-{accelerator.process_index}"
