#!/usr/bin/env python
"""Every family on this machine's devices against transformers: losses and gradients, as a run would compute them.

    python scripts/gpu_parity.py [--small] [--record DIR]
    python scripts/gpu_parity.py --layouts 8

Random models of the families' shapes (fewer layers), the same weights in both; batches of whole sequences and of
documents that do not see each other. Truth is transformers in float32 on the same device, TF32 off; with documents it
reads each alone. Ours is the training step with everything that `remit train` sets on this machine: in bfloat16
Transformer Engine's layers where they are usable, with fused rotary embeddings and weight gradients added to the
buffer; in float32 the local layers. Gradients are those of ntp and of kd (half ntp, half the divergence from a
reference of the same weights, which has none); beside them the losses of a reference from its chunked head.
--layouts N takes the layouts that fit N ranks in place of one rank: tensor, sequence, pipeline (virtual stages and a
replicated reference, too) and context parallelism.

A case fails (exit code 1) where a float32 loss is off by more than 1e-3 nat or a weight's gradient by more than 1e-3 of
its norm; where in bfloat16 losses, or gradients on average, are off by more than 1.5 times what transformers itself
loses in bfloat16, or one gradient by more than twice its largest; or where its ranks fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarking import heading, record, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import patches  # noqa: E402

patches.apply()

from gpu_parity_ranks import LAYOUTS, ranks_of  # noqa: E402
from random_model import write_random_model  # noqa: E402

FAMILIES = ("olmo2_1b", "smollm3_3b", "youtu_2b", "smollm2_135m")
ODD_HEADS = ("smollm2_135m",)  # 9 heads, 3 groups: no tensor parallelism
SEQUENCES = 4
STOPPED = (75, 128 + signal.SIGTERM)  # of ranks: gpu_day.sh's time is up, and what there is goes into the record
LIMIT, RATIO, LARGEST_RATIO = 1e-3, 1.5, 2.0
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131,
}  # fmt: skip
SMALL_LATENT = SMALL | {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--layouts", type=int, metavar="N", help="all layouts of 2 to N ranks, in place of one rank")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    return parser.parse_args()


def description(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """config.json of a family, with fewer layers."""
    from remit_megatron.run.configuration import load_model_description

    values = load_model_description(name) | {"num_hidden_layers": args.layers, "torch_dtype": "float32"}
    for key in ("no_rope_layers", "layer_types"):
        if values.get(key) is not None:
            values[key] = values[key][: args.layers]
    values = {key: None if key.endswith("_token_id") else value for key, value in values.items()}
    if args.small:
        values |= SMALL_LATENT if values["model_type"].startswith("youtu") else SMALL
        if "head_dim" in values and not values["model_type"].startswith("youtu"):
            values["head_dim"] = 16
    return values


def transformers_step(
    directory: Path, ids: torch.Tensor, lengths: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each token [b, s], 0 for the last of a document, and gradients of their mean in float32, on the host."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    losses = torch.zeros(ids.shape)
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    counted = len(ids) * (ids.shape[1] - len(lengths))
    for row, sequence in enumerate(ids.to(device).split(1)):
        first = 0
        for part in sequence.split(lengths, dim=1):
            logits = model(part).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:], reduction="none")
            (loss.sum() / counted).backward()
            losses[row, first : first + len(loss)] = loss.detach().cpu()
            first += part.shape[1]
            for name, parameter in model.named_parameters():  # summed in float32, as Megatron does it
                gradients[name] += parameter.grad
                parameter.grad = None
    return losses, {name: gradient.cpu() for name, gradient in gradients.items()}


def write_case(folder: Path, model: Path, vocabulary: int, lengths: list[int]) -> dict[str, Any]:
    """Truth in files, and what transformers loses of it in bfloat16."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (SEQUENCES, sum(lengths)), generator=generator)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(ids.shape).contiguous()
    counted = torch.ones(ids.shape, dtype=torch.uint8)
    counted[:, torch.tensor(lengths).cumsum(0) - 1] = 0
    losses, gradients = transformers_step(model, ids, lengths, torch.float32)
    folder.mkdir()
    (folder / "model").symlink_to(model)
    (folder / "gradient").mkdir()
    shutil.copy(model / "config.json", folder / "gradient")
    save_file(gradients, folder / "gradient" / "model.safetensors", metadata={"format": "pt"})
    truth = {"ids": ids, "documents": documents, "counted": counted, "losses": losses}
    save_file(truth, folder / "truth.safetensors")
    rounded, of_rounded = transformers_step(model, ids, lengths, torch.bfloat16)
    error = (rounded - losses).abs()[counted.bool()]
    theirs = {"mean": error.mean().item(), "largest": error.max().item(), "gradients": {}}
    for name, gradient in gradients.items():
        theirs["gradients"][name] = ((of_rounded[name] - gradient).norm() / gradient.norm()).item()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the ranks are other processes
    return theirs


def mean_and_largest(errors: dict[str, float]) -> tuple[float, float, str]:
    """Mean and largest error of the gradients, and the weight of the largest; one that is no number counts as that."""
    name = max(errors, key=lambda one: math.inf if math.isnan(errors[one]) else errors[one])
    return sum(errors.values()) / len(errors), errors[name], name.split()[0]


