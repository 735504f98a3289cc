"""The model as lmms-eval calls it. Importing this file needs lmms-eval; nothing else in the package imports it."""

import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vidlada.conversation import EncodedVideo
from vidlada.errors import InputError
from vidlada.evaluation.answering import Answerer, Media, Question, Reply
from vidlada.evaluation.arguments import ModelArguments, generation_settings
from vidlada.evaluation.benchmarks import video_of
from vidlada.evaluation.folder import RECORD_FOLDER, open_record
from vidlada.evaluation.likelihood import is_greedy, negative_log_likelihood
from vidlada.generation import GenerationSettings
from vidlada.images import open_images, to_rgb
from vidlada.loading import load
from vidlada.messages import VIDEO_PLACE
from vidlada.processor import VidLaDAProcessor

Messages = list[dict[str, Any]]
TASK_ERRORS = (Exception, SystemExit)  # tasks raise whatever they like for a missing or broken video


class VidLaDAChat(lmms):
    """`--model vidlada`, asked with messages.

    Args:
        arguments: `ModelArguments`, and lmms-eval's `batch_size`, `max_batch_size` and `device`.
    """

    is_simple = False

    def __init__(self, max_batch_size: Any = None, **arguments: Any):
        super().__init__()
        if max_batch_size is not None:
            raise InputError("max_batch_size is of automatic batch sizes, which there are none; give batch_size")
        self.arguments = ModelArguments.from_dict(arguments)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        given = self.arguments
        device = str(self.accelerator.device) if self._world_size > 1 else given.device
        if given.device is not None and torch.device(given.device).type != torch.device(device or "cpu").type:
            raise InputError(f"device {given.device} was asked for, but accelerate runs its processes on {device}")
        self.vidlada = load(
            given.pretrained, given.dtype, device, quantization=given.quantization, compiled=given.compiled,
            adapter=given.adapter,
        )  # fmt: skip
        self.answerer = Answerer(
            self.vidlada, given.sampling, given.batch_size,
            time_instruction=given.add_time_instruction, system=given.system_prompt,
        )  # fmt: skip
        self.defaults = self.vidlada.settings(**given.decoding)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts the tensors it gathers."""
        return self.accelerator.device

    def settings(self, arguments: dict[str, Any]) -> GenerationSettings:
        """Decoding settings of a request."""
        return generation_settings(self.defaults, arguments, self.arguments.decoding)

    def question(self, messages: Messages, arguments: dict[str, Any]) -> Question:
        """A request's messages as a question; what cannot be asked carries its error."""
        settings = self.settings(arguments)
        try:
            text, media = read_messages(messages, self.vidlada.processor)
        except InputError as error:
            return Question(settings=settings, error=str(error))
        return Question(text, media, settings, read_choices(messages))

    def document(self, task: str, split: str, doc_id: int) -> dict[str, Any]:
        """A row of the benchmark."""
        return self.task_dict[task][split][doc_id]

    def read_request(self, request: Instance) -> Question:
        """The question of a generation request."""
        _, to_messages, arguments, doc_id, task, split = request.args
        document = self.document(task, split, doc_id)
        try:
            messages = to_messages(document)
        except TASK_ERRORS as error:
            return missing_video(task, document, error, self.settings(arguments))
        return self.question(messages, arguments)

    def generate_until(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        """Answers, one by one as they come, so that the response cache holds all of them when a run is interrupted."""
        questions = [self.read_request(request) for request in requests]
        with Record(self._rank, self.document) as record, self.bar(len(requests)) as bar:
            replies = self.answerer.replies(questions)
            for request, question, reply in zip(requests, questions, replies, strict=True):
                record.add(request, question, reply)
                bar.update(1)
                yield GenerationResult(reply.text, TokenCounts(output_tokens=reply.tokens))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Iterator[list[str]]:
        """Answers of every round of conversations."""
        with Record(self._rank, self.document) as record, self.bar(len(requests)) as bar:
            for request in requests:
                started = time.perf_counter()
                rounds = list(self.rounds(request))
                replies = [reply for _, reply in rounds]
                spent = Reply(
                    tokens=sum(reply.tokens for reply in replies),
                    forward_passes=sum(reply.forward_passes for reply in replies),
                    seconds=time.perf_counter() - started,
                    error=next((reply.error for reply in replies if reply.error is not None), None),
                )
                record.add(request, rounds[0][0] if rounds else Question(), spent)
                bar.update(1)
                yield [reply.text for reply in replies]

    def rounds(self, request: Instance) -> Iterator[tuple[Question, Reply]]:
        """Questions and replies of a conversation; the task words each from the replies before it.

        A video is encoded once; later rounds go on about the video of the first. After a round that failed the others
        have no answers: they would be asked about something else.
        """
        _, to_messages, arguments, doc_id, task, split = request.args
        document = self.document(task, split, doc_id)
        answers: list[str] = []
        seen: dict[Hashable, tuple[Media, list[EncodedVideo] | str]] = {}
        information, error = None, None
        while True:
            try:
                messages, finished, _, information = to_messages(
                    document, round_idx=len(answers), previous_output=answers, previous_round_info=information
                )
            except TASK_ERRORS as failure:
                question = missing_video(task, document, failure)
                yield question, Reply(error=question.error)
                return
            if finished:
                return
            question = self.question(messages, arguments)
            if question.media is None and seen:
                question = replace(question, media=next(iter(seen.values()))[0])
            error = error or question.error
            if error is None:
                if question.video_key not in seen:
                    seen[question.video_key] = (question.media, self.encode(question.media, question.settings))
                reply = self.answerer.ask(question, seen[question.video_key][1])
                error = reply.error
            else:
                reply = Reply(error=error)
            yield question, reply
            answers = [*answers, reply.text]

    def encode(self, media: Media, settings: GenerationSettings) -> list[EncodedVideo] | str:
        """Visual tokens, or why there are none."""
        try:
            return self.vidlada.encode_media(self.answerer.decode(media, settings))
        except InputError as error:
            return str(error)

    def loglikelihood(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        """Only simple tasks ask for it."""
        raise InputError("tasks that compare likelihoods are not asked with messages; add --force_simple")

    def bar(self, total: int) -> Any:
        """Progress, in the first process."""
        return tqdm(total=total, disable=self._rank != 0, desc="answers")


class VidLaDASimple(VidLaDAChat):
    """`--model vidlada --force_simple`: the older interface, which tasks that compare likelihoods need."""

    is_simple = True

    def read_request(self, request: Instance) -> Question:
        text, arguments, to_visual, doc_id, task, split = request.args
        return self.simple_question(text, to_visual, arguments, self.document(task, split, doc_id), task)

    def simple_question(
        self, text: str, to_visual: Any, arguments: dict[str, Any], document: dict[str, Any], task: str
    ) -> Question:
        """Text and visuals as a question."""
        try:
            visuals = to_visual(document) or []
        except TASK_ERRORS as error:
            return missing_video(task, document, error, self.settings(arguments))
        parts = [{"type": "video" if isinstance(visual, str) else "image", "url": visual} for visual in visuals]
        return self.question([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], arguments)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Iterator[list[str]]:
        """Conversations are asked with messages only."""
        raise InputError("tasks of several rounds are asked with messages; leave --force_simple out")

    def loglikelihood(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        """For every continuation the bound of its negative log-likelihood: lmms-eval's tasks take the smallest.

        What cannot be computed is infinite. lmms-eval 0.7.3 turns a bare pair into text, but hands on what a
        `GenerationResult` holds; its response cache holds text only.
        """
        seen: dict[Any, list[EncodedVideo] | str] = {}
        model, given = self.vidlada.model, self.arguments
        with Record(self._rank, self.document) as record, self.bar(len(requests)) as bar:
            for request in requests:
                text, continuation, to_visual, doc_id, task, split = request.args
                question = self.simple_question(text, to_visual, {}, self.document(task, split, doc_id), task)
                if question.video_key not in seen and question.error is None:
                    seen = {
                        question.video_key: self.encode(question.media, question.settings)
                    }  # a video's requests come together
                video = seen.get(question.video_key, "")
                value, greedy, error = float("inf"), False, question.error
                try:
                    if isinstance(video, str):
                        raise InputError(question.error or video)
                    prompt = (
                        self.vidlada.chat(video, think=question.settings.think, **self.answerer.options)
                        .request(question.text)
                        .prompt
                    )
                    ids = self.vidlada.processor.text_ids(continuation.strip())
                    value = negative_log_likelihood(
                        model, prompt, ids, given.mc_num, given.batch_size_ppl, given.mc_seed
                    )
                    greedy = given.is_check_greedy and is_greedy(model, prompt, ids)
                except InputError as failure:
                    error = str(failure)
                record.add(request, question, Reply(error=error))
                bar.update(1)
                yield GenerationResult((value, greedy))


def missing_video(
    task: str, document: dict[str, Any], error: BaseException, settings: GenerationSettings | None = None
) -> Question:
    """What becomes of a question whose video the task does not find or cannot read; some do not say which one."""
    path = video_of(task, document)
    why = " ".join(str(error).split()) or f"{path or 'its video'} is not there"
    return Question(media=path, settings=settings or GenerationSettings(), error=why)


def read_messages(messages: Messages, processor: VidLaDAProcessor) -> tuple[str, Media]:
    """Text and visual part of a task's messages.

    Videos and images stand in front of the text, in the order of the messages, or in the places of as many marks in
    it. To a model that sees images as frames, several images without such places are the frames of one video.

    Raises:
        InputError: sound, a part of a video, or what only a conversation has.
    """
    parts = [part for message in messages for part in message["content"]]
    if any(part["type"] == "audio" for part in parts):
        raise InputError("the task gives sound; the model sees only video")
    if any(message["role"] != "user" for message in messages):
        raise InputError("the task gives a conversation; the model is asked one question")
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    shown = [(part["type"], part["url"]) for part in parts if part["type"] in ("image", "video")]
    strange = [url for kind, url in shown if kind == "video" and not isinstance(url, str)]
    if strange:
        raise InputError(f"the task gives {type(strange[0]).__name__} for a video instead of its path")
    images = sum(kind == "image" for kind, _ in shown)
    if processor.tiling.as_frames and images == len(shown) > 0 and text.count(VIDEO_PLACE) != images:
        size = (processor.image_size,) * 2
        frames = [Image.fromarray(picture(url)).resize(size, Image.Resampling.BICUBIC) for _, url in shown]
        return text, np.stack([np.asarray(frame) for frame in frames])
    media = tuple(picture(url) if kind == "image" else url for kind, url in shown)
    return text, media[0] if len(media) == 1 else media or None


def read_choices(messages: Messages) -> tuple[str, ...] | None:
    """Answers to choose from, which a part of our own tasks' messages may name."""
    choices = [part["choices"] for message in messages for part in message["content"] if part.get("choices")]
    return tuple(choices[0]) if choices else None


def picture(image: Any) -> np.ndarray:
    """(height, width, 3) uint8 of an image or its path."""
    return open_images(image)[0] if isinstance(image, str) else to_rgb(image)


class Record:
    """What every sample cost and which failed, one JSON object a line, where `RECORD_FOLDER` says; else nowhere."""

    def __init__(self, rank: int, document: Callable[[str, str, int], dict[str, Any]]):
        self.rank, self.document = rank, document
        self.file: TextIO | None = None

    def __enter__(self) -> "Record":
        folder = os.environ.get(RECORD_FOLDER)
        if folder:
            self.file = open_record(Path(folder), self.rank)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, request: Instance, question: Question, reply: Reply) -> None:
        """Note a sample."""
        if reply.error is not None:
            tqdm.write(f"{request.task_name} {request.doc_id}: {reply.error}")
        if self.file is None:
            return
        video = question.media
        if not isinstance(video, str):  # a task may show a video as pictures
            *_, doc_id, task, split = request.args
            video = video_of(task, self.document(task, split, doc_id))
        entry = {
            "task": request.task_name, "doc_id": request.doc_id, "video": video, "tokens": reply.tokens,
            "forward_passes": reply.forward_passes, "seconds": round(reply.seconds, 4), "error": reply.error,
            "time": time.time(),
        }  # fmt: skip
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
