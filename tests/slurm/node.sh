#!/usr/bin/env bash
# PID 1 of a node: node.sh NAME DIRECTORY DAEMONS...   (hosts and nsswitch.conf lie in DIRECTORY; a daemon is a command)
# It lives as long as its standard input is open: when the test that holds the other end is gone, however it
# ended, this process ends, and the kernel ends everything else in its PID namespace.
set -euo pipefail
name=$1 directory=$2
shift 2

hostname "$name"
mount --make-rprivate /
mount --bind "$directory/hosts" /etc/hosts
mount --bind "$directory/nsswitch.conf" /etc/nsswitch.conf
# The network interfaces of this node, and shared memory that no other node sees.
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up

echo ready
read -r _ # the network is wired
for daemon in "$@"; do
    bash -c "exec $daemon" </dev/null &
done
cat >/dev/null
