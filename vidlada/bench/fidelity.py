"""How far every cache's predictions are from full recompute's, step by step on the same road.

Right answers are a coarse measure: a cache that changes one word early takes another road, and most questions are
answered in a few steps. Here full recompute decodes, every cache is shown the answer as it then stands, and what it
would predict in the open slots of the block is compared with what full recompute predicts there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidlada.api import VidLaDA
from vidlada.bench.decoding import BASELINE, CACHES
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser, Request, RunningRequest
from vidlada.errors import InputError
from vidlada.markdown import table
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.shapes.dataset import question_of
from vidlada.shapes.questions import LONG_FAMILIES


@dataclass
class Distance:
    """Sums over steps and open slots.

    Attributes:
        slots: compared.
        divergence: Kullback-Leibler, from full recompute to the cache, in nats.
        same: slots where both find the same token most probable.
        work: positions computed in all layers.
    """

    slots: int = 0
    divergence: float = 0.0
    same: int = 0
    work: int = 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Compare logits (slots, vocabulary)."""
        expected, found = expected.log_softmax(-1), found.log_softmax(-1)
        self.slots += len(expected)
        self.divergence += float((expected.exp() * (expected - found)).sum())
        self.same += int((expected.argmax(-1) == found.argmax(-1)).sum())


@torch.inference_mode()
def follow(
    model: VidLaDAForMaskedDiffusion, request: Request, caches: Sequence[str], distances: dict[str, Distance]
) -> None:
    """Decode a request by full recompute, and let every cache predict every step; the distances are added to.

    Args:
        model: in evaluation mode.
        request: its own cache is ignored.
        caches: policies as `GenerationSettings.cache` takes them.
        distances: of the caches and of full recompute.
    """

    def row(number: int, cache: str) -> RunningRequest:
        return RunningRequest(number, replace(request, settings=request.settings.replace(cache=cache)), model)

    leader, followers = row(0, BASELINE), [row(number, cache) for number, cache in enumerate(caches, start=1)]
    denoiser, layers = Denoiser(model), model.language_model.config.num_hidden_layers
    allowed = torch.ones(model.language_model.config.vocab_size, dtype=torch.bool)
    allowed[list(model.config.suppressed_token_ids)] = False
    while not leader.done:
        logits = denoiser.block_logits([leader])  # (block, vocabulary)
        open_slots = leader.open_slots()[leader.slots]
        found = denoiser.block_logits(followers).split(len(logits)) if followers else ()
        for cache, predicted in zip(caches, found, strict=True):
            distances[cache].add(logits[open_slots][:, allowed], predicted[open_slots][:, allowed])
        for own in (own for follower in followers for own in follower.caches):
            moved = own.compare_probes()
            if moved is not None:
                own.take_drift(moved)
        (proposals,) = denoiser.predict([leader], [logits])
        leader.commit(proposals, 1, layers)
        leader.next_block()
        for follower in followers:
            follower.ids, follower.masked, follower.block = leader.ids.clone(), leader.masked.clone(), leader.block
    distances[BASELINE].work += sum(leader.statistics.layer_tokens)
    for cache, follower in zip(caches, followers, strict=True):
        distances[cache].work += sum(follower.layer_tokens(layers))


def fidelity_figures(
    vidlada: VidLaDA,
    entries: Sequence[dict[str, Any]],
    folder: Path,
    caches: Sequence[str] = CACHES,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> dict[str, Any]:
    """Follow full recompute through the captions and timelines of a dataset, whose answers are long.

    Args:
        vidlada: the model.
        entries, folder: of a shapes dataset.
        caches: policies as `GenerationSettings.cache` takes them.
        progress: called with what is measured next.
        options: as of `VidLaDA.ask`.

    Returns:
        For each cache the mean divergence in millinats, the percentage of slots with the same most probable token, and
        the work: positions computed in all layers, as a percentage of full recompute's.

    Raises:
        InputError: a video, an option or a policy cannot be used, or there is no long answer.
    """
    names = [name for name in dict.fromkeys(caches) if parse_policy(name) is not None]
    long = [entry for entry in entries if entry["family"] in LONG_FAMILIES]
    if not long:
        raise InputError(f"no question with a long answer ({', '.join(LONG_FAMILIES)}) among {len(entries)}")
    distances = {name: Distance() for name in (BASELINE, *names)}
    for number, entry in enumerate(long, start=1):
        progress(f"question {number} of {len(long)}")
        chat = vidlada.chat(folder / entry["video"], **options)
        follow(vidlada.model, chat.request(question_of(entry)), names, distances)
    return {
        "model": vidlada.name,
        "questions": len(long),
        "rows": [
            {
                "cache": name,
                "millinats": 1000 * distance.divergence / max(1, distance.slots),
                "same_percent": 100 * distance.same / max(1, distance.slots),
                "work_percent": 100 * distance.work / distances[BASELINE].work,
            }
            for name, distance in distances.items()
            if name != BASELINE
        ],
    }


def fidelity_table(figures: dict[str, Any]) -> str:
    """Markdown of `fidelity_figures`."""
    title = (
        f"{figures['model']}, {figures['questions']} captions and timelines; predictions in every open slot of a block"
    )
    head = ("cache", "divergence, millinats", "same first choice, %", "work, % of none")
    rows = [
        [row["cache"], f"{row['millinats']:.2f}", f"{row['same_percent']:.2f}", f"{row['work_percent']:.1f}"]
        for row in figures["rows"]
    ]
    return "\n".join([title, "", *table(head, rows)])
