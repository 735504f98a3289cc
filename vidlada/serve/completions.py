"""Updates of the engine as OpenAI's objects.

`delta.content` carries stable text only, so that a client that knows nothing of diffusion shows the right answer. With
`diffusing` every event also has a `diffusion` object: the draft as it stands.
"""

import json
import time
import uuid
from typing import Any

from vidlada.api import VidLaDA
from vidlada.engine.engine import Update
from vidlada.serve.service import Submitted


class Completion:
    """One answer on its way to the client.

    Args:
        vidlada: the model.
        name: it is served under.
        submitted: the request.
        diffusing: tell the draft as well.
    """

    def __init__(self, vidlada: VidLaDA, name: str, submitted: Submitted, diffusing: bool):
        self.vidlada, self.name, self.submitted, self.diffusing = vidlada, name, submitted, diffusing
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.sent = 0  # characters of the stable text
        self.last: Update | None = None

    def text(self, update: Update) -> str:
        """What of the answer is certain; the suffix follows it once it is complete."""
        suffix = self.submitted.handle.job.settings.suffix if update.stable.finish_reason else ""
        return update.stable.text + suffix

    def seconds(self, update: Update) -> dict[str, float]:
        """By phase."""
        return {**self.submitted.seconds, **update.seconds, **update.state.statistics.seconds}

    def usage(self, update: Update) -> dict[str, Any]:
        """Token counts; visual tokens are part of the prompt's."""
        prompt, completion = self.submitted.prompt_tokens, update.stable.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "visual_tokens": self.submitted.visual_tokens},
        }

    def diffusion(self, update: Update) -> dict[str, Any]:
        """The draft: every slot up to the last one that has a proposal."""
        state = update.state
        pieces = self.vidlada.draft(state).pieces
        tokens = [
            {"text": text, "final": final, "confidence": round(confidence, 4)}
            for (text, final), confidence in zip(pieces, state.confidence.tolist(), strict=False)
        ]
        while tokens and tokens[-1]["text"] is None:
            tokens.pop()
        draft = {"step": state.step, "slots": len(pieces), "tokens": tokens}
        if update.stable.finish_reason is not None:
            job = self.submitted.handle.job
            draft["frame_times"] = [round(time, 3) for video in job.videos for time in video.frames.times]
            draft["settings"] = job.settings.to_dict()
            statistics = state.statistics.to_dict()
            statistics["seconds"] = {phase: round(value, 4) for phase, value in self.seconds(update).items()}
            draft["statistics"] = statistics
        return draft

    def whole(self, update: Update) -> dict[str, Any]:
        """The answer as one object."""
        message = {"role": "assistant", "content": self.text(update), "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": update.stable.finish_reason,
            "logprobs": None,
        }
        completion = {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(update)}
        return {**completion, "diffusion": self.diffusion(update)} if self.diffusing else completion

    def opening(self) -> bytes:
        """The first event."""
        return self._event(self._chunk({"role": "assistant", "content": ""}))

    def events(self, update: Update) -> bytes:
        """The events of an update; none if there is nothing new to tell."""
        self.last = update
        text = self.text(update)
        delta = {"content": text[self.sent :]} if len(text) > self.sent else {}
        self.sent = len(text)
        draft = {"diffusion": self.diffusion(update)} if self.diffusing else {}
        parts = []
        if delta or draft:
            parts.append(self._event({**self._chunk(delta), **draft}))
        if update.stable.finish_reason is not None:
            parts.append(self._event(self._chunk({}, update.stable.finish_reason)))
        return b"".join(parts)

    def closing(self, include_usage: bool) -> bytes:
        """The last events."""
        usage = b""
        if include_usage and self.last is not None:
            head = self._head("chat.completion.chunk")
            usage = self._event({**head, "choices": [], "usage": self.usage(self.last)})
        return usage + b"data: [DONE]\n\n"

    @staticmethod
    def error(body: dict[str, Any]) -> bytes:
        """An error after the stream began."""
        return Completion._event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    @staticmethod
    def _event(content: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
