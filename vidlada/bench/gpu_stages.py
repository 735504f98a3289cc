"""The stages of `vidlada.bench.gpu`: each gives cases, and every case figures, predicted and measured."""

import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, get_args

import torch
from torch import Tensor

from vidlada.bench.calibration import FEW, KEYS, MANY, attention_rate, bandwidth, host_seconds, products_rate
from vidlada.bench.count import CACHES, STOP, count_work, typical_step
from vidlada.bench.decoding import Run, measure
from vidlada.bench.gpu_session import SMALL, WARM_STEPS, Case, Figure, Session, Stage
from vidlada.bench.launches import launches_of
from vidlada.bench.paper import CACHES as PEERS
from vidlada.bench.sizes import random_model, random_request
from vidlada.decoding.sampler import Denoiser, Request, denoise
from vidlada.generation import GenerationSettings
from vidlada.machine import GIB, now, peak_memory, reset_peak_memory
from vidlada.model.config import VidLaDAConfig
from vidlada.model.quantization import Quantization, quantize
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.model.vision import Vision

PACE = 3  # tokens a step, of the faster pace
TOGETHER = (1, 4, 8, 16)


def machine_cases(session: Session) -> Iterator[Case]:
    """What predictions rest on."""
    device, text, kind = session.device_rates, session.text, (session.device, session.dtype)
    known = session.known_gpu is not None

    def rate(what: str, unit: str, scale: float, expected: float | None, run: Callable[[], float]) -> Case:
        return what, lambda: [Figure(what, unit, expected / scale if known and expected else None, run() / scale)]

    yield rate("element-wise operations", "GB/s", 1e9, device.bandwidth, lambda: bandwidth(*kind))
    yield rate(f"products of {MANY} rows", "TFLOP/s", 1e12, device.products, lambda: products_rate(text, MANY, *kind))
    # a product of few rows reads every weight for them: bytes decide
    skinny = 2.0 * FEW / session.dtype.itemsize * device.bandwidth
    yield rate(f"products of {FEW} rows", "TFLOP/s", 1e12, skinny, lambda: products_rate(text, FEW, *kind))
    for queries, expected in ((MANY, device.attention), (FEW, None)):
        yield rate(f"attention of {queries} queries to {KEYS} keys", "TFLOP/s", 1e12, expected,
                   partial(attention_rate, text, queries, KEYS, *kind))  # fmt: skip

    def host() -> list[Figure]:
        per_layer, per_step = host_seconds(*kind)
        return [Figure("launches of a layer", "ms", 1e3 * device.per_layer if known else None, 1e3 * per_layer),
                Figure("rest of a step", "ms", 1e3 * device.per_step if known else None, 1e3 * per_step)]  # fmt: skip

    yield "host", host


def vector_cases(session: Session) -> Iterator[Case]:
    """The recorded answers of the published code, token by token."""
    if not (session.tests / "data" / "mha.npz").exists():
        yield "recorded answers", lambda: [Figure("found", "of a checkout's tests/data", 1, 0)]
        return
    sys.path.insert(0, str(session.tests))
    vectors = import_module("vectors")

    def same(variant: str, name: str, **options: Any) -> list[Figure]:
        arrays, model = vectors.arrays(variant), vectors.load_reference_model(variant)
        model = model.to(session.device)
        prompt = torch.from_numpy(arrays["splice.embeds"])[0].to(session.device)
        settings = GenerationSettings(gen_length=32, noise="torch").replace(**options)
        *_, (_, state) = denoise(model, [Request(prompt, settings)])
        expected = arrays[name].reshape(-1).tolist()
        found = state.answer_ids()
        return [Figure("same ids", f"of {len(expected)}", len(expected),
                       sum(a == b for a, b in zip(found, expected, strict=False)))]  # fmt: skip

    for variant in vectors.VARIANTS:
        names = [name for name in vectors.arrays(variant) if name.startswith("generate.block")]
        for name in names:
            block, steps = (int(part[5:]) for part in name.removeprefix("generate.").split("_"))
            yield f"{variant} {name}", partial(same, variant, name, block_length=block, steps=steps)
        guided = {"block_length": 16, "steps": 16, "cfg_scale": 1.0}
        yield f"{variant} generate.cfg1", partial(same, variant, "generate.cfg1", **guided)


