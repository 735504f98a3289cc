"""A training run as YAML: validated dataclasses."""

import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.training.data.samples import STRICT, OneOrMore, Share
from vidlada.training.settings import build, check_texts, expand_variables, read_yaml

ModelPart = Literal["tower", "projector", "language_model"]
LinearMap = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a layer


CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, config=STRICT)
class CollateSettings:
    """How samples become tensors.

    Args:
        control_targets: also train the control tokens (bos, header marks, end of turn) wherever they stand, the
            prompt included, and the whole header of an answer: a quirk of the published recipe.
        conversation_mask: turn a attends to turn b only if b ≤ a.
        pad_targets: fill rows up with the end-of-text token, as targets that may be attended to, as LLaDA was trained;
            by default padding is neither. Only for samples that do not share a row.
        end_targets: at most this many extra end-of-turn targets follow an answer. Answers are decoded in a fixed
            number of slots, so the model must know that after the end comes nothing.
        end_slots: at most this many further slots follow, always hidden and never a target; their number is drawn
            log-uniformly. At inference every answer has `gen_length` slots: a model that never saw more slots than
            an answer needs reads the answer's length, and so its kind, from their number.
        end_slots_share: share of answers that such slots follow.
        force_up_to: samples whose answers have at most this many tokens (ends of turn included) hide every target.
        max_length: samples with more tokens are skipped; the model's own limit by default.
        weigh_every: an answer counts as one sample for every so many of its targets, at least one: a caption teaches
            as much as so many short answers. 0: each answer counts once.
        packing: all samples of a pass stand in one row, one after another, and do not see one another: no padding.
            Only for samples that do not share a row.
        tokens_per_row: with packing, most tokens of a row: what the samples of a pass need beyond it goes into further
            rows, each with a forward and backward of its own, so that memory is bounded; gradients are those of one
            row. Longer samples are skipped. None: one row, however long.
        pad_to_multiple_of: rows get a multiple of so many tokens. Kernels are made for every shape they meet, which on
            a CPU costs a tenth of a step whose shape is new.
    """

    control_targets: bool = False
    conversation_mask: bool = False
    pad_targets: bool = False
    end_targets: NonNegativeInt = 0
    end_slots: NonNegativeInt = 0
    end_slots_share: Share = 1.0
    force_up_to: NonNegativeInt = 0
    max_length: PositiveInt | None = None
    weigh_every: NonNegativeInt = 0
    packing: bool = False
    tokens_per_row: PositiveInt | None = None
    pad_to_multiple_of: PositiveInt = 1

    def __post_init__(self) -> None:
        for name in ("conversation_mask", "pad_targets"):
            if self.packing and getattr(self, name):
                raise InputError(f"packing and {name} exclude each other")
        if self.tokens_per_row is None:
            return
        if not self.packing:
            raise InputError("tokens_per_row is of packed rows; set packing: true too")
        if self.tokens_per_row <= self.end_targets + self.end_slots:
            raise InputError(
                f"tokens_per_row: {self.tokens_per_row} tokens leave no room beside {self.end_targets} end_targets and "
                f"{self.end_slots} end_slots"
            )
        if self.tokens_per_row % self.pad_to_multiple_of:
            raise InputError(
                f"tokens_per_row: {self.tokens_per_row} is no multiple of pad_to_multiple_of, {self.pad_to_multiple_of}"
            )


@dataclass(frozen=True, config=STRICT)
class Stage:
    """A part of a run with its own data and learning rate.

    Args:
        name: shown in the log.
        steps: optimizer steps; or
        epochs: passes over the data.
        learning_rate: at the stage's start (after warm-up).
        final_learning_rate: at its end; the same as `learning_rate` by default.
        tower_learning_rate, projector_learning_rate: at its start, where these parts differ from the language model;
            they follow the same schedule.
        frozen: parts that stay as they are.
        schedule: how the rate goes from one to the other.
        data: arguments of the source; `kind` is `shapes` or `llava`.
        collate: see `CollateSettings`.
        think_tokens: the model gets the tokens of think mode that its tokenizer lacks (`<think>`, `</think>`,
            `<stop_think>`, `<answer>`), before the run's first stage.
    """

    name: str
    learning_rate: PositiveFloat
    data: dict[str, Any]
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    final_learning_rate: NonNegativeFloat | None = None
    tower_learning_rate: PositiveFloat | None = None
    projector_learning_rate: PositiveFloat | None = None
    frozen: Annotated[tuple[ModelPart, ...], OneOrMore] = ()
    schedule: Literal["linear", "cosine"] = "linear"
    collate: CollateSettings = field(default_factory=CollateSettings)
    think_tokens: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError(f"stage {self.name}: give either steps or epochs")
        if set(self.frozen) >= set(get_args(ModelPart)):
            raise InputError(f"stage {self.name}: frozen names every part; nothing is left to train")
        for part in self.frozen:
            if getattr(self, f"{part}_learning_rate", None) is not None:
                raise InputError(f"stage {self.name}: {part} is frozen; leave {part}_learning_rate out")

    @property
    def length(self) -> int:
        """Steps; known once epochs are resolved against the data."""
        if self.steps is None:
            raise InputError(f"stage {self.name}: its epochs are not resolved against its data yet")
        return self.steps

    def rate_ratio(self, part: ModelPart) -> float:
        """Learning rate of a part over the language model's."""
        own = {"tower": self.tower_learning_rate, "projector": self.projector_learning_rate}.get(part)
        return 1.0 if own is None else own / self.learning_rate


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Held-out samples during training: their loss, always with the same masks, and the share of their questions that
    is answered right, decoded as at inference.

    Args:
        data: arguments of the source, as in a stage; for shapes with `split: validation`.
        every: steps between two evaluations; there is one after the last step too.
        steps: batches of the source to use.
        collate: see `CollateSettings`.
        questions: most questions of these samples to answer; right is the sample's own answer, but for case and spaces.
            Those whose answers do not fit into the slots are not asked.
        generation: how they are answered, where that differs from the model's own settings (`gen_length`, `steps` …).
        best: what decides which model is kept as `model-best`: `score`, where there are questions, or `loss`; `none`
            keeps none.
    """

    data: dict[str, Any]
    every: PositiveInt = 500
    steps: PositiveInt = 8
    collate: CollateSettings = field(default_factory=CollateSettings)
    questions: NonNegativeInt = 0
    generation: dict[str, Any] = field(default_factory=dict)
    best: Literal["score", "loss", "none"] = "score"


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters in the language model's layers instead of training its weights.

    Args:
        rank: of the updates.
        alpha: they are scaled by alpha / rank.
        dropout: of their input.
        modules: linear maps of a layer that get one.
        train_projector: train the projector whole; the rest of the model is frozen.
    """

    rank: PositiveInt = 64
    alpha: PositiveInt = 128
    dropout: Share = 0.0
    modules: Annotated[tuple[LinearMap, ...], OneOrMore] = get_args(LinearMap)
    train_projector: bool = True

    def __post_init__(self) -> None:
        if not self.modules:
            raise InputError("lora: modules is empty; leave it out for all linear maps")


@dataclass(frozen=True, config=STRICT)
class EventSupervision:
    """Loss on what middle layers know of the events of the shapes world (deep supervision, arXiv 1409.5185).

    Linear maps, which are left behind after training, read the kind of event and the colours and shape of its thing
    from single tokens. A video's tokens otherwise learn of events only through answers, by way of all layers.

    Args:
        frame_layers: whose output must know, in the first token of every frame, what happens in it.
        question_layers: whose output must know, in a question of what happens at a second or before or after another
            event, the event in question: in the token of the second, or in that of the question mark.
        neighbour_layers: whose output must know, in the first token of every frame, the last event before it and the
            next after it.
        frame_weight, question_weight, neighbour_weight: of the losses, each a mean over layers.
        learning_rate: of the linear maps, by Adam.
    """

    frame_layers: tuple[NonNegativeInt, ...] = ()
    question_layers: tuple[NonNegativeInt, ...] = ()
    neighbour_layers: tuple[NonNegativeInt, ...] = ()
    frame_weight: PositiveFloat = 0.3
    question_weight: PositiveFloat = 0.4
    neighbour_weight: PositiveFloat = 0.2
    learning_rate: PositiveFloat = 2e-3


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """One run.

    Args:
        output: folder of checkpoints, logs and the final model.
        stages: in order.
        model: entries of `vidlada.model.config.VidLaDAConfig`, for a model trained from nothing; or
        init_from: a model to start from: `tiny`, a folder, or a name of the hub. A folder of a Llama-family language
            model loses its causal mask and gains the mask and control tokens; `model` then describes the vision half,
            or says `text_only: true`.
        new_layers: numbers of layers of `init_from`'s language model, counted from 0, each to be followed by a copy of
            itself that adds nothing yet: a deeper model that starts where the other stood.
        vision_tower: name or folder of the tower that a published `init_from` must have been made with; only its last
            part counts. None: whichever it is.
        seed: of initial weights, data order and masking.
        precision: of the forward pass; weights and optimizer stay float32. `auto` is `bf16` where the machine has
            instructions for its products, else `no`, which is float32. `fp16` needs a GPU.
        optimizer: `adamw`, or `muon`: the layers' matrices by Muon, everything else by AdamW, at one learning rate
            (its updates are scaled to AdamW's size). Muon needs whole matrices: one process or DDP, not sharded.
        weight_decay, beta1, beta2, gradient_clip: of the optimizer; the betas are AdamW's.
        warmup_steps: linear warm-up from 0 at the run's start.
        warmup_share: the same as a share of the run's steps; it replaces `warmup_steps`.
        checkpoint_every, keep_checkpoints: in steps; older ones are deleted.
        log_every: in steps.
        workers: processes that prepare batches.
        stratified: spread the masking times of a batch evenly.
        complementary: train each answer twice, with a mask and with its complement (LaViDa); twice the cost.
        objective: `diffusion`, or `autoregressive`: the causal twin, next-token loss under a causal mask.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: the layers by torch.compile.
        per_device_batch: most samples of a forward pass on one device; a step takes as many passes as its samples
            need over all devices. None: one pass for a device's whole share.
        parallel: how several processes share the work. `auto`: as `accelerate launch` was configured, DDP under
            torchrun. `fsdp` is FSDP2; `zero2` and `zero3` are DeepSpeed's.
        max_skipped_share: the run ends when more than this share of the samples so far was broken.
        lora: train adapters instead of the language model.
        event_supervision: see `EventSupervision`; for runs of one process on clips of the shapes world.
        evaluation: on held-out samples.
        tracker: where figures go besides the terminal.
        layouts: the final model's; `published` is written as `model-published`, beside ours.
        save_dtype: type of the weights in model folders; `auto`: as they came where `init_from` is stored in 16 bits,
            else float32. Adapters stay float32. Checkpoints to continue from keep all weights in float32 besides.
        name: of the run, for trackers; by default its output folder's.
    """

    output: str
    stages: tuple[Stage, ...]
    model: dict[str, Any] | None = None
    init_from: str | None = None
    new_layers: tuple[NonNegativeInt, ...] = ()
    vision_tower: str | None = None
    seed: int = 0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    gradient_clip: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 100
    warmup_share: Share | None = None
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 20
    workers: NonNegativeInt = 1
    stratified: bool = True
    complementary: bool = False
    objective: Literal["diffusion", "autoregressive"] = "diffusion"
    gradient_checkpointing: bool = False
    compile: bool = False
    per_device_batch: PositiveInt | None = None
    parallel: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    max_skipped_share: Share = 0.02
    lora: Lora | None = None
    event_supervision: EventSupervision | None = None
    evaluation: Evaluation | None = None
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    layouts: Annotated[tuple[Literal["vidlada", "published"], ...], OneOrMore] = ("vidlada",)
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.model is None and self.init_from is None:
            raise InputError("give either model (a new one) or init_from (a folder)")
        if self.new_layers and (self.init_from is None or self.lora is not None):
            raise InputError("new_layers deepens the model of init_from, without lora")
        if not self.stages:
            raise InputError("stages is empty; a run needs at least one")
        sharded = self.parallel in ("fsdp", "zero2", "zero3")
        if sharded and self.optimizer == "muon":
            raise InputError(f"optimizer: muon needs whole matrices, which {self.parallel} splits; use adamw or ddp")
        if sharded and any(stage.collate.tokens_per_row for stage in self.stages):
            raise InputError(f"tokens_per_row: processes would need as many rows under {self.parallel}; use ddp")
        if self.parallel in ("zero2", "zero3") and len({stage.frozen for stage in self.stages}) > 1:
            raise InputError(f"{self.parallel} cannot freeze other parts in other stages; use fsdp, or freeze alike")
        if self.objective == "autoregressive" and self.complementary:
            raise InputError("complementary masks belong to objective: diffusion; autoregressive hides nothing")
        if self.event_supervision is not None and (self.lora is not None or self.parallel != "auto"):
            raise InputError(
                "event_supervision is for training whole models in one process: leave lora and parallel out"
            )
        if self.lora is not None and self.think_tokens:
            raise InputError("think_tokens: adapters leave the embeddings frozen, so new tokens would learn nothing")
        if self.lora is not None and self.init_from is None:
            raise InputError("lora adapts a trained model; give init_from")
        if self.lora is not None:
            self._check_rates_under_adapters(self.lora)
        if self.lora is not None and "published" in self.layouts:
            raise InputError("layouts: an adapter has no published layout; merge it (vidlada merge), then convert")
        if self.lora is not None and self.save_dtype != "auto":
            raise InputError("save_dtype: adapters are float32; merge them (vidlada merge) for the base model's type")
        if self.parallel == "zero3" and self.evaluation is not None and self.evaluation.questions:
            raise InputError("evaluation: questions need whole weights in each process, which zero3 splits; use fsdp")

    def _check_rates_under_adapters(self, lora: Lora) -> None:
        """Refuse learning rates of parts that adapters leave frozen."""
        frozen = ("tower",) if lora.train_projector else ("tower", "projector")
        for stage in self.stages:
            for part in frozen:
                if getattr(stage, f"{part}_learning_rate") is not None:
                    raise InputError(f"stage {stage.name}: lora freezes the {part}; leave {part}_learning_rate out")

    @property
    def new_model(self) -> dict[str, Any]:
        """Arguments of a new model, or of what is new beside a Llama-family one: by default no vision. The tower has no
        pooling head unless it is asked for: nothing would ever train it, which DDP takes for a mistake."""
        if self.init_from is not None and not self.model:
            return {"text_only": True}
        values = dict(self.model or {})
        if isinstance(values.get("vision_config"), dict):
            values["vision_config"] = {"vision_use_head": False, **values["vision_config"]}
        return values

    @property
    def think_tokens(self) -> bool:
        """Whether any stage asks for them."""
        return any(stage.think_tokens for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.length for stage in self.stages)

    @property
    def frozen(self) -> frozenset[ModelPart]:
        """Parts that are frozen in every stage."""
        return frozenset.intersection(*(frozenset(stage.frozen) for stage in self.stages))

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step's number within it."""
        for stage in self.stages:
            if step < stage.length:
                return stage, step
            step -= stage.length
        raise InputError(f"step {step} is past the end of the run")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        stage, within = self.stage_at(step)
        last = stage.learning_rate if stage.final_learning_rate is None else stage.final_learning_rate
        progress = within / stage.length
        if stage.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        rate = stage.learning_rate + (last - stage.learning_rate) * progress
        return rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


def config_path(name: str | Path) -> Path:
    """A run description by its path, or by the name of one in the package: `tiny` is `configs/tiny.yaml` there."""
    packaged = CONFIGS / f"{name}.yaml"
    return packaged if not Path(name).exists() and packaged.is_file() else Path(name)


def load_config(path: str | Path, output: str | None = None) -> TrainingConfig:
    """Read a YAML run description.

    Args:
        path: the file, or the name of one in the package.
        output: overrides the file's own `output`.

    Raises:
        InputError: the file is missing or malformed, or an entry is unknown, invalid or no Unicode.
    """
    path = config_path(path)
    if not path.exists() and path.suffix == "":
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise InputError(f"{path}: no such file, and not one of the package's own: {names}")
    values = expand_variables(read_yaml(path), str(path))
    if output is not None:
        values["output"] = output
    check_texts(values, str(path))  # of the environment and the command line too
    return build(TrainingConfig, values, str(path))
