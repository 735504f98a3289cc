"""Letters of answers as models give them, and as lmms-eval reads them."""

import string
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlada.evaluation.submission import letter_place
from vidlada.letters import read_letter

ANSWERS = {
    "C": "C", "C,": "C", "C.": "C", "**C**": "C", "c": "C", "(C)": "C", "(c)": "C", "[C]": "C", "C)": "C", "`C`": "C",
    "C. The man leaves": "C", "C: the man leaves": "C", "(C) A man leaves": "C", "**C.** A man": "C", " C \n": "C",
    "C\n\nThe man leaves.": "C", "C, because A is wrong": "C", "A. A man opens the door": "A", "\\boxed{C}": "C",
    "The answer is C": "C", "The correct answer is (C).": "C", "Answer: C": "C", "answer: c": "C", "Option C": "C",
    "The best option is C because he left.": "C", "I think (A) is wrong, so the answer is B.": "B",
    "The final answer is $\\boxed{D}$.": "D", "It is B": "B", "A man opens C": "C", "A man opens the door": None,
    "The answer is a man": None, "": None, "He leaves.": None, "a man": None, "Both a and b": None, "Z": None, "A": "A",
    "答案是C": "C", "答案：C。因为A不对": "C", "Ｃ": "C", "C.The man": "C", "e.g. the man": None,
    "I'd say E!": "E", "U.S.A": None, "vitamin-C": None,
}  # fmt: skip
# lmms-eval's own reader (0.7.3) takes no small or wide letters, and capitals inside words and articles for letters
DIFFERENT = {
    "c": "", "(c)": "", "answer: c": "", "A man opens C": "A", "A man opens the door": "A", "Both a and b": "B",
    "U.S.A": "A", "vitamin-C": "C", "Ｃ": "", "答案：C。因为A不对": "A",
}  # fmt: skip


@pytest.mark.parametrize(("answer", "letter"), ANSWERS.items())
def test_letters_of_real_answers(answer, letter):
    assert read_letter(answer) == letter
    assert letter_place(answer) == (-1 if letter is None else "ABCDE".index(letter))


def test_lmms_eval_reads_the_same_elsewhere():
    extract = pytest.importorskip("lmms_eval.tasks._task_utils.mcq_extract").extract_mcq_answer
    read = {answer: extract(answer, list("ABCDE")) for answer in ANSWERS}
    assert read == {answer: DIFFERENT.get(answer, letter or "") for answer, letter in ANSWERS.items()}


@given(st.text(), st.sampled_from(["ABCD", "ABCDE", "ABCDEFGHIJ"]))
def test_a_letter_is_in_the_answer_and_among_the_choices(answer, letters):
    letter = read_letter(answer, letters)
    assert letter is None or (letter in letters and letter in normalize("NFKC", answer).upper())


@given(st.sampled_from("ABCDE"), st.text(string.ascii_lowercase + " ", max_size=20))
def test_an_item_of_a_list_is_its_letter(letter, text):
    assert read_letter(f"{letter}. {text}") == read_letter(f"({letter}) {text}") == letter
