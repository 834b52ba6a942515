#!/usr/bin/env bash
# Makes constraints.txt again from pyproject.toml, with the newest versions that fit: ./scripts/constraints.sh
set -euo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
cd -- "$root"
made=$(uv pip compile pyproject.toml --extra test --upgrade --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
  --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet)
cat > constraints.txt << END
# Exact versions of everything that scripts/setup.sh installs (x86-64 Linux, Python 3.12). No addresses: your own uv settings
# say where packages come from. Made by scripts/constraints.sh; run it again after a change of pyproject.toml.
$made
END
