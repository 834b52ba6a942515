"""How far an FP8 reference would move the token weights of ReMiT, emulated on a CPU before a GPU is at hand.

Weights and inputs of the linear layers are rounded to float8_e4m3fn as the recipes scale them, in all layers but the
first and the last; the rest is float32. What a GPU adds (accumulation, 16-bit activations) is not emulated, so that the
gate of `reference.fp8` has the last word. One table, against the reference in float32:

    python scripts/fp8_error.py --reference HF_DIR --student HF_DIR --input TEXTS.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from remit_megatron.objectives import token_weights, weight_error_bound

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Elements that share a scale, (weights, inputs): rows and columns; None for all of them.
RECIPES: dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]] = {
    "tensorwise": (None, None),
    "blockwise": ((128, 128), (1, 128)),
    "mxfp8": ((1, 32), (1, 32)),
}


def rounded(value: Tensor, block: tuple[int, int] | None, *, powers_of_two: bool = False) -> Tensor:
    """float8_e4m3fn's nearest values to a matrix (further leading axes are rows), scaled block by block."""
    matrix = value.flatten(0, -2)
    rows, columns = block or matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = _LARGEST / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12)
    if powers_of_two:
        scale = scale.log2().floor().exp2()
    blocks = (blocks * scale).to(torch.float8_e4m3fn).to(value.dtype) / scale
    return blocks.flatten(2).flatten(0, 1)[: matrix.shape[0], : matrix.shape[1]].reshape(value.shape)


def quantized(model: torch.nn.Module, recipe: str) -> torch.nn.Module:
    """A copy of a Hugging Face model whose linear layers compute with rounded weights and inputs."""
    model = copy.deepcopy(model)
    of_weights, of_inputs = (
        partial(rounded, block=block, powers_of_two=recipe == "mxfp8") for block in RECIPES[recipe]
    )

    def round_input(_module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (of_inputs(inputs[0]),)

    for layer in model.get_submodule("model.layers")[1:-1]:  # type: ignore[index]
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = of_weights(module.weight.data)
                module.register_forward_pre_hook(round_input)
    return model


def sequences(path: Path, tokenizer: transformers.PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """[count, length + 1] tokens of the texts, each followed by the end-of-document token."""
    tokens: list[int] = []
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            text = record.get("text") or f"Question: {record['question']}\nAnswer: {record['answer']}"
            tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]  # type: ignore[list-item, misc]
            if len(tokens) > count * length:
                return torch.tensor([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
    raise SystemExit(f"{path}: found {len(tokens)} tokens; expected more than {count * length}")


@torch.no_grad()
def losses(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """[count, length] losses in nats."""
    rows = []
    for row in tokens:
        logits = model(row[None, :-1]).logits[0].float()
        rows.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(rows)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True, help="JSONL with text, or question and answer")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.reference)
    tokens = sequences(args.input, tokenizer, args.sequences, args.length)
    read: Callable[[Path], torch.nn.Module] = lambda path: (  # noqa: E731
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    )
    student, reference = losses(read(args.student), tokens), losses(model := read(args.reference), tokens)
    mask = torch.ones_like(student)
    print("| reference | mean abs. difference of the loss | bound on mean abs. dw | mean abs. dw |\n|---|---|---|---|")
    for name in ("bf16", *RECIPES):
        other = losses(copy.deepcopy(model).bfloat16() if name == "bf16" else quantized(model, name), tokens)
        total, counted = weight_error_bound(reference, other, mask)
        moved = (token_weights(student, reference, mask) - token_weights(student, other, mask)).abs().mean()
        print(f"| {name} | {(other - reference).abs().mean():.4f} | {total / counted:.4f} | {moved:.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
