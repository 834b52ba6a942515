#!/usr/bin/env bash
# Runs the tests against another megatron-core and says which patch or seam broke: ./scripts/try_megatron.sh VERSION [pytest arguments]
#
# Works in a copy (.try-megatron/VERSION), with an environment of its own; this repository and its .venv stay as they are. Started again
# it uses the environment that is there. Without pytest arguments all tests of one process and of several ranks run.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
fail() {
  printf 'try_megatron: %s\n' "$1" >&2
  exit 2
}
[[ "${1:-}" =~ ^[0-9]+(\.[0-9a-z]+)+$ ]] || fail "found ${1:-nothing}; expected a version of megatron-core, as 0.20.0"
version=$1
shift
current=$(sed -n 's/^megatron-core==//p' "$root/constraints.txt")
[[ -n "$current" ]] || fail "constraints.txt: found no megatron-core"
copy="$root/.try-megatron/$version"
mkdir -p -- "$copy"
printf '*\n' > "$root/.try-megatron/.gitignore"

# Everything but its environment is as it is here today.
find "$copy" -mindepth 1 -maxdepth 1 ! -name '.venv*' -exec rm -rf -- {} +
(cd -- "$root" && git ls-files -z --cached --others --exclude-standard) |
  (cd -- "$root" && xargs -0 tar -c --ignore-failed-read) | tar -x -C "$copy"
# The pin, and the guard of each patch: what is tried is whether it holds on the other version.
sed -i "s/${current//./\\.}/$version/g" "$copy/pyproject.toml" "$copy/constraints.txt" "$copy"/patches/*.py
"$copy/scripts/setup.sh" || fail "no environment with megatron-core $version (it may need other versions than constraints.txt has)"
cd -- "$copy"
export PATH="$copy/.venv/bin:$PATH"
printf 'megatron-core %s in place of %s\n' "$version" "$current"
code=0
python scripts/megatron_seams.py || code=1
(($#)) || set -- tests/unit tests/distributed tests/integration
python -m pytest -q -p no:cacheprovider "$@" || code=1
exit "$code"
