#!/usr/bin/env bash
# The first day on GPUs, in an hour: ./scripts/gpu_day.sh [--small] [--out DIR]
#
# For a node with 1 to 8 GPUs, from the repository (its .venv, or the python of the image). Runs each part in order with a time
# limit, and goes on after one that fails; the limits add up to an hour. Each part keeps its output in DIR (docs/benchmarks without
# --out) as gpu_day-DATE-TIME-NAME.log, and the benches, the parity and the run their records; gpu_day.md gets a section of this
# day: what passed, how long it took, what remit doctor and the tests said. The exit code is 0 if all parts passed, 1 if one did
# not, 2 where nothing can run. --small runs every part at a tiny size on a CPU, which is what the tests do, so that this cannot rot.
set -uo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
cd -- "$root" || exit 2
small=
out=$root/docs/benchmarks
while (($#)); do
  case $1 in
    --small) small=1 ;;
    --out)
      out=${2:?--out needs a folder}
      shift
      ;;
    *)
      echo "usage: $0 [--small] [--out DIR]" >&2
      exit 2
      ;;
  esac
  shift
done
[ -x .venv/bin/python ] && PATH=$root/.venv/bin:$PATH
export PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # read when the driver starts, which some parts ask early
if ! gpus=$(python -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || [[ ! $gpus =~ ^[0-9]+$ ]]; then
  echo "python: found none that imports torch; expected that of ./scripts/setup.sh, or of the image" >&2
  exit 2
fi
if [ -z "$small" ] && [ "$gpus" -eq 0 ]; then
  echo "no GPU here: --small runs the parts on a CPU" >&2
  exit 2
fi
mkdir -p -- "$out" || exit 2
stem=$out/gpu_day-$(date +%Y-%m-%d-%H%M%S)
parts=$stem-parts.log
: > "$parts" || exit 2

failed=()
# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 begin=$SECONDS code outcome
  local log=$stem-$name.log
  shift 2
  timeout --kill-after=30 "$limit" "$@" > "$log" 2>&1 < /dev/null
  code=$?
  if [ "$code" -eq 0 ]; then
    outcome=passed
    printf 'passed  %-12s %5d s\n' "$name" $((SECONDS - begin))
  else
    outcome="failed, exit code $code"
    printf 'FAILED  %-12s %5d s  exit code %d (124: time limit of %d s), %s\n' "$name" $((SECONDS - begin)) "$code" "$limit" "$log"
    failed+=("$name")
  fi
  printf '%s\t%s\t%d\n' "$name" "$outcome" $((SECONDS - begin)) >> "$parts"
}
# left_out NAME WHY
left_out() {
  printf 'left out %-11s %s\n' "$1" "$2"
  printf '%s\tleft out: %s\t0\n' "$1" "$2" >> "$parts"
}

record=(--record "$out")
if [ -n "$small" ]; then
  tiny=(--rounds 1 --hidden 64 --vocabulary 128 --sequence 32 --micro-batch 1)
  part doctor 300 python -m remit_megatron doctor --allow-no-gpu
  part tests 300 python -m pytest -q tests/gpu
  part kernels 600 python scripts/bench_kernels.py --rounds 1 --tokens 4 --hidden-tokens 4 --vocabulary 331 --hidden 32 "${record[@]}"
  part steps 900 python scripts/bench_step.py --fp8 tensorwise "${tiny[@]}" --layers 1 "${record[@]}"
  part steps_fp8 300 python scripts/bench_step.py --fp8 tensorwise --student-fp8 "${tiny[@]}" --layers 3 --arms ntp "${record[@]}"
  part parity 900 python scripts/gpu_parity.py --small "${record[@]}"
  part layouts 900 python scripts/gpu_parity.py --small --layouts 4 --families olmo2_1b "${record[@]}"
  part run 900 python scripts/gpu_run.py --small --nproc 2 "${record[@]}"
else
  size=(--hidden 2048 --layers 16 --vocabulary 100352 --sequence 4096 --micro-batch 2)
  part doctor 120 python -m remit_megatron doctor --require-gpu
  part tests 240 python scripts/gpu_tests.py
  part kernels 400 python scripts/bench_kernels.py --compile "${record[@]}"
  part steps 240 python scripts/bench_step.py --fp8 tensorwise "${size[@]}" "${record[@]}"
  part steps_fp8 240 python scripts/bench_step.py --fp8 tensorwise --student-fp8 "${size[@]}" "${record[@]}"
  part parity 900 python scripts/gpu_parity.py "${record[@]}"
  if [ "$gpus" -ge 2 ]; then
    part layouts 600 python scripts/gpu_parity.py --layouts "$gpus" "${record[@]}"
  else
    left_out layouts "one GPU; tensor, pipeline and context parallelism need 2, some layouts 4"
  fi
  part run 800 python scripts/gpu_run.py --nproc "$gpus" "${record[@]}"
fi
python scripts/gpu_day_record.py "$stem" --record "$out" || failed+=(record)
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed; records in $out"
