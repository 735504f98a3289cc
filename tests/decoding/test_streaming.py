"""Settled text never changes, and ends as the answer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vidlada.decoding.sampler import State, Statistics
from vidlada.decoding.streaming import overlap, stable_text

SLOTS = 12
TEXTS = ["stop here é 漢字 🎬", "stop  stopping\n the  end", "ab abc b", "  spaces  "]


def bytes_tokenizer():
    """Byte-level, as the published tokenizer is: a character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    return tokenizer


TOKENIZER = bytes_tokenizer()
INTERESTING = sorted({token for text in TEXTS for token in TOKENIZER.encode(text).ids})


def decode(ids):
    return TOKENIZER.decode(list(ids))


def state_of(ids, committed, stop_at=None):
    committed = torch.tensor(committed)
    tokens = torch.where(committed, torch.tensor(ids), -1)
    return State(1, tokens, committed, committed.float(), stop_at, bool(committed.all()), Statistics())


def first_stop(ids, committed, sequences):
    """The loop's rule: the earliest place where a stop sequence stands in full."""
    return next(
        (place for place in range(len(ids)) for words in sequences
         if tuple(ids[place : place + len(words)]) == words and all(committed[place : place + len(words)])),
        None,
    )  # fmt: skip


@settings(max_examples=300)
@given(
    ids=st.lists(st.sampled_from(INTERESTING), min_size=SLOTS, max_size=SLOTS),
    order=st.permutations(range(SLOTS)),
    words=st.lists(st.sampled_from(["stop", "b", "abc", "é", " th", "\n", "漢字", "pp"]), max_size=3),
    max_tokens=st.none() | st.integers(1, SLOTS),
)
def test_settled_text_only_grows_and_ends_as_the_answer(ids, order, words, max_tokens):
    sequences = [tuple(TOKENIZER.encode(word).ids) for word in words]
    committed, before = [False] * SLOTS, ""
    for slot in order:
        committed[slot] = True
        stop_at = first_stop(ids, committed, sequences)
        stable = stable_text(state_of(ids, committed, stop_at), decode, sequences, words, max_tokens)
        assert stable.text.startswith(before)
        before = stable.text
        if stable.finish_reason:
            break
    assert stable.finish_reason
    whole = first_stop(ids, [True] * SLOTS, sequences)
    kept = ids[:whole][: max_tokens or SLOTS]
    cuts = [place for place in (decode(kept).find(word) for word in words) if place >= 0]
    expected = decode(kept)[: min(cuts, default=None)]
    assert stable.text == expected.strip()
    # where the tokens run out just before a stop that nobody has seen yet, they ran out
    stopped = bool(cuts) or (stop_at is not None and len(kept) == stop_at)
    assert stable.finish_reason == ("stop" if stopped else "length")


def test_holes_hold_text_back():
    ids = TOKENIZER.encode("ab abc b").ids
    committed = [True] * len(ids)
    committed[1] = False
    stable = stable_text(state_of(ids, committed), decode, [], [])
    assert stable.text == decode(ids[:1]).strip()
    assert stable.finish_reason is None


def test_the_beginning_of_a_stop_string_is_held_back():
    ids = TOKENIZER.encode("ab st").ids
    committed = [True] * len(ids) + [False]
    stable = stable_text(state_of([*ids, 0], committed), decode, [], ["stop"])
    assert stable.text == "ab"


def test_max_tokens_cuts_the_answer():
    ids = TOKENIZER.encode("ab abc b").ids
    stable = stable_text(state_of(ids, [True, True] + [False] * (len(ids) - 2)), decode, [], [], max_tokens=2)
    assert (stable.text, stable.tokens, stable.finish_reason) == (decode(ids[:2]).strip(), 2, "length")


def test_overlap():
    assert overlap("abc", ["cd", "bcd"]) == 2
    assert overlap("abc", ["abc", "x"]) == 0
    assert overlap([1, 2], [(2, 3), (1, 2, 4)]) == 2
    assert overlap("", ["a"]) == 0
