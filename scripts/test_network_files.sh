#!/usr/bin/env bash
# Runs on network file systems, each mounted twice as two nodes would: ./scripts/test_network_files.sh [pytest arguments]
#
# glusterfs  keeps locks on its server, for all clients.
# sshfs      keeps them on the client: each node gets the lock that another has, as on Lustre with localflock.
# nfs4       the client of Linux 6.1 in two kernels of their own (user-mode-linux); NFS 4.1 keeps locks on the server (nfs-ganesha).
# nfs3       the same two kernels, mounted with `nolock`, which keeps locks on the client.
#
# All is served and mounted here, in namespaces of their own (mounts, network, processes), which take every daemon with them: no port is
# open to others, no system service and no directory is touched. The four are tried side by side; REMIT_NETWORK_KINDS="sshfs nfs4" takes two.
#
# Installs Debian's packages of these where they are missing. Needs root, /dev/fuse and /dev/net/tun.
# Where it cannot run it says what is missing, and fails.
set -Eeuo pipefail

self=$(readlink -f -- "${BASH_SOURCE[0]}")
root=$(cd -- "$(dirname -- "$self")/.." && pwd -P)
readonly address=10.77.0.1 # on the loopback of the namespace; GlusterFS refuses 127.0.0.1
readonly modules=/usr/lib/uml/modules
read -ra kinds <<< "${REMIT_NETWORK_KINDS:-glusterfs sshfs nfs4 nfs3}"

say() { printf 'test_network_files: %s\n' "$1" >&2; }
fail() {
  say "$1"
  exit 1
}
among() { [[ " ${kinds[*]} " == *" $1 "* ]]; }

# The following are inside of the namespaces; $folder is there.

serve_glusterfs() {
  mkdir -p /var/lib/glusterd /var/log/glusterfs "$folder"/{state,log,brick,glusterfs/n1,glusterfs/n2}
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
}

serve_sshfs() {
  mkdir -p "$folder"/{shared,sshfs/n1,sshfs/n2}
  /usr/sbin/sshd -f /dev/null -o Port=2222 -o "ListenAddress=$address" -o "HostKey=$folder/ssh/host" -o StrictModes=no -o UsePAM=no \
    -o "AuthorizedKeysFile=$folder/ssh/user.pub" -o "Subsystem=sftp internal-sftp" -o "PidFile=$folder/ssh/pid"
  for name in n1 n2; do
    sshfs -o "port=2222,IdentityFile=$folder/ssh/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null" \
      "root@$address:$folder/shared" "$folder/sshfs/$name"
  done
}

serve_nfs() { # two kernels are started; they say by a file that they are ready
  local kind n
  mkdir -p /run/ganesha "$folder"/{export,recovery,kernels,ready,processes,nfs3/n1,nfs3/n2,nfs4/n1,nfs4/n2}
  cat > "$folder/ganesha.conf" << CONF
NFS_CORE_PARAM { Protocols = 3, 4; Bind_addr = $address; NFS_Port = 2049; MNT_Port = 20048; Enable_NLM = false; Enable_RQUOTA = false; }
NFSv4 { Graceless = true; Lease_Lifetime = 20; Only_Numeric_Owners = true; RecoveryBackend = fs; RecoveryRoot = $folder/recovery; }
EXPORT {
  Export_Id = 1; Path = $folder/export; Pseudo = /files; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
  Protocols = 3, 4; Transports = TCP; FSAL { Name = VFS; }
}
CONF
  rpcbind
  ganesha.nfsd -f "$folder/ganesha.conf" -L "$folder/ganesha.log" -N NIV_EVENT -p "$folder/ganesha.pid"
  # What this machine sees there is what the server has; a node mounts its own over it.
  for kind in nfs3 nfs4; do for n in 1 2; do mount --bind "$folder/export" "$folder/$kind/n$n"; done; done
  cc -O1 -shared -fPIC -o "$folder/registers.so" "$root/tests/network_files/registers.c" -ldl
  for n in 1 2; do
    ip tuntap add "tap$n" mode tap
    ip address add "10.77.$n.1/24" dev "tap$n"
    ip link set "tap$n" up
    LD_PRELOAD=$folder/registers.so linux.uml mem=3G rootfstype=hostfs rootflags=/ rw con=null con0=null,fd:1 quiet "umid=n$n" \
      "uml_dir=$folder/kernels" "eth0=tuntap,tap$n" "init=$self" -- --node "$folder" "$n" \
      > "$folder/kernel.n$n" 2>&1 < /dev/null &
    printf 'Host n%s\n  HostName 10.77.%s.2\n' "$n" "$n" >> "$folder/ssh/config"
  done
  cat >> "$folder/ssh/config" << CONF
Host *
  IdentityFile $folder/ssh/user
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ControlMaster auto
  ControlPath $folder/ssh/%h
  ControlPersist yes
CONF
}

await_nfs() {
  for ((i = 0; i < 240; i++)); do
    [[ ! -e "$folder/ready/failed" ]] || break
    [[ ! -e "$folder/ready/n1" || ! -e "$folder/ready/n2" ]] || break
    sleep 0.5
  done
  for name in n1 n2; do
    [[ -e "$folder/ready/$name" ]] || { tail -n 5 "$folder/kernel.$name" "$folder/node.$name" && return 1; }
    ssh -F "$folder/ssh/config" "$name" true
  done
}