def policy_cases(session: Session) -> Iterator[Case]:
    """Every cache on the device, eagerly and over fixed buffers, against the CPU in float32."""
    models: dict[str, VidLaDAForMaskedDiffusion] = {}
    frames, per_frame = 12, 6

    def answer(device: str, cache: str, static: bool, dtype: torch.dtype) -> Any:
        if f"{device} {dtype}" not in models:
            # weights are made on the CPU, as every device draws other numbers
            made = random_model(SMALL, "cpu", torch.float32).to(device, dtype)
            made.language_model.pack()
            models[f"{device} {dtype}"] = made
        model = models[f"{device} {dtype}"]
        settings = GenerationSettings(gen_length=16, block_length=8, cache=cache, noise="torch")
        denoiser, states = Denoiser(model, static), []
        denoiser.add(random_request(model, per_frame, frames, settings))
        while denoiser.rows:
            states += [state for _, state in denoiser.step()]
        return states

    def compare(cache: str, static: bool, dtype: torch.dtype, reference: tuple[str, torch.dtype]) -> list[Figure]:
        found, expected = answer(session.device, cache, static, dtype), answer(reference[0], cache, False, reference[1])
        ids = [states[-1].proposed for states in (found, expected)]
        apart = max(float((a.confidence - b.confidence).abs().max()) for a, b in zip(found, expected, strict=True))
        return [Figure("same ids", "of 16", 16, int((ids[0] == ids[1]).sum())),
                Figure("largest difference of a probability", "", 0.0, apart)]  # fmt: skip

    for cache in CACHES:
        on_cpu = ("cpu", torch.float32)
        yield f"{cache}, eager", partial(compare, cache, False, torch.float32, on_cpu)
        if cache != "none":
            yield f"{cache}, fixed buffers", partial(compare, cache, True, torch.float32, on_cpu)
            same_type = (session.device, session.dtype)
            yield (f"{cache}, fixed buffers, {str(session.dtype).removeprefix('torch.')}, against eager there",
                   partial(compare, cache, True, session.dtype, same_type))  # fmt: skip


def count_cases(session: Session) -> Iterator[Case]:
    """Launches and waits of a usual step, counted on a pretended device and on this one."""

    def run_case(cache: str) -> list[Figure]:
        settings = session.settings(cache)
        steps = 8 if cache.startswith("mars") else 6
        _, work = count_work(session.size, cache, session.frames, session.slots, session.block, steps)
        expected = typical_step(work)
        denoiser = Denoiser(session.model, static=False)
        request = session.request(settings)
        denoiser.add(Request(request.prompt, settings, STOP, frame_index=request.frame_index))
        for _ in range(WARM_STEPS):
            denoiser.step()
        found = [launches_of(denoiser.step, session.device) for _ in range(steps - WARM_STEPS)]
        kernels, waits = (statistics.mode(values) for values in zip(*found, strict=True))
        on_gpu = session.device.startswith("cuda")
        counted = expected.kernels + (expected.combining if on_gpu else 0)
        return [Figure("kernels" if on_gpu else "operations", "a step", counted, kernels),
                Figure("waits of the host", "a step", expected.waits, waits if on_gpu else None)]  # fmt: skip

    for cache in CACHES:
        yield cache, partial(run_case, cache)


def speed_figures(session: Session, settings: GenerationSettings, run: Run, frames: int | None = None) -> list[Figure]:
    """Of one answer."""
    predicted, later = session.predict(settings, frames=frames), run.seconds[1:] or run.seconds
    steps = predicted[: len(run.seconds)]
    return [
        Figure("whole answer", "s", sum(steps), run.total),
        Figure("first step", "s", steps[0], run.seconds[0]),
        Figure("later step, median", "ms", 1e3 * statistics.median(steps[1:] or steps), 1e3 * statistics.median(later)),
        Figure("tokens a second", "", session.slots / sum(steps), session.slots / run.total),
        Figure("peak memory", "GiB", session.predict_peak(settings, frames=frames), run.peak / GIB),
    ]


