#!/usr/bin/env python3
"""A tiny model and data for the toy configurations of post-training, and a picture of what came out.

    scripts/posttrain_toy.py make            # runs/posttrain_toy: model, sft.jsonl, dpo.jsonl, rlvr.jsonl
    remit posttrain sft configs/posttrain/toy_sft.yaml
    remit posttrain dpo configs/posttrain/toy_dpo.yaml
    remit posttrain rlvr configs/posttrain/toy_rlvr.yaml
    scripts/posttrain_toy.py plot            # runs/posttrain_toy/posttrain.png

The task: ``7+5=`` is ``12``. The examples of SFT are right four times in ten; preferences and rewards know better.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+="
RIGHT = 0.4  # share of the examples of SFT
EXAMPLES = 8192


def make(output: Path, seed: int) -> None:
    """Writes the model and the data."""
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    output.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<|end|>": 0} | {character: 1 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        output / "model"
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(output / "model")
    generator = random.Random(seed)

    def problem() -> tuple[str, int]:
        a, b = generator.randrange(10), generator.randrange(10)
        return f"{a}+{b}=", a + b

    def wrong(total: int) -> int:
        return (total + generator.choice((-1, 1, 10))) % 20  # a slip, or a carry

    def write(name: str, lines: list[dict[str, Any]]) -> None:
        (output / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    problems = [problem() for _ in range(EXAMPLES)]
    said = [total if generator.random() < RIGHT else wrong(total) for _, total in problems]
    write("sft.jsonl", [{"prompt": p, "completion": f"{s:02}"} for (p, _), s in zip(problems, said, strict=True)])
    write("dpo.jsonl", [{"prompt": p, "chosen": f"{t:02}", "rejected": f"{wrong(t):02}"} for p, t in problems[:2048]])
    write("rlvr.jsonl", [{"prompt": p, "answer": t} for p, t in (problem() for _ in range(2048))])


PANELS = (
    ("toy_sft", "loss", "SFT: loss"),
    ("toy_dpo", "rewards/accuracies", "DPO: preferred pairs"),
    ("toy_rlvr", "reward_mean", "RLVR: mean reward"),
)


def plot(output: Path) -> None:
    """Draws each stage's own objective by step, from its metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    for axis, (run, metric, title) in zip(axes, PANELS, strict=True):
        lines = [json.loads(line) for line in (output / run / "metrics.jsonl").read_text().splitlines()]
        axis.plot([line["iteration"] for line in lines], [line[metric] for line in lines], linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(output / "posttrain.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "plot"))
    parser.add_argument("--output", type=Path, default=Path("runs/posttrain_toy"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.what == "make":
        make(args.output, args.seed)
    else:
        plot(args.output)


if __name__ == "__main__":
    main()
