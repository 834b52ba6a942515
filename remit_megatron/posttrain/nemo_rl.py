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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.posttrain import outside
from remit_megatron.posttrain.chat import load_tokenizer, require_template
from remit_megatron.posttrain.configuration import NO_TEMPLATE, PosttrainSettings, dump
from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.formats import write_format
from remit_megatron.posttrain.nemo_rl_keys import Amounts, Cluster, Facts, amounts_of, check_arguments, render
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN, UserError, did_you_mean, show
from remit_megatron.runtime.extras import require
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.locks import DirectoryLock

VERSION = "0.7.0"
EXAMPLES = {"sft": "sft.yaml", "dpo": "dpo.yaml", "rlvr": "grpo_math_1B.yaml"}
SCRIPTS = {"sft": "run_sft.py", "dpo": "run_dpo.py", "rlvr": "run_grpo.py"}
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
    "policy.megatron_cfg.scheduler.lr_decay_iters",  # dpo.yaml leaves it out; NeMo-RL's own recipes for DPO have it
)


def run(settings: PosttrainSettings, *, dry_run: bool = False) -> int:
    """Writes the job, or takes its model; returns 0 when the run has its model, else 75.

    Raises:
        UserError: the configuration, the model or the data is wrong, or says what NeMo-RL cannot do.
    """
    require("trl", field="engine nemo_rl")
    check_arguments(settings)
    cluster = read_cluster(settings)
    given, run_dir = outside.prepare(settings), Path(settings.run_dir).absolute()
    examples = given.train + given.valid
    check_data(settings, examples)
    _check_template(settings, given.source.path, examples)
    facts = facts_of(given.source.path.absolute(), records=len(given.train), has_valid=bool(given.valid))
    values = render(settings, cluster, facts)
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
            outside.take_kept(run_dir / "kept", run_dir, given)
            outside.take_model(run_dir / "output", run_dir, given)
            return EXIT_DONE
        outside.write_settings(run_dir, settings)
        for name, examples in (("train", given.train), ("valid", given.valid)):
            if examples:
                write_format(run_dir / f"data/{name}.jsonl", examples, form="nemo_rl", stage=settings.stage)
        write_atomic(run_dir / "nemo_rl.yaml", text)
        kept = kept_steps(settings, amounts_of(settings, cluster, facts))
        megatron = cluster.on_megatron(facts.family)
        write_atomic(run_dir / "run.sh", inside_script(settings, cluster, run_dir, megatron=megatron, kept=kept))
        write_atomic(run_dir / "submit.sh", submit_script(cluster, run_dir))
        sys.stderr.write(
            f"written for NeMo-RL {VERSION}: bash {run_dir / 'submit.sh'}; when the job is done, start this again\n"
        )
        return EXIT_START_ME_AGAIN
    finally:
        lock.release()


def facts_of(model: Path, *, records: int, has_valid: bool) -> Facts:
    """What a configuration is about, of the model as its config.json says."""
    config = json.loads((model / "config.json").read_text())
    return Facts(model, config.get("model_type", ""), config.get("max_position_embeddings"), records, has_valid)


