#!/usr/bin/env bash
# Entry point of the container image: docker run IMAGE doctor runs `remit doctor`.
set -euo pipefail

# docker run --user gives a home that cannot be written; compilers and model libraries keep their caches there.
if [[ ! -w "${HOME:-/}" ]]; then
  HOME=$(mktemp -d)
  export HOME
fi
# NVIDIA's entry point selects the forward-compatible driver libraries.
nvidia=/opt/nvidia/nvidia_entrypoint.sh
if [[ -x "$nvidia" ]]; then
  exec "$nvidia" remit "$@"
fi
exec remit "$@"
