#!/usr/bin/env bash
# What a run on a real model is worth, on CPU: after scripts/smollm2_gsm8k.sh,
#
#   100 GSM8K items with eight worked examples, and as many boolean expressions of BIG-Bench-Hard, of the original and of the run
#   -> paired comparison -> token heatmap of the reference against the original -> one page
#
# Usage: scripts/smollm2_evaluation.sh DATA [RUNS] [ITEMS]
#   DATA   folder with gsm8k_train.jsonl (question, answer) and bbh/boolean_expressions.json, as their authors publish them
#   RUNS   what scripts/smollm2_gsm8k.sh wrote (default: runs/smollm2_gsm8k)
#   ITEMS  of each task (default: 100)
set -euo pipefail

data=${1:-}
runs=${2:-runs/smollm2_gsm8k}
items=${3:-100}
for file in "$data/gsm8k_train.jsonl" "$data/bbh/boolean_expressions.json"; do
    if [[ ! -f $file ]]; then
        echo "error: DATA: found no $file; expected GSM8K's and BIG-Bench-Hard's own files" >&2
        exit 2
    fi
done
for place in hf reference/config.yaml remit/config.yaml; do
    if [[ ! -e $runs/$place ]]; then
        echo "error: RUNS: found no $runs/$place; expected what scripts/smollm2_gsm8k.sh writes" >&2
        exit 2
    fi
done
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$repository/.venv/bin:$PATH"

say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

say "Items: the last ones of the file, which a short run does not train on"
items_folder=$runs/items
mkdir -p "$items_folder/gsm8k" "$items_folder/boolean"
tail -n "$items" "$data/gsm8k_train.jsonl" >"$items_folder/gsm8k/test.jsonl"
python -c 'import json, sys; [print(json.dumps(item)) for item in json.load(sys.stdin)["examples"]]' \
    <"$data/bbh/boolean_expressions.json" >"$items_folder/boolean/test.jsonl"
tail -n 8 "$data/gsm8k_train.jsonl" |
    python -c 'import json, sys
for line in sys.stdin:
    item = json.loads(line)
    print(json.dumps({"text": "Question: {question}\nAnswer: {answer}".format(**item)}))' >"$items_folder/texts.jsonl"

say "Evaluation"
remit evaluate "original=$runs/hf" "remit=$runs/remit" --suite smollm2 \
    --data "$items_folder" --limit "$items" --output "$runs/evaluation"
remit evaluate compare "$runs/evaluation"

say "Heatmap"
remit analyze heatmap --student "$runs/hf" --reference "$runs/reference" --input "$items_folder/texts.jsonl" \
    --output "$runs/analysis/heatmap"

say "Report"
remit report "$runs/reference" "$runs/remit" --results "$runs/evaluation/results.json" --parts "$runs/analysis" \
    --title "SmolLM2-135M-Instruct on GSM8K" --output "$runs/report.html"
say "Done"
