#!/usr/bin/env bash
# Makes .venv from pyproject.toml and constraints.txt, or does nothing where it is up to date. From any directory, without sudo.
#
#   REMIT_PYTHON=/path/to/python3.12    uses this interpreter instead of looking for one
#
# What it needs is found, or installed where only this repository sees it: uv (else with pip into .venv-tools), Python 3.12 (on
# the PATH, under pyenv, else uv's own). Where packages come from is up to your own uv settings.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
venv="$root/.venv"
tools="$root/.venv-tools"
log="$tools/setup.log"

say() { printf 'setup: %s\n' "$1" >&2; }
fail() {
  say "$1"
  exit 1
}

# The path belongs to it: a copied or moved repository needs its own environment.
wanted_stamp() { { cat -- "$root/pyproject.toml" "$root/constraints.txt"; printf '%s\n' "$root"; } | sha256sum | cut -d ' ' -f 1; }
up_to_date() { [[ -f "$venv/.remit-stamp" && "$(<"$venv/.remit-stamp")" == "$(wanted_stamp)" ]] && [[ -x "$venv/bin/python" ]]; }

up_to_date && exit 0

[[ "$(uname -s)" == Linux ]] || fail "found $(uname -s); expected Linux (constraints.txt pins packages for x86-64 Linux)"
mkdir -p -- "$tools" 2>/dev/null || fail "cannot write to $root"
printf '*\n' > "$tools/.gitignore"
# Several at once (ranks, two terminals): the first one works, the others wait and find it done.
exec 9> "$tools/lock"
flock 9
up_to_date && exit 0

# A name on the PATH proves nothing: pyenv's shims exist for versions that are not selected.
runs() { "$@" > /dev/null 2>&1 < /dev/null; }

# Version 3.12 with the parts of the standard library that a hand-built Python may lack and our packages import.
is_python312() { runs "$1" -c 'import sys, bz2, ctypes, lzma, sqlite3, ssl; sys.exit(sys.version_info[:2] != (3, 12))'; }

# Absolute path of an interpreter; of the one behind it where it belongs to a virtual environment, which uv passes over.
interpreter() { "$1" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable))'; }

pyenv_pythons() {
  local versions="${PYENV_ROOT:-$HOME/.pyenv}/versions"
  [[ -d "$versions" ]] || return 0
  find "$versions" -maxdepth 1 -mindepth 1 -name "$1" | sort -rV | sed 's#$#/bin/python3#'
}

find_uv() {
  local candidate python
  for candidate in uv "$tools/bin/uv" "${XDG_BIN_HOME:-$HOME/.local/bin}/uv" "$HOME/.cargo/bin/uv"; do
    if runs "$candidate" --version; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  say "installing uv into ${tools##*/}"
  while read -r python; do
    if runs "$python" -m pip --version &&
      "$python" -m pip install --quiet --disable-pip-version-check --upgrade --target "$tools" uv > "$log" 2>&1 < /dev/null &&
      runs "$tools/bin/uv" --version; then
      printf '%s\n' "$tools/bin/uv"
      return 0
    fi
  done < <(printf '%s\n' python3 python /usr/bin/python3; pyenv_pythons '3.*')
  fail "uv: not found, and no Python here has a pip that can install it; install uv and put it on the PATH"
}

find_python() {
  local candidate
  if [[ -n "${REMIT_PYTHON:-}" ]]; then
    is_python312 "$REMIT_PYTHON" || fail "REMIT_PYTHON: found $REMIT_PYTHON; expected a complete Python 3.12"
    interpreter "$REMIT_PYTHON"
    return 0
  fi
  while read -r candidate; do
    if is_python312 "$candidate"; then
      interpreter "$candidate"
      return 0
    fi
  done < <(printf '%s\n' python3.12 /usr/bin/python3.12 /usr/local/bin/python3.12 python3; pyenv_pythons '3.12*')
  candidate=$("$uv" python find --managed-python 3.12 2> /dev/null || true)
  if [[ -z "$candidate" ]]; then
    say "no Python 3.12 here: uv installs its own"
    "$uv" python install --quiet 3.12 > "$log" 2>&1 || fail "Python 3.12: not found, and uv could not install it ($(reason))"
    candidate=$("$uv" python find --managed-python 3.12 2> /dev/null || true)
  fi
  is_python312 "$candidate" || fail "Python 3.12: not found; install it, or set REMIT_PYTHON"
  printf '%s\n' "$candidate"
}

# The last error in the log, or else its last line, for a message of one line.
reason() {
  local lines
  lines=$(grep -E '(^|[[:space:]])([[:alpha:]]*[Ee]rror|[Cc]ause[a-z ]*): ' "$log" || grep -v '^[[:space:]]*$' "$log" || true)
  tail -n 1 <<< "${lines:-no message}" | sed 's/^[^[:alnum:]]*//' | cut -c 1-200
}

# Runs a silent command and says every half a minute that it still works.
patiently() {
  local pid started=$SECONDS next=30
  "$@" > "$log" 2>&1 < /dev/null 9>&- &
  pid=$!
  trap 'kill "$pid" 2> /dev/null || true' EXIT
  while kill -0 "$pid" 2> /dev/null; do
    sleep 0.2
    if ((SECONDS - started >= next)); then
      say "still installing ($((SECONDS - started)) s)"
      next=$((next + 30))
    fi
  done
  trap - EXIT
  wait "$pid"
}

started=$SECONDS
uv=$(find_uv) || exit 1
rm -f -- "$venv/.remit-stamp"
if ! is_python312 "$venv/bin/python"; then
  python=$(find_python) || exit 1
  "$uv" venv --quiet --clear --python "$python" "$venv" > "$log" 2>&1 || fail "cannot make .venv ($(reason))"
fi
say "installing packages into .venv (under a minute from a warm cache; the first time downloads about 3 GB)"
# Compiled here, once: where PYTHONDONTWRITEBYTECODE is set, or .venv cannot be written to, every process would compile what
# it imports, which for torch and Megatron takes longer than importing them.
patiently "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --constraints "$root/constraints.txt" --editable "${root}[test]" ||
  fail "installing failed: $(reason) (whole text: ${log#"$root/"})"
wanted_stamp > "$venv/.remit-stamp"
say "ready after $((SECONDS - started)) s"
