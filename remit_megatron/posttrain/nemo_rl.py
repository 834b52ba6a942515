"""``engine: nemo_rl``: the same configuration as a job for NeMo-RL 0.7, in its own container.

Written into the run directory: ``nemo_rl.yaml`` (over one of NeMo-RL's own example files), ``data/``, ``run.sh`` (the
training and the conversion to Hugging Face, inside the container) and ``submit.sh`` (its Slurm submission by
``ray.sub``). The command then ends with 75: started again when the job has finished, it takes the model.

Families that Megatron-Bridge has (Llama) train on Megatron, the others (OLMo 2, SmolLM3, Youtu) on DTensor.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.posttrain import outside
from remit_megatron.posttrain.configuration import NO_TEMPLATE, PosttrainSettings, dump
from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.formats import write_format
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN, UserError, did_you_mean, show
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.locks import DirectoryLock

VERSION = "0.7.0"
EXAMPLES = {"sft": "sft.yaml", "dpo": "dpo.yaml", "rlvr": "grpo_math_1B.yaml"}
SCRIPTS = {"sft": "run_sft.py", "dpo": "run_dpo.py", "rlvr": "run_grpo.py"}
SECTIONS = {"sft": "sft", "dpo": "dpo", "rlvr": "grpo"}
MEGATRON_FAMILIES = ("llama",)
# Verifiers that NeMo-RL's environment `math` stands for: math-verify on the answer in \boxed{}.
_MATH_VERIFIERS = ("math", "gsm8k")
# Sections whose keys are the data set's own, not the example file's.
_FREE = (
    "data.train.",
    "data.validation.",
    "data.default.",
    "policy.tokenizer.chat_template",
    "policy.optimizer.kwargs.",
    "policy.scheduler",  # of DTensor; sft.yaml leaves it out
)


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


def run(settings: PosttrainSettings, *, dry_run: bool = False) -> int:
    """Writes the job, or takes its model; returns 0 when the run has its model, else 75.

    Raises:
        UserError: the configuration, the model or the data is wrong, or says what NeMo-RL cannot do.
    """
    cluster = read_cluster(settings)
    given, run_dir = outside.prepare(settings), Path(settings.run_dir).absolute()
    family = json.loads((given.source.path / "config.json").read_text()).get("model_type", "")
    check_data(settings, given.train + given.valid)
    _check_template(settings, given.source.path)
    values = render(settings, cluster, model=given.source.path.absolute(), family=family, has_valid=bool(given.valid))
    _check_keys(values, Path(cluster.repository), settings.stage)
    text = dump({"defaults": str(_example(cluster, settings.stage)), **_nested(values)})
    if dry_run:
        sys.stdout.write(text)
        return EXIT_DONE
    lock = DirectoryLock(run_dir)
    try:
        if outside.already_done(run_dir, given.identity):
            return EXIT_DONE
        if outside.is_model(run_dir / "output"):
            outside.take_model(run_dir / "output", run_dir, given)
            return EXIT_DONE
        outside.write_settings(run_dir, settings)
        for name, examples in (("train", given.train), ("valid", given.valid)):
            if examples:
                write_format(run_dir / f"data/{name}.jsonl", examples, form="nemo_rl", stage=settings.stage)
        write_atomic(run_dir / "nemo_rl.yaml", text)
        write_atomic(run_dir / "run.sh", inside_script(settings, cluster, run_dir, megatron=_megatron(cluster, family)))
        write_atomic(run_dir / "submit.sh", submit_script(cluster, run_dir))
        sys.stderr.write(
            f"written for NeMo-RL {VERSION}: bash {run_dir / 'submit.sh'}; when the job is done, start this again\n"
        )
        return EXIT_START_ME_AGAIN
    finally:
        lock.release()


def _check_template(settings: PosttrainSettings, model: Path) -> None:
    expected = "a file that ends in .jinja: NeMo-RL puts every prompt through a template"
    if settings.chat_template == NO_TEMPLATE or not (settings.chat_template or "x.jinja").endswith(".jinja"):
        raise UserError("chat_template", show(settings.chat_template), expected)
    own = model / "tokenizer_config.json"
    has_own = (model / "chat_template.jinja").exists() or (own.exists() and '"chat_template"' in own.read_text())
    if settings.chat_template is None and not has_own:
        raise UserError("chat_template", f"none in {model}", expected)


def read_cluster(settings: PosttrainSettings) -> Cluster:
    """The ``nemo_rl`` section, checked.

    Raises:
        UserError: an unknown key, a wrong type, or no repository or container.
    """
    given, known = settings.nemo_rl, list(Cluster.__dataclass_fields__)
    for name, value in given.items():
        if name not in known:
            raise UserError(f"nemo_rl.{name}", show(value), f"one of {', '.join(known)}{did_you_mean(name, known)}")
    for name in ("repository", "container"):
        if not isinstance(given.get(name), str) or not given[name]:
            expected = "a checkout of NVIDIA-NeMo/RL at v0.7.0" if name == "repository" else "an image for ray.sub"
            raise UserError(f"nemo_rl.{name}", show(given.get(name)), expected)
    for name in ("nodes", "gpus_per_node", "tensor_parallel_size", "micro_batch_size"):
        value = given.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"nemo_rl.{name}", show(value), "a whole number, at least 1")
    for name in ("sbatch", "overrides"):
        if not isinstance(given.get(name) or {}, Mapping):
            raise UserError(f"nemo_rl.{name}", show(given[name]), "a mapping")
    if given.get("backend") not in (None, "dtensor", "megatron"):
        raise UserError(
            "nemo_rl.backend", show(given["backend"]), "dtensor, megatron, or null for what the family takes"
        )
    cluster = Cluster(**{**given, "mounts": tuple(given.get("mounts") or ())})
    if cluster.nodes * cluster.gpus_per_node % cluster.tensor_parallel_size:
        found = f"{cluster.tensor_parallel_size} on {cluster.nodes} x {cluster.gpus_per_node} GPUs"
        raise UserError("nemo_rl.tensor_parallel_size", found, "a divisor of the number of GPUs")
    if not _example(cluster, settings.stage).is_file():
        found = f"{cluster.repository} without examples/configs/{EXAMPLES[settings.stage]}"
        raise UserError("nemo_rl.repository", found, f"a checkout of NVIDIA-NeMo/RL at v{VERSION}")
    return cluster


def check_data(settings: PosttrainSettings, examples: list[Example]) -> None:
    """Refuses verifiers that NeMo-RL's own environment is not.

    Raises:
        UserError: names the first line.
    """
    if settings.stage == "sft":
        for example in examples:
            if "text" in example.fields:
                raise UserError(example.place, "text", "messages, or prompt and completion: NeMo-RL has no plain text")
    if settings.stage != "rlvr":
        return
    for example in examples:
        name = example.fields.get("verifier", settings.verifier)
        if name not in _MATH_VERIFIERS or example.fields.get("verifier_args"):
            expected = f"{' or '.join(_MATH_VERIFIERS)}: what NeMo-RL's environment math verifies; others by engine trl"
            raise UserError(example.place, f"verifier {show(name)}", expected)
        prompt = example.fields["prompt"]
        if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
            raise UserError(example.place, "a prompt of several messages", "one of the user: NeMo-RL reads the first")


# TRL's argument -> what it is for NeMo-RL. All others are refused: they would not be done.
_LENGTH, _OPTIMIZER = "policy.max_total_sequence_length", "policy.optimizer.kwargs"
_MAPPED = {
    *("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("max_length", "max_completion_length", "num_generations", "temperature", "top_p", "top_k", "beta", "epsilon"),
    *("epsilon_high", "scale_rewards", "loss_type", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
    *("gradient_checkpointing", "generation_batch_size", "steps_per_generation"),
}


def render(
    settings: PosttrainSettings, cluster: Cluster, *, model: Path, family: str, has_valid: bool
) -> dict[str, Any]:
    """NeMo-RL's keys, dotted, with their values.

    Raises:
        UserError: an argument of TRL that has no counterpart, or a value of one.
    """
    trl, stage, run_dir = settings.trl, settings.stage, Path(settings.run_dir).absolute()
    for name, value in trl.items():
        if name not in _MAPPED:
            raise UserError(
                f"trl.{name}", show(value), "nothing, with engine nemo_rl: nemo_rl.overrides takes its own keys"
            )
    megatron = _megatron(cluster, family)
    replicas = cluster.nodes * cluster.gpus_per_node // cluster.tensor_parallel_size
    batch = trl.get("per_device_train_batch_size", 8) * trl.get("gradient_accumulation_steps", 1) * replicas
    section = SECTIONS[stage]
    values: dict[str, Any] = {
        f"{section}.seed": settings.seed,
        f"{section}.max_num_steps": trl["max_steps"] if trl.get("max_steps", -1) > 0 else 1_000_000_000,
        f"{section}.max_num_epochs": int(trl.get("num_train_epochs", 1_000_000 if trl.get("max_steps", -1) > 0 else 3)),
        f"{section}.val_at_start": False,
        f"{section}.val_period": trl.get("eval_steps", 0) if has_valid else 0,
        "checkpointing.checkpoint_dir": str(run_dir / "checkpoints"),
        "checkpointing.save_period": trl.get("save_steps", 500),
        "checkpointing.keep_top_k": trl.get("save_total_limit"),
        "checkpointing.metric_name": None,
        "policy.model_name": str(model),
        "policy.tokenizer.name": str(model),
        "policy.train_global_batch_size": batch,
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
    values |= _parallel(trl, cluster, stage=stage, megatron=megatron) | _optimizer(trl, stage, megatron=megatron)
    values |= _data(stage, run_dir, has_valid) | _stage(trl, stage, batch)
    return {**values, **(cluster.overrides or {})}


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


def _optimizer(trl: Mapping[str, Any], stage: str, *, megatron: bool) -> dict[str, Any]:
    rate = trl.get("learning_rate", {"sft": 2e-5, "dpo": 1e-6, "rlvr": 1e-6}[stage])
    decay, beta1, beta2 = trl.get("weight_decay", 0.0), trl.get("adam_beta1", 0.9), trl.get("adam_beta2", 0.999)
    epsilon, warmup = trl.get("adam_epsilon", 1e-8), trl.get("warmup_steps", 0)
    kind, steps = trl.get("lr_scheduler_type", "linear"), trl.get("max_steps", -1)
    if kind not in ("linear", "constant", "constant_with_warmup"):
        raise UserError(
            "trl.lr_scheduler_type", show(kind), "linear, constant or constant_with_warmup, with engine nemo_rl"
        )
    if steps <= 0 and (kind == "linear" or 0 < warmup < 1):
        raise UserError("trl.max_steps", "nothing", "the number of steps: NeMo-RL's schedules are told it")
    warmup = int(warmup * steps) if 0 < warmup < 1 else int(warmup)
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
            **({f"{where}.scheduler.lr_decay_iters": steps} if kind == "linear" else {}),
        }
    linear = "torch.optim.lr_scheduler.LinearLR"
    first = {"name": linear, "kwargs": {"start_factor": 1e-8, "end_factor": 1.0, "total_iters": warmup}}
    if kind == "linear":
        then = {"name": linear, "kwargs": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps - warmup}}
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


def _stage(trl: Mapping[str, Any], stage: str, batch: int) -> dict[str, Any]:
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
        return values
    if "max_length" not in trl:
        raise UserError("trl.max_length", "nothing", "tokens of prompt and completion together, with engine nemo_rl")
    loss, scale = trl.get("loss_type", "dapo"), trl.get("scale_rewards", "group")
    if loss not in ("grpo", "dapo", "bnpo"):
        raise UserError("trl.loss_type", show(loss), "grpo, dapo or bnpo, with engine nemo_rl")
    if scale not in ("group", "none", True, False):
        raise UserError("trl.scale_rewards", show(scale), "group or none, with engine nemo_rl")
    group = trl.get("num_generations", 8)
    drawn = trl.get("generation_batch_size", batch * trl.get("steps_per_generation", 1))
    if drawn % group:
        raise UserError("trl.num_generations", group, f"a divisor of the {drawn} completions of a step")
    return {
        _LENGTH: trl["max_length"],
        "grpo.num_generations_per_prompt": group,
        "grpo.num_prompts_per_step": drawn // group,
        "grpo.normalize_rewards": scale in ("group", True),
        "grpo.use_leave_one_out_baseline": False,
        "loss_fn.reference_policy_kl_penalty": trl.get("beta", 0.0),
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.ratio_clip_min": trl.get("epsilon", 0.2),
        "loss_fn.ratio_clip_max": trl.get("epsilon_high", trl.get("epsilon", 0.2)),
        "loss_fn.token_level_loss": loss != "grpo",
        "policy.generation.max_new_tokens": trl.get("max_completion_length", 512),
        "policy.generation.temperature": trl.get("temperature", 1.0),
        "policy.generation.top_p": trl.get("top_p", 1.0),
        "policy.generation.top_k": trl.get("top_k") or None,
        "checkpointing.model_save_format": None,  # see _parallel
    }


def inside_script(settings: PosttrainSettings, cluster: Cluster, run_dir: Path, *, megatron: bool) -> str:
    """run.sh: training and conversion, run by ray.sub inside the container."""
    config, output = shlex.quote(str(run_dir / "nemo_rl.yaml")), shlex.quote(str(run_dir / "output"))
    newest = f"$(ls -d {shlex.quote(str(run_dir / 'checkpoints'))}/step_* | sort -V | tail -n 1)"
    if megatron:
        convert = "uv run --extra mcore examples/converters/convert_megatron_to_hf.py"
        weights = '--megatron-ckpt-path="$(ls -d "$newest"/policy/weights/iter_* | tail -n 1)"'
    else:
        convert = "uv run examples/converters/convert_dcp_to_hf.py"
        weights = '--dcp-ckpt-path="$newest/policy/weights"'
    return f"""#!/bin/bash