def protocol_cases(session: Session) -> Iterator[Case]:
    """The paper's speed table: answers of 128 tokens in blocks of 32, one token a step, with ours and peers' caches;
    then at a faster pace, and with half of the frames."""

    def run_case(cache: str, pace: int, frames: int) -> list[Figure]:
        settings = session.settings(cache, pace)
        session.warm(settings)
        return speed_figures(session, settings, measure(session.model, session.request(settings, frames)), frames)

    half = max(1, session.frames // 2)
    order = [(cache, 1, session.frames) for cache in ("none", "mars", "mars:paper", "dual", "prefix")]
    order += [(cache, PACE, session.frames) for cache in ("mars", "mars:paper", "dual", "none")]
    order += [(cache, 1, half) for cache in ("none", "mars", "mars:paper")]
    order += [(cache, 1, session.frames) for cache in PEERS.values()]
    for cache, pace, frames in OrderedDict.fromkeys(order):
        yield f"{cache}, {pace} a step, {frames} frames", partial(run_case, cache, pace, frames)


def graph_cases(session: Session) -> Iterator[Case]:
    """A cached step eagerly, as captured graphs, by compiled layers, and both."""

    def run_case(cache: str, graphs: bool, compiled: bool) -> list[Figure]:
        settings, language_model = session.settings(cache), session.model.language_model
        plain = language_model.enter, language_model.leave
        if compiled:
            language_model.compile_layers()
        try:
            denoiser, seconds = Denoiser(session.model, graphs), list[float]()
            kinds = ("eager", "captures", "replays")
            before = [getattr(denoiser.graphs, kind, 0) for kind in kinds]
            reset_peak_memory(session.device)
            for _ in range(2):  # the second request meets what the first compiled
                denoiser.add(session.request(settings))
                while denoiser.rows:
                    started = now(session.device)
                    denoiser.step()
                    seconds.append(now(session.device) - started)
        finally:
            language_model.enter, language_model.leave = plain
        expected = session.predict(settings)[1:]
        own = seconds[len(seconds) // 2 :]
        found = [
            Figure("later step, median", "ms", 1e3 * statistics.median(expected), 1e3 * statistics.median(own[1:])),
            Figure("whole second answer", "s", sum(session.predict(settings)), sum(own)),
            Figure("slowest step but the first", "ms", None, 1e3 * max(own[1:])),
            Figure("peak memory", "GiB", None, peak_memory(session.device) / GIB),
        ]
        if denoiser.graphs is not None:
            found += [
                Figure(kind, "parts of layers", None, getattr(denoiser.graphs, kind) - count)
                for kind, count in zip(kinds, before, strict=True)
            ]
        return found

    for compiled in (False, True):
        for cache in ("mars", "dual", "frozen"):
            for graphs in (False, True):
                kind = [name for name, on in (("graphs", graphs), ("compiled", compiled)) if on]
                yield f"{cache}, {' and '.join(kind) or 'eager'}", partial(run_case, cache, graphs, compiled)


def weight_cases(session: Session) -> Iterator[Case]:
    """Steps with smaller weights; on a GPU they are compiled, as `vidlada.load` does."""

    def run_case(kind: Quantization | None, compiled: bool) -> list[Figure]:
        session.kept = None  # two models of 8B beside the copies of a conversion may be too much
        session.release()
        model = random_model(session.size.text_config, session.device, session.dtype)
        model.language_model.pack()
        if kind is not None:
            quantize(model.language_model.layers, kind)
        if compiled:
            model.language_model.compile_layers()
        session.release()
        settings = GenerationSettings(gen_length=session.block, block_length=session.block, cache="frozen")
        request = random_request(model, session.size.tokens_per_frame, session.frames, settings)
        measure(model, request)
        run = measure(model, request)
        expected = session.predict(settings) if kind is None else None
        return [
            Figure("first step", "s", expected[0] if expected else None, run.seconds[0]),
            Figure("later step, median", "ms", 1e3 * statistics.median(expected[1:]) if expected else None,
                   1e3 * statistics.median(run.seconds[1:])),
            Figure("peak memory", "GiB", None, run.peak / GIB),
        ]  # fmt: skip

    on_gpu = session.device.startswith("cuda")
    for kind in (None, *get_args(Quantization)):
        yield kind or "none", partial(run_case, kind, on_gpu and kind is not None)


def batch_cases(session: Session) -> Iterator[Case]:
    """Answers decoded together."""

    def run_case(cache: str, count: int) -> list[Figure]:
        settings = session.settings(cache)
        session.warm(settings, count)
        session.release()
        reset_peak_memory(session.device)
        denoiser = Denoiser(session.model)
        for _ in range(count):
            denoiser.add(session.request(settings))
        started, steps = now(session.device), list[float]()
        while denoiser.rows:
            before = now(session.device)
            denoiser.step()
            steps.append(now(session.device) - before)
        total, expected = now(session.device) - started, session.predict(settings, count)
        return [
            Figure("tokens a second, all", "", count * session.slots / sum(expected), count * session.slots / total),
            Figure("later step, median", "ms", 1e3 * statistics.median(expected[1:]),
                   1e3 * statistics.median(steps[1:])),
            Figure("peak memory", "GiB", session.predict_peak(settings, count), peak_memory(session.device) / GIB),
        ]  # fmt: skip

    for cache in ("mars", "dual"):
        for count in TOGETHER if session.size_name != "tiny" else TOGETHER[:2]:
            yield f"{cache}, {count} together", partial(run_case, cache, count)


def vision_cases(session: Session) -> Iterator[Case]:
    """Synthetic frames through a random tower of the published shape."""

    def run_case() -> list[Figure]:
        tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape = tiny if session.size_name == "tiny" else {}
        published = VidLaDAConfig().vision.to_dict()
        config = VidLaDAConfig(text_config=session.text.to_dict(), vision_config={**published, **shape})
        with torch.device(session.device):
            vision = Vision(config).to(session.dtype).eval()
        side, seconds = int(config.vision.image_size), list[float]()
        frames = torch.randint(0, 256, (session.frames, 3, side, side), dtype=torch.uint8)

        @torch.inference_mode()
        def encode() -> Tensor:
            pixels = frames.to(session.device).to(session.dtype) / 127.5 - 1
            return torch.cat([vision.project(part) for part in pixels.split(16)])

        for _ in range(3):
            started = now(session.device)
            encode()
            seconds.append(now(session.device) - started)
        tower = config.vision
        patches = session.frames * config.patches_per_side**2
        work = 2.0 * patches * tower.num_hidden_layers * tower.hidden_size * (
            4 * tower.hidden_size + 2 * tower.intermediate_size + 2 * config.patches_per_side**2
        )  # fmt: skip
        return [Figure(f"{session.frames} frames", "s", work / session.device_rates.products, min(seconds[1:]))]

    yield "tower", run_case


STAGES = {
    "machine": Stage("What the predictions rest on.", 2, machine_cases),
    "vectors": Stage("Answers recorded from the published code, in float32.", 2, vector_cases),
    "policies": Stage("Every cache on a small random model: on this device against the CPU.", 4, policy_cases),
    "counts": Stage("A usual step of each cache, eager.", 4, count_cases),
    "protocol": Stage("The paper's protocol; full recompute is `none`.", 12, protocol_cases),
    "graphs": Stage("CUDA graphs and torch.compile.", 4, graph_cases),
    "weights": Stage("Quantised weights.", 5, weight_cases),
    "batch": Stage("Answers decoded together.", 4, batch_cases),
    "vision": Stage("The vision tower.", 1, vision_cases),
}
