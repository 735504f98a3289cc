"""The loss on what middle layers know of events: see `EventSupervision` in config.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidlada.errors import InputError
from vidlada.model.language_model import LanguageModel
from vidlada.training.config import EventSupervision
from vidlada.training.data.event_labels import CLASSES
from vidlada.training.objective import IGNORED

# Of the kind of event where nothing happens: frames with an event are few
QUIET_FRAME, QUIET = 0.25, 0.5
BETAS = (0.9, 0.99)


class EventReader(nn.Module):
    """Linear maps from hidden states (tokens, width) to the labels of an event, (tokens, classes) each."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.maps = nn.ModuleList(nn.Linear(width, classes) for classes in CLASSES)

    def forward(self, states: Tensor) -> list[Tensor]:
        states = self.norm(states.float())
        return [part(states) for part in self.maps]


class EventLoss:
    """Readers on a model's layers, with an optimizer of their own. Part of a run's checkpoints, not of its model.

    Args:
        settings: of the run.
        language_model: whose layers are read.

    Raises:
        InputError: the model has no such layer.
    """

    def __init__(self, settings: EventSupervision, language_model: LanguageModel):
        layers = language_model.layers
        neighbours = settings.neighbour_layers, settings.neighbour_weight / 2, QUIET
        self.kinds = {  # layers, weight, and weight of tokens at which nothing happens
            "frame": (settings.frame_layers, settings.frame_weight, QUIET_FRAME),
            "question": (settings.question_layers, settings.question_weight, QUIET),
            "previous": neighbours,
            "next": neighbours,
        }
        numbers = {number for numbers, *_ in self.kinds.values() for number in numbers}
        if any(number >= len(layers) - 1 for number in numbers):
            raise InputError(f"event_supervision: layers {sorted(numbers)}, but it takes 0 to {len(layers) - 2}")
        self.states: dict[int, Tensor] = {}  # (batch, tokens, width) that layers put out last
        width = language_model.config.hidden_size
        self.readers = nn.ModuleDict(
            {f"{kind}{number}": EventReader(width) for kind, (own, *_) in self.kinds.items() for number in own}
        )
        self.readers.to(language_model.devices[0])
        self.optimizer = torch.optim.Adam(self.readers.parameters(), lr=settings.learning_rate, betas=BETAS)
        for number in numbers:
            layers[number].register_forward_hook(self._keep(number))

    def _keep(self, number: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self.states[number] = output

        return hook

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """The weighted loss on the states of the forward pass that has just been; 0 where the batch knows no event."""
        loss = next(self.readers.parameters()).new_zeros(())
        for kind, (layers, weight, quiet) in self.kinds.items():
            if f"{kind}_events" in batch:
                for number in layers:
                    part = self._loss_of(f"{kind}{number}", self.states[number], batch[f"{kind}_events"], quiet)
                    loss = loss + weight / len(layers) * part
        self.states.clear()
        return loss

    def _loss_of(self, reader: str, states: Tensor, events: Tensor, quiet: float) -> Tensor:
        """Mean over events of their labels' cross-entropies; tokens at which nothing happens count less."""
        row, place, *labels = events.to(states.device).T
        weights = torch.where(labels[0] > 0, 1.0, quiet)
        logits = self.readers[reader](states[row, place])
        losses = [
            F.cross_entropy(read, label, ignore_index=IGNORED, reduction="none")
            for read, label in zip(logits, labels, strict=True)
        ]
        return (losses[0] * weights + losses[1] + losses[2] + losses[3]).sum() / weights.sum()

    def step(self) -> None:
        """Update the readers, and forget their gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"readers": self.readers.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.readers.load_state_dict(state["readers"])
        self.optimizer.load_state_dict(state["optimizer"])
