"""The front door: load a model, show it a video, ask."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.checkpoint.load import describe, load_model, load_tokenizer
from vidlada.decoding.cache import VisualCache
from vidlada.decoding.policies import policy_from
from vidlada.decoding.sampler import Request, State, Statistics, denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.info import check_memory, check_memory_of_weights, memory_need
from vidlada.model.quantization import Quantization, quantize
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import EncodedConversation, Message, VidLaDAProcessor, time_instruction
from vidlada.video import Frames, Sampling, VideoInfo, sample_frames

SHIPPED = "tiny"
PIECE_CONTEXT = 8  # tokens before a token that may change its text


@dataclass(frozen=True)
class EncodedVideo:
    """A video the model has seen: any number of questions may be asked about it at no further visual cost.

    Attributes:
        visual_tokens: (visual tokens, width).
        times: seconds of each frame from the video's start.
        info: what the file is; None for frames given as an array.
        seconds: time spent in `video` (decoding) and `vision` (the tower).
    """

    visual_tokens: Tensor
    times: tuple[float, ...]
    info: VideoInfo | None
    seconds: dict[str, float]

    @property
    def duration(self) -> float:
        """Seconds the video lasts; for an array of frames, up to the last frame."""
        if self.info is not None:
            return self.info.duration
        return self.times[-1] if self.times else 0.0


@dataclass(frozen=True)
class Draft:
    """An answer in the making.

    Attributes:
        state: the decoding loop's snapshot.
        pieces: text of every slot and whether it is final; None text where nothing was proposed yet.
        text: the text so far, without undecided slots.
    """

    state: State
    pieces: tuple[tuple[str | None, bool], ...]
    text: str


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        token_ids: its tokens, without the end of turn.
        finish_reason: `stop` when the model ended the answer, `length` when the slots ran out.
        frame_times: seconds of the frames the model saw.
        statistics: steps, forward passes, tokens, seconds per phase.
        settings: how it was decoded.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    frame_times: tuple[float, ...]
    statistics: Statistics
    settings: GenerationSettings = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class VidLaDA:
    """A model and its processor.

    Args:
        model: in evaluation mode.
        processor: that fits it.
        name: how the model was asked for.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, name: str):
        self.model, self.processor, self.name = model, processor, name

    def encode_video(
        self,
        video: "str | Path | Frames | np.ndarray | EncodedVideo | None",
        frames: int = 64,
        fps: float = 1.0,
        force_sample: bool = False,
    ) -> EncodedVideo:
        """Sample a video and run the vision tower over it.

        Args:
            video: a file, a folder of images, an image, frames already sampled, or a uint8 array
                (frames, height, width, 3) taken at `fps`; None for no video at all.
            frames: most frames to take.
            fps: candidate frames a second.
            force_sample: always take `frames` frames, evenly spaced.

        Raises:
            InputError: the video cannot be used.
        """
        if isinstance(video, EncodedVideo):
            return video
        if video is None:
            width = self.model.language_model.config.hidden_size
            return EncodedVideo(torch.empty(0, width, device=self.model.device), (), None, {})
        if self.model.config.text_only:
            raise InputError(f"{self.name} is a text-only checkpoint; it cannot see videos")
        started = time.perf_counter()
        info = None
        if isinstance(video, np.ndarray):
            images, times = video, tuple(i / fps for i in range(len(video)))
            if len(images) == 0:
                raise InputError("the video array holds no frames")
        else:
            if not isinstance(video, Frames):
                sampling = Sampling(fps=fps, max_frames=frames, force_sample=force_sample)
                video = sample_frames(video, sampling, size=self.processor.image_size)
            images, times, info = video.images, video.times, video.info
        decoded = time.perf_counter()
        self._check_memory(len(images), self.settings())
        with torch.inference_mode():
            pixels = self.processor.pixel_values(images).to(self.model.device, self.model.dtype)
            (visual_tokens,) = self.model.encode_videos(pixels, [len(pixels)])
        seconds = {"video": decoded - started, "vision": time.perf_counter() - decoded}
        return EncodedVideo(visual_tokens, tuple(times), info, seconds)

    def request(self, encoded: EncodedConversation, visual_tokens: Tensor, settings: GenerationSettings) -> Request:
        """What the decoding loop needs to go on with a conversation.

        Args:
            encoded: as the processor encodes it.
            visual_tokens: (visual tokens, width) of all its videos, in order.
            settings: of decoding.
        """
        processor, model = self.processor, self.model
        ids = torch.tensor([encoded.input_ids], device=model.device)
        with torch.inference_mode():
            prompt = model.embed(ids, visual_tokens)[0]
        words = [tuple(processor.text_ids(word)) for word in settings.stop]
        return Request(
            prompt=prompt,
            settings=settings,
            stop_sequences=(*words, *((token,) for token in model.config.stop_token_ids)),
            suffix_ids=tuple(processor.text_ids(settings.suffix)) if settings.suffix else (),
            frame_index=encoded.frame_index,
        )

    def draft(self, state: State) -> Draft:
        """A state as text."""
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
        return Draft(state, tuple(pieces), decode(state.answer_ids()).strip())

    def _check_memory(self, frames: int, settings: GenerationSettings) -> None:
        """Refuse a run that cannot fit."""
        need = memory_need(self.model.config, 0, frames, settings.gen_length, self.model.dtype.itemsize, settings.cache)
        instead = "use fewer frames, a smaller gen_length or a smaller type"
        check_memory(need.working, self.model.device, f"answering about {frames} frames", instead)

    def settings(self, **generation: Any) -> GenerationSettings:
        """This checkpoint's generation defaults with some of them changed."""
        settings = GenerationSettings.from_dict(self.model.config.generation or {}).updated(**generation)
        policy_from(settings.cache)  # an unknown policy is refused before any work starts
        return settings

    def ask(self, video: Any, question: str, **options: Any) -> Answer:
        """Answer one question about a video.

        Args:
            video: what `encode_video` takes; an `EncodedVideo` is not encoded again.
            question: text.
            options: `frames`, `fps`, `force_sample` of `encode_video`; `time_instruction`, `system` of `Conversation`;
                the rest are `GenerationSettings`.

        Raises:
            InputError: the video, the question or an option cannot be used.
        """
        return self.chat(video, **split_options(options)).ask(question)

    def stream(self, video: Any, question: str, **options: Any) -> Iterator[Draft]:
        """As `ask`, but yields a draft after every denoising step."""
        return self.chat(video, **split_options(options)).stream(question)

    def chat(self, video: Any, **options: Any) -> "Conversation":
        """Several questions about one video, which is encoded once; options as for `ask`."""
        options = split_options(options)
        video_options = {name: options[name] for name in VIDEO_OPTIONS if name in options}
        others = {name: value for name, value in options.items() if name not in VIDEO_OPTIONS}
        others["settings"] = self.settings(**others.pop("generation", {}))
        return Conversation(self, self.encode_video(video, **video_options), **others)

    def ask_many(self, questions: Sequence[tuple[Any, str]], **options: Any) -> list[Answer]:
        """Answer several questions, each about its own video, in one padded batch.

        Args:
            questions: pairs of a video (as for `encode_video`) and a question; a video given several times as the same
                object is encoded once.
            options: as for `ask`.
        """
        options = split_options(options)
        seen: dict[int, EncodedVideo] = {}
        for video, _ in questions:
            if id(video) not in seen:
                video_options = {name: options[name] for name in VIDEO_OPTIONS if name in options}
                seen[id(video)] = self.encode_video(video, **video_options)
        chats = [self.chat(seen[id(video)], **options) for video, _ in questions]
        requests = [chat.request(question) for chat, (_, question) in zip(chats, questions, strict=True)]
        last: dict[int, State] = {}
        for number, state in denoise(self.model, requests):
            last[number] = state
        return [chat.answer(last[number]) for number, chat in enumerate(chats)]


