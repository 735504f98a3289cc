"""`/v1/completions`, OpenAI's older interface: a text is gone on with, without a chat template."""

from itertools import accumulate
from typing import Any

from vidlada.engine.entry import Update
from vidlada.serve.completions import DONE, Reply, event
from vidlada.serve.objects import TextChoice, TextLogprobs, TokenLogprob
from vidlada.serve.schema import CompletionRequest


class TextReply(Reply):
    """Answers of that interface."""

    order: CompletionRequest

    def prompt(self, number: int) -> str:
        """What an answer goes on with."""
        return self.order.prompts[number // self.order.n] if self.order.echo else ""

    def whole(self) -> dict[str, Any]:
        """One object with a choice for every answer."""
        choices = []
        for number, update in enumerate(self.finished):
            tokens = None if self.order.logprobs is None else self.token_logprobs(number, update)
            text = self.prompt(number) + self.text(number, update)
            choices.append(choice_of(number, text, update.stable.finish_reason, tokens, len(self.prompt(number))))
        return {**self.head(), "choices": choices, "usage": self.usage(), **self.draft(0, self.finished[0])}

    def opening(self) -> bytes:
        """The prompts, if they are to be repeated."""
        if not self.order.echo:
            return b""
        return b"".join(self.chunk(choice_of(n, self.prompt(n), None)) for n in range(len(self.submitted)))

    def events(self, number: int, update: Update) -> bytes:
        """What became certain, and the end."""
        offset = len(self.prompt(number)) + self.sent[number]
        _, text, tokens = self.delta(number, update)
        draft, reason = self.draft(number, update), update.stable.finish_reason
        if not (text or draft or reason):
            return b""
        return self.chunk(choice_of(number, text, reason, tokens or None, offset), draft)

    def closing(self, include_usage: bool) -> bytes:
        """Usage, if asked for, and the end mark."""
        usage = event({**self.head(), "choices": [], "usage": self.usage()}) if include_usage else b""
        return usage + DONE

    def head(self) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.name}

    def chunk(self, choice: TextChoice, draft: dict[str, Any] | None = None) -> bytes:
        """An event of one answer."""
        return event({**self.head(), "choices": [choice], **(draft or {})})


def choice_of(
    number: int, text: str, reason: str | None, tokens: list[TokenLogprob] | None = None, offset: int = 0
) -> TextChoice:
    """An answer as this interface has it.

    Args:
        number: of the answer.
        text: of it.
        reason: it ended for.
        tokens: with their log-probabilities; None for none.
        offset: characters before the first of them.
    """
    logprobs: TextLogprobs | None = None
    if tokens is not None:
        texts = [token["token"] for token in tokens]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{each["token"]: each["logprob"] for each in token["top_logprobs"]} for token in tokens],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        }
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
