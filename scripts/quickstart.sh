#!/usr/bin/env bash
# Sets up the environment, then turns the whole method once at toy size: ./scripts/quickstart.sh [options of remit quickstart]
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/remit" quickstart "$@"