def kept_steps(settings: PosttrainSettings, amounts: Amounts) -> list[tuple[int, int]]:
    """Steps of TRL's after which a model is kept, each with NeMo-RL's step."""
    every = settings.keep.every
    return [(step, step // amounts.updates) for step in range(every, amounts.steps + 1, every)] if every else []


def _check_template(settings: PosttrainSettings, model: Path, examples: list[Example]) -> None:
    expected = "a file that ends in .jinja: NeMo-RL puts every prompt through a template"
    if settings.chat_template == NO_TEMPLATE or not (settings.chat_template or "x.jinja").endswith(".jinja"):
        raise UserError("chat_template", show(settings.chat_template), expected)
    own = model / "tokenizer_config.json"
    has_own = (model / "chat_template.jinja").exists() or (own.exists() and '"chat_template"' in own.read_text())
    if settings.chat_template is None and not has_own:
        raise UserError("chat_template", f"none in {model}", expected)
    tokenizer = load_tokenizer(model, settings.chat_template)
    require_template(tokenizer, examples, stage=settings.stage, model=model, chat_template=settings.chat_template)


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
        value = given.get(name) or {}
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise UserError(f"nemo_rl.{name}", show(value), "a mapping of names to values")
    mounts = given.get("mounts") or ()
    if not isinstance(mounts, list | tuple) or not all(isinstance(mount, str) and ":" in mount for mount in mounts):
        raise UserError("nemo_rl.mounts", show(mounts), "a list of /host:/container")
    if given.get("backend") not in (None, "dtensor", "megatron"):
        raise UserError(
            "nemo_rl.backend", show(given["backend"]), "dtensor, megatron, or null for what the family takes"
        )
    cluster = Cluster(**{**given, "mounts": tuple(mounts)})
    if cluster.nodes * cluster.gpus_per_node % cluster.tensor_parallel_size:
        found = f"{cluster.tensor_parallel_size} on {cluster.nodes} x {cluster.gpus_per_node} GPUs"
        raise UserError("nemo_rl.tensor_parallel_size", found, "a divisor of the number of GPUs")
    if not _example(cluster, settings.stage).is_file():
        found = f"{cluster.repository} without examples/configs/{EXAMPLES[settings.stage]}"
        raise UserError("nemo_rl.repository", found, f"a checkout of NVIDIA-NeMo/RL at v{VERSION}")
    return cluster


def check_data(settings: PosttrainSettings, examples: list[Example]) -> None:
    """Refuses lines that NeMo-RL would not learn from as TRL does, and verifiers that its own environment is not.

    Raises:
        UserError: names the first line.
    """
    if settings.stage == "sft":
        for example in examples:
            if "text" in example.fields:
                raise UserError(example.place, "text", "messages, or prompt and completion: NeMo-RL has no plain text")
            _check_learnt(settings, example)
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


def _check_learnt(settings: PosttrainSettings, example: Example) -> None:
    """NeMo-RL learns all that the assistant says, and nothing else."""
    prompt = example.fields.get("prompt", [])
    if "messages" in example.fields and not settings.trl.get("assistant_only_loss"):
        found = f"{show(settings.trl.get('assistant_only_loss'))}, with messages at {example.place}"
        raise UserError("trl.assistant_only_loss", found, "true: NeMo-RL learns what the assistant says, and no other")
    if isinstance(prompt, list) and any(message["role"] == "assistant" for message in prompt):
        found = "a prompt with messages of the assistant"
        raise UserError(example.place, found, "none of them: NeMo-RL would learn them too")


def inside_script(
    settings: PosttrainSettings,
    cluster: Cluster,
    run_dir: Path,
    *,
    megatron: bool,
    kept: Sequence[tuple[int, int]] = (),
) -> str:
    """run.sh: training and conversion, run by ray.sub inside the container.

    Args:
        kept: intermediate models, see :func:`kept_steps`.
    """
    config, output = shlex.quote(str(run_dir / "nemo_rl.yaml")), shlex.quote(str(run_dir / "output"))
    newest = f"$(ls -d {shlex.quote(str(run_dir / 'checkpoints'))}/step_* | sort -V | tail -n 1)"
    if megatron:
        convert = "uv run --extra mcore examples/converters/convert_megatron_to_hf.py"
        weights = '--megatron-ckpt-path="$(ls -d "$1"/policy/weights/iter_* | tail -n 1)"'
    else:
        convert = "uv run examples/converters/convert_dcp_to_hf.py"
        weights = '--dcp-ckpt-path="$1/policy/weights"'
    checkpoints, folder = shlex.quote(str(run_dir / "checkpoints")), shlex.quote(str(run_dir / "kept"))
    keep = "".join(f"convert {checkpoints}/step_{round_} {folder}/step-{step}\n" for step, round_ in kept)
    keep = f"mkdir -p {folder}\n{keep}" if kept else ""
    return f"""#!/bin/bash
# NeMo-RL {VERSION}, written by remit posttrain {settings.stage}. Started by ray.sub; see submit.sh.
set -euo pipefail
cd {shlex.quote(str(Path(cluster.repository).absolute()))}
# One place for the first conversion of the model, which every node reads.
export NRL_MEGATRON_CHECKPOINT_DIR={shlex.quote(str(run_dir / "converted"))}
uv run ./examples/{SCRIPTS[settings.stage]} --config {config}
convert() {{ # CHECKPOINT DIRECTORY
  rm -rf "$2.part" "$2"
  {convert} --config="$1/config.yaml" {weights} --hf-ckpt-path="$2.part"
  mv "$2.part" "$2"
}}
{keep}newest={newest}
convert "$newest" {output}
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


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested
