"""Several processes as one: the accelerator a run asks for, and what keeps processes in step."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule

from vidlada.errors import InputError, VidLaDAError
from vidlada.model.parallel import free_port
from vidlada.training.config import TrainingConfig
from vidlada.training.precision import RUN_TYPES, run_precision

Engine = Literal["ddp", "fsdp", "deepspeed"]
Result = TypeVar("Result")
GONE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|process group|TCPStore", re.IGNORECASE)
SOURCE_PLACE = re.compile(r"^\[[^\]]*\.(cc|cpp|h|cu):\d+\] ")

SHARDED_LAYERS = ["Layer", "SiglipEncoderLayer"]


class LostPeer(VidLaDAError):  # noqa: N818 - what happened
    """Another process of the launch has ended; this one cannot go on alone."""

    def __init__(self, reason: str):
        super().__init__(
            f"another process of this launch has ended ({reason}); its own messages say why. Continue with --resume"
        )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run.

    Args:
        config: `parallel` says how several processes share the work; with `auto`, the environment that
            `accelerate launch` sets does. Precision, clipping and accumulation are always the run's own.

    Raises:
        InputError: the engine asked for is not installed, is configured for something the run cannot do,
            or does not go with the optimizer; or fp16 is asked for without a GPU.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and config.precision == "fp16":  # accelerate would compute in float32 without a word
        raise InputError('precision: fp16 needs a GPU, and none is here; use bf16, or "no" for float32')
    engine = engine_of(config)
    fsdp = fsdp_plugin(config) if engine == "fsdp" else None
    zero = deepspeed_plugin(config) if engine == "deepspeed" else None
    if zero is not None and "LOCAL_RANK" not in os.environ:
        launch_alone()
    accelerator = Accelerator(
        mixed_precision=run_precision(config),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
        # without it, accelerate does not join processes on a machine without GPU; with it, it does not use DeepSpeed
        cpu=on_cpu and zero is None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and zero is not None else [],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        fsdp_plugin=fsdp,
        deepspeed_plugin=zero,
    )
    if fsdp is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards over GPUs only, though what it does then works on CPUs too; so it is tested there
        if accelerator.mixed_precision != "no":
            fsdp.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp
    if config.optimizer == "muon" and is_sharded(accelerator):
        raise InputError("optimizer: muon needs whole matrices, which this launch splits; use adamw")
    if any(stage.collate.tokens_per_row for stage in config.stages) and is_sharded(accelerator):
        raise InputError("tokens_per_row: processes would need as many rows, since this launch splits the model")
    return accelerator


def launch_alone() -> None:
    """Set what a launcher would for a single process: DeepSpeed does not begin without it."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()})


def engine_of(config: TrainingConfig) -> Engine:
    """What shares the work: as the run says, or as `accelerate launch` was configured; `InputError` if they differ."""
    launched: Engine = "ddp"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        launched = "fsdp"
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        launched = "deepspeed"
    if config.parallel == "auto":
        return launched
    wanted: Engine = "ddp" if config.parallel == "ddp" else "fsdp" if config.parallel == "fsdp" else "deepspeed"
    if launched not in ("ddp", wanted):
        raise InputError(
            f"parallel: {config.parallel}, but accelerate launch is configured for {launched}; use parallel: auto"
        )
    return wanted


def fsdp_plugin(config: TrainingConfig) -> FullyShardedDataParallelPlugin:
    """Settings of FSDP2: ours, or those of `accelerate launch`."""
    if config.parallel == "auto":
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise InputError("accelerate launch is configured for FSDP 1; set fsdp_version: 2 in its fsdp_config")
        return plugin
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=SHARDED_LAYERS,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=True,
    )


def deepspeed_plugin(config: TrainingConfig) -> DeepSpeedPlugin:
    """Settings of DeepSpeed: ours, or those of `accelerate launch`."""
    stage = None if config.parallel == "auto" else int(config.parallel[-1])
    try:
        plugin = DeepSpeedPlugin(zero_stage=stage, zero3_save_16bit_model=True, zero3_init_flag=False)
    except (ImportError, ValueError) as error:
        raise InputError(f"parallel: {config.parallel} needs DeepSpeed: pip install deepspeed ({error})") from error
    for entry in ("optimizer", "scheduler"):
        if entry in plugin.deepspeed_config:
            raise InputError(f"DeepSpeed's own configuration names an {entry}; remove it, the run has its own")
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own figures follow from it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def weights_come_from_main(accelerator: Accelerator) -> bool:
    """Whether the main process alone needs the weights, and this is another."""
    fsdp = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    return fsdp is not None and fsdp.cpu_ram_efficient_loading and not accelerator.is_main_process


def weights_place(accelerator: Accelerator) -> tuple[torch.device, torch.dtype]:
    """Where a checkpoint's weights go, tensor by tensor from the mapped file, and in which type: the device of this
    process, so that none holds a copy on the host. DeepSpeed keeps them in the run's type, and float32 ones of its own;
    with ZeRO-3 transformers divides every layer among the processes as soon as it is read.
    """
    if not is_deepspeed(accelerator):
        return accelerator.device, torch.float32
    dtype = RUN_TYPES.get(accelerator.mixed_precision, torch.float32)
    divided = accelerator.state.deepspeed_plugin.zero_stage == 3
    return torch.device("cpu") if divided else accelerator.device, dtype


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs backward passes, clips and updates."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Let the main process do something while the others wait; what goes wrong there is raised in all.

    Returns:
        What the action returned, in every process.

    Raises:
        VidLaDAError: as the action did, or for the OSError it raised.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [None, action()]
        except VidLaDAError as error:
            outcome = [error, None]
        except OSError as error:
            problem = f"{error.filename or Path.cwd()}: cannot be written: {error.strerror or error}"
            outcome = [VidLaDAError(problem), None]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
    result: Result = outcome[1]
    return result


@contextmanager
def lost_peers() -> Iterator[None]:
    """Say in a line that another process of the launch is gone, where torch's backends raise errors of their own."""
    try:
        yield
    except DistError as error:
        raise LostPeer(first_line(error)) from error
    except RuntimeError as error:  # gloo's
        if not GONE.search(str(error)):
            raise
        raise LostPeer(first_line(error)) from error


def first_line(error: Exception) -> str:
    """What an error says first, without the place in torch's source before it and the advice behind it."""
    return SOURCE_PLACE.sub("", str(error).splitlines()[0]).partition(". ")[0].rstrip(". ")


@contextmanager
def whole_weights(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Every process holds all weights of an FSDP2 model, to run parts of it alone. ZeRO-3's cannot."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True)
        if sharded:
            accelerator.wait_for_everyone()


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
