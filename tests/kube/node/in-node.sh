#!/usr/bin/env bash
# Runs a command where a kubelet and its containers can live beside the machine's own business: with a network, process
# and mount namespace of its own, and its own /run, /var/log, /var/lib and cgroups. Nothing of it can be reached from
# outside, and all of it ends with the command, also when this script is killed. Needs root, and cgroup version 1.
set -euo pipefail
shopt -s nullglob
controllers=(cpu cpuacct cpuset memory devices freezer blkio pids systemd)
clean() { # the directories of the run with this process id
  for controller in "${controllers[@]}"; do
    find "/sys/fs/cgroup/$controller/cascade-node-$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -rf "${TMPDIR:-/tmp}/cascade-node-$1"
}
for former in {/sys/fs/cgroup/memory,"${TMPDIR:-/tmp}"}/cascade-node-*; do
  [[ -d /proc/${former##*-} ]] || clean "${former##*-}"
done
export NODE_ADDRESS=172.31.0.1 NODE_CGROUP=cascade-node-$$ NODE_DIRECTORY=${TMPDIR:-/tmp}/cascade-node-$$
mkdir "$NODE_DIRECTORY" "$NODE_DIRECTORY"/{lib,sysctl}
trap 'clean $$' EXIT
for controller in "${controllers[@]}"; do mkdir -p "/sys/fs/cgroup/$controller/$NODE_CGROUP"; done
# A new cpuset has no cores and no memory, and no process may join it.
for file in cpuset.cpus cpuset.mems; do cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$NODE_CGROUP/$file"; done
echo "nameserver $NODE_ADDRESS
search cascade.svc.cluster.local" >"$NODE_DIRECTORY/resolv.conf"

setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc bash -euc '
  umount /sys/fs/cgroup/unified 2>/dev/null || true  # a kubelet wants version 1 or 2, not both
  resolver=$(readlink -f /etc/resolv.conf)
  mount -t tmpfs tmpfs /run
  mount -t tmpfs tmpfs /var/log
  mount --bind "$NODE_DIRECTORY/lib" /var/lib  # where the kubelet looks for device plugins
  mkdir -p /run/lock /run/netns "$(dirname "$resolver")"
  touch "$resolver"
  mount --bind "$NODE_DIRECTORY/resolv.conf" "$resolver"
  # The kubelet wants these settings of the whole machine. It is shown them; the machine keeps its own.
  show() {
    echo "$2" >"$NODE_DIRECTORY/sysctl/${1//\//.}"
    mount --bind "$NODE_DIRECTORY/sysctl/${1//\//.}" "/proc/sys/$1"
  }
  show vm/overcommit_memory 1
  show vm/panic_on_oom 0
  show kernel/panic 10
  show kernel/panic_on_oops 1
  show kernel/keys/root_maxkeys 1000000
  show kernel/keys/root_maxbytes 25000000
  ip link set lo up
  ip address add "$NODE_ADDRESS/32" dev lo
  echo 1 >/proc/sys/net/ipv4/ip_forward
  exec "$@"' _ "$@"
