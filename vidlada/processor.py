"""Conversations and frames to tensors: chat template, tokens, pixel values, and the map of which position is what."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vidlada.errors import InputError
from vidlada.messages import (
    BOS,
    CHAT_TEMPLATE,
    END_HEADER,
    END_OF_ANSWER,
    END_OF_TURN,
    START_HEADER,
    TAGS,
    THINK_TOKENS,
    Message,
    pieces_of,
)
from vidlada.model.config import VidLaDAConfig
from vidlada.settings import check_unicode
from vidlada.tiling import ImageShape, MediaShape, MergeType, Tiling


@dataclass
class EncodedConversation:
    """Token ids of one conversation and the role of every position.

    Attributes:
        input_ids: token ids; the stand-in of the model's configuration once per visual token.
        frame_index: number of the frame or image a visual token belongs to, counted over the conversation; -1 for
            text.
        is_answer: True for what the assistant says, its end-of-turn token included.
        is_control: True for bos, header marks and end-of-turn tokens, and for the whole header of an answer.
        turn: number of the user turn a position belongs to (the system message belongs to the first).
        media: shape of each video and image, in order.
    """

    input_ids: list[int] = field(default_factory=list)
    frame_index: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    is_control: list[bool] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    media: list[MediaShape] = field(default_factory=list)

    def append(self, ids: Sequence[int], turn: int, *, answer: bool = False, control: bool = False) -> None:
        """Add text tokens."""
        self.input_ids.extend(ids)
        self.frame_index.extend([-1] * len(ids))
        self.is_answer.extend([answer] * len(ids))
        self.is_control.extend([control] * len(ids))
        self.turn.extend([turn] * len(ids))

    def append_medium(self, stand_in: int, frame_index: Sequence[int], turn: int, shape: MediaShape) -> None:
        """Add the places of the visual tokens of a video or an image."""
        self.media.append(shape)
        self.append([stand_in] * len(frame_index), turn)
        self.frame_index[len(self.frame_index) - len(frame_index) :] = frame_index


class VidLaDAProcessor(ProcessorMixin):
    """Turns conversations with videos and images into the model's inputs.

    Args:
        tokenizer: with the control tokens of the published tokenizer.
        image_size: pixels along a side of a frame.
        pixel_mean, pixel_std: normalisation after scaling to 0..1.
        tokens_per_frame: visual tokens of a frame.
        closing_tokens: visual tokens after the last frame (1 where a single newline closes the video).
        video_token_id: stand-in for one visual token.
        max_length: most tokens a conversation may have.
        system_message: used when a conversation brings none; empty for no system turn.
        patches_per_side: of a frame or tile, before pooling.
        image_aspect_ratio, image_grid_pinpoints, image_merge_type: how images are taken; see `vidlada.tiling.Tiling`.
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
        patches_per_side: int = 27,
        image_aspect_ratio: str = "frame",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        image_merge_type: MergeType = "spatial_unpad",
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
        self.patches_per_side = patches_per_side
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.image_merge_type = image_merge_type

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: VidLaDAConfig) -> "VidLaDAProcessor":
        """Build the processor of a model from its configuration."""
        return cls(
            tokenizer,
            image_size=int(config.vision.image_size),
            tokens_per_frame=config.tokens_per_frame(),
            closing_tokens=config.visual_tokens(0),
            video_token_id=config.video_token_id,
            max_length=config.max_length,
            system_message=config.system_message,
            patches_per_side=config.patches_per_side,
            image_aspect_ratio=config.image_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
            image_merge_type=config.image_merge_type,
        )

    @property
    def tiling(self) -> Tiling:
        """How images are tiled."""
        pinpoints = self.image_grid_pinpoints
        return Tiling(
            self.image_aspect_ratio,
            self.image_size,
            self.patches_per_side,
            None if pinpoints is None else tuple((int(width), int(height)) for width, height in pinpoints),
            self.image_merge_type,
        )

    def token_id(self, token: str) -> int:
        """Return the id of a control token; `InputError` if the tokenizer lacks it."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise InputError(f"the tokenizer has no {token} token; it does not belong to this model family")
        return int(token_id)

    @cached_property
    def think_ids(self) -> dict[str, int]:
        """Ids of the think-mode tokens that the tokenizer has."""
        tokens = [token for token in (*THINK_TOKENS, END_OF_ANSWER) if token in self.tokenizer.get_added_vocab()]
        return {token: int(self.tokenizer.convert_tokens_to_ids(token)) for token in tokens}

    def answer_ids(self, text: str) -> list[int]:
        """Tokenize an assistant turn; think-mode tags become single tokens where the tokenizer has them."""
        if not self.think_ids:
            return self.text_ids(text)
        ids: list[int] = []
        pending = ""
        for piece in TAGS.split(text):
            if piece in self.think_ids:
                ids += self.text_ids(pending) + [self.think_ids[piece]]
                pending = ""
            else:
                pending += piece
        return ids + self.text_ids(pending)

    def text_ids(self, text: str) -> list[int]:
        """Tokenize plain text; control tokens written in it stay text. Lone surrogates raise an `InputError`."""
        check_unicode("the text", text)
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
        both = values.to(dtype), torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        if torch.device(device).type != "cpu":
            both = both[0].pin_memory(), both[1].pin_memory()
        values, pixels = (tensor.to(device, non_blocking=True) for tensor in both)
        return values.index_select(0, pixels.flatten().int()).view(pixels.shape)

    @property
    def most_frames(self) -> int:
        """Number of frames that fit the context without any text."""
        return max(0, (self.max_length - self.closing_tokens) // self.tokens_per_frame)

    def image_pictures(self, image: np.ndarray, alone: bool = True) -> tuple[np.ndarray, MediaShape]:
        """Return the pictures of an image that go through the vision tower.

        Args:
            image: (height, width, 3) uint8 RGB.
            alone: it is the only image of its conversation.

        Returns:
            (pictures, height, width, 3) uint8, and its shape; where the model sees images as videos, one frame.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise InputError(f"an image must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}")
        return (image[None], 1) if self.tiling.as_frames else self.tiling.cut(image, alone)

    def media_frame_index(self, shape: MediaShape) -> list[int]:
        """Return the frame number of each visual token of a medium; an image is one frame."""
        if isinstance(shape, ImageShape):
            return [0] * self.tiling.tokens(shape)
        index = np.repeat(np.arange(shape), self.tokens_per_frame).tolist()
        return index + [shape - 1] * self.closing_tokens

    def with_system_message(self, messages: Sequence[Message]) -> list[Message]:
        """Return the conversation with the default system message in front, unless it has one."""
        if not messages:
            raise InputError("the conversation is empty; give at least one user message")
        if messages[0].get("role") == "system":
            return list(messages)
        return [{"role": "system", "content": self.system_message}, *messages]

    def encode(
        self, messages: Sequence[Message], media: Sequence[MediaShape], add_generation_prompt: bool = True
    ) -> EncodedConversation:
        """Tokenize one conversation and record the role of every position.

        Args:
            messages: role and content; content is text or a list of parts of type `text`, `image` or `video`. A
                line break follows a medium unless its part is `inline`. The default system message is put in front
                unless the first message is a system message. Empty messages are left out, as in the published
                template.
            media: number of frames of each video, shape of each image, in order.
            add_generation_prompt: end with the assistant's header, for an answer to follow.

        Raises:
            InputError: an unknown role or part, a wrong number of media, or more tokens than `max_length`.
        """
        end_of_turn = self.token_id(END_OF_TURN)
        encoded = EncodedConversation()
        encoded.append([self.token_id(BOS)], 0, control=True)
        shapes = iter(media)
        turn, first_frame = -1, 0
        for message in self.with_system_message(messages):
            pieces = pieces_of(message)
            if not pieces:
                continue
            role = message["role"]
            turn += role == "user"
            here, is_answer = max(turn, 0), role == "assistant"
            self._append_header(encoded, role, here)
            if not is_answer:
                pieces[0] = f"\n\n{pieces[0]}"  # tokenized in one piece with what stands before it
            for piece in pieces:
                if isinstance(piece, str):
                    ids = self.answer_ids(piece) if is_answer else self.text_ids(piece)
                    encoded.append(ids, here, answer=is_answer)
                    continue
                shape = next(shapes, None)
                if shape is None:
                    raise InputError(f"the conversation has more videos and images than the {len(media)} given")
                index = [first_frame + number for number in self.media_frame_index(shape)]
                encoded.append_medium(self.video_token_id, index, here, shape)
                first_frame += 1 if isinstance(shape, ImageShape) else shape
            encoded.append([end_of_turn], here, answer=is_answer, control=True)
        if next(shapes, None) is not None:
            raise InputError(
                f"{len(media)} videos and images were given, more than the conversation has parts for them"
            )
        if add_generation_prompt:
            self._append_header(encoded, "assistant", max(turn, 0))
        if len(encoded.input_ids) > self.max_length:
            raise InputError(
                f"the conversation has {len(encoded.input_ids)} tokens, more than the model's {self.max_length}; "
                f"use fewer frames, images or a shorter text"
            )
        return encoded

    def _append_header(self, encoded: EncodedConversation, role: str, turn: int) -> None:
        """Append what stands before a message."""
        encoded.append([self.token_id(START_HEADER)], turn, control=True)
        encoded.append(self.text_ids(role), turn, control=role == "assistant")
        encoded.append([self.token_id(END_HEADER)], turn, control=True)
        if role == "assistant":
            encoded.append(self.text_ids("\n\n"), turn, control=True)

    def __call__(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Build the model inputs of a batch, left-padded so that all answers start at the same position.

        Args:
            conversations: one conversation or several. Video parts hold their frames under `video`: uint8
                (frames, height, width, 3); image parts hold one under `image`: uint8 (height, width, 3).
            add_generation_prompt: end each with the assistant's header.

        Returns:
            `input_ids`, `attention_mask`, `frame_index` (batch, tokens); with videos or images `pixel_values`
            (all pictures, 3, size, size) and `media_shapes`, a list.
        """
        alone = bool(conversations) and isinstance(conversations[0], dict)
        batch = cast(Sequence[Sequence[Message]], [conversations] if alone else conversations)
        rows: list[EncodedConversation] = []
        media: list[tuple[np.ndarray, MediaShape]] = []
        for messages in batch:
            own = self.media_of(messages)
            media.extend(own)
            rows.append(self.encode(messages, [shape for _, shape in own], add_generation_prompt))
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
        if media:
            features["pixel_values"] = torch.cat([self.pixel_values(pictures) for pictures, _ in media])
            features["media_shapes"] = [shape for _, shape in media]
        return BatchFeature(features)

    def media_of(self, messages: Sequence[Message]) -> list[tuple[np.ndarray, MediaShape]]:
        """Return the pictures and shapes of a conversation's media, in order."""
        parts = [piece for message in messages for piece in pieces_of(message) if not isinstance(piece, str)]
        alone = sum(part["type"] == "image" for part in parts) == 1
        found: list[tuple[np.ndarray, MediaShape]] = []
        for part in parts:
            pixels = np.asarray(part[part["type"]])
            found.append((pixels, len(pixels)) if part["type"] == "video" else self.image_pictures(pixels, alone))
        return found

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """Render the prompt as text or, with `tokenize=True`, as model inputs.

        Args:
            conversation: one conversation or several, as for `__call__`.
            tokenize: return tensors instead of text.
            kwargs: `add_generation_prompt`, and what transformers' own method takes.
        """
        if tokenize:
            return self(conversation, add_generation_prompt=kwargs.get("add_generation_prompt", False))
        alone = bool(conversation) and isinstance(conversation[0], dict)
        batch = [self.with_system_message(messages) for messages in ([conversation] if alone else conversation)]
        for messages in batch:
            for message in messages:
                pieces_of(message)  # refuses unknown roles and parts
        return super().apply_chat_template(batch[0] if alone else batch, tokenize=False, **kwargs)

    def tag_ids(self, tag: str) -> list[int]:
        """Return the token ids of a think-mode tag: a single one if the tokenizer has it."""
        return [self.think_ids[tag]] if tag in self.think_ids else self.text_ids(tag)

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Decode token ids without control tokens; think-mode tags are kept."""
        options = {"skip_special_tokens": True, **kwargs}
        if not self.think_ids or not options["skip_special_tokens"]:
            return self.tokenizer.decode(token_ids, **options)
        ids = [int(token) for token in np.atleast_1d(np.asarray(token_ids, dtype=np.int64))]
        tags = {token: tag for tag, token in self.think_ids.items()}
        text, start = "", 0
        for place, token in enumerate(ids):
            if token in tags:
                text += self.tokenizer.decode(ids[start:place], **options) + tags[token]
                start = place + 1
        return text + self.tokenizer.decode(ids[start:], **options)


AutoProcessor.register(VidLaDAConfig, VidLaDAProcessor)
