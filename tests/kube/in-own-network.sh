#!/usr/bin/env bash
# Runs a command in a network and process namespace of its own, where only the loopback interface is up: its servers
# cannot be reached from outside, take no port from others, and end with it. Needs root.
set -euo pipefail
exec unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && exec "$@"' _ "$@"
