"""Answers with a fixed scaffold whose holes the model fills in: what infilling can do, for JSON.

A hole with choices is filled in with the likeliest of them, one pass each, in order, while all later holes are masked.
The free holes are then denoised together, in slots between the scaffold's tokens.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vidlada.decoding.sampler import Request, State, Statistics
from vidlada.decoding.scoring import sum_log_probabilities
from vidlada.decoding.streaming import StableText
from vidlada.errors import InputError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor

INTEGER = re.compile(r"\s*(-?(?:0|[1-9]\d*))(?!\d|\.\d)")
END_OF_STRING = re.compile(r'["\n]')


@dataclass(frozen=True)
class Hole:
    """A value to be filled in.

    Attributes:
        name: of it, for errors.
        choices: JSON texts it is one of; empty for a free one.
        slots: of a free one.
        kind: of a free one: `string`, whose quotes belong to the scaffold, or `integer`.
        most: characters of a string at most.
    """

    name: str
    choices: tuple[str, ...] = ()
    slots: int = 0
    kind: str = "string"
    most: int | None = None

    def value(self, text: str) -> str:
        """What stands in a free hole, as JSON.

        Raises:
            InputError: it is no such value.
        """
        if self.kind == "string":
            return json.dumps(END_OF_STRING.split(text)[0].strip()[: self.most], ensure_ascii=False)[1:-1]
        found = INTEGER.match(text)
        if found is None:
            raise InputError(
                f"response_format: the model wrote {text.strip()[:40]!r} for {self.name!r}, which is no integer; "
                f"give it a minimum and a maximum, or an enum"
            )
        return found[1]


Form = tuple[str | Hole, ...]  # ends with a text


def form_slots(form: Form, text_ids: Callable[[str], Sequence[int]]) -> int:
    """Tokens that a form takes at most, scaffold included."""
    pieces = [
        max(len(text_ids(choice)) for choice in piece.choices) if isinstance(piece, Hole) and piece.choices
        else piece.slots if isinstance(piece, Hole) else len(text_ids(piece))
        for piece in form
    ]  # fmt: skip
    return sum(pieces)


class FormTurn:
    """A form being filled in.

    Args:
        model, processor: that answer.
        request: whose prompt and settings count; its slots hold the form.
        form: what is to be filled in.

    Attributes:
        request: what the decoding loop is to work on, once there are only free holes.
    """

    def __init__(
        self,
        model: VidLaDAForMaskedDiffusion,
        processor: VidLaDAProcessor,
        request: Request,
        form: Form,
    ):
        self.model, self.processor, self.request, self.form = model, processor, request, list(form)
        self.statistics = Statistics(visual_tokens=request.visual_tokens, merged=request.merged)
        if not self.choosing:
            self.begin_decoding()

    @property
    def choosing(self) -> bool:
        """Whether there is a hole with choices left."""
        return any(isinstance(piece, Hole) and piece.choices for piece in self.form)

    def step(self) -> tuple[State, StableText, tuple[float, ...]]:
        """Fill in the next hole that has choices."""
        started = time.perf_counter()
        number, hole = next((n, p) for n, p in enumerate(self.form) if isinstance(p, Hole) and p.choices)
        self.form[number] = self.likeliest(number, hole)
        prompt, ids = len(self.request.prompt), self.ids(self.form)
        layers = self.model.language_model.config.num_hidden_layers
        self.statistics += Statistics(
            1, 1, 1, ((prompt + len(ids)),) * layers, seconds={"denoising": time.perf_counter() - started}
        )
        if not self.choosing:
            self.begin_decoding()
        proposed = torch.tensor(ids)
        committed = proposed != self.model.config.mask_token_id
        state = State(self.statistics.steps, proposed, committed, committed.float(), None, False, self.statistics)
        complete = bool(committed.all())
        return state, StableText(self.text(ids) if complete else "", len(ids), "stop" if complete else None), ()

    def begin_decoding(self) -> None:
        """Go on with the free holes, in one block."""
        ids = self.ids(self.form)
        settings = replace(self.request.settings, gen_length=len(ids), block_length=len(ids))
        self.request = replace(self.request, settings=settings, initial_ids=ids, stop_sequences=(), suffix_ids=())

    def ids(self, pieces: Sequence[str | Hole]) -> list[int]:
        """Tokens of some pieces of the form as they stand, a mask in every slot of holes."""
        mask, text_ids = self.model.config.mask_token_id, self.processor.text_ids
        slots = [
            [mask] * max(piece.slots, *(len(text_ids(choice)) for choice in piece.choices), 0)
            if isinstance(piece, Hole) else text_ids(piece)
            for piece in pieces
        ]  # fmt: skip
        return [token for piece in slots for token in piece]

    @torch.inference_mode()
    def likeliest(self, number: int, hole: Hole) -> str:
        """The likeliest of a hole's choices, each judged with the first token of the text behind it."""
        model, device = self.model, self.request.prompt.device
        first, (close, *rest) = self.ids(self.form[:number]), self.ids(self.form[number + 1 :])
        closed = [[*self.processor.text_ids(choice), close] for choice in hole.choices]
        longest = max(map(len, closed))
        ids = torch.tensor([*first, *[model.config.mask_token_id] * longest, *rest], device=device)
        embedded = model.language_model.embed_tokens(ids)
        start = len(self.request.prompt) + len(first)
        sequence = torch.cat((self.request.prompt.to(embedded.dtype), embedded))[None]
        hidden = model.language_model(sequence, wanted=slice(start, start + longest))[0]
        scores = sum_log_probabilities(model.lm_head(hidden).float(), closed).tolist()
        return hole.choices[scores.index(max(scores))]

    def take(self, state: State) -> tuple[State, StableText]:
        """A state after a step, and the text once it is complete.

        Raises:
            InputError: a free value is not what it has to be.
        """
        statistics = self.statistics + state.statistics
        whole = replace(state, step=statistics.steps, statistics=statistics)
        if not state.done:
            return whole, StableText("", 0, None)
        return whole, StableText(self.text(state.proposed.tolist()), len(state.proposed), "stop")

    def text(self, ids: Sequence[int]) -> str:
        """The filled-in form."""
        processor, stops = self.processor, set(self.model.config.stop_token_ids)
        text, place = "", 0
        for piece in self.form:
            if isinstance(piece, str):
                text += piece
                place += len(processor.text_ids(piece))
                continue
            written = list(ids[place : place + piece.slots])
            end = next((n for n, token in enumerate(written) if token in stops), len(written))
            text += piece.value(processor.decode(written[:end]))
            place += piece.slots
        return text