VIDEO_OPTIONS = ("frames", "fps", "force_sample")
CHAT_OPTIONS = ("time_instruction", "system")


def split_options(options: dict[str, Any]) -> dict[str, Any]:
    """Move every option that is not about the video or the prompt under `generation`."""
    own = {name: value for name, value in options.items() if name in (*VIDEO_OPTIONS, *CHAT_OPTIONS, "generation")}
    rest = {name: value for name, value in options.items() if name not in own}
    return {**own, "generation": {**own.get("generation", {}), **rest}}


class Conversation:
    """Questions and answers about one video.

    Args:
        vidlada: the model.
        video: already encoded.
        settings: of decoding.
        time_instruction: tell the model when its frames were taken (the published sentence).
        system: a system message instead of the checkpoint's own.
    """

    def __init__(
        self,
        vidlada: VidLaDA,
        video: EncodedVideo,
        settings: GenerationSettings,
        time_instruction: bool = False,
        system: str | None = None,
    ):
        self.vidlada, self.video, self.settings = vidlada, video, settings
        self.time_instruction = time_instruction
        self.visual: VisualCache | None = None  # left by the last answer, where the settings say so
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def request(self, question: str) -> Request:
        """What the decoding loop needs to answer the next question."""
        counts = [len(self.video.times)] if self.video.times else []
        self.vidlada._check_memory(sum(counts), self.settings)
        encoded = self.vidlada.processor.encode([*self.messages, self._user(question)], counts)
        return replace(self.vidlada.request(encoded, self.video.visual_tokens, self.settings), visual=self.visual)

    def _user(self, question: str) -> Message:
        if not question or not question.strip():
            raise InputError("the question is empty; ask something about the video")
        if not self.video.times or any(message["role"] == "user" for message in self.messages):
            return {"role": "user", "content": question}
        if self.time_instruction:
            question = f"{time_instruction(self.video.times, self.video.duration)}\n{question.strip()}"
        return {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}

    def stream(self, question: str) -> Iterator[Draft]:
        """Answer the next question, yielding a draft after every step.

        Models trained on conversations (`config.multi_turn`) see the earlier questions and answers.
        """
        request = self.request(question)
        state = None
        for _, state in denoise(self.vidlada.model, [request]):
            yield self.draft(state)
        assert state is not None
        self.last, self.visual = self.answer(state), state.visual
        if self.vidlada.model.config.multi_turn:
            self.messages += [self._user(question), {"role": "assistant", "content": self.last.text}]

    def ask(self, question: str) -> Answer:
        """Answer the next question."""
        for _ in self.stream(question):
            pass
        return self.last

    def draft(self, state: State) -> Draft:
        """A state as text."""
        return self.vidlada.draft(state)

    def answer(self, state: State) -> Answer:
        """A finished state as an answer."""
        ids = state.answer_ids()
        text = self.vidlada.processor.decode(ids)
        # a stop string may stand inside other tokens than its own, where the loop cannot see it
        for word in self.settings.stop:
            text = text.split(word)[0]
        return Answer(
            text=text.strip() + self.settings.suffix,
            token_ids=ids,
            finish_reason="length" if state.stop_at is None else "stop",
            frame_times=self.video.times,
            statistics=state.statistics.with_seconds(self.video.seconds),
            settings=self.settings,
        )


