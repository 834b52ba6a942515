"""Megatron's arguments against real runs: what a dry run accepts, two steps do not die of.

In CI a few draws, always the same. ``python -m tests.fuzz.test_arguments_sweep 500 [SEED]`` is a long one with its own
draws; it prints each fault, and how many draws were refused, done and stopped.
"""

from __future__ import annotations

import contextlib
import enum
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import patches

patches.apply()

from remit_megatron.run.megatron_args import _known_arguments  # noqa: E402
from tests.distributed.pool import RankFailure, RankPool  # noqa: E402
from tests.tiny import make_llama, make_tokenizer, write_documents  # noqa: E402

# What a run is made of; each draw gives two or three groups another value of one or all of their arguments.
GROUPS: list[dict[str, list[Any]]] = [
    {"lr": [1e-3, 0.0, -1.0, 1e-12, 1], "min_lr": [0.0, 1e-5, 1e-2, -1.0], "lr_warmup_init": [0.0, 1e-4, 1.0]},
    {
        "lr_decay_style": ["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        "lr_wsd_decay_iters": [None, 0, 1, 2, 5],
        "lr_wsd_decay_style": ["exponential", "linear", "cosine", "minus_sqrt"],
        "lr_decay_iters": [None, 1, 2, 7, 0],
        "lr_warmup_iters": [0, 1, 2, -1],
        "lr_warmup_fraction": [None, 0.0, 0.5, 1.0],
    },
    {
        "train_iters": [None],
        "train_samples": [4, 5, 1, 0],
        "lr_warmup_samples": [0, 1, 9],
        "lr_decay_samples": [None, 3],
    },
    {
        "weight_decay": [0.0, 0.1, -0.1],
        "start_weight_decay": [None, 0.0, 0.2],
        "end_weight_decay": [None, 0.1, 0.2],
        "weight_decay_incr_style": ["constant", "linear", "cosine"],
    },
    {
        "optimizer": ["adam", "sgd", "muon", "lion"],
        "adam_beta1": [0.9, 0.0, 1.0],
        "adam_beta2": [0.95, 1.0, 0.0],
        "adam_eps": [1e-8, 0.0, 1.0],
        "sgd_momentum": [0.9, 0.0, 1.0],
        "clip_grad": [0.0, 1.0, -1.0, 1e-30],
    },
    {"decoupled_lr": [1e-3, 0.0, 1e-6], "decoupled_min_lr": [None, 0.0, 1e-4]},
    {
        "bf16": [True, False],
        "use_distributed_optimizer": [True, False],
        "overlap_grad_reduce": [True, False],
        "overlap_param_gather": [True, False],
        "grad_reduce_in_bf16": [True, False],
        "accumulate_allreduce_grads_in_fp32": [True, False],
        "main_grads_dtype": ["fp32", "bf16"],
        "fp32_residual_connection": [True, False],
    },
    {
        "fp16": [True],
        "initial_loss_scale": [1.0, 16.0, 0.0],
        "min_loss_scale": [1.0, 0.5, 32.0],
        "loss_scale_window": [1, 1000, 0, 0.5],
        "hysteresis": [1, 2, 0],
        "loss_scale": [None, 1.0, 0.0],
    },
    {
        "micro_batch_size": [1, 2, 3, 0],
        "global_batch_size": [2, 4, 6, 3, None],
        "eval_global_batch_size": [None, 1, 2, 4, 0],
        "eval_micro_batch_size": [None, 1, 2, 0],
        "decrease_batch_size_if_needed": [True, False],
    },
    {
        "recompute_granularity": [None, "full", "selective"],
        "recompute_method": [None, "uniform", "block"],
        "recompute_num_layers": [None, 0, 1, 2, 3],
        "recompute_modules": [["core_attn"], ["mlp"], ["layernorm"], ["moe"]],
    },
    {"attention_dropout": [0.0, 0.5, 1.0, -0.1], "hidden_dropout": [0.0, 0.5, 1.0]},
    {
        "init_method_std": [0.0, 0.02, -1.0],
        "embedding_init_method_std": [None, 0.0, -1.0],
        "activation_func_clamp_value": [None, 1.0],
        "rotary_seq_len_interpolation_factor": [None, 2],
        "glu_linear_offset": [0.0, 1.0],
        "apply_query_key_layer_scaling": [True, False],
    },
    {
        "eval_interval": [1, 2, 100, 0],
        "eval_iters": [0, 1, 2, -1],
        "start_eval_at_iter": [None, 0, 1, 5, -1],
        "save_interval": [1, 2, 100, 0],
        "exit_interval": [None, 1, 2, 0, -1],
        "iterations_to_skip": [[], [1], [2], [9]],
        "train_sync_interval": [None, 0, 1, -1],
    },
    {
        "log_params_norm": [True],
        "log_num_zeros_in_grad": [True],
        "log_throughput": [True],
        "log_timers_to_tensorboard": [True],
        "log_memory_interval": [None, 1, 0],
        "timing_log_level": [0, 1, 2],
        "tensorboard_log_interval": [1, 2, 0],
        "tensorboard_queue_size": [1, 0],
        "manual_gc": [True],
        "manual_gc_interval": [0, 1, -1],
        "check_weight_hash_across_dp_replicas_interval": [None, 1, 0],
        "profile": [True, False],
        "use_pytorch_profiler": [True],
        "profile_step_start": [0, 1, -1],
        "profile_step_end": [2, 1],
    },
    {
        "tensor_model_parallel_size": [1, 2, 0],
        "pipeline_model_parallel_size": [1, 2],
        "sequence_parallel": [True, False],
        "num_distributed_optimizer_instances": [1, 2, 0],
        "decoder_first_pipeline_num_layers": [None, 1, 2],
        "expert_model_parallel_size": [1, 0],
        "cp_comm_type": [["p2p"], ["x"]],
    },
    {
        "use_gloo_process_groups": [True, False],
        "ddp_bucket_size": [None, 1, 0],
        "ddp_num_buckets": [None, 1, 0],
        "ddp_average_in_collective": [True, False],
        "async_save": [True, False],
        "ckpt_fully_parallel_save": [True, False],
        "dist_ckpt_workers": [1, 2, 0],
        "distributed_timeout_minutes": [1, 0],
        "rerun_mode": ["disabled", "validate_results", "report_stats"],
        "deterministic_mode": [True],
        "exit_signal": ["SIGTERM", "SIGUSR1", "SIGKILL"],
    },
]


class Outcome(NamedTuple):
    """Exit code (or a traceback's last line), what was said on standard error, and what Megatron made of the values."""

    code: int | str
    error: str
    made: dict[str, Any]


def draw(generator: random.Random) -> dict[str, Any]:
    """Values of one to six arguments, of one to three groups."""
    values: dict[str, Any] = {}
    for group in generator.sample(GROUPS, generator.choice((1, 1, 2, 3))):
        names = generator.sample(sorted(group), generator.randint(1, min(3, len(group))))
        for name in (name for name in group if name in names or name in ("fp16", "train_iters")):
            values[name] = generator.choice(group[name])
    return {name: value for name, value in values.items() if value is not None or name in ("train_iters",)}


def material(root: Path) -> Path:
    """A tokenizer, a student, and a corpus that is also held out."""
    from remit_megatron.data.build import build_dataset

    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "corpus.jsonl", count=150, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
    make_llama(root / "student", seed=1, tokenizer=tokenizer, **sizes)
    return root


def configuration(root: Path, megatron: dict[str, Any]) -> Path:
    smallest = {"seq_length": 32, "global_batch_size": 2, "train_iters": 2, "lr": 1e-3, "min_lr": 1e-5}
    content = {
        "init": str(root / "student"),
        "objective": {"name": "ntp"},
        "data": {
            "train": str(root / "corpus"),
            "valid": [str(root / "corpus")],
            "tokenizer": str(root / "tokenizer"),
            "num_workers": 0,
        },
        "megatron": smallest | {"eval_iters": 1} | megatron,
        "run_dir": str(root / "run"),
    }
    path = root / "run.yaml"
    path.write_text(json.dumps(content))
    return path


def command(words: list[str], names: list[str]) -> Outcome:
    """A command in a warm process."""
    from megatron.training import global_vars

    from remit_megatron.cli import main

    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code: int | str = main(words)
        except BaseException as raised:  # what a user would see as a traceback
            code = f"{type(raised).__name__}: {raised}"[:300]
    arguments = global_vars._GLOBAL_ARGS
    made = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return Outcome(code, error.getvalue(), {name: value for name, value in made.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)


def fault(pool: RankPool, root: Path, megatron: dict[str, Any], outcomes: Counter[str]) -> str | None:
    """What is wrong with how these arguments are dealt with, or None."""
    shutil.rmtree(root / "run", ignore_errors=True)
    words = ["train", str(configuration(root, megatron))]
    try:
        (dry,) = pool.run(command, world_size=1, words=[*words, "--dry-run", "--nproc", "1"], names=[])
        if dry.code == 2 and dry.error.startswith("error: ") and dry.error.count("\n") == 1:
            outcomes["refused"] += 1
            return None
        if dry.code != 0:
            return f"dry run: {dry.code} {dry.error}"
        (run,) = pool.run(command, world_size=1, words=words, names=list(megatron))
    except RankFailure as failure:
        return f"the process died: {failure}"
    outcomes[str(run.code)] += 1
    stopped = run.code == 75 and ("exit_interval" in megatron)
    hopeless = run.code == 70 and ("gradient of norm" in run.error or "found no update in" in run.error)
    if run.code != 0 and not stopped and not hopeless:
        return f"run: {run.code} {run.error}"
    other = {
        name: (value, run.made[name])
        for name, value in megatron.items()
        if name in run.made and _is_plain(value) and run.made[name] != value
    }
    other.pop("clip_grad", None)  # infinite for 0, so that the norm is measured
    other = {name: values for name, values in other.items() if values[0] != _known_arguments()[0][name].default}
    return f"other values: {other}" if other else None


@pytest.mark.parametrize("part", range(2))
def test_what_a_dry_run_accepts_runs(pool, tmp_path, part):
    generator, outcomes = random.Random(part), Counter[str]()
    root = material(tmp_path)
    for _ in range(15):
        megatron = draw(generator)
        found = fault(pool, root, megatron, outcomes)
        assert found is None, (megatron, found)
    assert outcomes["refused"] and outcomes["0"], outcomes


def main(count: int, seed: int) -> int:
    generator, outcomes, faults = random.Random(seed), Counter[str](), 0
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        root = material(Path(folder))
        for number in range(count):
            megatron = draw(generator)
            if (found := fault(pool, root, megatron, outcomes)) is not None:
                faults += 1
                print(number, json.dumps(megatron), found, flush=True)
    pool.close()
    print(f"{count} draws, {faults} faults, {dict(outcomes)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000))
