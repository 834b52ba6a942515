"""A configuration of TRL's arguments as NeMo-RL 0.7's keys: what is the same there, and a refusal of what is not.

TRL counts updates of the weights; a step of NeMo-RL is a round: completions are drawn once, and used for one update or
several. Numbers of steps are converted where the two differ. NeMo-RL trains in bfloat16, and of messages the
assistant's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remit_megatron.posttrain.configuration import PosttrainSettings, check_keep
from remit_megatron.runtime.errors import UserError, show

SECTIONS = {"sft": "sft", "dpo": "dpo", "rlvr": "grpo"}
MEGATRON_FAMILIES = ("llama",)
# Steps are counted, epochs are not: NeMo-RL ends at the sooner of the two, and its epochs are whole.
_NO_LIMIT = 1_000_000_000


@dataclass(frozen=True)
class Cluster:
    """The ``nemo_rl`` section.

    Attributes:
        repository: a checkout of NVIDIA-NeMo/RL at v0.7.0, on a file system that the nodes share.
        container: image, as ray.sub takes it.
        nodes, gpus_per_node: size of the job.
        backend: ``dtensor`` or ``megatron``; None goes by the family.
        tensor_parallel_size, micro_batch_size: of the policy.
        sbatch: further options of sbatch, by their long names: account, partition, time.
        mounts: further mounts, ``/host:/container``.
        overrides: NeMo-RL's own keys, dotted.
    """

    repository: str = ""
    container: str = ""
    nodes: int = 1
    gpus_per_node: int = 8
    backend: str | None = None
    tensor_parallel_size: int = 1
    micro_batch_size: int = 1
    sbatch: Mapping[str, Any] | None = None
    mounts: tuple[str, ...] = ()
    overrides: Mapping[str, Any] | None = None

    def on_megatron(self, family: str) -> bool:
        """Whether a family trains on Megatron; on DTensor otherwise."""
        return self.backend == "megatron" if self.backend else family in MEGATRON_FAMILIES


@dataclass(frozen=True)
class Facts:
    """What a configuration is about.

    Attributes:
        model: the Hugging Face directory.
        family: ``model_type`` of its config.json.
        context: tokens that the model takes, ``max_position_embeddings``; None where it says nothing.
        records: lines of ``data.train``.
        has_valid: whether there are lines to evaluate.
    """

    model: Path
    family: str
    context: int | None
    records: int
    has_valid: bool


@dataclass(frozen=True)
class Amounts:
    """The numbers of a run, by TRL's rules.

    Attributes:
        batch: sequences, pairs or completions of an update.
        drawn: completions of a round, a multiple of ``batch``; ``batch`` without completions.
        group: completions of a prompt; 1 without.
        steps: updates of the run.
    """

    batch: int
    drawn: int
    group: int
    steps: int

    @property
    def updates(self) -> int:
        """Updates of a round."""
        return self.drawn // self.batch

    def rounds(self, name: str, steps: int) -> int:
        """NeMo-RL's steps of TRL's.

        Raises:
            UserError: they are no whole number of rounds.
        """
        if steps % self.updates:
            raise UserError(name, steps, f"a multiple of the {self.updates} updates of a round, with engine nemo_rl")
        return steps // self.updates


# TRL's arguments that have a counterpart. All others are refused: they would not be done.
_LENGTH, _OPTIMIZER = "policy.max_total_sequence_length", "policy.optimizer.kwargs"
_MAPPED = {
    *("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("max_length", "max_completion_length", "num_generations", "temperature", "top_p", "top_k", "beta", "epsilon"),
    *("epsilon_high", "scale_rewards", "loss_type", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
    *("gradient_checkpointing", "generation_batch_size", "steps_per_generation", "bf16", "assistant_only_loss"),
}
# null is a value of these, and not TRL's default.
_NULL_SAYS = ("max_length", "max_completion_length", "num_generations")


def check_arguments(settings: PosttrainSettings) -> None:
    """Refuses what TRL would refuse, by name, type and range; imports TRL.

    Raises:
        UserError: as said.
    """
    from remit_megatron.posttrain.trl_arguments import check_names

    trl = dict(settings.trl)
    # Of prompt and completion together, which TRL has no argument for.
    length = trl.pop("max_length", 1) if settings.stage == "rlvr" else 1
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError("trl.max_length", show(length), "a whole number, at least 1")
    check_names(replace(settings, trl=trl))


def render(settings: PosttrainSettings, cluster: Cluster, facts: Facts) -> dict[str, Any]:
    """NeMo-RL's keys, dotted, with their values. The arguments are checked, see :func:`check_arguments`.

    Raises:
        UserError: an argument of TRL that has no counterpart, or a value of one.
    """
    trl, stage, run_dir = _arguments(settings), settings.stage, Path(settings.run_dir).absolute()
    megatron = cluster.on_megatron(facts.family)
    amounts = amounts_of(settings, cluster, facts)
    steps = amounts.rounds("trl.max_steps", amounts.steps)
    section = SECTIONS[stage]
    values: dict[str, Any] = {
        f"{section}.seed": settings.seed,
        f"{section}.max_num_steps": steps,
        f"{section}.max_num_epochs": _NO_LIMIT,
        f"{section}.val_at_start": False,
        f"{section}.val_period": _evaluation(trl, amounts, facts.has_valid),
        "checkpointing.checkpoint_dir": str(run_dir / "checkpoints"),
        "checkpointing.save_period": amounts.rounds("trl.save_steps", _whole(trl, "save_steps", 500)),
        "checkpointing.keep_top_k": trl.get("save_total_limit"),
        "checkpointing.metric_name": None,
        "policy.model_name": str(facts.model),
        "policy.tokenizer.name": str(facts.model),
        "policy.train_global_batch_size": amounts.batch,
        "policy.train_micro_batch_size": cluster.micro_batch_size,
        "policy.max_grad_norm": trl.get("max_grad_norm", 1.0),
        "policy.dtensor_cfg.enabled": not megatron,
        "policy.megatron_cfg.enabled": megatron,
        "logger.log_dir": str(run_dir / "logs"),
        "logger.wandb_enabled": False,
        "logger.tensorboard_enabled": False,
        "cluster.gpus_per_node": cluster.gpus_per_node,
        "cluster.num_nodes": cluster.nodes,
    }
    # Left out, or null, it would be the example's, or none.
    template = str(Path(settings.chat_template).absolute()) if settings.chat_template else "default"
    values["policy.tokenizer.chat_template"] = template
    values |= _parallel(trl, cluster, stage=stage, megatron=megatron)
    values |= _optimizer(trl, stage, amounts, steps, megatron=megatron)
    values |= _data(stage, run_dir, facts.has_valid) | _stage(trl, stage, amounts, facts.context)
    return {**values, **(cluster.overrides or {})}


def amounts_of(settings: PosttrainSettings, cluster: Cluster, facts: Facts) -> Amounts:
    """The numbers of a run by TRL's rules, where every replica of the policy is one of its processes.

    Raises:
        UserError: they do not go together, or a pass over the data would have no whole batch.
    """
    trl, stage = _arguments(settings), settings.stage
    each = trl.get("per_device_train_batch_size", 8)
    accumulation = trl.get("gradient_accumulation_steps", 1)
    replicas = cluster.nodes * cluster.gpus_per_node // cluster.tensor_parallel_size
    batch, drawn, group = each * accumulation * replicas, 0, 1
    if stage == "rlvr":
        if "generation_batch_size" in trl and "steps_per_generation" in trl:
            found = "with trl.steps_per_generation"
            raise UserError("trl.generation_batch_size", found, "one of the two: each follows from the other")
        drawn = trl.get("generation_batch_size", each * replicas * trl.get("steps_per_generation", accumulation))
        group = trl.get("num_generations", 8)
    drawn = drawn or batch
    if drawn % batch:
        found = f"{drawn} completions a round"
        raise UserError(
            "trl.steps_per_generation", found, f"a multiple of the {batch} of an update, with engine nemo_rl"
        )
    if drawn % group:
        raise UserError("trl.num_generations", group, f"a divisor of the {drawn} completions of a round")
    if facts.records < drawn // group:
        expected = f"at least {drawn // group}, what a step takes: NeMo-RL leaves out a batch that is not whole"
        raise UserError("data.train", f"{facts.records} lines", expected)
    if (steps := trl.get("max_steps", -1)) < 1:
        if stage == "rlvr":
            passes = facts.records // (drawn // group) * (drawn // batch)
        else:
            passes = math.ceil(math.ceil(facts.records / (each * replicas)) / accumulation)
        steps = math.ceil(trl.get("num_train_epochs", 3) * passes)
        steps += -steps % (drawn // batch)  # the last round is whole
    amounts = Amounts(batch, drawn, group, steps)
    check_keep(settings.keep, steps)
    if settings.keep.every is not None:
        every, period = settings.keep.every, _whole(trl, "save_steps", 500)
        amounts.rounds("keep.every", every)
        if every % period:
            raise UserError("keep.every", every, f"a multiple of trl.save_steps, {period}, with engine nemo_rl")
        if "save_total_limit" in trl:
            found = f"{trl['save_total_limit']}, with keep.every"
            raise UserError("trl.save_total_limit", found, "null: the kept models are made of checkpoints at the end")
    return amounts


def _arguments(settings: PosttrainSettings) -> dict[str, Any]:
    """The arguments of TRL that say something: all have a counterpart."""
    found = {}
    for name, value in settings.trl.items():
        if name not in _MAPPED:
            expected = "nothing, with engine nemo_rl: nemo_rl.overrides takes its own keys"
            raise UserError(f"trl.{name}", show(value), expected)
        if value is not None:
            found[name] = value
        elif name in _NULL_SAYS:
            raise UserError(f"trl.{name}", "null", "a number, with engine nemo_rl")
    if found.get("bf16") is False:
        raise UserError("trl.bf16", "False", "true, or nothing: NeMo-RL trains in bfloat16")
    return found


def _whole(trl: Mapping[str, Any], name: str, default: int) -> int:
    value = trl.get(name, default)
    if value != int(value) or value < 1:
        raise UserError(f"trl.{name}", show(value), "a whole number of steps, with engine nemo_rl")
    return int(value)


def _evaluation(trl: Mapping[str, Any], amounts: Amounts, has_valid: bool) -> int:
    """Rounds between two evaluations; 0 is none."""
    strategy = trl.get("eval_strategy", "no")
    if not has_valid and strategy != "no":
        raise UserError("data.valid", "nothing", f"files, for trl.eval_strategy {strategy}")
    if not has_valid:
        return 0
    if strategy != "steps" or "eval_steps" not in trl:
        raise UserError(
            "trl.eval_strategy", show(strategy), "steps, with eval_steps, for data.valid and engine nemo_rl"
        )
    return amounts.rounds("trl.eval_steps", _whole(trl, "eval_steps", 0))


def _parallel(trl: Mapping[str, Any], cluster: Cluster, *, stage: str, megatron: bool) -> dict[str, Any]:
    where = "policy.megatron_cfg" if megatron else "policy.dtensor_cfg"
    size = "tensor_model_parallel_size" if megatron else "tensor_parallel_size"
    # Plain torch checkpoints, which convert_dcp_to_hf.py reads, are those of the first DTensor worker.
    first = {"policy.dtensor_cfg._v2": False} if stage != "dpo" else {}
    return first | {
        f"{where}.{size}": cluster.tensor_parallel_size,
        f"{where}.activation_checkpointing": trl.get("gradient_checkpointing", True),
        f"{where}.sequence_parallel": False,
        "policy.make_sequence_length_divisible_by": cluster.tensor_parallel_size,
    }


def _optimizer(trl: Mapping[str, Any], stage: str, amounts: Amounts, rounds: int, *, megatron: bool) -> dict[str, Any]:
    """Optimizer and schedule; NeMo-RL's schedules go on once a round."""
    rate = trl.get("learning_rate", {"sft": 2e-5, "dpo": 1e-6, "rlvr": 1e-6}[stage])
    decay, beta1, beta2 = trl.get("weight_decay", 0.0), trl.get("adam_beta1", 0.9), trl.get("adam_beta2", 0.999)
    epsilon, kind = trl.get("adam_epsilon", 1e-8), trl.get("lr_scheduler_type", "linear")
    if kind not in ("linear", "constant", "constant_with_warmup"):
        expected = "linear, constant or constant_with_warmup, with engine nemo_rl"
        raise UserError("trl.lr_scheduler_type", show(kind), expected)
    share = trl.get("warmup_steps", 0)
    # TRL's constant schedule has no warm-up, whatever is said of one.
    warmup = 0 if kind == "constant" else int(share) if share >= 1 else math.ceil(share * amounts.steps)
    warmup = math.ceil(warmup / amounts.updates)
    if kind == "linear" and warmup >= rounds:
        raise UserError("trl.warmup_steps", show(share), f"fewer than the {amounts.steps} steps of the run")
    if megatron:
        where = "policy.megatron_cfg"
        return {
            f"{where}.optimizer.lr": rate,
            f"{where}.optimizer.min_lr": 0.0 if kind == "linear" else rate,
            f"{where}.optimizer.weight_decay": decay,
            f"{where}.optimizer.adam_beta1": beta1,
            f"{where}.optimizer.adam_beta2": beta2,
            f"{where}.optimizer.adam_eps": epsilon,
            f"{where}.scheduler.lr_decay_style": "linear" if kind == "linear" else "constant",
            f"{where}.scheduler.lr_warmup_iters": warmup,
            f"{where}.scheduler.lr_warmup_init": 0.0,
            **({f"{where}.scheduler.lr_decay_iters": rounds} if kind == "linear" else {}),
        }
    linear = "torch.optim.lr_scheduler.LinearLR"
    first = {"name": linear, "kwargs": {"start_factor": 1e-8, "end_factor": 1.0, "total_iters": warmup}}
    if kind == "linear":
        then = {"name": linear, "kwargs": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": rounds - warmup}}
    else:
        then = {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0, "total_iters": 10_000_000_000}}
    return {
        f"{_OPTIMIZER}.lr": rate,
        f"{_OPTIMIZER}.weight_decay": decay,
        f"{_OPTIMIZER}.betas": [beta1, beta2],
        f"{_OPTIMIZER}.eps": epsilon,
        "policy.scheduler": [first, then, {"milestones": [warmup]}] if warmup else [then, {"milestones": []}],
    }


def _data(stage: str, run_dir: Path, has_valid: bool) -> dict[str, Any]:
    name = "BinaryPreferenceDataset" if stage == "dpo" else "ResponseDataset"
    values: dict[str, Any] = {}
    for key, file, wanted in (("data.train", "train", True), ("data.validation", "valid", has_valid)):
        path = str(run_dir / f"data/{file}.jsonl")
        # Merged with the example's: its split, and its share of the training data for validation, must not stay.
        own = {"dataset_name": name, "data_path": path, "split": "train"}
        values[key] = own | ({"split_validation_size": 0} if stage != "dpo" else {}) if wanted else None
    values["data.shuffle"] = True
    if stage == "sft":
        values |= {"data.add_bos": False, "data.add_eos": False}  # the template says
    if stage == "rlvr":
        values |= {"data.default.prompt_file": None, "env.math.math_verify_impl": "hf_math_verify"}
    return values


def _stage(trl: Mapping[str, Any], stage: str, amounts: Amounts, context: int | None) -> dict[str, Any]:
    if stage != "rlvr":
        values: dict[str, Any] = {_LENGTH: trl.get("max_length", 1024)}
        if stage == "dpo":
            loss = trl.get("loss_type", "sigmoid")
            loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
            if loss not in ("sigmoid", "sigmoid_norm"):
                raise UserError("trl.loss_type", show(loss), "sigmoid or sigmoid_norm, with engine nemo_rl")
            values["dpo.reference_policy_kl_penalty"] = trl.get("beta", 0.1)
            values["dpo.preference_average_log_probs"] = loss == "sigmoid_norm"
            values["dpo.sft_loss_weight"] = 0
        elif trl.get("loss_type", "nll") != "nll":
            raise UserError("trl.loss_type", show(trl["loss_type"]), "nll, with engine nemo_rl")
        return values
    length = trl.get("max_length", context)
    if length is None:
        raise UserError("trl.max_length", "nothing", "tokens of prompt and completion together, with engine nemo_rl")
    loss, scale = trl.get("loss_type", "dapo"), trl.get("scale_rewards", "group")
    if loss not in ("grpo", "dapo", "bnpo"):
        raise UserError("trl.loss_type", show(loss), "grpo, dapo or bnpo, with engine nemo_rl")
    if scale not in ("group", "none", True, False):
        raise UserError("trl.scale_rewards", show(scale), "group or none, with engine nemo_rl")
    completion = trl.get("max_completion_length", 512)
    if completion >= length:
        expected = f"fewer than the {length} tokens of prompt and completion (trl.max_length)"
        raise UserError("trl.max_completion_length", completion, expected)
    return {
        _LENGTH: length,
        "grpo.num_generations_per_prompt": amounts.group,
        "grpo.num_prompts_per_step": amounts.drawn // amounts.group,
        "grpo.normalize_rewards": scale in ("group", True),
        "grpo.use_leave_one_out_baseline": False,
        "loss_fn.reference_policy_kl_penalty": trl.get("beta", 0.0),
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.ratio_clip_min": trl.get("epsilon", 0.2),
        "loss_fn.ratio_clip_max": trl.get("epsilon_high", trl.get("epsilon", 0.2)),
        "loss_fn.token_level_loss": loss != "grpo",
        "policy.generation.max_new_tokens": completion,
        "policy.generation.temperature": trl.get("temperature", 1.0),
        "policy.generation.top_p": trl.get("top_p", 1.0),
        "policy.generation.top_k": trl.get("top_k") or None,
        "checkpointing.model_save_format": None,  # see _parallel
    }
