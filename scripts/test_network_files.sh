#!/usr/bin/env bash
# Runs on network file systems, each mounted twice as two nodes would: ./scripts/test_network_files.sh [pytest arguments]
#
# GlusterFS keeps locks on its server, for all clients. sshfs keeps them on the client: each node gets the lock that another has, as
# on Lustre with localflock or NFS with local_lock. Both are served and mounted here, through FUSE, in namespaces of their own (mounts,
# network, processes), which take every daemon with them: no port is open to others, no system service and no directory is touched.
#
# Installs Debian's glusterfs-server, glusterfs-client, sshfs and openssh-server where they are missing. Needs root and /dev/fuse.
# Where it cannot run it says what is missing, and fails.
set -Eeuo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
readonly address=10.77.0.1 # on the loopback of the namespace; GlusterFS refuses 127.0.0.1

say() { printf 'test_network_files: %s\n' "$1" >&2; }
fail() {
  say "$1"
  exit 1
}

serve() { # inside of the namespaces; $folder is there
  local name
  ip link set lo up
  ip address add "$address/32" dev lo
  mount -t tmpfs run /run
  mkdir -p /run/gluster /run/sshd /run/lock "$folder"/{state,log,brick,shared,ssh,glusterfs/n1,glusterfs/n2,sshfs/n1,sshfs/n2}
  mkdir -p /var/lib/glusterd /var/log/glusterfs
  mount --bind "$folder/state" /var/lib/glusterd
  mount --bind "$folder/log" /var/log/glusterfs

  glusterd --log-level WARNING
  for ((i = 0; i < 100; i++)); do
    ! gluster --mode=script volume list || break
    sleep 0.2
  done
  gluster --mode=script volume create files "$address:$folder/brick/files" force
  gluster --mode=script volume start files
  for name in n1 n2; do mount -t glusterfs "$address:/files" "$folder/glusterfs/$name"; done

  ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/host"
  ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/user"
  /usr/sbin/sshd -f /dev/null -o Port=2222 -o "ListenAddress=$address" -o "HostKey=$folder/ssh/host" -o StrictModes=no -o UsePAM=no \
    -o "AuthorizedKeysFile=$folder/ssh/user.pub" -o "Subsystem=sftp internal-sftp" -o "PidFile=$folder/ssh/pid"
  for name in n1 n2; do
    sshfs -o "port=2222,IdentityFile=$folder/ssh/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null" \
      "root@$address:$folder/shared" "$folder/sshfs/$name"
  done
}

if [[ "${1:-}" == --inside ]]; then
  folder=$2
  shift 2
  serve > "$folder/serve.log" 2>&1 < /dev/null || fail "the file systems could not be served: $(tail -n 1 "$folder/serve.log")"
  cd -- "$root"
  export REMIT_NETWORK_FILES=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  code=0
  "$root/.venv/bin/python" -m pytest -q -p no:cacheprovider tests/network_files "$@" || code=$?
  umount -l "$folder"/{glusterfs,sshfs}/{n1,n2} || true
  exit "$code"
fi

((EUID == 0)) || fail "found user $(id -un); expected root: file systems are mounted"
[[ -c /dev/fuse ]] || fail "found no /dev/fuse; expected a kernel with FUSE"
missing=()
for program in glusterd gluster glusterfs sshfs sshd ssh-keygen; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" > /dev/null || missing+=("$program")
done
folder=$(mktemp -d /var/tmp/remit-network-XXXXXX)
trap 'rm -rf --one-file-system -- "$folder"' EXIT
if ((${#missing[@]})); then
  command -v apt-get > /dev/null || fail "found no ${missing[*]}, and no apt-get to install them with"
  say "installing ${missing[*]}"
  {
    apt-get update &&
      env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends glusterfs-server glusterfs-client sshfs openssh-server
  } > "$folder/log" 2>&1 < /dev/null || fail "${missing[*]} could not be installed: $(grep -E '^(E|Err)' "$folder/log" | tail -n 1)"
fi
"$root/scripts/setup.sh"
unshare --mount --net --pid --fork --mount-proc --propagation private "${BASH_SOURCE[0]}" --inside "$folder" "$@"
