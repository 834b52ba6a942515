#!/usr/bin/env bash
# Builds the Dockerfile on a base without a GPU, and trains inside of what came out: ./scripts/test_image.sh [--keep]
#
# The base is Debian by debootstrap, with a C compiler as NVIDIA's has (some packages are built from source), the Python 3.12 of
# .venv, and a torch of another version than the one pinned (the files of .venv's, under the name of a vendor's build): what the
# image must not replace. buildah builds with --isolation chroot. In the image,
# as a user without rights on a root that cannot be written to: `remit doctor`, unit tests, a run of two steps on two ranks.
#
# Installs Debian's buildah and debootstrap where they are missing (root, or sudo without a password for that; the rest needs root).
# Needs about 25 GB under TMPDIR (/var/tmp) while it works. --keep leaves base and image there, and finds the base again next time.
# By hand: about 15 minutes on two cores.
set -Eeuo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
keep=
case "$*" in
  '') ;;
  --keep) keep=1 ;;
  *)
    printf 'usage: %s [--keep]\n' "$0" >&2
    exit 2
    ;;
esac
# Another version by name, as NVIDIA's are: 2.13.0a0+BUILD.
readonly base_torch=2.13.0a0+another.build
readonly certificates=/etc/ssl/certs/ca-certificates.crt
readonly base=localhost/remit_megatron_base image=localhost/remit_megatron
tests=(tests/unit/kernels tests/unit/objectives tests/unit/runtime tests/unit/data tests/unit/training)

say() { printf 'test_image: %s\n' "$1" >&2; }
fail() {
  say "FAILED: $1"
  exit 1
}
((EUID == 0)) || fail "found user $(id -un); expected root: a base is made, and file systems are mounted"

export TMPDIR=${TMPDIR:-/var/tmp}
folder=$TMPDIR/remit_megatron_image
mkdir -p -- "$folder"
log=$folder/log
: > "$log"
exec 9> "$folder/lock"
flock -n 9 || fail "another one is at work in $folder"

logged() { "$@" >> "$log" 2>&1 < /dev/null; }
trap 'fail "line $LINENO: $(last)"' ERR
last() { grep -v '^[[:space:]]*$' "$log" | tail -n 3 | tr '\n' ' '; }

missing=()
for program in buildah debootstrap; do
  command -v "$program" > /dev/null || missing+=("$program")