# NeMo-RL {VERSION}, written by remit posttrain {settings.stage}. Started by ray.sub; see submit.sh.
set -euo pipefail
cd {shlex.quote(str(Path(cluster.repository).absolute()))}
# One place for the first conversion of the model, which every node reads.
export NRL_MEGATRON_CHECKPOINT_DIR={shlex.quote(str(run_dir / "converted"))}
uv run ./examples/{SCRIPTS[settings.stage]} --config {config}
newest={newest}
rm -rf {output}.part {output}
{convert} --config="$newest/config.yaml" {weights} --hf-ckpt-path={output}.part
mv {output}.part {output}
"""


def submit_script(cluster: Cluster, run_dir: Path) -> str:
    """submit.sh: ray.sub of the checkout, with its variables."""
    repository = Path(cluster.repository).absolute()
    mounts = ",".join([f"{repository}:{repository}", f"{run_dir}:{run_dir}", *cluster.mounts])
    options = {"nodes": cluster.nodes, "job-name": run_dir.name, **(cluster.sbatch or {})}
    words = [f"--{name}={value}" for name, value in options.items()]
    return f"""#!/bin/bash
set -euo pipefail
cd {shlex.quote(str(repository))}
COMMAND={shlex.quote(f"bash {shlex.quote(str(run_dir / 'run.sh'))}")} \\
CONTAINER={shlex.quote(cluster.container)} \\
MOUNTS={shlex.quote(mounts)} \\
GPUS_PER_NODE={cluster.gpus_per_node} \\
sbatch {shlex.join(words)} ray.sub
"""


def known_keys(example: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of an example file, those of sections too."""
    found = set()
    for name, value in example.items():
        found.add(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found |= known_keys(value, f"{prefix}{name}.")
    return found


def _check_keys(values: Mapping[str, Any], repository: Path, stage: str) -> None:
    file = repository / "examples/configs" / EXAMPLES[stage]
    known = known_keys(yaml.safe_load(file.read_text()))
    for name, value in values.items():
        if name not in known and not name.startswith(_FREE):
            hint = did_you_mean(name, sorted(known))
            raise UserError(f"nemo_rl: {name}", show(value), f"a key of {file} (NeMo-RL {VERSION}){hint}")


def _example(cluster: Cluster, stage: str) -> Path:
    return Path(cluster.repository).absolute() / "examples/configs" / EXAMPLES[stage]


def _megatron(cluster: Cluster, family: str) -> bool:
    return cluster.backend == "megatron" if cluster.backend else family in MEGATRON_FAMILIES


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested
