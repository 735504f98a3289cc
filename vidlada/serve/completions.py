"""Updates of the engine as OpenAI's objects.

`delta.content` carries stable text only, so that a client that knows nothing of diffusion shows the right answer;
`delta.reasoning_content` likewise the thought before it. With `diffusing` every event also has a `diffusion` object:
the draft as it stands.
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from vidlada.api import VidLaDA
from vidlada.engine.entry import Update
from vidlada.engine.requests import RequestHandle
from vidlada.errors import VidLaDAError
from vidlada.serve.objects import Draft, DraftToken, TokenLogprob, Usage
from vidlada.serve.schema import AnswerRequest
from vidlada.serve.service import Submitted

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for a probability of 0


async def updates_of(
    handles: Sequence[RequestHandle], deadline: float | None = None
) -> AsyncGenerator[tuple[int, Update], None]:
    """Updates of several answers as they come, with the answer's number, until all are complete."""
    streams = [handle.updates(deadline) for handle in handles]
    waiting = {asyncio.ensure_future(anext(stream, None)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, update = waiting.pop(task), task.result()
                if update is not None:
                    yield number, update
                    waiting[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for handle in handles:
            handle.cancel()


class Reply:
    """Answers on their way to the client.

    Args:
        vidlada: the model.
        name: it is served under.
        order: what was asked for.
        submitted: the answers' requests, in order.
    """

    identity = "cmpl"

    def __init__(self, vidlada: VidLaDA, name: str, order: AnswerRequest, submitted: Sequence[Submitted]):
        self.vidlada, self.name, self.order, self.submitted = vidlada, name, order, submitted
        self.id = f"{self.identity}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.sent = [0] * len(submitted)  # characters of each stable text
        self.sent_thought = [0] * len(submitted)  # characters of each stable thought
        self.sent_tokens = [0] * len(submitted)
        self.last: list[Update | None] = [None] * len(submitted)

    @property
    def finished(self) -> list[Update]:
        """The last update of every answer, once all are there."""
        return [update for update in self.last if update is not None]

    def text(self, number: int, update: Update) -> str:
        """What of the answer is certain; the suffix follows it once it is complete.

        An answer that goes on with a text keeps the white space before it, so that the two can be put together.
        """
        job = self.submitted[number].handle.job
        suffix = job.settings.suffix if update.stable.finish_reason else ""
        text = update.stable.text
        if job.continues and text:
            raw = self.vidlada.processor.decode(update.state.proposed[: update.stable.tokens].tolist())
            text = raw[: len(raw) - len(raw.lstrip())] + text
        return text + suffix

    def reasoning(self, update: Update) -> str:
        """What of the thought is certain, if the client wants it."""
        return update.stable.reasoning if self.order.include_reasoning else ""

    def seconds(self, number: int, update: Update) -> dict[str, float]:
        """By phase."""
        return {**self.submitted[number].seconds, **update.seconds, **update.state.statistics.seconds}

    def usage(self) -> Usage:
        """Token counts; visual tokens are part of the prompt's, which counts once for all its answers, and those of a
        thought part of the completion's."""
        seen = [update.state.statistics for update in self.finished]
        prompts = list(zip(self.submitted, seen, strict=True))[:: self.order.n]
        prompt = sum(submitted.prompt_tokens(statistics) for submitted, statistics in prompts)
        reasoning = sum(update.stable.reasoning_tokens for update in self.finished)
        completion = sum(update.stable.tokens for update in self.finished) + reasoning
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "visual_tokens": sum(statistics.visual_tokens for _, statistics in prompts),
            },
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def token_logprobs(self, number: int, update: Update, first: int = 0) -> list[TokenLogprob]:
        """Each stable token, from the `first` on, with the log of the probability with which it was committed.

        For an answer that was chosen from `guided_choice`: the choice as a whole, and the others beside it.
        """
        if update.choices:
            if first:
                return []
            choices = self.submitted[number].handle.job.choices
            ranked = sorted(zip(choices, update.choices, strict=True), key=lambda pair: -pair[1])
            entries = [entry_of(text, math.exp(score)) for text, score in ranked]
            return [{**entries[0], "top_logprobs": entries[: self.wanted_logprobs]}]
        state, decode = update.state, self.vidlada.processor.decode
        ids = state.proposed[: update.stable.tokens].tolist()
        found: list[TokenLogprob] = []
        for place in range(first, len(ids)):
            text = decode(ids[: place + 1])[len(decode(ids[:place])) :]
            entry = entry_of(text, float(update.confidence[place]))
            found.append({**entry, "top_logprobs": [entry] if self.wanted_logprobs else []})
        return found

    @property
    def wanted_logprobs(self) -> int:
        """Alternatives asked for."""
        return getattr(self.order, "top_logprobs", 0)

    def diffusion(self, number: int, update: Update) -> Draft:
        """The draft: every slot up to the last one that has a proposal."""
        state = update.state
        pieces = self.vidlada.draft(state).pieces
        tokens: list[DraftToken] = [
            {"text": text, "final": final, "confidence": round(confidence, 4)}
            for (text, final), confidence in zip(pieces, state.confidence.tolist(), strict=False)
        ]
        while tokens and tokens[-1]["text"] is None:
            tokens.pop()
        draft: Draft = {"step": state.step, "slots": len(pieces), "thinking": update.stable.thinking, "tokens": tokens}
        if update.stable.finish_reason is not None:
            job = self.submitted[number].handle.job
            draft["frame_times"] = [round(time, 3) for video in job.videos for time in video.frames.times]
            draft["settings"] = job.settings.to_dict()
            statistics = state.statistics.to_dict()
            statistics["seconds"] = {phase: round(value, 4) for phase, value in self.seconds(number, update).items()}
            draft["statistics"] = statistics
        return draft

    # --- what the interfaces say differently ---

    def whole(self) -> dict[str, Any]:
        """The answers as one object."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """The first events."""
        return b""

    def events(self, number: int, update: Update) -> bytes:
        """The events of an update; none if there is nothing new."""
        raise NotImplementedError

    def closing(self, include_usage: bool) -> bytes:
        """The last events."""
        raise NotImplementedError

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error after the stream began."""
        return event(body)

    def delta(self, number: int, update: Update) -> tuple[str, str, list[TokenLogprob]]:
        """Thought, text and the text's tokens that were not sent yet."""
        before, self.last[number] = self.last[number], update
        if before is not None and not update.stable.text.startswith(before.stable.text):
            raise VidLaDAError("memory ran out, and the repeated answer differs from what was sent already; ask again")
        text, reasoning = self.text(number, update), self.reasoning(update)
        new_reasoning = reasoning[self.sent_thought[number] :]
        self.sent_thought[number] = max(self.sent_thought[number], len(reasoning))
        new = text[self.sent[number] :]
        tokens: list[TokenLogprob] = []
        if getattr(self.order, "logprobs", None) not in (None, False) and new:
            tokens = self.token_logprobs(number, update, self.sent_tokens[number])
            self.sent_tokens[number] = update.stable.tokens
        self.sent[number] = max(self.sent[number], len(text))
        return new_reasoning, new, tokens

    def draft(self, number: int, update: Update) -> dict[str, Any]:
        """The draft as a field of the object, if the client asked for it."""
        return {"diffusion": self.diffusion(number, update)} if self.order.diffusing else {}


class ChatReply(Reply):
    """`/v1/chat/completions`."""

    identity = "chatcmpl"

    def whole(self) -> dict[str, Any]:
        """One object with a choice for every answer."""
        choices = []
        for number, update in enumerate(self.finished):
            message = {"role": "assistant", "content": self.text(number, update), "refusal": None}
            if reasoning := self.reasoning(update):
                message["reasoning_content"] = reasoning
            logprobs = None
            if getattr(self.order, "logprobs", False):
                logprobs = {"content": self.token_logprobs(number, update), "refusal": None}
            choice = {"index": number, "message": message, "finish_reason": update.stable.finish_reason}
            choices.append({**choice, "logprobs": logprobs})
        return {
            **self.head("chat.completion"), "choices": choices, "usage": self.usage(),
            **self.draft(0, self.finished[0]),
        }  # fmt: skip

    def opening(self) -> bytes:
        """The roles."""
        roles = range(len(self.submitted))
        return b"".join(self.chunk(number, {"role": "assistant", "content": ""}) for number in roles)

    def events(self, number: int, update: Update) -> bytes:
        """What became certain, and the end."""
        reasoning, text, tokens = self.delta(number, update)
        logprobs = {"content": tokens, "refusal": None} if tokens else None
        draft, parts = self.draft(number, update), []
        delta = {"reasoning_content": reasoning, "content": text}
        if reasoning or text or draft:
            new = {name: value for name, value in delta.items() if value}
            parts.append(self.chunk(number, new, None, logprobs, draft))
        if update.stable.finish_reason is not None:
            parts.append(self.chunk(number, {}, update.stable.finish_reason))
        return b"".join(parts)

    def closing(self, include_usage: bool) -> bytes:
        """Usage, if asked for, and the end mark."""
        usage = event({**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        return (usage if include_usage else b"") + DONE

    def head(self, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def chunk(
        self,
        number: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        draft: dict[str, Any] | None = None,
    ) -> bytes:
        """An event of one answer."""
        choice = {"index": number, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return event({**self.head("chat.completion.chunk"), "choices": [choice], **(draft or {})})


DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    line = b"" if name is None else f"event: {name}\n".encode()
    return line + b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def entry_of(text: str, probability: float) -> TokenLogprob:
    """A token with its log-probability, as OpenAI has it."""
    logprob = math.log(probability) if probability > 0 else LEAST_LOGPROB
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
