#!/usr/bin/env python
"""A run on this machine's devices from end to end: memory against `remit plan`, save and resume, the parts of a step.

    python scripts/gpu_run.py [--nproc N] [--layers N] [--small] [--record DIR]

Trains a random model on random text with `remit` and a live reference: two runs to their end, and one that is saved and
stopped (exit code 75) and started again; then `remit score`, and a run from these scores, kept in float32. GPUs may add
in another order each time, so the two whole runs say how far apart losses of the same run are; the stopped one and that
from the scores may be at most four times that and 1e-5 from the first, and the two at most 1e-3 from each other. With
an even number of ranks the same data on two pipeline stages, the reference in the pipeline and then whole on every rank
(`reference.placement: replicated`): losses apart by no more than that either. Checkpoints of a run go with its end.

Reported beside it: the peak memory of every rank over the plan's, which must be at most 8% above it (what the plan
leaves alone for CUDA and NCCL) and at least 1 / 1.4; and the time of one step, the last but one, by kinds of kernels
(torch.profiler; on a CPU, by operations). Exit code 1 where a part fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarking import heading, record, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS, STOP = 7, 3  # a replicated reference fills pauses from the fifth step on, and the last has nothing ahead of it
# Losses of two runs of the same: apart by at most this, or nothing can be said of a third.
NOISE, TIMES, EXACT = 1e-3, 4.0, 1e-5
# Peak of a GPU's memory over the plan's.
LEAST_MEMORY, MOST_MEMORY = 1 / 1.4, 1.08
# Kind of a kernel -> what its name holds; the first that fits. On a CPU the names are those of operations.
KINDS = {
    "loss over the vocabulary": r"_statistics_kernel|_gradient_kernel|_divergence",
    "communication": r"nccl|gloo|c10d",
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "matrix products": r"gemm|cutlass|nvjet|aten::(mm|bmm|addmm)|wgmma|cublas",
    "norms and rotary": r"norm|rope|rotary",
    "optimizer": r"adam|multi_tensor|foreach",
    "copies": r"memcpy|memset|copy_|fill_|zero_",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=1, help="ranks, one for each GPU (default: 1)")
    parser.add_argument("--layers", type=int, help="of the model (default: 16; 4 with --small)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    parser.add_argument("--rank-of", nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def rank(config: str, out: str) -> int:
    """One rank of the run, one step profiled; leaves its peak memory and the time of each kind in OUT.RANK.json."""
    import patches

    patches.apply()
    import torch
    from megatron.training import training
    from torch.profiler import ProfilerActivity, profile

    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    original, profilers = training.train_step, []
    steps = 0

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != STEPS - 1:
            return original(*args, **kwargs)
        with profile(activities=activities) as profiler:
            result = original(*args, **kwargs)
            if gpu:
                torch.cuda.synchronize()
        profilers.append(profiler)
        return result

    training.train_step = train_step
    code = train(load_config(config))
    (profiler,) = profilers
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if not gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key, re.I)), "everything else")
            seconds[kind] = seconds.get(kind, 0.0) + spent / 1e6
    peak = torch.cuda.max_memory_allocated() if gpu else None
    Path(f"{out}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps({"peak": peak, "seconds": seconds}))
    return code


def material(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A tokenizer, random text, and the configuration of the run."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<eos>", "<unk>", *(f"w{n}" for n in range(126))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    draw = random.Random(1)
    lines = (" ".join(draw.choices(list(words)[2:], k=draw.randint(20, 400))) for _ in range(2000))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    small = args.small
    size = {"hidden_size": 64, "intermediate_size": 128} if small else {"hidden_size": 2048, "intermediate_size": 8192}
    model = {
        "model_type": "llama",
        "vocab_size": 131 if small else 100352,
        **size,
        "num_hidden_layers": args.layers or (4 if small else 16),
        "num_attention_heads": 4 if small else 16,
        "num_key_value_heads": 4 if small else 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "reference").mkdir()
    megatron = {
        "seq_length": 64 if small else 4096,
        "micro_batch_size": 1,
        "global_batch_size": 4 * args.nproc,
        "train_iters": STEPS,
        "lr": 1e-3,
        "save_interval": 1000,
        "ckpt_format": "torch_dist",
    }
    return {
        "model": model,
        "objective": {"name": "remit", "epsilon": 0.2},
        "reference": {"checkpoint": str(folder / "reference_model")},
        "data": {
            "train": [[1.0, str(folder / "corpus")]],
            "tokenizer": str(folder / "tokenizer"),
            "document_mask": True,
            "num_workers": 0,
        },
        "megatron": megatron,
        "logging": {"tensorboard": False},
    }


def remit(*words: str, check: bool = True) -> int:
    return subprocess.run([sys.executable, "-m", "remit_megatron", *words], cwd=ROOT, check=check).returncode


def configured(folder: Path, name: str, config: dict[str, Any], **changes: Any) -> Path:
    """The configuration of a run, in a file."""
    own = config | {"run_dir": str(folder / config.get("run", name)), "megatron": config["megatron"] | changes}
    own.pop("run", None)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(own))  # JSON is YAML
    return path


def run(folder: Path, name: str, config: dict[str, Any], nproc: int, *, profiled: bool = False, **changes: Any) -> int:
    """One start of a run; returns its exit code. Of a run that ended the checkpoints go: 14 bytes a parameter each."""
    from remit_megatron.runtime.launch import launch

    path = configured(folder, name, config, **changes)
    if profiled:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
        code = launch(nproc, ["--rank-of", str(path), str(folder / "profile")], module="gpu_run")
    else:
        code = launch(nproc, ["train", str(path)])
    if code == 0:
        shutil.rmtree(folder / config.get("run", name) / "checkpoints")
    return code


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of two runs' losses; infinite where they are not of equal length, or one is no number."""
    if len(one) != len(other) or not one:
        return math.inf
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def faults(
    codes: dict[str, int], found: dict[str, list[float]], planned: int, peaks: list[int | None]
) -> tuple[list[str], dict[str, float]]:
    """What does not hold, in words, and the differences that were judged.

    Args:
        codes: exit code of each start, by name.
        found: losses of "straight", "again", "resumed" and "cached", and of "pipeline" and "replicated" where those
            ran.
        planned: bytes of a GPU by the plan.
        peaks: the most that each rank had allocated; None where there is no GPU.
    """
    wrong = [f"{name}: exit code {code}" for name, code in codes.items() if code != (75 if name == "stopped" else 0)]
    wrong += [f"{name}: {len(losses)} steps of {STEPS}" for name, losses in found.items() if len(losses) != STEPS]
    differences = {"again": apart(found["straight"], found["again"])}
    differences |= {name: apart(found["straight"], found[name]) for name in ("resumed", "cached")}
    if "replicated" in found:
        differences["replicated"] = apart(found["pipeline"], found["replicated"])
    if not differences["again"] <= NOISE:
        wrong.append(f"two runs of the same are {differences['again']:.1e} apart, more than {NOISE}")
    limit = EXACT + TIMES * differences["again"]
    for name in ("resumed", "cached", "replicated"):
        if name in differences and not differences[name] <= limit:
            wrong.append(f"{name}: {differences[name]:.1e} apart, more than {limit:.1e}")
    for number, peak in enumerate(peaks):
        if peak is not None and not LEAST_MEMORY <= peak / planned <= MOST_MEMORY:
            ratio = f"{peak / planned:.3f} times the plan's memory"
            wrong.append(f"rank {number} took {ratio}; expected {LEAST_MEMORY:.2f} to {MOST_MEMORY}")
    return wrong, differences


