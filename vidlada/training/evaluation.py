"""Held-out samples during training: their loss, the share of their questions answered right, and the best model."""

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vidlada import files
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.training.answers import AskedQuestion, answer_questions, is_right
from vidlada.training.batches import Batches
from vidlada.training.config import Evaluation
from vidlada.training.data.collate import rows_of
from vidlada.training.data.samples import Source
from vidlada.training.losses import BatchLoss
from vidlada.training.parallel import total, whole_weights
from vidlada.training.records import Records
from vidlada.training.stages import EVALUATION

BEST = "model-best"  # folder of the best model so far
BEST_FIGURES = "evaluation.json"  # in it: at which step it was evaluated, and how well it did


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        step: steps done before it.
        loss: mean over the samples.
        score: share of the questions that were answered right; None without questions.
    """

    step: int
    loss: float
    score: float | None = None

    def beats(self, other: "EvaluationResult | None", best: str) -> bool:
        """Whether this is better, by `score` or `loss`; what has no such figure is beaten."""
        if other is None:
            return True
        if best == "score" and self.score is not None:
            return other.score is None or self.score > other.score
        return self.loss < other.loss

    def write(self, folder: Path) -> None:
        """Write it beside the model it is about."""
        files.write_text(folder / BEST_FIGURES, json.dumps(asdict(self)) + "\n")


class HeldOut:
    """The held-out samples of a run: always the same, with the same masks.

    Args:
        settings: of the evaluation.
        source: of its samples.
        model: wrapped by the accelerator.
        processor: of the model.
        batches, batch_loss, records: of the run.
        accelerator: of all processes.

    Raises:
        InputError: the settings of the answers are wrong.
    """

    def __init__(
        self, settings: Evaluation, source: Source, model: Any, processor: VidLaDAProcessor, batches: Batches,
        batch_loss: BatchLoss, records: Records, accelerator: Accelerator,
    ):  # fmt: skip
        self.settings, self.source, self.model, self.processor = settings, source, model, processor
        self.batches, self.batch_loss, self.records, self.accelerator = batches, batch_loss, records, accelerator
        config = inner_model(accelerator, model).config
        try:
            self.generation = GenerationSettings.from_dict(
                {**(config.generation or {}), "cache": None, **settings.generation}
            )
        except InputError as error:
            raise InputError(f"evaluation: generation: {error}") from error

    @torch.no_grad()
    def evaluate(self, done: int) -> EvaluationResult:
        """Loss, and score where there are questions, after so many steps; every process calls this."""
        self.model.eval()
        try:
            return EvaluationResult(done, self._loss(done), self._score() if self.settings.questions else None)
        finally:
            self.model.train()

    def _loss(self, done: int) -> float:
        loss = 0.0
        steps = range(self.settings.steps)
        with closing(self.batches.of(self.source, self.settings.collate, EVALUATION, steps)) as batches:
            for batch in batches:
                loss += sum(float(self.batch_loss(row, batch["step"], stream=EVALUATION)) for row in rows_of(batch))
                self.records.note_skipped(done, batch["skipped"])
        return total(self.accelerator, [loss])[0] / self.settings.steps

    def _score(self) -> float:
        """Share of the questions that were answered right; each process answers its own."""
        own = self.questions()[self.accelerator.process_index :: self.accelerator.num_processes]
        with whole_weights(self.accelerator, self.model), self.accelerator.autocast():
            model = inner_model(self.accelerator, self.model)
            answers = answer_questions(model, self.processor, own, self.generation)
        right = sum(is_right(text, question.answer) for question, text in zip(own, answers, strict=True))
        of_all, count = total(self.accelerator, [float(right), float(len(own))])
        return of_all / max(1.0, count)

    def questions(self) -> list[AskedQuestion]:
        """The questions to ask, spread evenly over the samples; those whose answers the slots cannot hold are not."""
        dataset = self.batches.dataset(self.source, self.settings.collate, EVALUATION)
        found = []
        for step in range(self.settings.steps):
            for item in self.source.plan(step):
                for number, (_, answer) in enumerate(item.exchanges):
                    if 0 < len(self.processor.answer_ids(answer)) < self.generation.gen_length:
                        found.append(AskedQuestion(dataset, item, number, answer))
        count = min(self.settings.questions, len(found))
        return [found[number * len(found) // count] for number in range(count)]


def inner_model(accelerator: Accelerator, model: Any) -> VidLaDAForMaskedDiffusion:
    """The model itself, without what shares it among processes; adapters stay in its layers."""
    inner: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def best_so_far(output: Path) -> EvaluationResult | None:
    """What the best model of a run came to; None where there is none."""
    path = output / BEST / BEST_FIGURES
    if not path.is_file():
        return None
    values = files.read_json(path)
    try:
        return EvaluationResult(**values)
    except TypeError as error:
        raise InputError(f"{path}: not the figures of an evaluation; remove {path.parent}") from error


def summary(found: EvaluationResult, best: bool) -> str:
    """A line for people."""
    score = "" if found.score is None else f" score {found.score:.1%}"
    return f"evaluation after step {found.step}: loss {found.loss:.4f}{score}{', the best so far' * best}"
