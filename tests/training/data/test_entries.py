"""Packed entries are the entries."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vidlada.training.data.entries import Entries, Entry, TarMember

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MEMBERS = st.builds(TarMember, st.just(Path("a/b.tar")), st.just("1.jpg"), st.integers(0, 2**40), st.integers(0, 99))
MEDIA = st.one_of(MEMBERS, st.sampled_from([Path("clip.mp4"), Path("/x/picture.PNG")]))
TURNS = st.lists(TEXTS, min_size=1, max_size=3).map(tuple)
ENTRIES = st.lists(st.builds(Entry, TEXTS, st.lists(MEDIA, max_size=3).map(tuple), TURNS, TURNS, TEXTS, TEXTS))


@given(st.lists(ENTRIES, min_size=1, max_size=3), st.data())
def test_packed_joined_and_taken_as_lists_are(parts, data):
    expected = [entry for part in parts for entry in part]
    packed = Entries.join([Entries.pack(part) for part in parts])
    numbers = data.draw(st.lists(st.integers(0, len(expected) - 1))) if expected else []
    for entries, same in ((packed, expected), (packed.take(numbers), [expected[number] for number in numbers])):
        assert list(entries) == same
        assert [entry.origin for entry in entries] == [entry.origin for entry in same]  # which equality leaves out
        assert list(entries[1:3]) == same[1:3]
        assert entries.places["videos"].tolist() == [
            sum(media.suffix == ".mp4" for media in entry.media) for entry in same
        ]
        assert entries.places["images"].tolist() == [
            sum(media.suffix != ".mp4" for media in entry.media) for entry in same
        ]
        assert entries.places["characters"].tolist() == [
            len("".join((*entry.questions, *entry.answers, entry.process, entry.system or ""))) for entry in same
        ]
