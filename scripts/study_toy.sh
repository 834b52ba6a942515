#!/usr/bin/env bash
# The study at toy size (docs/study.md): when does guidance by an RL-tuned reference help, and when not?
#
#   scripts/study_toy.sh                                  everything: about an hour on two quiet cores
#   scripts/study_toy.sh --part a --seeds 1-2             a part of it; the same directory may get the rest later
#   scripts/study_toy.sh --tables                         what there is so far, as tables
#   scripts/study_toy.sh --tables --picture docs/images/quickstart.png    and the README's picture of it
#
# Stopped at any moment, it goes on where it was. Every model comes out of the commands that the quickstart uses; what was
# measured is collected in docs/study/toy.json.
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
"$root/scripts/setup.sh"
cd "$root"
exec "$root/.venv/bin/python" "$root/scripts/study_toy.py" "$@"
