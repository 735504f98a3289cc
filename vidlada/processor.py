"""Conversations and frames to tensors: chat template, tokens, pixel values, and the map of which position is what."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig

Message = dict[str, Any]

BOS, START_HEADER, END_HEADER, END_OF_TURN = (
    "<|startoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
MASK, END_OF_TEXT = "<|mdm_mask|>", "<|endoftext|>"
VIDEO_PLACE = "<image>"

CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}{% for message in messages %}"
    "{{ '" + START_HEADER + "' + message['role'] + '" + END_HEADER + "\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% else %}{{ '" + VIDEO_PLACE + "\n' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '" + END_OF_TURN + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START_HEADER + "assistant" + END_HEADER + "\n\n' }}{% endif %}"
)


@dataclass
class EncodedConversation:
    """Token ids of one conversation and, for every position, what it is.

    Attributes:
        input_ids: token ids; the stand-in of the model's configuration once per visual token.
        frame_index: number of the frame a visual token belongs to, counted over the conversation; -1 for text.
        is_answer: True for what the assistant says, its end-of-turn token included.
        is_control: True for bos, header marks and end-of-turn tokens.
        turn: number of the user turn a position belongs to (the system message belongs to the first).
    """

    input_ids: list[int] = field(default_factory=list)
    frame_index: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    is_control: list[bool] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)

    def append(self, ids: Sequence[int], turn: int, *, answer: bool = False, control: bool = False) -> None:
        """Add text tokens."""
        self.input_ids.extend(ids)
        self.frame_index.extend([-1] * len(ids))
        self.is_answer.extend([answer] * len(ids))
        self.is_control.extend([control] * len(ids))
        self.turn.extend([turn] * len(ids))

    def append_video(self, stand_in: int, frame_index: Sequence[int], turn: int) -> None:
        """Add the places of a video's visual tokens."""
        self.append([stand_in] * len(frame_index), turn)
        self.frame_index[len(self.frame_index) - len(frame_index) :] = frame_index


def time_instruction(times: Sequence[float], duration: float) -> str:
    """The published sentence that tells the model when its frames were taken.

    Args:
        times: seconds of each frame.
        duration: seconds the video lasts.
    """
    stamps = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {stamps}. Please answer the following questions related to this video."
    )


