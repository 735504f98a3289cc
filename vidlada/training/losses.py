"""The loss of a batch: what is hidden in it, what the model predicts there, and how much that counts in its step."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vidlada.training.config import TrainingConfig
from vidlada.training.data.collate import to_device
from vidlada.training.event_supervision import EventLoss
from vidlada.training.objective import (
    before_targets,
    causal_mask,
    complement,
    diffusion_loss,
    draw_masking,
    draw_times,
    next_token_loss,
)


class BatchLoss:
    """The objective of a run, on batches of `StepDataset`.

    Args:
        config: of the run.
        mask_token_id: what a hidden token is replaced by.
        model: wrapped by the accelerator.
        accelerator: of all processes.
        events: what is added in training, if anything.
    """

    def __init__(
        self,
        config: TrainingConfig,
        mask_token_id: int,
        model: Any,
        accelerator: Accelerator,
        events: EventLoss | None = None,
    ):
        self.config, self.mask_token_id = config, mask_token_id
        self.model, self.accelerator, self.events = model, accelerator, events

    def __call__(self, batch: dict[str, Any], step: int, stream: int = 0) -> Tensor:
        """A batch's share of the step's mean loss.

        Args:
            batch: from `StepDataset`.
            step: seeds what is hidden.
            stream: another stream of random numbers, for evaluation.
        """
        if self.config.objective == "autoregressive":
            loss = self._next_token(batch)
        else:
            loss = self._diffusion(batch, step, stream)
        if self.events is not None and self.model.training:
            loss = loss + self.events(batch)
        return loss * batch["weight"]

    def _next_token(self, batch: dict[str, Any]) -> Tensor:
        labels, sample_index, device = batch["labels"], batch["sample_index"], self.accelerator.device
        mask = causal_mask(batch["attention_mask"], labels.shape[1])
        logits = self.predict({**batch, "attention_mask": mask}, batch["input_ids"], before_targets(labels))
        return next_token_loss(logits, labels.to(device), sample_index.to(device), batch["total_samples"])

    def _diffusion(self, batch: dict[str, Any], step: int, stream: int) -> Tensor:
        config, device = self.config, self.accelerator.device
        labels, sample_index = batch["labels"], batch["sample_index"]
        # a step in one part draws its times and its masks from one stream; parts share only the times
        seed = config.seed + stream
        generator = masking_generator(seed, 0, step)
        count = int(sample_index.max()) + 1
        times = draw_times(batch["total_samples"], generator, config.stratified)
        row = batch.get("row", 0)
        if batch["parts"] > 1 or row:
            generator = masking_generator(seed, batch["part"] + 1 + batch["parts"] * row, step)
        times = times[batch["first_sample"] : batch["first_sample"] + count]
        targets = labels >= 0
        maskings = [draw_masking(targets, sample_index, times, generator, batch["force"])]
        if config.complementary:
            maskings.append(complement(maskings[0], targets, sample_index))
        weight = batch["sample_weight"].to(device) if "sample_weight" in batch else None
        labels, sample_index = labels.to(device), sample_index.to(device)
        losses = []
        for masking in maskings:
            hidden = batch["input_ids"].masked_fill(masking.masked, self.mask_token_id)
            logits = self.predict(batch, hidden, masking.masked)
            placed = replace(masking, masked=masking.masked.to(device))
            losses.append(diffusion_loss(logits, labels, sample_index, placed, batch["total_samples"], weight))
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

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


def masking_generator(seed: int, part: int, step: int) -> torch.Generator:
    """Of what is hidden in one part of one step."""
    return torch.Generator().manual_seed((seed * 1000 + part) * 10**9 + step)
