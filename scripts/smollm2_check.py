"""Checks of scripts/smollm2_gsm8k.sh against transformers: log-probabilities, the run's metrics, the exported model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

TOLERANCE = 1e-4


def texts_of(path: Path, count: int) -> list[str]:
    """The first texts of a JSONL file with ``text``, or with ``question`` and ``answer``."""
    found = []
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            found.append(record.get("text") or f"Question: {record['question']}\nAnswer: {record['answer']}")
            if len(found) == count:
                break
    return found


def largest_difference(original: Path, checkpoint: Path, texts: list[str]) -> tuple[float, int]:
    """Largest difference of a log-probability between transformers and ``remit logprobs``, and the token count."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command = [sys.executable, "-m", "remit_megatron", "logprobs", "--checkpoint", str(checkpoint)]
        subprocess.run([*command, "--input", str(source), "--output", str(target)], check=True)
        ours = [json.loads(line) for line in target.read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    worst, tokens = 0.0, 0
    for record in ours:
        ids = torch.tensor([record["token_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        worst = max(worst, (logprobs - torch.tensor(record["logprobs"][1:])).abs().max().item())
        tokens += ids.numel() - 1
    return worst, tokens


def main() -> int:
    """Prints the findings; returns 1 if one of them is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--original", "--checkpoint", "--exported", "--run", "--text"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    failures = []

    worst, tokens = largest_difference(args.original, args.checkpoint, texts_of(args.text, 4))
    print(f"log-probabilities of {tokens} tokens, imported model against transformers: largest difference {worst:.1e}")
    if not worst <= TOLERANCE:
        failures.append(f"found a difference of {worst:.1e}; expected at most {TOLERANCE:.0e}")

    metrics = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    first, last = metrics[0], metrics[-1]
    print(f"remit: lm_loss {first['lm_loss']:.4f} -> {last['lm_loss']:.4f}, spread {last['weight_std']:.4f}")
    half = max(1, len(metrics) // 2)
    early, late = (sum(m["lm_loss"] for m in part) / len(part) for part in (metrics[:half], metrics[half:]))
    if len(metrics) > 3 and not late < early:
        failures.append(f"found mean losses {early:.4f}, then {late:.4f}; expected the loss to fall")
    if not all(m["weight_std"] > 0 for m in metrics):
        failures.append("found weights without spread")

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.exported).eval()
    prompt = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    print("exported model continues:", tokenizer.decode(out[0, ids.input_ids.shape[1] :]).strip()[:160])

    for failure in failures:
        print("error:", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
