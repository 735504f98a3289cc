"""Several processes as one: the accelerator a run asks for, and what keeps processes in step."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from vidlada.errors import InputError, VidLaDAError
from vidlada.training.config import TrainingConfig

SHARDED_LAYERS = ["Layer", "SiglipEncoderLayer"]


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run.

    Args:
        config: `parallel` says how several processes share the work; with `auto`, the environment that
            `accelerate launch` sets does.

    Raises:
        InputError: the engine asked for is not installed, or does not go with the optimizer.
    """
    arguments = {}
    if config.parallel == "fsdp":
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=SHARDED_LAYERS,
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
    elif config.parallel in ("zero2", "zero3"):
        try:
            arguments["deepspeed_plugin"] = DeepSpeedPlugin(
                zero_stage=int(config.parallel[-1]),
                gradient_clipping=config.gradient_clip,
                zero3_save_16bit_model=True,
                zero3_init_flag=False,
            )
        except (ImportError, ValueError) as error:
            raise InputError(f"parallel: {config.parallel} needs DeepSpeed: pip install deepspeed") from error
        plugin = arguments["deepspeed_plugin"]
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    on_cpu = not torch.accelerator.is_available()
    zero = config.parallel in ("zero2", "zero3")
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
        # without it, accelerate does not join processes on a machine without GPU; with it, it does not use DeepSpeed
        cpu=on_cpu and not zero,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and zero else [],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        **arguments,
    )
    plugin = arguments.get("fsdp_plugin")
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards over GPUs only, though what it does then works on CPUs too; so it is tested there
        if config.precision != "no":
            plugin.set_mixed_precision(config.precision)
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if config.optimizer == "muon" and is_sharded(accelerator):
        raise InputError("optimizer: muon needs whole matrices, which this launch splits; use adamw")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs backward passes, clips and updates."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def on_main(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Let the main process do something while the others wait; what goes wrong there is raised in all.

    Raises:
        VidLaDAError: as the action did, or for the OSError it raised.
    """
    problem: list[VidLaDAError | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except VidLaDAError as error:
            problem = [error]
        except OSError as error:
            problem = [VidLaDAError(f"{error.filename or Path.cwd()}: cannot be written: {error.strerror or error}")]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]


def total(accelerator: Accelerator, figures: list[float]) -> list[float]:
    """Sums over all processes."""
    if accelerator.num_processes == 1:
        return figures
    # not float64 on every device: counts stay exact in float32 up to 16 million
    summed = accelerator.reduce(torch.tensor(figures, dtype=torch.float32, device=accelerator.device), "sum")
    return summed.tolist()


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something holds in at least one process."""
    return total(accelerator, [float(here)])[0] > 0
