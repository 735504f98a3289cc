"""Does seeing everything at once help? The masked-diffusion model beside its causal twin, on held-out shapes questions.

Train both with the same data and budget, the second with `objective: autoregressive`, then compare them:

    OBJECTIVE=diffusion OUTPUT=runs/diffusion vidlada train twins
    OBJECTIVE=autoregressive OUTPUT=runs/causal vidlada train twins
    vidlada shapes write data/test --split test --clips 120 --seconds 8 --size 84
    python scripts/compare_twins.py runs/diffusion/model runs/causal/model data/test/test.json out

Writes scores.json and three plots (needs matplotlib): by family, by the time of the decisive event, and with fewer
frames a second. The result is whatever it is.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from vidlada.api import VidLaDA
from vidlada.cli.options import one_line_errors
from vidlada.conversation import EncodedVideo
from vidlada.errors import InputError
from vidlada.loading import load
from vidlada.shapes.benchmark import points, read_questions
from vidlada.shapes.dataset import question_of
from vidlada.shapes.questions import BENCHMARK_FAMILIES
from vidlada.shapes.world import Clip
from vidlada.training.objective import causal_mask

RATES = (1.0, 0.5, 0.25)  # frames a second; training has one
THIRDS = ("early", "middle", "late")
LONGEST_ANSWER = 12  # tokens; short answers need at most eight

Answerer = Callable[[EncodedVideo, list[str]], list[str]]


def decisive_second(entry: dict[str, Any]) -> int | None:
    """The second of the one event a question is about; None if it is about no single event."""
    question = question_of(entry)
    answer = entry["conversations"][1]["value"]
    if entry["choices"]:
        answer = entry["choices"]["ABCDEFGH".index(answer)]
    clip = Clip.from_dict(entry["clip"])
    seconds = [event.second for event in clip.events]
    if entry["family"] == "when" and answer.isdigit():
        return int(answer)
    if entry["family"] == "at":
        named = [int(word) for word in question.split(" ?")[0].split() if word.isdigit()]
        return named[0] if named and named[0] in seconds else None
    if seconds and question.startswith("what happens first"):
        return seconds[0]
    if seconds and question.startswith("what happens last"):
        return seconds[-1]
    return None


def third_of(entry: dict[str, Any]) -> str | None:
    """The third of its clip the decisive event falls into."""
    second = decisive_second(entry)
    return None if second is None else THIRDS[min(2, 3 * second // entry["clip"]["seconds"])]


def by_diffusion(model: VidLaDA) -> Answerer:
    """Answers decoded as `vidlada ask` does, a token a step."""

    def answer(video: EncodedVideo, questions: list[str]) -> list[str]:
        asked = [(video, question) for question in questions]
        return [found.text for found in model.ask_many(asked, gen_length=LONGEST_ANSWER, block_length=LONGEST_ANSWER)]

    return answer


def by_next_token(model: VidLaDA) -> Answerer:
    """Greedy answers from left to right under a causal mask, the whole sequence recomputed for every token."""
    config, processor, network = model.model.config, model.processor, model.model
    banned = [*config.suppressed_token_ids, config.mask_token_id]

    @torch.inference_mode()
    def one(video: EncodedVideo, question: str) -> str:
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
        encoded = processor.encode([message], [len(video.times)])
        states = network.embed(torch.tensor([encoded.input_ids]), video.visual_tokens)  # (1, tokens, width)
        said: list[int] = []
        while len(said) < LONGEST_ANSWER:
            last = network(inputs_embeds=states, attention_mask=causal_mask(None, states.shape[1])).logits[0, -1]
            last[banned] = -torch.inf
            said.append(int(last.argmax()))
            if said[-1] in config.stop_token_ids:
                break
            states = torch.cat((states, network.embed(torch.tensor([said[-1:]]))), dim=1)
        return processor.decode(said).strip()

    return lambda video, questions: [one(video, question) for question in questions]


def score(model: VidLaDA, answerer: Answerer, entries: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Percent right, and number of questions, by family, by third, and by frames a second."""
    by_video = defaultdict(list)
    for entry in entries:
        by_video[entry["video"]].append(entry)
    right: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, asked in by_video.items():
        questions = [question_of(entry) for entry in asked]
        for rate in RATES:
            answers = answerer(model.encode_video(folder / name, fps=rate), questions)
            for entry, answer in zip(asked, answers, strict=True):
                point = points(entry, answer)
                right["frames a second", f"{rate:g}"].append(point)
                if rate == RATES[0]:
                    right["family", entry["family"]].append(point)
                    third = third_of(entry)
                    if third is not None:
                        right["decisive event", third].append(point)
    groups: dict[str, Any] = {"family": {}, "decisive event": {}, "frames a second": {}}
    orders = {"family": list(BENCHMARK_FAMILIES), "decisive event": list(THIRDS)}
    for group, label in sorted(right, key=lambda key: orders.get(key[0], [key[1]]).index(key[1])):
        found = right[group, label]
        groups[group][label] = {"percent": 100 * sum(found) / len(found), "number": len(found)}
    return groups


def plot(scores: dict[str, Any], group: str, path: Path) -> None:
    """Bars of both models side by side."""
    from matplotlib.figure import Figure

    labels = list(next(iter(scores.values()))[group])
    figure = Figure(figsize=(max(4, 1.2 * len(labels)), 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, groups) in enumerate(scores.items()):
        places = [place + 0.4 * number - 0.2 for place in range(len(labels))]
        axes.bar(places, [groups[group][label]["percent"] for label in labels], width=0.38, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel(group)
    axes.set_ylabel("right, %")
    figure.legend(loc="outside upper right", ncols=len(scores))
    figure.savefig(path)


@click.command()
@click.argument("diffusion", type=click.Path(path_type=Path))
@click.argument("autoregressive", type=click.Path(path_type=Path))
@click.argument("questions", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@one_line_errors
def main(diffusion: Path, autoregressive: Path, questions: Path, output: Path) -> None:
    """Compare model folders DIFFUSION and AUTOREGRESSIVE on QUESTIONS (from `vidlada shapes write`)."""
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; choose another folder")
    entries = [entry for entry in read_questions(questions) if entry["family"] in BENCHMARK_FAMILIES]
    scores = {}
    for name, folder, answerer in (("diffusion", diffusion, by_diffusion), ("causal", autoregressive, by_next_token)):
        model = load(folder)
        scores[name] = score(model, answerer(model), entries, questions.parent)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    for group in ("family", "decisive event", "frames a second"):
        plot(scores, group, output / f"{group.replace(' ', '-')}.svg")
    for group in scores["diffusion"]:
        click.echo(f"| {group} | diffusion, % | causal, % | questions |\n|---|---|---|---|")
        for label, found in scores["diffusion"][group].items():
            other = scores["causal"][group][label]["percent"]
            click.echo(f"| {label} | {found['percent']:.1f} | {other:.1f} | {found['number']} |")


if __name__ == "__main__":
    main()
