#!/usr/bin/env bash
# Everything that must pass: ./scripts/test.sh [pytest arguments]
#
# Environment, shellcheck, hadolint, ruff, pyright, pytest; stops at the first check that fails. Tests run two at a time;
# those of several ranks have two pools of warm processes, whose ranks wait for each other much of the time. With
# arguments that choose tests there is one pytest, and the other checks still run: they take seconds.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
"$root/scripts/setup.sh"
cd -- "$root"
bin="$root/.venv/bin"
export PATH="$bin:$PATH"

# Quiet when a check passes; its own words, then one line, when it does not.
check() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1 < /dev/null); then
    printf 'ok      %s\n' "$name"
  else
    printf '%s\nFAILED  %s\n' "$output" "$name" >&2
    exit 1
  fi
}

mapfile -t shell_scripts < <(find scripts .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -path '.ci/run' \) | sort)
check shellcheck shellcheck --severity=style "${shell_scripts[@]}"
check hadolint hadolint Dockerfile
check 'ruff check' ruff check
check 'ruff format' ruff format --check --diff
check pyright pyright
tests() {
  "$bin/python" -m pytest "$@" || {
    code=$?
    printf 'FAILED  pytest (exit code %s)\n' "$code" >&2
  }
}
code=0
if (($#)); then
  tests "$@"
else
  tests -n 2 --dist loadfile tests/unit tests/fuzz tests/golden
  tests -n 2 --dist loadfile --durations=40 tests/distributed
  tests -n 2 --dist loadfile tests/integration
  tests tests/gpu # by themselves they see the GPUs of the machine
fi
exit "$code"
