"""Batches of the parts of steps that this process works on."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from vidlada.processor import VidLaDAProcessor
from vidlada.training.config import CollateSettings, TrainingConfig
from vidlada.training.data.collate import Collator, PartSampler, StepDataset
from vidlada.training.data.samples import Source
from vidlada.training.data.workers import prefetch_batches
from vidlada.training.stages import stage_seed


class Batches:
    """What one process works on.

    Attributes:
        waited: seconds in which the device waited for data; who reports it sets it back.

    Args:
        config: of the run.
        processor: of the model in training.
        accelerator: of all processes.
        text_only: the model has no vision.
    """

    def __init__(self, config: TrainingConfig, processor: VidLaDAProcessor, accelerator: Accelerator, text_only: bool):
        self.config, self.processor = config, processor
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        # DDP takes a tower that does not run for a mistake, in a launch of one process too
        self.needs_stand_in = accelerator.distributed_type != DistributedType.NO and not text_only
        self.waited = 0.0

    def dataset(self, source: Source, collate: CollateSettings, number: int) -> StepDataset:
        """The batches of a stage, or of the evaluation.

        Args:
            source: of samples.
            collate: how they become tensors.
            number: of the stage; seeds the random choices.
        """
        stand_in = self.processor.image_size if self.needs_stand_in else None
        collator = Collator(self.processor, collate, stand_in, events=self.config.event_supervision is not None)
        return StepDataset(source, collator, stage_seed(self.config, number))

    def of(self, source: Source, collate: CollateSettings, number: int, steps: range) -> Generator[dict[str, Any]]:
        """This process's parts of some steps; arguments as for `dataset`, and numbers of steps within the stage."""
        parts = PartSampler(steps, source, self.config.per_device_batch, self.processes, self.process)
        return prefetch_batches(self.dataset(source, collate, number), parts, self.config.workers)

    def steps(self, sources: Sequence[Source], first: int) -> Generator[tuple[int, int, Iterator[dict[str, Any]]]]:
        """Step numbers, passes of this process and their batches, from `first` to the end of the run.

        Args:
            sources: of the stages.
            first: step to begin with.
        """
        start = 0
        for number, (stage, source) in enumerate(zip(self.config.stages, sources, strict=True)):
            steps = range(max(0, first - start), stage.length)
            if len(steps):
                with closing(self.of(source, stage.collate, number, steps)) as batches:
                    for within in steps:
                        started = time.monotonic()
                        head = next(batches)
                        self.waited += time.monotonic() - started
                        passes = head["parts"] // self.processes
                        yield start + within, passes, chain([head], islice(batches, passes - 1))
            start += stage.length
