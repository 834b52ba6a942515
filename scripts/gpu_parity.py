#!/usr/bin/env python
"""Every family on this machine's device against transformers: float32, bfloat16, documents that do not see each other.

    python scripts/gpu_parity.py [--small] [--record DIR]

Random models of the families' shapes (fewer layers), the same weights in both. Truth is transformers in float32 on the
same device, TF32 off. In float32 the layers are the local ones, in bfloat16 Transformer Engine's where it is usable. A
case fails (exit code 1) where float32 is off by more than 1e-3 nat, or where bfloat16 is off by more than 1.5 times
what transformers itself loses in bfloat16. With documents, transformers scores each document alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking import heading, record, versions

import patches

patches.apply()

from random_model import write_random_model  # noqa: E402

FAMILIES = ("olmo2_1b", "smollm3_3b", "youtu_2b", "smollm2_135m")
LIMIT, RATIO = 1e-3, 1.5
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


def expected(directory: Path, ids: torch.Tensor, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Loss of each token by transformers, [b, s - 1]; each document alone. What ends a document predicts nothing."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(ids.device).eval()
    losses = []
    with torch.no_grad():
        for part in ids.split(lengths, dim=1):
            logits = model(part).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            losses.append(loss.view(len(ids), -1))
    return torch.cat(losses, dim=1)


def found(directory: Path, ids: torch.Tensor, lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """The same through Megatron, and the layers that it took."""
    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.reference.live import LiveReference

    source, gpu = resolve(directory), torch.cuda.is_available()
    with process_groups() as groups, torch.no_grad():
        arguments = default_arguments(
            params_dtype=dtype, use_cpu_initialization=not gpu, make_vocab_size_divisible_by=64 if gpu else 1
        )
        chunks = build_chunks(model_config(source.hf_config, arguments), groups)
        load_weights(chunks, source)
        packed = arguments.transformer_impl == "transformer_engine"
        forward = ModelForward(
            eod_id=-1, groups=lambda: groups, document_mask=len(lengths) > 1, packed_attention=packed
        )
        reference = LiveReference(chunks, vocab_size=source.hf_config["vocab_size"], forward=forward)
        documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
        host = ids.cpu()
        item = {
            "tokens": host,
            "labels": host.roll(-1, dims=1),
            "loss_mask": torch.ones(host.shape),
            "document_ids": documents.expand_as(host).contiguous(),
        }
        loss = forward.run(chunks[0], forward.batch(item), reference.losses).float()
    ends = torch.tensor(lengths).cumsum(0) - 1
    inside = torch.ones(ids.shape[1], dtype=torch.bool)
    inside[ends] = False
    return loss[:, inside.to(loss.device)], arguments.transformer_impl


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[list[str]], bool]:
    """A row for each family, dtype and mask, and whether all are within their limits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = 48 if args.small else 2048
    rows, good = [], True
    for name in FAMILIES:
        directory = folder / name
        write_random_model(directory, description(name, args), dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        rows_of_embedding = description(name, args)["vocab_size"]
        ids = torch.randint(rows_of_embedding, (2, tokens), generator=generator).to(device)
        for lengths in ([tokens], [tokens // 2 + 1, tokens // 8, tokens - tokens // 2 - 1 - tokens // 8]):
            truth = expected(directory, ids, lengths, torch.float32)
            for dtype in (torch.float32, torch.bfloat16):
                ours, layers = found(directory, ids, lengths, dtype)
                error = (ours - truth).abs()
                theirs = (expected(directory, ids, lengths, dtype) - truth).abs()
                limit = LIMIT if dtype == torch.float32 else RATIO * theirs.mean().item() + 1e-5
                within = bool(torch.isfinite(error).all()) and error.mean().item() <= limit
                within &= dtype != torch.float32 or error.max().item() <= LIMIT
                good &= within
                row = [name, str(dtype)[6:], layers, str(len(lengths))]
                row += [f"{value:.2e}" for value in (error.mean(), error.max(), theirs.mean(), theirs.max())]
                rows.append([*row, "yes" if within else "NO"])
                sys.stdout.write(" | ".join(rows[-1]) + "\n")
    return rows, good


def main() -> int:
    import transformers

    args = parse()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory() as folder:
        rows, good = measure(args, Path(folder))
    head = ["model", "dtype", "layers", "documents", "mean error", "largest", "transformers' mean", "largest", "within"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    if args.record:
        text = f"{versions('torch', 'megatron-core', 'transformers')}\n\nErrors of a token's loss, in nats.\n\n"
        record(args.record, "parity", title=heading("parity"), text=text + "\n".join(lines) + "\n", raw={"rows": rows})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