insert() { # MODULE, after those that it needs
  local words i
  read -ra words <<< "$(grep "/$1.ko:" "$modules/$(uname -r)/modules.dep" | tr -d :)"
  for ((i = ${#words[@]} - 1; i >= 0; i--)); do insmod "$modules/$(uname -r)/${words[i]}" || true; done # or it is there
}

node() { # the first process of a kernel whose root is this machine's
  local n=$1 both
  mount -t proc proc /proc
  mount -t sysfs sys /sys
  mount -t tmpfs run /run
  mkdir -p /dev/pts /dev/shm /run/sshd
  mount -t devpts pts /dev/pts
  mount -t tmpfs shm /dev/shm
  hostname "n$n"
  ip link set lo up
  ip link set eth0 up
  ip address add "10.77.$n.2/24" dev eth0
  ip route add "$address" via "10.77.$n.1" # and nowhere else: what asks for a name is answered at once
  printf '127.0.0.1 localhost n%s\n' "$n" > /run/hosts
  mount --bind /run/hosts /etc/hosts
  for file in ~root/.bashrc /etc/bash.bashrc; do # a shell that sshd starts reads them
    [[ ! -e "$file" ]] || mount --bind /dev/null "$file"
  done
  insert nfsv3
  insert nfsv4
  both="addr=$address,port=2049,proto=tcp,hard"
  mount -i -t nfs4 -o "vers=4.1,clientaddr=10.77.$n.2,$both" "$address:/files" "$folder/nfs4/n$n"
  mount -i -t nfs -o "vers=3,nolock,mountaddr=$address,mountport=20048,mountproto=tcp,$both" "$address:$folder/export" "$folder/nfs3/n$n"
  /usr/sbin/sshd -f /dev/null -o "HostKey=$folder/ssh/host" -o StrictModes=no -o UsePAM=no -o MaxSessions=100 -o PidFile=none \
    -o "AuthorizedKeysFile=$folder/ssh/user.pub"
  touch "$folder/ready/n$n"
}

serve() {
  ip link set lo up
  ip address add "$address/32" dev lo
  mount -t tmpfs run /run
  mkdir -p /run/gluster /run/sshd /run/lock "$folder/ssh"
  for name in host user; do ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/$name"; done
  if among nfs3 || among nfs4; then serve_nfs; fi
  ! among glusterfs || serve_glusterfs
  ! among sshfs || serve_sshfs
  if among nfs3 || among nfs4; then await_nfs; fi
}

if [[ "${1:-}" == --node ]]; then
  export PATH=/usr/sbin:/usr/bin:/sbin:/bin
  folder=$2
  node "$3" > "$folder/node.n$3" 2>&1 || touch "$folder/ready/failed" # and this first process must not end
  exec sleep infinity
fi

if [[ "${1:-}" == --inside ]]; then
  folder=$2
  shift 2
  export PATH=$PATH:/usr/sbin:/sbin
  serve > "$folder/serve.log" 2>&1 < /dev/null || fail "the file systems could not be served: $(tail -n 3 "$folder/serve.log" | tr '\n' ' ')"
  cd -- "$root"
  export REMIT_NETWORK_FILES=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  code=0 tried=()
  for kind in "${kinds[@]}"; do
    REMIT_NETWORK_KINDS=$kind "$root/.venv/bin/python" -m pytest -q -p no:cacheprovider tests/network_files "$@" > "$folder/$kind.out" 2>&1 < /dev/null &
    tried+=("$!")
  done
  for i in "${!kinds[@]}"; do
    wait "${tried[i]}" || code=$?
    printf '== %s\n' "${kinds[i]}"
    cat "$folder/${kinds[i]}.out"
  done
  ((code == 0)) || tail -n 5 "$folder"/kernel.n* 2> /dev/null || true
  for kind in "${kinds[@]}"; do umount -l "$folder/$kind"/{n1,n2} || true; done
  exit "$code"
fi

((EUID == 0)) || fail "found user $(id -un); expected root: file systems are mounted"
for kind in "${kinds[@]}"; do
  [[ "$kind" =~ ^(glusterfs|sshfs|nfs[34])$ ]] || fail "REMIT_NETWORK_KINDS: found $kind; expected glusterfs, sshfs, nfs4, nfs3"
done
for device in /dev/fuse /dev/net/tun; do [[ -c "$device" ]] || fail "found no $device; expected a kernel with it"; done
missing=()
for program in glusterd gluster glusterfs sshfs sshd ssh-keygen linux.uml ganesha.nfsd rpcbind insmod ip cc; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" > /dev/null || missing+=("$program")
done
folder=$(mktemp -d /var/tmp/remit-network-XXXXXX)
trap 'rm -rf --one-file-system -- "$folder"' EXIT
if ((${#missing[@]})); then
  command -v apt-get > /dev/null || fail "found no ${missing[*]}, and no apt-get to install them with"
  say "installing ${missing[*]}"
  {
    apt-get update &&
      env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends glusterfs-server glusterfs-client sshfs openssh-server \
        user-mode-linux nfs-ganesha nfs-ganesha-vfs rpcbind kmod iproute2 gcc libc6-dev
  } > "$folder/log" 2>&1 < /dev/null || fail "${missing[*]} could not be installed: $(grep -E '^(E|Err)' "$folder/log" | tail -n 1)"
fi
"$root/scripts/setup.sh"
unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private "$self" --inside "$folder" "$@"
