"""The Python interface: load a model, encode videos and images, ask."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vidlada.checkpoint.load import save_model
from vidlada.checkpoint.publish import upload
from vidlada.conversation import Answer, Conversation, Draft, EncodedVideo
from vidlada.decoding.choices import check_choices
from vidlada.decoding.memory import PROMPT_TOKENS
from vidlada.decoding.sampler import State
from vidlada.decoding.thinking import split_thought
from vidlada.engine.choosing import as_choices
from vidlada.engine.offline import decode
from vidlada.errors import InputError, VidLaDAError
from vidlada.fetch import Fetching, Progress
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.info import MemoryNeed, check_free, memory_need
from vidlada.media import FrameEncoder, Pictures, is_image, local, media_list, read_image, read_video
from vidlada.messages import THINK, Message, pieces_of
from vidlada.model.free_memory import free_memory_of
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.settings import settings_of
from vidlada.tiling import MediaShape, pictures_of
from vidlada.video import MAX_FRAMES, Sampling

TOKENS_OF_A_TIME = 12  # at most, of a frame's time in the time instruction
PIECE_CONTEXT = 8  # tokens before a token that may change its text


class VidLaDA:
    """A model and its processor.

    Args:
        model: in evaluation mode.
        processor: that fits it.
        name: how the model was asked for.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, name: str):
        self.model, self.processor, self.name = model, processor, name
        self.progress: Progress | None = None  # of downloads

    def encode_video(self, video: Any, sampling: Sampling | None = None, **options: Any) -> EncodedVideo:
        """Sample a video, or open an image, and run the vision tower over it.

        Args:
            video: a file, a folder of images, an image, an http(s) address of one, frames already sampled, a Pillow
                image, or a uint8 array: (height, width, 3) of an image, or (frames, height, width, 3) taken at the
                sampling's `fps`; None for no video at all.
            sampling: which frames to take.
            options: instead, `frames`, `fps`, `force_sample`, `background` of `Sampling`, `max_download_mb`.

        Raises:
            InputError: the video cannot be used.
        """
        found, prompt, fetching, generation = split_options(options)
        if video is None:
            width = self.model.language_model.config.hidden_size
            return EncodedVideo(torch.empty(0, width, device=self.model.device), (), None, {}, 0)
        settings = self.settings(**generation)
        (encoded,) = self.encode_media([video], found if sampling is None else sampling, settings, prompt, fetching)
        return encoded

    def encode_media(
        self,
        media: Any,
        sampling: Sampling | None = None,
        settings: GenerationSettings | None = None,
        prompt: PromptSettings | None = None,
        fetching: Fetching | None = None,
    ) -> list[EncodedVideo]:
        """Encode the videos and images of one conversation into visual tokens, one after another.

        Args:
            media: one, or a list in the order of the conversation; each as for `encode_video`. A single image is
                tiled, several are not, as in training.
            sampling: which frames to take of videos.
            settings, prompt: of what will be asked; `frames: auto` leaves room for it.
            fetching: limits of downloads.

        Raises:
            InputError: one cannot be used, or all together take more memory than there is.
        """
        sampling, settings = sampling or Sampling(), settings or self.settings()
        given = media_list(media)
        if given and self.model.config.text_only:
            raise InputError(f"{self.name} is a text-only checkpoint; it cannot see videos")
        encoded = {number: medium for number, medium in enumerate(given) if isinstance(medium, EncodedVideo)}
        with local(given, fetching or Fetching(), self.progress) as sources:
            new = [number for number in range(len(sources)) if number not in encoded]
            images = [number for number in new if is_image(sources[number])]
            alone = len(images) + sum(medium.is_image for medium in encoded.values()) == 1
            for number in images:
                read = partial(read_image, sources[number], self.processor, alone, sampling.background)
                encoded[number] = self._encode_image(read, settings)
            videos = [number for number in new if number not in encoded]
            if sampling.max_frames == "auto":
                known = [medium.shape for medium in encoded.values()]
                most = self.frames_that_fit(known, max(1, len(videos)), settings, prompt)
                sampling = replace(sampling, max_frames=most)
            for number in videos:
                others = [medium.shape for medium in encoded.values()]
                check = partial(self.check_frames, others=others, settings=settings)
                encoded[number] = self._encode_video(sources[number], sampling, check)
        return [encoded[number] for number in range(len(given))]

    def _encode_image(self, read: Callable[[], Pictures], settings: GenerationSettings) -> EncodedVideo:
        """Read an image and run the vision tower over its tiles.

        Args:
            read: gives them.
            settings: of what will be asked, for the memory it takes.
        """
        started = time.perf_counter()
        pictures = read()
        decoded = time.perf_counter()
        self._check_memory([pictures.shape], settings)
        with torch.inference_mode():
            pixels = self.processor.pixel_values(pictures.images, self.model.device, self.model.dtype)
            (tokens,) = self.model.encode_media(pixels, [pictures.shape])
        seconds = {"video": decoded - started, "vision": time.perf_counter() - decoded}
        return EncodedVideo(tokens, pictures.times, pictures.info, seconds, pictures.shape, is_image=True)

    def _encode_video(self, source: Any, sampling: Sampling, check: Callable[[int], None]) -> EncodedVideo:
        """Read a video and run the vision tower over its frames, a few at a time while the next are decoded.

        Args:
            source: as `read_video` takes it.
            sampling: which frames to take.
            check: called with their number before they are decoded; it may raise.
        """
        started = time.perf_counter()
        encoder = FrameEncoder(self.model, self.processor)
        pictures = read_video(source, sampling, self.processor.image_size, check, encoder.take)
        tokens = encoder.tokens(pictures.numbers)
        seconds = {"video": time.perf_counter() - started - encoder.seconds, "vision": encoder.seconds}
        return EncodedVideo(tokens, pictures.times, pictures.info, seconds, pictures.shape)

    def frames_that_fit(
        self,
        others: Sequence[MediaShape],
        videos: int,
        settings: GenerationSettings,
        prompt: PromptSettings | None = None,
    ) -> int:
        """Return the largest number of frames per video that fits the context and the free memory.

        Args:
            others: shapes of what else the conversation shows.
            videos: how many share the room.
            settings, prompt: of what will be asked.

        Raises:
            InputError: not a single frame fits.
        """
        config, prompt = self.model.config, prompt or PromptSettings()
        system = config.system_message if prompt.system is None else prompt.system
        text = PROMPT_TOKENS + len(self.processor.text_ids(system)) + settings.slots
        room = config.max_length - text - sum(map(config.visual_tokens, others))
        each = config.tokens_per_frame() + (TOKENS_OF_A_TIME if prompt.time_instruction else 0)
        context = room // (videos * each)
        memory = free_memory_of(self.model.language_model)

        def fits(frames: int) -> bool:
            need = self._memory_need([*others, *[frames] * videos], settings)
            return all(need.on(each) <= each.free for each in memory)

        most = bisect_left(range(1, max(0, context) + 1), True, key=lambda frames: not fits(frames))
        if most < 1:
            limit = f"the context of {config.max_length} tokens" if context < 1 else "the free memory"
            raise InputError(
                f"not a single frame fits {limit} beside the answer slots; use fewer of them, or fewer media"
            )
        return min(most, MAX_FRAMES)

    def draft(self, state: State, reasoning: str = "", thinks: bool = False) -> Draft:
        """Decode a state to text.

        Args:
            state: of the thought or the answer.
            reasoning: the thought, once it is complete.
            thinks: the state is the thought's.
        """
        decode = self.processor.decode
        pieces: list[tuple[str | None, bool]] = []
        known: list[int] = []
        end = len(state.proposed) if state.stop_at is None else state.stop_at
        for token, final in zip(state.proposed[:end].tolist(), state.committed[:end].tolist(), strict=True):
            if token == self.model.config.mask_token_id:
                pieces.append((None, False))
                continue
            # a token's own text depends on the few that stand before it (spaces, parts of a character)
            before = known[-PIECE_CONTEXT:]
            known.append(token)
            pieces.append((decode([*before, token])[len(decode(before)) :], final))
        text = decode(state.answer_ids())
        thought, text = split_thought(f"{THINK}{text}" if thinks else text)
        return Draft(state, tuple(pieces), text, reasoning or thought)

    def check_frames(self, frames: int, others: Sequence[MediaShape], settings: GenerationSettings) -> None:
        """Refuse more frames than a prompt or this machine's memory can hold, before they are decoded.

        Raises:
            InputError: they are too many.
        """
        most = self.processor.most_frames
        if frames > most:
            raise InputError(
                f"{frames} frames are more than the {most} that fit in the model's {self.processor.max_length} tokens; "
                f"use fewer frames"
            )
        self._check_memory([*others, frames], settings)

    def _memory_need(self, media: Sequence[MediaShape], settings: GenerationSettings) -> MemoryNeed:
        """Estimate what an answer takes besides the weights."""
        processes = self.model.language_model.processes
        return memory_need(self.model.config, 0, media, settings, self.model.dtype.itemsize, processes)

    def _check_memory(self, media: Sequence[MediaShape], settings: GenerationSettings) -> None:
        """Refuse a run that cannot fit."""
        need = self._memory_need(media, settings)
        instead = "use fewer frames, a smaller gen_length or a smaller type"
        what = f"answering about {sum(map(pictures_of, media))} frames"
        for each in free_memory_of(self.model.language_model):
            check_free(need.on(each), each.free, each.device, what, instead)

    def settings(self, **generation: Any) -> GenerationSettings:
        """Return this checkpoint's generation settings with the given ones changed."""
        settings = GenerationSettings.from_dict(self.model.config.generation or {}).replace(**generation)
        check_choices(settings)  # before any work starts
        return settings

    def ask(self, media: Any, question: str, choices: Sequence[str] | None = None, **options: Any) -> Answer:
        """Answer one question about a video, an image, or several of them.

        Args:
            media: what `encode_video` takes, or a list of such; an `EncodedVideo` is not encoded again. They stand in
                front of the question, or in the places of as many `<image>` marks in it.
            question: text.
            choices: answer with the likeliest of these, found in one pass, instead of decoding.
            options: `frames`, `fps`, `force_sample` of `Sampling`, all of `PromptSettings` and `GenerationSettings`,
                `max_download_mb`.

        Raises:
            InputError: a video, the question or an option cannot be used.
        """
        return self.chat(media, **options).ask(question, choices)

    def stream(self, media: Any, question: str, **options: Any) -> Iterator[Draft]:
        """Answer like `ask`, yielding a draft after every denoising step."""
        return self.chat(media, **options).stream(question)

    def chat(self, media: Any, **options: Any) -> "Conversation":
        """Start a conversation about videos and images, which are encoded once; options as for `ask`."""
        sampling, prompt, fetching, generation = split_options(options)
        settings = self.settings(**generation)
        return Conversation(self, self.encode_media(media, sampling, settings, prompt, fetching), settings, prompt)

    def complete(self, messages: Sequence[Message], **options: Any) -> Answer:
        """Answer the last message of a conversation.

        Args:
            messages: role and content; content is text, or a list of parts in any order: `{"type": "text", "text":
                …}`, `{"type": "image", "image": …}`, `{"type": "video", "video": …}` with what `encode_video` takes.
            options: as for `ask`.
        """
        sampling, prompt, fetching, generation = split_options(options)
        settings = self.settings(**generation)
        parts = [piece for message in messages for piece in pieces_of(message) if not isinstance(piece, str)]
        missing = [part["type"] for part in parts if part.get(part["type"]) is None]
        if missing:
            raise InputError(f"a part of type {missing[0]} has no {missing[0]}")
        media = self.encode_media([part[part["type"]] for part in parts], sampling, settings, prompt, fetching)
        conversation = Conversation(self, media, settings, prompt)
        *earlier, last = messages
        if last.get("role") != "user":
            raise InputError("the last message must be the user's")
        conversation.messages += earlier
        return conversation.complete(last)

    def ask_many(
        self,
        questions: Sequence[tuple[Any, str]],
        choices: Sequence[Sequence[str] | None] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer several questions, each about its own videos and images, as many together as memory allows.

        Args:
            questions: pairs of media (as for `ask`) and a question; media given several times as the same object are
                encoded once.
            choices: of each question, as for `ask`; None for one that is decoded.
            options: as for `ask`.
        """
        sampling, prompt, fetching, generation = split_options(options)
        settings = self.settings(**generation)
        encoded: dict[int, list[EncodedVideo]] = {}
        for media, _ in questions:
            if id(media) not in encoded:
                encoded[id(media)] = self.encode_media(media, sampling, settings, prompt, fetching)
        chats = [Conversation(self, encoded[id(media)], settings, prompt) for media, _ in questions]
        messages = [chat.message(question) for chat, (_, question) in zip(chats, questions, strict=True)]
        if choices is not None and (isinstance(choices, str) or len(choices) != len(questions)):
            raise InputError(f"choices must be a list for each of the {len(questions)} questions, or None for one")
        given = [as_choices(own) for own in choices or [None] * len(questions)]
        for chat in chats:
            chat.check_memory()
        # made as there is room for them: every prompt takes memory
        entries = (chat.entry(message, own) for chat, message, own in zip(chats, messages, given, strict=True))
        answers = dict[int, Answer]()
        for place, update in decode(self.model, entries, together=len(chats)):
            if isinstance(update, VidLaDAError):
                raise update
            if update.stable.finish_reason is not None:
                answers[place] = chats[place].answer(update, given[place])
        return [answers[place] for place in range(len(chats))]

    def push_to_hub(self, repository: str, private: bool | None = None, revision: str | None = None) -> str:
        """Upload weights, configuration, processor, tokenizer and a model card to the Hugging Face hub.

        Args:
            repository: `owner/name`; it is created if need be.
            private: whether a new repository is; as the hub decides by default.
            revision: branch to upload to; it is created if need be.

        Returns:
            The commit's address.

        Raises:
            InputError: the name cannot be one of the hub's.
            VidLaDAError: the hub cannot be reached, or does not let us in.
        """
        with TemporaryDirectory() as folder:
            save_model(self.model, self.processor, Path(folder))
            return upload(Path(folder), repository, private, revision)


SAMPLING_OPTIONS = {listed.alias or name: name for name, (_, listed, _) in settings_of(Sampling).items()}


def split_options(options: dict[str, Any]) -> tuple[Sampling, PromptSettings, Fetching, dict[str, Any]]:
    """Split the options of `ask` into frame sampling, prompt settings, download limits and generation settings.

    Raises:
        InputError: an option is unknown or out of bounds.
    """
    options = {**options, **options.get("generation", {})}
    options.pop("generation", None)
    sampling = {name: options.pop(option) for option, name in SAMPLING_OPTIONS.items() if option in options}
    prompt = {name: options.pop(name) for name in settings_of(PromptSettings) if name in options}
    fetching = {name: options.pop(name) for name in settings_of(Fetching) if name in options}
    unknown = sorted(set(options) - set(settings_of(GenerationSettings)))
    if unknown:
        others = (*settings_of(PromptSettings), *settings_of(Fetching), *settings_of(GenerationSettings))
        raise InputError(
            f"unknown option {', '.join(unknown)}; known: {', '.join(sorted([*SAMPLING_OPTIONS, *others]))}"
        )
    return Sampling(**sampling), PromptSettings(**prompt), Fetching(**fetching), options