done
if ((${#missing[@]})); then
  command -v apt-get > /dev/null || fail "found no ${missing[*]}, and no apt-get to install them with"
  say "installing ${missing[*]}"
  { logged apt-get update && logged env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } ||
    fail "${missing[*]} could not be installed: $(last)"
fi
"$root/scripts/setup.sh"
python=$root/.venv/bin/python

# Layers are shared where the kernel mounts overlays, and copied where it does not.
driver=overlay
storage() { buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver "$driver" "$@"; }
mounts() { storage from scratch > "$folder/probe" 2>> "$log" && storage mount "$(< "$folder/probe")" >> "$log" 2>&1; }
if ! mounts; then
  rm -rf -- "${folder:?}/storage" "${folder:?}/run"
  driver=vfs
fi
say "storage driver: $driver"
made=()
clean() {
  storage rm --all >> "$log" 2>&1 || true
  ((${#made[@]} == 0)) || rm -rf -- "${made[@]}"
  [[ -n "$keep" ]] || rm -rf -- "${folder:?}"
}
trap clean EXIT

copy_python() { # ROOT: the interpreter behind .venv, without what was installed into it
  local prefix target=$1/usr/local
  prefix=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
  mkdir -p -- "$target/bin" "$target/lib" "$target/include"
  cp -a -- "$prefix/include/python3.12" "$target/include/"
  cp -a -- "$prefix/bin/python3.12" "$target/bin/"
  ln -sf python3.12 "$target/bin/python3"
  tar -C "$prefix/lib" --exclude=site-packages --exclude=__pycache__ --exclude=test -cf - python3.12 | tar -C "$target/lib" -xf -
  find "$prefix/lib" -maxdepth 1 -name 'libpython3*' -exec cp -a -t "$target/lib" {} +
  mkdir -p -- "$target/lib/python3.12/site-packages"
  logged chroot "$1" ldconfig
  logged chroot "$1" /usr/local/bin/python3 -m ensurepip
}

copy_torch() { # ROOT: torch and what belongs to its build, as a vendor's
  local from to=$1/usr/local/lib/python3.12/site-packages
  from=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  (cd -- "$from" && cp -a -- torch torchgen functorch triton nvidia torch-*.dist-info triton-*.dist-info nvidia_*.dist-info "$to")
  (cd -- "$from" && cp -a -- typing_extensions.py typing_extensions-*.dist-info "$to")
  mv -- "$to"/torch-*.dist-info "$to/torch-$base_torch.dist-info"
  sed -i "s/^Version: .*/Version: $base_torch/" "$to/torch-$base_torch.dist-info/METADATA"
  sed -i "s/^__version__ = .*/__version__ = '$base_torch'/" "$to/torch/version.py"
  rm -rf -- "$to/torch/__pycache__/version."*
}

# What must be the same after the build: every file of the base's torch, by name and size, and the largest ones by content.
torch_of() {
  (cd -- "$1/usr/local/lib/python3.12/site-packages" &&
    find torch triton nvidia torch-*.dist-info -type f ! -name '*.pyc' -printf '%p %s\n' | LC_ALL=C sort &&
    sha256sum torch/version.py torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so) | sha256sum
}

make_base() {
  local container mounted suite
  suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  container=$(storage from scratch)
  mounted=$(storage mount "$container")
  logged debootstrap --variant=minbase \
    --include=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libncursesw6,libuuid1,libgomp1,libstdc++6,gcc,libc6-dev \
    "$suite" "$mounted" || fail "debootstrap: $(last)"
  cp -- "$certificates" "$mounted$certificates"
  copy_python "$mounted"
  copy_torch "$mounted"
  torch_of "$mounted" > "$folder/torch"
  # It trusts whom this machine trusts: pip's own list knows no proxy.
  logged storage config --env PATH=/usr/local/bin:/usr/bin:/bin --env "PIP_CERT=$certificates" --env "SSL_CERT_FILE=$certificates" "$container"
  logged storage commit --rm "$container" "$base" || fail "the base could not be kept: $(last)"
}

if ! { [[ -f "$folder/torch" ]] && storage images -q "$base" > /dev/null 2>&1; }; then
  say "making the base"
  make_base
fi

say "building the Dockerfile"
arguments=(--build-arg "BASE_IMAGE=$base")
for name in PIP_INDEX_URL UV_DEFAULT_INDEX; do
  [[ -z "${!name:-}" ]] || arguments+=(--build-arg "$name=${!name}")
done
begun=$SECONDS
logged storage build --layers --isolation chroot --pull-never --format docker "${arguments[@]}" --tag "$image" --file "$root/Dockerfile" "$root" ||
  fail "the build: $(last) (whole text: $log)"
say "built in $((SECONDS - begun)) s"

container=$(storage from --pull-never "$image")
mounted=$(storage mount "$container")
tools=$(mktemp -d)
work=$(mktemp -d)
made+=("$tools" "$work")
chmod 755 "$tools"
chmod 777 "$work"
mapfile -t variables < <(storage inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$image" | grep .)

# COMMAND...: as user 1234 in the image, whose root is mounted read-only as `docker run --read-only --tmpfs /tmp` does.
inside() {
  # shellcheck disable=SC2016 # expanded by the shell that is started
  unshare --mount --propagation private bash -euc '
    image=$1 tools=$2 work=$3
    shift 3
    mount --bind "$image" "$image"
    mount -o remount,bind,ro "$image"
    mount -t proc proc "$image/proc"
    mount --rbind /dev "$image/dev"
    mount -t tmpfs shm "$image/dev/shm"
    mount -t tmpfs tmp "$image/tmp"
    mkdir "$image/tmp/tools" "$image/tmp/work"
    mount --bind "$tools" "$image/tmp/tools"
    mount --bind "$work" "$image/tmp/work"
    exec chroot --userspec=1234:1234 "$image" /usr/bin/env --chdir=/opt/remit_megatron -i "$@"
  ' - "$mounted" "$tools" "$work" "${variables[@]}" HOME=/nonexistent OMP_NUM_THREADS=1 "$@"
}
entry=/opt/remit_megatron/scripts/entrypoint.sh

# The image as it is.
[[ "$(torch_of "$mounted")" == "$(< "$folder/torch")" ]] || fail "the base's torch is not what it was"
for name in torch torchgen functorch triton nvidia; do
  [[ ! -e "$mounted/opt/venv/lib/python3.12/site-packages/$name" ]] || fail "found a second $name in the image"
done
for name in uv pip pytest hypothesis ruff pyright hadolint shellcheck node hatchling; do
  found=$(find "$mounted/opt" -path '*/bin/*' -name "$name" -print -quit)
  [[ -z "$found" ]] || fail "found a development tool in the image: ${found#"$mounted"}"
done
[[ ! -e "$mounted/opt/uv" && ! -e "$mounted/opt/build" ]] || fail "found what only the build needs"
! inside touch /opt/remit_megatron/file 2>> "$log" || fail "the root can be written to"
found=$(inside python -c 'import os, torch; print(os.getuid(), torch.__version__, torch.__file__)')
[[ "$found" == "1234 $base_torch /usr/local/lib/python3.12/site-packages/torch/__init__.py" ]] || fail "found torch $found"
say "the base's torch is there, unchanged ($base_torch), and no development tool"

logged inside "$entry" doctor || fail "remit doctor: $(last)"
say "remit doctor: $(last)"

"$python" "$root/scripts/image_requirements.py" unneeded 2>> "$log" | grep -E '^(pytest|pluggy|iniconfig|hypothesis|sortedcontainers|execnet)' |
  sed 's/.*/^&==/' | grep -f - "$root/constraints.txt" > "$folder/tools.txt"
uv=$(command -v uv || printf '%s' "$root/.venv-tools/bin/uv")
logged "$uv" pip install --python "$python" --no-deps --target "$tools" --requirement "$folder/tools.txt" || fail "pytest: $(last)"
# Tests of kernels in Triton's interpreter start a Python with a path of its own, where pytest is not.
logged inside PYTHONPATH=/tmp/tools HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis HOME=/tmp python -m pytest -q -n 2 -p no:cacheprovider \
  --ignore-glob='*_triton.py' "${tests[@]}" ||
  fail "unit tests: $(last)"
say "unit tests: $(last)"

logged inside PYTHONPATH=/opt/remit_megatron python tests/image/small_run.py /tmp/work || fail "the small run: $(last)"
logged inside "$entry" train /tmp/work/run.yaml --nproc 2 || fail "remit train on two ranks: $(last)"
[[ "$(wc -l < "$work/run/metrics.jsonl")" == 2 && -f "$work/run/checkpoints/iter_0000002/manifest.json" ]] || fail "found no two steps in $work/run"
say "remit train on two ranks: $(last)"

layers=$(storage inspect --type image --format '{{len .OCIv1.RootFS.DiffIDs}}' "$image")
below=$(storage inspect --type image --format '{{len .OCIv1.RootFS.DiffIDs}}' "$base")
say "layers: $layers, $below of them the base's; $(du -sm "$mounted/opt/venv" | cut -f 1) MB in /opt/venv, $(du -sm "$mounted/opt/remit_megatron" | cut -f 1) MB in /opt/remit_megatron"
printf 'passed\n'