class VidLaDAProcessor(ProcessorMixin):
    """Turns conversations with videos into the model's inputs.

    Args:
        tokenizer: with the control tokens of the published tokenizer.
        image_size: pixels along a side of a frame.
        pixel_mean, pixel_std: normalisation after scaling to 0..1.
        tokens_per_frame: visual tokens of a frame.
        closing_tokens: visual tokens after the last frame (1 where a single newline closes the video).
        video_token_id: stand-in for one visual token.
        max_length: most tokens a conversation may have.
        system_message: used when a conversation brings none; empty for no system turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 384,
        pixel_mean: float = 0.5,
        pixel_std: float = 0.5,
        tokens_per_frame: int = 210,
        closing_tokens: int = 0,
        video_token_id: int = -200,
        max_length: int = 32768,
        system_message: str = "",
        chat_template: str | None = CHAT_TEMPLATE,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size = image_size
        self.pixel_mean = pixel_mean
        self.pixel_std = pixel_std
        self.tokens_per_frame = tokens_per_frame
        self.closing_tokens = closing_tokens
        self.video_token_id = video_token_id
        self.max_length = max_length
        self.system_message = system_message

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: VidLaDAConfig) -> "VidLaDAProcessor":
        """The processor that fits a model."""
        return cls(
            tokenizer,
            image_size=int(config.vision.image_size),
            tokens_per_frame=config.tokens_per_frame(),
            closing_tokens=config.visual_tokens(0),
            video_token_id=config.video_token_id,
            max_length=config.max_length,
            system_message=config.system_message,
        )

    def token_id(self, token: str) -> int:
        """Id of a control token; `InputError` when the tokenizer lacks it."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise InputError(f"the tokenizer has no {token} token; it does not belong to this model family")
        return int(token_id)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens written inside it stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def pixel_values(
        self, images: np.ndarray, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Resize (bicubic, aspect not kept), scale and normalise frames.

        Args:
            images: (frames, height, width, 3) uint8 RGB.
            device: where the values are wanted. Bytes are sent there, a quarter of what their values take.
            dtype: of the result; the values are computed in float32.

        Returns:
            (frames, 3, image_size, image_size).
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise InputError(
                f"frames must be uint8 of shape (frames, height, width, 3), not {images.dtype} {images.shape}"
            )
        size = (self.image_size, self.image_size)
        if images.shape[1:3] != size:
            images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])
        scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
        values = torch.from_numpy((scaled - np.float32(self.pixel_mean)) / np.float32(self.pixel_std))  # of every byte
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        if torch.device(device).type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(device, non_blocking=True)
        found = values.to(device, dtype).index_select(0, pixels.flatten().int())
        return found.view(pixels.shape)

    def video_frame_index(self, frames: int) -> list[int]:
        """Frame number of each visual token of a video of `frames` frames."""
        index = np.repeat(np.arange(frames), self.tokens_per_frame).tolist()
        return index + [frames - 1] * self.closing_tokens

    def encode(
        self, messages: Sequence[Message], frame_counts: Sequence[int], add_generation_prompt: bool = True
    ) -> EncodedConversation:
        """Token ids and position map of one conversation.

        Args:
            messages: role and content; content is text or a list of parts of type `text` or `video`. The default
                system message is put in front unless the first message is a system message. Empty messages are
                left out, as in the published template.
            frame_counts: frames of each video part, in order.
            add_generation_prompt: end with the assistant's header, for an answer to follow.

        Raises:
            InputError: an unknown role or part, a wrong number of videos, or more tokens than `max_length`.
        """
        if not messages:
            raise InputError("the conversation is empty; give at least one user message")
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system_message}, *messages]
        start, end, end_of_turn = (self.token_id(token) for token in (START_HEADER, END_HEADER, END_OF_TURN))
        encoded = EncodedConversation()
        encoded.append([self.token_id(BOS)], 0, control=True)
        counts = iter(frame_counts)
        turn, first_frame = -1, 0

        def header(role: str, turn: int) -> None:
            encoded.append([start], turn, control=True)
            encoded.append(self.text_ids(role), turn)
            encoded.append([end], turn, control=True)

        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant"):
                raise InputError(f"unknown role {role!r}; use system, user or assistant")
            if not content:
                continue
            turn += role == "user"
            here = max(turn, 0)
            header(role, here)
            pending = "\n\n"  # text joins what stands before it, so that both are tokenized in one piece
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part.get("type") == "text":
                    pending += str(part["text"]).strip()
                elif part.get("type") == "video":
                    frames = next(counts, None)
                    if frames is None:
                        raise InputError(f"the conversation has more video parts than the {len(frame_counts)} given")
                    encoded.append(self.text_ids(pending), here)
                    index = [first_frame + i for i in self.video_frame_index(frames)]
                    encoded.append_video(self.video_token_id, index, here)
                    first_frame += frames
                    pending = "\n"
                else:
                    raise InputError(f"unknown content part {part.get('type')!r}; use text or video")
            is_answer = role == "assistant"
            if is_answer:
                encoded.append(self.text_ids("\n\n"), here)
                pending = pending.removeprefix("\n\n")
            encoded.append(self.text_ids(pending), here, answer=is_answer)
            encoded.append([end_of_turn], here, answer=is_answer, control=True)
        if next(counts, None) is not None:
            raise InputError(f"{len(frame_counts)} videos were given, more than the conversation has video parts")
        if add_generation_prompt:
            header("assistant", max(turn, 0))
            encoded.append(self.text_ids("\n\n"), max(turn, 0))
        if len(encoded.input_ids) > self.max_length:
            raise InputError(
                f"the conversation has {len(encoded.input_ids)} tokens, more than the model's {self.max_length}; "
                f"use fewer frames or a shorter text"
            )
        return encoded

    def __call__(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of a batch of conversations, left-padded so that all answers start at one place.

        Args:
            conversations: one conversation or several. Video parts hold their frames under `video`: uint8
                (frames, height, width, 3).
            add_generation_prompt: end each with the assistant's header.

        Returns:
            `input_ids`, `attention_mask`, `frame_index` (batch, tokens); with videos `pixel_values`
            (all frames, 3, size, size) and `frame_counts`, a list.
        """
        alone = bool(conversations) and isinstance(conversations[0], dict)
        batch = cast(Sequence[Sequence[Message]], [conversations] if alone else conversations)
        rows, videos = [], []
        for messages in batch:
            parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
            own = [np.asarray(part["video"]) for part in parts if part.get("type") == "video"]
            videos.extend(own)
            rows.append(self.encode(messages, [len(video) for video in own], add_generation_prompt))
        length = max((len(row.input_ids) for row in rows), default=0)
        input_ids = torch.full((len(rows), length), int(self.tokenizer.pad_token_id))
        frame_index = torch.full((len(rows), length), -1)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(length - len(row.input_ids), length)
            input_ids[number, place] = torch.tensor(row.input_ids)
            frame_index[number, place] = torch.tensor(row.frame_index)
            attention_mask[number, place] = 1
        features: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "frame_index": frame_index,
        }
        if videos:
            features["pixel_values"] = torch.cat([self.pixel_values(video) for video in videos])
            features["frame_counts"] = [len(video) for video in videos]
        return BatchFeature(features)

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """The prompt as text, or (`tokenize=True`) as model inputs.

        Args:
            conversation: one conversation or several, as for `__call__`.
            tokenize: return tensors instead of text.
            kwargs: `add_generation_prompt`, and what transformers' own method takes.
        """
        if tokenize:
            return self(conversation, add_generation_prompt=kwargs.get("add_generation_prompt", False))
        return super().apply_chat_template(conversation, tokenize=False, **kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Text of token ids, control tokens left out."""
        return self.tokenizer.decode(token_ids, **{"skip_special_tokens": True, **kwargs})


AutoProcessor.register(VidLaDAConfig, VidLaDAProcessor)
