"""The Python interface: load a model, encode a video, ask."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.checkpoint.load import describe, load_model, load_tokenizer, save_model
from vidlada.checkpoint.publish import upload
from vidlada.decoding.cache import VisualCache
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser, Request, State, Statistics
from vidlada.decoding.scoring import score_answers
from vidlada.decoding.streaming import StableText, stable_text
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.info import check_memory, check_memory_of_weights, memory_need
from vidlada.model.hub import local_folder, with_revision
from vidlada.model.quantization import Quantization, quantize
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import EncodedConversation, Message, VidLaDAProcessor, time_instruction
from vidlada.settings import check_unicode, settings_of
from vidlada.video import Frames, Sampling, VideoInfo, sample_frames

SHIPPED = "tiny"
PIECE_CONTEXT = 8  # tokens before a token that may change its text


@dataclass(frozen=True)
class EncodedVideo:
    """A video as visual tokens: any number of questions may be asked about it without encoding it again.

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
        choices: probability of each answer that was given to choose from, relative to the others.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    frame_times: tuple[float, ...]
    statistics: Statistics
    settings: GenerationSettings = field(repr=False)
    choices: dict[str, float] | None = None

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
        sampling: Sampling | None = None,
        **options: Any,
    ) -> EncodedVideo:
        """Sample a video and run the vision tower over it.

        Args:
            video: a file, a folder of images, an image, frames already sampled, or a uint8 array
                (frames, height, width, 3) taken at the sampling's `fps`; None for no video at all.
            sampling: which frames to take.
            options: instead, `frames`, `fps`, `force_sample` of `Sampling`.

        Raises:
            InputError: the video cannot be used.
        """
        if isinstance(video, EncodedVideo):
            return video
        if sampling is None:
            sampling = Sampling(**{SAMPLING_OPTIONS[name]: value for name, value in options.items()})
        if video is None:
            width = self.model.language_model.config.hidden_size
            return EncodedVideo(torch.empty(0, width, device=self.model.device), (), None, {})
        if self.model.config.text_only:
            raise InputError(f"{self.name} is a text-only checkpoint; it cannot see videos")
        started = time.perf_counter()
        info = None
        if isinstance(video, np.ndarray):
            images, times = video, tuple(i / sampling.fps for i in range(len(video)))
            if len(images) == 0:
                raise InputError("the video array holds no frames")
        else:
            if not isinstance(video, Frames):
                video = sample_frames(video, sampling, size=self.processor.image_size)
            images, times, info = video.images, video.times, video.info
        decoded = time.perf_counter()
        self._check_memory(len(images), self.settings())
        with torch.inference_mode():
            pixels = self.processor.pixel_values(images, self.model.device, self.model.dtype)
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
        parse_policy(settings.cache)  # an unknown policy is refused before any work starts
        return settings

    def ask(self, video: Any, question: str, choices: Sequence[str] | None = None, **options: Any) -> Answer:
        """Answer one question about a video.

        Args:
            video: what `encode_video` takes; an `EncodedVideo` is not encoded again.
            question: text.
            choices: answer with the likeliest of these, found in one pass, instead of decoding.
            options: `frames`, `fps`, `force_sample` of `Sampling`, all of `PromptSettings` and `GenerationSettings`.

        Raises:
            InputError: the video, the question or an option cannot be used.
        """
        return self.chat(video, **options).ask(question, choices)

    def stream(self, video: Any, question: str, **options: Any) -> Iterator[Draft]:
        """As `ask`, but yields a draft after every denoising step."""
        return self.chat(video, **options).stream(question)

    def chat(self, video: Any, **options: Any) -> "Conversation":
        """Several questions about one video, which is encoded once; options as for `ask`."""
        sampling, prompt, generation = split_options(options)
        settings = self.settings(**generation)
        return Conversation(self, self.encode_video(video, sampling), settings, prompt)

    def ask_many(
        self,
        questions: Sequence[tuple[Any, str]],
        choices: Sequence[Sequence[str] | None] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer several questions, each about its own video, in one padded batch.

        Args:
            questions: pairs of a video (as for `encode_video`) and a question; a video given several times as the same
                object is encoded once.
            choices: of each question, as for `ask`; None for one that is decoded.
            options: as for `ask`.
        """
        sampling, prompt, generation = split_options(options)
        settings = self.settings(**generation)
        encoded: dict[int, EncodedVideo] = {}
        for video, _ in questions:
            if id(video) not in encoded:
                encoded[id(video)] = self.encode_video(video, sampling)
        chats = [Conversation(self, encoded[id(video)], settings, prompt) for video, _ in questions]
        answers: dict[int, Answer] = {}
        decoded: list[int] = []
        for number, own in enumerate(choices or [None] * len(questions)):
            if own is None:
                decoded.append(number)
            else:
                answers[number] = chats[number].choose(questions[number][1], own)
        requests = [chats[number].request(questions[number][1]) for number in decoded]
        for place, state, stable in self.decode(requests):
            if stable.finish_reason is not None:
                answers[decoded[place]] = chats[decoded[place]].answer(state, stable)
        return [answers[number] for number in range(len(questions))]

    def decode(self, requests: Sequence[Request]) -> Iterator[tuple[int, State, StableText]]:
        """Decode requests together until the text of each is complete.

        Yields:
            Place of a request in `requests`, its state after a step, and the text that can no longer change; the last
            one of a request has a finish reason.
        """
        denoiser = Denoiser(self.model)
        states = []
        for request in requests:
            number, state = denoiser.add(request)
            states += [] if state is None else [(number, state)]
        while states or denoiser.rows:
            for number, state in states or denoiser.step():
                request = requests[number]
                stable = stable_text(state, self.processor.decode, request.stop_sequences, request.settings.stop)
                if stable.finish_reason is not None:
                    denoiser.remove(number)
                yield number, state, stable
            states = []

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


def split_options(options: dict[str, Any]) -> tuple[Sampling, PromptSettings, dict[str, Any]]:
    """Options of `ask` as how to sample frames, what to put into the prompt, and generation settings.

    Raises:
        InputError: an option is unknown or out of bounds.
    """
    options = {**options, **options.get("generation", {})}
    options.pop("generation", None)
    sampling = {name: options.pop(option) for option, name in SAMPLING_OPTIONS.items() if option in options}
    prompt = {name: options.pop(name) for name in settings_of(PromptSettings) if name in options}
    unknown = sorted(set(options) - set(settings_of(GenerationSettings)))
    if unknown:
        known = sorted([*SAMPLING_OPTIONS, *settings_of(PromptSettings), *settings_of(GenerationSettings)])
        raise InputError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
    return Sampling(**sampling), PromptSettings(**prompt), options


class Conversation:
    """Questions and answers about one video.

    Args:
        vidlada: the model.
        video: already encoded.
        settings: of decoding.
        prompt: what is put beside the question.
    """

    def __init__(
        self,
        vidlada: VidLaDA,
        video: EncodedVideo,
        settings: GenerationSettings,
        prompt: PromptSettings | None = None,
    ):
        self.vidlada, self.video, self.settings = vidlada, video, settings
        self.prompt = prompt or PromptSettings()
        self.visual: VisualCache | None = None  # of the last answer, with `reuse`
        self.messages: list[Message] = (
            [] if self.prompt.system is None else [{"role": "system", "content": self.prompt.system}]
        )

    def request(self, question: str) -> Request:
        """What the decoding loop needs to answer the next question."""
        counts = [len(self.video.times)] if self.video.times else []
        self.vidlada._check_memory(sum(counts), self.settings)
        encoded = self.vidlada.processor.encode([*self.messages, self._user(question)], counts)
        return replace(self.vidlada.request(encoded, self.video.visual_tokens, self.settings), visual=self.visual)

    def _user(self, question: str) -> Message:
        check_unicode("the question", question)
        if not question.strip():
            raise InputError("the question is empty; ask something about the video")
        if not self.video.times or any(message["role"] == "user" for message in self.messages):
            return {"role": "user", "content": question}
        if self.prompt.time_instruction:
            question = f"{time_instruction(self.video.times, self.video.duration)}\n{question.strip()}"
        return {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}

    def stream(self, question: str) -> Iterator[Draft]:
        """Answer the next question, yielding a draft after every step.

        Models trained on conversations (`config.multi_turn`) see the earlier questions and answers.
        """
        for state in self._states(question):
            yield self.draft(state)

    def _states(self, question: str) -> Iterator[State]:
        """The states of the next answer, which is kept once it is complete."""
        for _, state, stable in self.vidlada.decode([self.request(question)]):
            if stable.finish_reason is not None:
                self.last, self.visual = self.answer(state, stable), state.visual
            yield state
        self._remember(question)

    def ask(self, question: str, choices: Sequence[str] | None = None) -> Answer:
        """Answer the next question, with one of the choices if there are any."""
        if choices is not None:
            self.last = self.choose(question, choices)
            self._remember(question)
            return self.last
        for _ in self._states(question):  # drafts cost time, and nobody sees them
            pass
        return self.last

    def choose(self, question: str, choices: Sequence[str]) -> Answer:
        """The likeliest of several answers, found in one pass; of the settings only `gen_length` matters.

        Raises:
            InputError: there is no choice, an empty one, or one twice.
        """
        if not choices or not all(choice.strip() for choice in choices) or len(set(choices)) < len(choices):
            raise InputError(f"choices must be different answers, none of them empty, not {list(choices)}")
        started = time.perf_counter()
        request = self.request(question)
        ids = [self.vidlada.processor.text_ids(choice) for choice in choices]
        scores = score_answers(self.vidlada.model, request.prompt, ids, self.settings.gen_length)
        best = int(scores.argmax())
        seconds = {**self.video.seconds, "scoring": time.perf_counter() - started}
        return Answer(
            text=choices[best],
            token_ids=ids[best],
            finish_reason="stop",
            frame_times=self.video.times,
            statistics=Statistics(forward_passes=1, seconds=seconds),
            settings=self.settings,
            choices=dict(zip(choices, scores.softmax(0).tolist(), strict=True)),
        )

    def _remember(self, question: str) -> None:
        """Models trained on conversations see the earlier turns."""
        if self.vidlada.model.config.multi_turn:
            self.messages += [self._user(question), {"role": "assistant", "content": self.last.text}]

    def draft(self, state: State) -> Draft:
        """A state as text."""
        return self.vidlada.draft(state)

    def answer(self, state: State, stable: StableText) -> Answer:
        """A finished state and its text as an answer."""
        return Answer(
            text=stable.text + self.settings.suffix,
            token_ids=state.answer_ids()[: stable.tokens],
            finish_reason=stable.finish_reason or "length",
            frame_times=self.video.times,
            statistics=state.statistics.with_seconds(self.video.seconds),
            settings=self.settings,
        )


def model_folder(name_or_folder: str | Path, revision: str | None = None, what: str = "model") -> Path:
    """Folder of a model or adapter given by name; `InputError` if there is none.

    Args:
        name_or_folder: `tiny`, the model in the package; a folder; or a name of the Hugging Face hub, `owner/name` or
            `owner/name@revision`, which is downloaded into the hub's cache.
        revision: of a name of the hub: a branch, tag or commit.
        what: is looked for, for messages.
    """
    if str(name_or_folder) == SHIPPED and revision is None:
        return Path(__file__).parent / "weights" / SHIPPED
    return local_folder(with_revision(str(name_or_folder), revision), what)


def load(
    name_or_folder: str | Path = SHIPPED,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    compiled: bool = False,
    graphs: bool | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
) -> VidLaDA:
    """Load a model.

    Args:
        name_or_folder: `tiny`, the model in the package; a folder in our, the published or the text-only layout; or a
            name of the Hugging Face hub, `owner/name` or `owner/name@revision`.
        dtype: of the weights; `auto` is float32 on a CPU, and the stored type elsewhere.
        device: `cuda`, `cpu`, …; the first GPU by default, else the CPU.
        device_map: as in transformers, to spread a model over devices.
        quantization: of the language model's projections; see `vidlada.model.quantization`.
        compiled: let torch.compile fuse what cached steps run; the first steps take seconds longer.
        graphs: replay repeated cached passes as CUDA graphs; by default on a GPU. Elsewhere they run over the same
            fixed buffers without one, which is of use only in tests.
        adapter: folder or name of a LoRA adapter for this model, to be merged into it. (An adapter may also be loaded
            by its own name; its base is then the one it names.)
        revision: of a name of the hub: a branch, tag or commit.

    Raises:
        InputError: there is no such folder, or it is not a checkpoint of this family.
        VidLaDAError: the hub cannot be reached.
    """
    device = usable_device(device)
    folder = model_folder(name_or_folder, revision)
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

        model = load_with_adapter(model_folder(adapter, what="adapter"), dtype, folder, **places)
    model.eval()
    model.language_model.pack()
    model.language_model.static = graphs
    if quantization is not None:
        quantize(model.language_model, quantization)
    if compiled:
        model.language_model.compile_layers()
    processor = VidLaDAProcessor.from_config(load_tokenizer(folder), model.config)
    return VidLaDA(model, processor, with_revision(str(name_or_folder), revision))


def usable_device(device: str | None) -> str:
    """The device asked for, or the first GPU, or the CPU; `InputError` if this machine lacks it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
