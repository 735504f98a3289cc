"""Think mode: a thought in slots of its own, then the answer; and how the two are separated in what a model says.

A model of the chain-of-thought stage answers `<think>{thought}</think>\n{answer}`. Where a thought is asked for, its
opening tag is given, the thought is decoded until its closing tag or the end of its slots, and the answer is decoded
behind it. A thought that nobody asked for is found in the text all the same.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vidlada.decoding.sampler import Request, State, Statistics
from vidlada.decoding.streaming import StableText, overlap, stable_text
from vidlada.errors import InputError
from vidlada.messages import ANSWER, END_OF_ANSWER, END_OF_THINK, STOP_THINK, THINK
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor

ENDS = (END_OF_THINK, STOP_THINK)


def split_thought(text: str, complete: bool = True) -> tuple[str, str]:
    """Thought and answer in what a model has said so far, without their tags.

    Args:
        text: from its beginning on.
        complete: nothing will follow; else what may be the beginning of a tag is held back.
    """
    if not complete:
        text = text[: len(text) - overlap(text, (*ENDS, END_OF_ANSWER))]
    thought, rest = "", text.lstrip()
    if not complete and THINK.startswith(rest):
        return "", ""
    if rest.startswith(THINK):
        rest = rest.removeprefix(THINK)
        end, tag = min(((rest.find(tag), tag) for tag in ENDS if tag in rest), default=(len(rest), ""))
        thought, rest = rest[:end].strip(), rest[end + len(tag) :]
    rest = rest.lstrip()
    if not complete and ANSWER.startswith(rest):
        return thought, ""
    if rest.startswith(ANSWER):
        rest = rest.removeprefix(ANSWER).partition(END_OF_ANSWER)[0]
    return thought, rest.strip()


class Turn:
    """One answer on its way: a thought, where the settings ask for one, then the answer itself.

    Attributes:
        request: what the decoding loop is to work on now.

    Args:
        request: of the answer.
        processor, model: that it is for.
        max_tokens: most tokens of the answer; the rest is cut off.

    Raises:
        InputError: prompt, thought and answer together are too long.
    """

    def __init__(
        self,
        request: Request,
        processor: VidLaDAProcessor,
        model: VidLaDAForMaskedDiffusion,
        max_tokens: int | None = None,
    ):
        self.final, self.processor, self.model, self.max_tokens = request, processor, model, max_tokens
        self.request, self.spoken = request, ""
        self.thought_tokens, self.earlier = 0, Statistics()
        self.decoded: tuple[list[int], str] = ([], "")  # the last that was asked for
        if not request.settings.think:
            return
        tags = [len(processor.answer_ids(tag)) for tag in (THINK, f"{END_OF_THINK}\n")]
        length = len(request.prompt) + request.settings.slots + len(request.suffix_ids) + sum(tags)
        if length > model.config.max_length:
            raise InputError(
                f"prompt, thought, answer slots and suffix take {length} tokens, more than the model's "
                f"{model.config.max_length}; use fewer frames, or a smaller think_length or gen_length"
            )
        self.spoken = THINK
        self.request = replace(
            self._behind(request, processor.answer_ids(THINK)),
            settings=request.settings.of_thought(),
            stop_sequences=(
                *(tuple(processor.tag_ids(tag)) for tag in ENDS),
                *((token,) for token in model.config.stop_token_ids),
            ),
            suffix_ids=(),
        )

    @property
    def thinks(self) -> bool:
        """Whether the thought is being decoded."""
        return self.request is not self.final

    def take(self, state: State) -> tuple[State, StableText]:
        """A state of `request` after a step, seen from the whole answer, and what is certain of it.

        When the thought is complete, `request` is another one, which the loop must go on with; its states come next.
        """
        stops = ENDS if self.thinks else self.request.settings.stop
        most = None if self.thinks else self.max_tokens
        stable = stable_text(state, self._decode, self.request.stop_sequences, stops, most)
        complete = stable.finish_reason is not None and not self.thinks
        thought, text = split_thought(self.spoken + stable.text, complete)
        whole = replace(state, step=self.earlier.steps + state.step, statistics=self.earlier + state.statistics)
        if not self.thinks:
            return whole, replace(stable, text=text, reasoning=thought, reasoning_tokens=self.thought_tokens)
        if stable.finish_reason is not None:
            self._answer(state, stable)
        return replace(whole, done=False), StableText("", 0, None, thought, stable.tokens, thinking=True)

    def _decode(self, ids: Sequence[int]) -> str:
        """Text of the settled tokens, which most steps leave as they are."""
        if self.decoded[0] != list(ids):
            self.decoded = list(ids), self.processor.decode(ids)
        return self.decoded[1]

    def _answer(self, state: State, stable: StableText) -> None:
        """Go on with the answer, behind the thought."""
        ids = self.processor.answer_ids(stable.text)
        if state.stop_at is not None or stable.finish_reason == "length":  # else the tag stands within a token
            ids = [int(token) for token in state.proposed[: stable.tokens]]
        self.spoken += f"{stable.text}{END_OF_THINK}\n"
        self.thought_tokens, self.earlier = stable.tokens, state.statistics
        behind = self._behind(self.request, ids + self.processor.answer_ids(f"{END_OF_THINK}\n"))
        self.request = self.final = replace(
            self.final,
            prompt=behind.prompt,
            frame_index=behind.frame_index,
            visual=self.final.visual if state.visual is None else state.visual,
        )

    @torch.inference_mode()
    def _behind(self, request: Request, ids: list[int]) -> Request:
        """A request whose prompt goes on with these tokens."""
        more = self.model.embed(torch.tensor([ids]))[0].to(request.prompt.dtype)
        known = request.frame_index
        frame_index = None if known is None else [*known, *[-1] * len(ids)]
        return replace(request, prompt=torch.cat((request.prompt, more)), frame_index=frame_index)