def model_folder(name_or_folder: str | Path) -> Path:
    """Folder of a model given by name (`tiny`, in the package) or path; `InputError` if there is none."""
    if str(name_or_folder) == SHIPPED:
        return Path(__file__).parent / "weights" / SHIPPED
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise InputError(f"{name_or_folder}: no such model folder; give a folder, or {SHIPPED!r} for the shipped one")
    return folder


def load(
    name_or_folder: str | Path = SHIPPED,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    compiled: bool = False,
    adapter: str | Path | None = None,
) -> VidLaDA:
    """Load a model.

    Args:
        name_or_folder: `tiny`, the model in the package, or a folder in our, the published or LLaDA-V layout.
        dtype: of the weights; `auto` is float32 on a CPU, and the stored type elsewhere.
        device: `cuda`, `cpu`, …; the first GPU by default, else the CPU.
        device_map: as in transformers, to spread a model over devices.
        quantization: of the language model's projections; see `vidlada.model.quantization`.
        compiled: let torch.compile fuse what cached steps run; the first steps take seconds longer.
        adapter: folder of a LoRA adapter for this model, to be merged into it. (An adapter's own folder may also be
            loaded by its name; its base is then the one it names.)

    Raises:
        InputError: there is no such folder, or it is not a checkpoint of this family.
    """
    device = usable_device(device)
    folder = model_folder(name_or_folder)
    if dtype == "auto" and device == "cpu":
        dtype = torch.float32
    checkpoint = describe(folder)
    if device_map is None:
        check_memory_of_weights(checkpoint, dtype, torch.device(device))
    places = {"device": device, "device_map": device_map, "checkpoint": checkpoint}
    if adapter is None:
        model = load_model(folder, dtype, **places)
    else:
        from vidlada.checkpoint.load import load_with_adapter

        model = load_with_adapter(model_folder(adapter), dtype, folder, **places)
    model.eval()
    model.language_model.pack()
    if quantization is not None:
        quantize(model.language_model, quantization)
    if compiled:
        model.language_model.compile_layers()
    processor = VidLaDAProcessor.from_config(load_tokenizer(folder), model.config)
    return VidLaDA(model, processor, str(name_or_folder))


def usable_device(device: str | None) -> str:
    """The device asked for, or the first GPU, or the CPU; `InputError` if this machine lacks it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
