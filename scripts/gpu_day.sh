#!/usr/bin/env bash
# The first day on GPUs, in an hour: ./scripts/gpu_day.sh [--small] [--out DIR]
#
# For a node with 1 to 8 GPUs, from the repository (its .venv, or the python of the image). Runs each part in order with a time
# limit, keeps its output in DIR/NAME.log and its record in DIR (docs/benchmarks without --out), and goes on after one that fails.
# The last lines say which parts passed; the exit code is 0 if all did. --small runs every part at a tiny size on a CPU, which is
# what the tests do, so that this cannot rot.
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
mkdir -p -- "$out"
[ -x .venv/bin/python ] && PATH=$root/.venv/bin:$PATH
export PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ -z "$small" ] && [ "$gpus" -eq 0 ]; then
  echo "no GPU here: --small runs the parts on a CPU" >&2
  exit 2
fi

failed=()
# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  timeout --kill-after=30 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null
  code=$?
  if [ "$code" -eq 0 ]; then
    printf 'passed  %-12s %5d s\n' "$name" $((SECONDS - begin))
  else
    printf 'FAILED  %-12s %5d s  exit code %d (124: time limit of %d s), %s\n' "$name" $((SECONDS - begin)) "$code" "$limit" "$out/$name.log"
    failed+=("$name")
  fi
}

record=(--record "$out")
if [ -n "$small" ]; then
  part doctor 300 python -m remit_megatron doctor --allow-no-gpu
  part tests 300 python -m pytest -q tests/gpu
  part kernels 600 python scripts/bench_kernels.py --rounds 1 --tokens 4 --hidden-tokens 4 --vocabulary 331 --hidden 32 "${record[@]}"
  part steps 900 python scripts/bench_step.py --fp8 tensorwise --rounds 1 --hidden 64 --layers 1 --vocabulary 128 --sequence 32 --micro-batch 1 "${record[@]}"
  part steps_fp8 300 python scripts/bench_step.py --fp8 tensorwise --student-fp8 --rounds 1 --hidden 64 --layers 3 --vocabulary 128 --sequence 32 --micro-batch 1 --arms ntp "${record[@]}"
  part parity 900 python scripts/gpu_parity.py --small "${record[@]}"
  part run 900 python scripts/gpu_run.py --small "${record[@]}"
else
  part doctor 300 python -m remit_megatron doctor --require-gpu
  part tests 600 python -m pytest -q tests/gpu
  part parity 900 python scripts/gpu_parity.py "${record[@]}"
  part run 900 python scripts/gpu_run.py --nproc "$gpus" "${record[@]}"
  part kernels 900 python scripts/bench_kernels.py --compile "${record[@]}"
  size=(--hidden 2048 --layers 16 --vocabulary 100352 --sequence 4096 --micro-batch 2)
  part steps 600 python scripts/bench_step.py --fp8 tensorwise "${size[@]}" "${record[@]}"
  part steps_fp8 600 python scripts/bench_step.py --fp8 tensorwise --student-fp8 "${size[@]}" "${record[@]}"
fi
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed; records in $out"