def losses(folder: Path) -> list[float]:
    """Of the steps of a run; none where it ended before its first."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [json.loads(line)["lm_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure(args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any], bool]:
    """Text of the record, its figures, and whether everything held."""
    import torch

    import patches

    patches.apply()
    from random_model import write_random_model

    config = material(folder, args)
    write_random_model(folder / "reference_model", config["model"], dtype=torch.float32, seed=2)
    for file in (folder / "tokenizer").iterdir():
        (folder / "reference_model" / file.name).write_bytes(file.read_bytes())
    words = ["--input", str(folder / "text.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    remit("data", "build", *words, "--output", str(folder / "corpus"))
    codes = {
        "straight": run(folder, "straight", config, args.nproc),
        "again": run(folder, "again", config, args.nproc, profiled=True),
        "stopped": run(folder, "stopped", config | {"run": "resumed"}, args.nproc, exit_interval=STOP),
        "resumed": run(folder, "resumed", config | {"run": "resumed"}, args.nproc),
    }
    scored = config | {"reference": config["reference"] | {"cache_dir": str(folder / "scores"), "dtype": "float32"}}
    words = ["score", str(configured(folder, "scored", scored)), "--nproc", str(args.nproc)]
    codes["scored"] = remit(*words, check=False)
    cached = scored | {"reference": scored["reference"] | {"source": "cache"}}
    codes["cached"] = run(folder, "cached", cached, args.nproc)
    if args.nproc % 2 == 0:
        for placement in ("pipeline", "replicated"):
            reference = config["reference"] | {"placement": placement}
            changes = {"pipeline_model_parallel_size": 2}
            codes[placement] = run(folder, placement, config | {"reference": reference}, args.nproc, **changes)
    found = {name: losses(folder / name) for name in codes if name not in ("stopped", "scored")}
    profiles = [folder / f"profile.{number}.json" for number in range(args.nproc)]
    nothing: dict[str, Any] = {"peak": None, "seconds": {"nothing, the run ended before": 1.0}}
    ranks = [json.loads(path.read_text()) if path.exists() else nothing for path in profiles]
    plan = folder / "plan.json"
    nodes = ["--nodes", "1", "--gpus-per-node", str(args.nproc)]
    remit("plan", str(folder / "straight.yaml"), *nodes, "--json", str(plan))
    planned = json.loads(plan.read_text())["stages"][0]["total"]
    wrong, differences = faults(codes, found, planned, [one["peak"] for one in ranks])
    figures = {"codes": codes, "losses": found, "apart": differences, "planned": planned, "ranks": ranks}
    return text_of(differences, planned, ranks, wrong), figures | {"wrong": wrong}, not wrong


def text_of(differences: dict[str, float], planned: int, ranks: list[dict[str, Any]], wrong: list[str]) -> str:
    """The record in Markdown."""
    spent = ranks[-1]["seconds"]
    shown = ("no GPU" if one["peak"] is None else f"{one['peak'] / 2**30:.2f} GiB" for one in ranks)
    compared = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    lines = [
        f"Largest difference of a loss from the run beside it: {compared}.",
        f"Memory of a GPU by the plan: {planned / 2**30:.2f} GiB; peak of the ranks: {', '.join(shown)}.",
        *(f"WRONG: {fault}." for fault in wrong),
        "",
        f"| kind | share of {sum(spent.values()):.3f} s of step {STEPS - 1} |",
        "|---|---|",
        *(
            f"| {kind} | {value / sum(spent.values()):.1%} |"
            for kind, value in sorted(spent.items(), key=lambda x: -x[1])
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    args = parse()
    if args.rank_of:
        return rank(*args.rank_of)
    with tempfile.TemporaryDirectory() as folder:
        text, figures, good = measure(args, Path(folder))
    sys.stdout.write(text + "\n")
    if args.record:
        head = f"{heading('a run from end to end')}\n{versions('megatron-core', 'transformer-engine')}\n\n"
        record(args.record, "gpu_run", title="A run from end to end", text=head + text, raw=figures)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