def judge(found: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether a case is within its limits.

    Rounding makes the error of a single small weight (a norm's) another on every layout, so that each is judged by
    the largest that transformers has, and their mean by its mean.
    """
    if not found["gradients"] or not all(found["gradients"].values()):
        return False
    exact = found["dtype"] == "float32"
    of_loss = LIMIT if exact else RATIO * theirs["mean"] + 1e-5
    good = found["mean_loss_error"] <= of_loss
    for losses in found["losses"].values():
        good &= losses["mean"] <= of_loss and (not exact or losses["largest"] <= LIMIT)
    their_mean, their_largest, _ = mean_and_largest(theirs["gradients"])
    for errors in found["gradients"].values():
        mean, largest, _ = mean_and_largest(errors)
        good &= largest <= (LIMIT if exact else LARGEST_RATIO * their_largest)  # not a number is not
        good &= exact or mean <= RATIO * their_mean
    return good


def jobs_of(args: argparse.Namespace, folder: Path, theirs: dict[str, Any]) -> dict[int, list[dict[str, str]]]:
    """Writes the cases; number of ranks -> what these do, in order."""
    jobs: dict[int, list[dict[str, str]]] = {}
    tokens = 48 if args.small else 2048
    documents = [tokens // 2 + 1, tokens // 8, tokens - tokens // 2 - 1 - tokens // 8]
    wanted = ["one"] if args.layouts is None else [name for name in LAYOUTS if 1 < ranks_of(name) <= args.layouts]
    for family in args.families:
        model = folder / family
        write_random_model(model, description(family, args), dtype=torch.float32)
        for lengths in ([tokens], documents):
            case = folder / f"{family}-{len(lengths)}"
            theirs[str(case)] = write_case(case, model, description(family, args)["vocab_size"], lengths)
            for layout in wanted:
                if "tensor_model_parallel_size" in LAYOUTS[layout] and family in ODD_HEADS and not args.small:
                    continue
                whole = "context_parallel_size" in LAYOUTS[layout]  # documents are refused with Transformer Engine's
                if layout != "one" and whole != (len(lengths) == 1):
                    continue
                for dtype in ("float32", "bfloat16"):
                    job = {"case": str(case), "layout": layout, "dtype": dtype}
                    jobs.setdefault(ranks_of(layout), []).append(job)
    return jobs


def run_jobs(folder: Path, nproc: int, jobs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Results of the jobs. Where ranks fail, that job has none, and new ranks go on behind it; none after a signal."""
    from remit_megatron.runtime.launch import launch

    own = folder / f"ranks-{nproc}"
    own.mkdir()
    results: list[dict[str, Any]] = []
    while len(results) < len(jobs):
        (own / "jobs.json").write_text(json.dumps(jobs[len(results) :]))
        path = own / "results.jsonl"
        path.unlink(missing_ok=True)
        code = launch(nproc, [str(own)], module="gpu_parity_ranks")
        if path.exists():
            results += [json.loads(line) for line in path.read_text().splitlines()]
        if len(results) < len(jobs):
            left = jobs[len(results) :] if code in STOPPED else [jobs[len(results)]]
            results += [job | {"failed": code} for job in left]
    return results


def rows_of(results: list[dict[str, Any]], theirs: dict[str, Any]) -> tuple[list[list[str]], bool]:
    """A row for each result and placement of the reference, and whether all are within their limits."""
    rows, good = [], True
    for found in results:
        family, documents = Path(found["case"]).name.rsplit("-", 1)
        start = [family, found["layout"], found["dtype"]]
        if "failed" in found:
            rows.append([*start, documents, f"ranks failed, exit code {found['failed']}", *[""] * 9, "NO"])
            good = False
            continue
        other = theirs[found["case"]]
        within = judge(found, other)
        good &= within
        ours = {objective: mean_and_largest(errors) for objective, errors in found["gradients"].items()}
        for placement, losses in found["losses"].items():
            row = [*start, documents, found["layers"], placement]
            row += [f"{value:.2e}" for value in (losses["mean"], losses["largest"], other["mean"], other["largest"])]
            row += [f"{mean:.2e}, {largest:.2e} ({name})" for mean, largest, name in ours.values()]
            row += [f"{value:.2e}" for value in mean_and_largest(other["gradients"])[:2]]
            rows.append([*row, "yes" if within else "NO"])
    return rows, good


def main() -> int:
    import transformers

    args = parse()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    results: list[dict[str, Any]] = []
    theirs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for nproc, jobs in jobs_of(args, Path(folder), theirs).items():
            if any(found.get("failed") in STOPPED for found in results):
                results += [job | {"failed": STOPPED[1]} for job in jobs]
            else:
                results += run_jobs(Path(folder), nproc, jobs)
    rows, good = rows_of(results, theirs)
    head = ["model", "layout", "dtype", "documents", "layers", "reference", "mean error", "largest"]
    head += ["transformers' mean", "largest", "ntp gradients: mean, largest", "kd gradients: mean, largest"]
    head += ["transformers' mean", "largest", "within"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.record:
        packages = versions("megatron-core", "transformers", "transformer-engine")
        said = "Errors of a token's loss in nats, of a gradient in parts of its norm; transformers' in bfloat16."
        text = f"{heading('parity')}\n{packages}\n\n{said}\n\n" + "\n".join(lines) + "\n"
        named = [found | {"case": Path(found["case"]).name} for found in results]
        raw = {"results": named, "transformers": {Path(case).name: errors for case, errors in theirs.items()}}
        record(args.record, "parity", title="Parity", text=text, raw=raw)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
