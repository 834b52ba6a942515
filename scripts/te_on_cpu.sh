#!/usr/bin/env bash
# The real Transformer Engine on a machine without a GPU, and the tests that need it:
#
#   ./scripts/te_on_cpu.sh DIR [--compiled] [pytest arguments]
#
# DIR, outside of the repository, gets an environment of its own (DIR/venv): that of scripts/setup.sh and Transformer Engine's
# Python, as PyPI has it. Its compiled part is types and kernels; without a GPU no kernel runs, the tests have functions of torch in
# their places, and the types are tests/te/extension.py. With --compiled that part is the real one too: PyPI has its source, which
# g++ and CUDA's nvcc turn into 33 objects, an hour on two cores; the wheel is kept in DIR/wheels, and DIR/build.log holds what the
# compiler said. --build as the only other argument stops before the tests.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
version=2.20.2

say() { printf 'te_on_cpu: %s\n' "$1" >&2; }
fail() {
  say "$1"
  exit 2
}

(($#)) || fail "usage: $0 DIR [--compiled] [--build | pytest arguments]"
mkdir -p -- "$1"
folder=$(cd -- "$1" && pwd -P)
shift
compiled=
if [[ "${1:-}" == --compiled ]]; then
  compiled=1
  shift
fi
[[ "$folder/" != "$root/"* ]] || fail "found $folder, inside the repository; expected a folder outside of it"
"$root/scripts/setup.sh"

uv=
for candidate in uv "$root/.venv-tools/bin/uv" "${XDG_BIN_HOME:-$HOME/.local/bin}/uv" "$HOME/.cargo/bin/uv"; do
  if "$candidate" --version > /dev/null 2>&1; then
    uv=$candidate
    break
  fi
done
[[ -n "$uv" ]] || fail "uv: not found, although scripts/setup.sh has used it"

venv="$folder/venv" log="$folder/build.log"
python="$venv/bin/python"
install() { "$uv" pip install --quiet --python "$python" --constraints "$root/constraints.txt" "$@"; }
if [[ ! -x "$python" ]]; then
  say "making $venv"
  "$uv" venv --quiet --python "$("$root/.venv/bin/python" -c 'import sys; print(sys._base_executable)')" "$venv"
fi
install --editable "${root}[test]"

# What its Python imports is named, so that nothing replaces torch.
install --no-deps "transformer-engine==$version"
install einops onnxscript onnx nvdlfw-inspect pydantic

# The wheel of the compiled part, against this environment's torch: leaves its path in wheels.
build() {
  local candidate nvcc headers
  wheels=("$folder/wheels/transformer_engine_torch-$version-"*.whl)
  if ((!${#wheels[@]})); then
    nvcc=$(command -v nvcc || true)
    for candidate in "${CUDA_HOME:-}/bin/nvcc" /usr/local/cuda/bin/nvcc /usr/local/cuda-13*/bin/nvcc; do
      [[ ! -x "$candidate" ]] || nvcc=$candidate
    done
    [[ -n "$nvcc" ]] || fail "nvcc: not found; expected CUDA 13's compiler on the PATH, or CUDA_HOME"
    command -v g++ > /dev/null || fail "g++: not found"
    install setuptools wheel ninja pybind11 nvidia-cudnn-frontend
    # What torch was built with is in its wheels: one folder of headers for CUDA, one each for cuDNN and NCCL.
    headers=$("$python" -c 'import glob, nvidia; print(":".join(d for p in nvidia.__path__ for d in sorted(glob.glob(p + "/*/include"))))')
    say "building transformer-engine-torch $version (log: $log)"
    rm -rf -- "$folder/building"
    # Not pip's cache: what it holds may have been built against another torch.
    # Of this part only the types are used where there is no GPU: not optimized, it is compiled in about half the time.
    mkdir -p -- "$folder/compiler"
    printf '#!/bin/sh\nexec %s "$@" -O0\n' "$(command -v g++)" > "$folder/compiler/g++"
    chmod +x -- "$folder/compiler/g++"
    PATH="$venv/bin:$PATH" CXX="$folder/compiler/g++" CPATH="$headers${CPATH:+:$CPATH}" CUDA_HOME=$(dirname -- "$(dirname -- "$nvcc")") \
      NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-2}" \
      nice -n 10 "$python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --no-binary transformer-engine-torch \
      --wheel-dir "$folder/building" "transformer-engine-torch==$version" -v > "$log" 2>&1 < /dev/null ||
      fail "building failed: $(grep -E '(^|[ :])[Ee]rror' "$log" | tail -n 1 | cut -c 1-200) (whole text: $log)"
    mkdir -p -- "$folder/wheels"
    mv -- "$folder/building"/transformer_engine_torch-*.whl "$folder/wheels/"
    wheels=("$folder/wheels/transformer_engine_torch-$version-"*.whl)
  fi
}

shopt -s nullglob
if [[ -n "$compiled" ]]; then
  build
  install --no-deps "${wheels[0]}" "transformer-engine-cu13==$version"
  install nvidia-cudnn-frontend
elif "$uv" pip show --quiet --python "$python" transformer-engine-cu13 2> /dev/null; then
  "$uv" pip uninstall --quiet --python "$python" transformer-engine-torch transformer-engine-cu13
  # It has files of the Python part, too, which went with it.
  install --no-deps --reinstall "transformer-engine==$version"
fi

if [[ "${1:-}" == --build ]]; then
  exit 0
fi
cd -- "$root"
# Options alone are for these tests, too, and not for all that the repository has.
named=
for argument; do
  [[ "$argument" == -* || ! -e "${argument%%::*}" ]] || named=1
done
[[ -n "$named" ]] || set -- tests/te "$@"
exec "$python" -m pytest "$@"
