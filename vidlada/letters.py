"""The letter of an answer to a question with choices."""

import re
import unicodedata

MARKUP = re.compile(r"[*_`$\"'“”‘’]|\\boxed|\\text")
CLAUSE = r"(?=\s*$|\s*[.,;:!?)\]}\n。、]|\s+(?:because|since|as|is|and|or)\b)"


def read_letter(answer: str, letters: str = "ABCDE") -> str | None:
    """The letter that an answer chooses, or None where it holds none.

    In this order: the answer is one letter, of either case; the last one that is called the answer, option or choice;
    one that begins the answer as an item of a list; the last one in brackets; the last capital that stands alone. The
    article in "A man opens the door" is no letter.

    Args:
        answer: what the model said.
        letters: the choices there are.
    """
    text = MARKUP.sub("", unicodedata.normalize("NFKC", answer)).strip()
    either, capital = f"[{letters}{letters.lower()}]", f"[{letters}]"
    article = r"(?!(?<=A)\s+[a-z])"
    for pattern in (
        rf"^[(\[{{]?({either})[)\]}}]?[\s.,;:!?]*$",
        rf"(?i:(?:\b(?:answer|option|choice)\b|答案|选项|选)(?:\s+is|是|为)?\s*:?\s*(?:option\s+)?)[(\[{{]?({either}){CLAUSE}",
        rf"^[(\[{{]?({either})[)\].:](?!\w\.)|^({capital})(?:,|\s+[-–—]|\s*\n)",
        rf"[(\[{{]({either})[)\]}}]",
        rf"(?a:(?<![\w'’.-])({capital})(?![\w'’-])){article}",
    ):
        if found := list(re.finditer(pattern, text)):
            return next(group for group in found[-1].groups() if group).upper()
    return None
