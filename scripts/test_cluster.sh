#!/usr/bin/env bash
# The batch scripts on a real Slurm of two nodes on this machine: ./scripts/test_cluster.sh [pytest arguments]
#
#   ./scripts/test_cluster.sh --shell [COMMAND...]    that Slurm alone, for a shell (or a command) that may use it, and ends it
#
# Installs Debian's slurm-wlm and munge where they are missing (root, or sudo without a password). The tests (tests/cluster) start
# munged, slurmctld and two slurmd on loopback, with ports, key and state in a temporary directory, and stop them again. No system
# service is touched. Eight and a half minutes on two cores, half an hour where many others want them.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
export PATH="$PATH:/usr/sbin:/sbin"

fail() {
  printf 'test_cluster: %s\n' "$1" >&2
  exit 1
}

missing=()
for program in munged slurmctld slurmd sbatch srun scontrol; do
  command -v "$program" > /dev/null || missing+=("$program")
done
# The stand-in for pyxis is compiled.
[[ -f /usr/include/slurm/spank.h ]] || missing+=(slurm/spank.h)
command -v cc > /dev/null || missing+=(cc)
if ((${#missing[@]})); then
  command -v apt-get > /dev/null || fail "found no ${missing[*]}, and no apt-get to install Slurm with"
  as_root=()
  if ((EUID)); then
    sudo -n true 2> /dev/null || fail "found no ${missing[*]}; installing Slurm needs root, or sudo without a password"
    as_root=(sudo -n)
  fi
  printf 'test_cluster: installing slurm-wlm and munge\n' >&2
  packages=(slurm-wlm slurm-client munge libslurm-dev gcc libc6-dev)
  {
    "${as_root[@]}" apt-get update &&
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
  } > "$log" 2>&1 < /dev/null || fail "Slurm could not be installed: $(grep -E '^(E|Err)' "$log" | tail -n 1)"
fi

"$root/scripts/setup.sh"
cd -- "$root"
export PATH="$root/.venv/bin:$PATH"
paths=(tests/cluster)
for word in "$@"; do [[ "$word" != tests/* ]] || paths=(); done
# Who started the daemons stops them; where it was killed they are ended here, by the numbers in their own files.
# Short: the path of a socket has at most 107 characters.
folder=$(mktemp -d /tmp/remit-slurm-XXXXXX)
stop() {
  local file
  for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [[ ! -f "$file" ]] || kill "$(< "$file")" 2> /dev/null || true
  done
  rm -rf -- "$folder" "$log"
}
trap stop EXIT
export REMIT_CLUSTER_FOLDER=$folder
if [[ "${1:-}" == --shell ]]; then
  "$root/.venv/bin/python" -m tests.cluster.shell "${@:2}"
else
  REMIT_CLUSTER=1 "$root/.venv/bin/python" -m pytest --timeout=1800 --durations=0 "${paths[@]}" "$@"
fi
