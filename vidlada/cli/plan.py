"""The command `plan`: what a model would need and reach on a GPU."""

import json

import click

from vidlada.cli.options import one_line_errors
from vidlada.generation import GenerationSettings
from vidlada.video import Sampling


@click.command("plan")
@click.option(
    "--model",
    default="8b",
    show_default=True,
    help="8b: VidLaDA-8B's shape; mid: that of the benchmarks on a CPU; or a checkpoint.",
)
@click.option("--gpu", default="h200", show_default=True,
              help="a100, h100, h200, rtx4090; or cpu, this machine's, measured for some seconds first.")  # fmt: skip
@click.option("--frames", type=click.IntRange(1), default=Sampling.max_frames, show_default=True, help="Of a video.")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Answers decoded together.")
@click.option("--cache", default="mars", show_default=True, help="As for ask.")
@click.option("--quantize", "quantization", help="The layers' weights, as for ask.")
@click.option("--kv-dtype", default=GenerationSettings.kv_dtype, show_default=True, help="As for ask.")
@click.option(
    "--visual-keep", type=float, default=GenerationSettings.visual_keep, show_default=True, help="As for ask."
)
@click.option("--gen-length", type=click.IntRange(1), default=GenerationSettings.gen_length, show_default=True,
              help="Answer slots.")  # fmt: skip
@click.option("--block-length", type=click.IntRange(1), default=GenerationSettings.block_length, show_default=True,
              help="Decoded together.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Of an answer; one a slot by default.")
@click.option("--questions-per-hour", type=click.FloatRange(0, min_open=True), help="How many GPUs would answer them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def plan(
    model: str, gpu: str, frames: int, concurrency: int, cache: str, quantization: str | None, kv_dtype: str,
    visual_keep: float, gen_length: int, block_length: int, steps: int | None, questions_per_hour: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Predict memory, latency and throughput on a GPU, without one, or on this CPU."""
    from vidlada.bench.calibration import calibrate
    from vidlada.bench.roofline import CPU, model_parameters, plan_figures, plan_text
    from vidlada.bench.sizes import SIZES, size_config
    from vidlada.checkpoint.load import describe
    from vidlada.info import parameter_count
    from vidlada.model.config import VidLaDAConfig
    from vidlada.model.hub import model_folder

    visual = None
    if model == "8b":
        config = VidLaDAConfig()
        parameters = model_parameters(config)
    elif model in SIZES:
        config, visual = size_config(SIZES[model].text_config), frames * SIZES[model].tokens_per_frame
        parameters = model_parameters(config)
    else:
        checkpoint = describe(model_folder(model))
        config, parameters = checkpoint.config, parameter_count(checkpoint)
    settings = GenerationSettings(
        gen_length=gen_length, block_length=block_length, steps=steps, cache=cache,
        kv_dtype=kv_dtype, visual_keep=visual_keep,  # type: ignore[arg-type]
    )  # fmt: skip
    device = calibrate(config.text) if gpu == CPU else None
    figures = plan_figures(
        config, parameters, gpu, frames, concurrency, settings, questions_per_hour, visual, device, quantization
    )
    click.echo(json.dumps(figures) if as_json else plan_text(figures))
