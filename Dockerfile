# remit_megatron on NVIDIA's PyTorch image: matched torch, CUDA, NCCL and a prebuilt Transformer Engine.
#
#   docker build -t remit_megatron .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v "$PWD:$PWD" -w "$PWD" \
#     remit_megatron train RUN.yaml --nproc 8
#
# Not built on the NGC image yet. scripts/test_image.sh builds it on a base of its own, without a GPU (docs/cluster.md).
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3

# What builds stays in this stage: uv, its caches, and what only tests and checks need.
# The base is an argument with a tag of its own.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build

ARG UV_VERSION=0.13.8
# Addresses of mirrors, for builds that need them: --build-arg PIP_INDEX_URL=... --build-arg UV_DEFAULT_INDEX=...
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:/opt/uv/bin:${PATH} \
    PYTHONNOUSERSITE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1

# --target leaves the image's own Python as it is.
RUN python3 -m pip install --no-cache-dir --target /opt/uv "uv==${UV_VERSION}" \
    && uv venv --system-site-packages --python 3.12 "${VIRTUAL_ENV}"

# uv does not see the image's packages, and would bring a second torch: everything is named, nothing is resolved. megatron-core comes
# this way as well, without its dependencies. NVIDIA apex is not installed: with Transformer Engine Megatron takes its fused optimizer
# and norms from there. Where the base image has apex it stays.
WORKDIR /opt/build
COPY constraints.txt scripts/image_requirements.py ./
RUN python image_requirements.py install constraints.txt > requirements.txt \
    && uv pip install --no-deps --compile-bytecode --requirement requirements.txt

# Editable, because scripts/ is part of it; readable for every user, because clusters run it under theirs.
COPY . /opt/remit_megatron
WORKDIR /opt/remit_megatron
RUN uv pip install --no-deps --editable . \
    && python scripts/image_requirements.py unneeded > /opt/build/unneeded.txt \
    && uv pip uninstall --requirement /opt/build/unneeded.txt \
    && python -m compileall -q remit_megatron patches tests \
    && chmod -R a+rX /opt/remit_megatron /opt/venv

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:${PATH} \
    PYTHONNOUSERSITE=1

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/remit_megatron /opt/remit_megatron

# A build machine has no GPU: libraries that cannot be imported without its driver are remarks here, everything else is checked.
RUN remit doctor --allow-no-gpu

WORKDIR /workspace
ENTRYPOINT ["/opt/remit_megatron/scripts/entrypoint.sh"]
CMD ["--help"]
