"""Thoughts: told apart from answers, decoded in slots of their own, with tags as tokens or as text."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidlada.decoding.sampler import Denoiser, State, Statistics
from vidlada.decoding.thinking import Turn, split_thought
from vidlada.errors import InputError
from vidlada.messages import THINK
from vidlada.processor import VidLaDAProcessor

FAST = {"gen_length": 8, "block_length": 4, "think_length": 12}


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("red", "", "red"),
        ("<think>it is red</think>\nred", "it is red", "red"),
        ("<think>it is red<stop_think>\nred", "it is red", "red"),
        ("<think>no end", "no end", ""),
        ("<think></think>\n<answer>red</answer> and more", "", "red"),
        ("say <think> twice</think>", "", "say <think> twice</think>"),
        ("<answer>red", "", "red"),
    ],
)
def test_split(text, thought, answer):
    assert split_thought(text) == (thought, answer)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<stop_think>", "<", "a", " ", "\n", "think>"]
)


@given(st.lists(PIECES, max_size=8).map("".join))
def test_what_was_certain_stays(text):
    whole = split_thought(text)
    for length in range(len(text) + 1):
        sure = split_thought(text[:length], complete=False)
        for early, late in zip(sure, whole, strict=True):
            assert late.startswith(early)


class Scripted:
    """In place of the decoding loop: every request gets the next text of a script, one token a step."""

    def __init__(self, vidlada, script):
        self.end, self.script = vidlada.model.config.stop_token_ids[0], list(script)
        self.rows, self.count = [], 0

    def add(self, request):
        slots = request.settings.gen_length
        wanted = torch.tensor([*self.script.pop(0), *[self.end] * slots])[:slots]
        stops = {ids[0] for ids in request.stop_sequences}
        self.rows.append(SimpleNamespace(number=self.count, wanted=wanted, stops=stops, statistics=Statistics()))
        self.count += 1
        return self.count - 1, None

    def remove(self, number):
        self.rows = [row for row in self.rows if row.number != number]

    def step(self):
        states = []
        for row in self.rows:
            done = row.statistics.steps + 1
            committed = torch.arange(len(row.wanted)) < done
            stop = next((place for place, token in enumerate(row.wanted[:done].tolist()) if token in row.stops), None)
            row.statistics = Statistics(steps=done, forward_passes=done, tokens=done)
            whole = done == len(row.wanted) or stop is not None
            state = State(done, row.wanted, committed, committed.float(), stop, whole, row.statistics)
            states.append((row.number, state))
        return states


def steer(vidlada, script, monkeypatch):
    monkeypatch.setattr("vidlada.engine.core.Denoiser", lambda model, static: Scripted(vidlada, script))


def words(vidlada, text):
    return vidlada.processor.text_ids(text)


def test_a_thought_is_followed_by_its_answer(thinker, monkeypatch):
    end = thinker.processor.think_ids["</think>"]
    thought, answer = words(thinker, "it is red"), words(thinker, "red circle")
    steer(thinker, [[*thought, end], answer], monkeypatch)
    drafts = list(thinker.stream(None, "is it red ?", think=True, **FAST))
    chat = thinker.chat(None, think=True, **FAST)
    steer(thinker, [[*thought, end], answer], monkeypatch)
    found = chat.ask("is it red ?")
    assert (found.reasoning, found.text, found.token_ids) == ("it is red", "red circle", answer)
    assert found.finish_reason == "stop"
    assert [draft.state.step for draft in drafts] == list(range(1, len(drafts) + 1))
    assert drafts[-1].reasoning == "it is red" and drafts[-1].text == "red circle"
    assert drafts[2].text == "" and "it is red".startswith(drafts[2].reasoning)


def test_the_thought_ends_with_its_budget(thinker, monkeypatch):
    thought = words(thinker, "red " * 20)
    steer(thinker, [thought, words(thinker, "blue")], monkeypatch)
    answer = thinker.ask(None, "is it red ?", think=True, **FAST)
    assert answer.reasoning == " ".join(["red"] * 12)
    assert answer.text == "blue"
    assert answer.statistics.tokens > 12


def test_prompts_of_both_parts(thinker):
    request = thinker.chat(None, think=True, **FAST).request("is it red ?")
    turn = Turn(request, thinker.processor, thinker.model)
    ids = thinker.processor.think_ids
    embed = thinker.model.language_model.embed_tokens.weight
    assert torch.equal(turn.request.prompt[-1], embed[ids[THINK]])
    assert torch.equal(turn.request.prompt[:-1], request.prompt)
    state = next(state for _, state in run(thinker, turn.request) if state.done)
    turn.take(state)
    behind = turn.request.prompt[len(request.prompt) :]
    thought = state.answer_ids()
    assert len(behind) == 1 + len(thought) + 1 + 1  # <think> thought </think> line break
    assert torch.equal(behind[1 + len(thought)], embed[ids["</think>"]])
    assert turn.request.settings == request.settings
    assert len(turn.request.frame_index) == len(turn.request.prompt)


def run(vidlada, request):
    denoiser = Denoiser(vidlada.model)
    denoiser.add(request)
    while denoiser.rows:
        yield from denoiser.step()


def test_many_thoughts_in_a_batch_are_as_alone(thinker):
    questions = [(None, "is it red ?"), (None, "which way does it move ?")]
    together = thinker.ask_many(questions, think=True, **FAST)
    for (media, question), answer in zip(questions, together, strict=True):
        alone = thinker.ask(media, question, think=True, **FAST)
        assert (alone.reasoning, alone.token_ids) == (answer.reasoning, answer.token_ids)


def test_tags_as_text(small):
    """The tokenizer without the tokens: nothing fails, and the tags are text."""
    assert small.processor.think_ids == {}
    answer = small.ask(None, "is it red ?", think=True, **FAST)
    assert answer.statistics.tokens >= 1


def test_too_long_thoughts_are_refused_at_once(thinker):
    with pytest.raises(InputError, match="prompt, thought, answer slots and suffix take"):
        thinker.ask(None, "is it red ?", think=True, think_length=100_000)


def test_the_pace_of_a_thought():
    from vidlada.generation import GenerationSettings

    settings = GenerationSettings(gen_length=64, block_length=16, steps=32, think=True, think_length=100)
    thought = settings.of_thought()
    assert thought.gen_length == 100 and 100 % thought.block_length == 0
    assert thought.steps % thought.num_blocks == 0 and 40 <= thought.steps <= 60
    assert settings.slots == 164 and replace(settings, think=None).slots == 64


@pytest.fixture(scope="module")
def thinker(small_folder):
    """The small model with the think-mode tokens added, as a training stage adds them."""
    import vidlada
    from vidlada.training.vocabulary import add_think_tokens

    loaded = vidlada.load(small_folder)
    loaded.processor = add_think_tokens(loaded.model, loaded.processor)
    assert isinstance(loaded.processor, VidLaDAProcessor)
    return loaded
