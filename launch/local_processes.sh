#!/usr/bin/env bash
# One run in several CPU processes on this machine: a cluster in small, to try what a large one does.
#
#   launch/local_processes.sh PROCESSES [--devices=N] -- COMMAND...
#
# Each process has N devices (default 1). Ctrl-C and SIGTERM are passed on to all. When a process
# fails, the others get five seconds to end by themselves; the exit status is the worst of those
# that did. Needs bash 5.1.
set -euo pipefail

usage() { sed -n '4s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=$1 devices=1
shift
if [[ ${1:-} =~ ^--devices=([1-9][0-9]*)$ ]]; then
  devices=${BASH_REMATCH[1]}
  shift
fi
[[ ${1:-} == -- && $# -gt 1 ]] || usage
shift

port=$((20000 + RANDOM % 10000))
while (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

set -m # every process in a group of its own: a signal from the terminal reaches this script alone
declare -A number=()
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  number[$!]=$i
done
trap 'kill -TERM "${!number[@]}" 2>/dev/null' INT TERM

worst=0 failed='' grace=''
while ((${#number[@]})); do
  status=0
  wait -n -p ended "${!number[@]}" 2>/dev/null || status=$? # bash would announce who was killed
  if [[ ! ${ended:-} ]]; then
    ((status == 127)) || continue # a signal came: it has been passed on
    # All are over, and bash noted that before it was asked to wait; it still knows how they ended.
    for ended in "${!number[@]}"; do break; done
    status=0
    wait "$ended" 2>/dev/null || status=$?
  fi
  name=${number[$ended]}
  unset "number[$ended]"
  # What was killed for another's failure says nothing of its own.
  if ((status > worst)) && ! [[ $failed && $status == 137 ]]; then worst=$status; fi
  if ((status)) && [[ ! $failed ]]; then
    failed=$name
    ((${#number[@]})) || break
    echo "process $name ended with status $status: stopping the others" >&2
    { sleep 5 && kill -KILL "${!number[@]}"; } 2>/dev/null &
    grace=$!
  fi
done
[[ ! $grace ]] || kill -KILL -- "-$grace" 2>/dev/null || true
exit "$worst"
