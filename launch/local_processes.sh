#!/usr/bin/env bash
# Starts one run in several CPU processes on this machine, to test a run of several hosts.
#
#   launch/local_processes.sh PROCESSES [--devices=N] -- COMMAND...
#
# Each process has N devices (default 1). On Ctrl-C and SIGTERM the script sends SIGTERM to all
# processes. When a process fails, the script kills the others after five seconds. The exit status
# is the highest of the processes that the script did not kill. Needs bash 5.1.
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

set -m # one process group per process, so that the terminal sends signals only to this script
declare -A number=()
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  number[$!]=$i
done
trap 'kill -TERM "${!number[@]}" 2>/dev/null' INT TERM

worst=0 failed='' grace=''
while ((${#number[@]})); do
  status=0
  wait -n -p ended "${!number[@]}" 2>/dev/null || status=$? # bash would print the killed process
  if [[ ! ${ended:-} ]]; then
    ((status == 127)) || continue # a signal interrupted `wait`; the trap has handled it
    # All processes ended before this `wait -n`; bash still returns their status by process id.
    for ended in "${!number[@]}"; do break; done
    status=0
    wait "$ended" 2>/dev/null || status=$?
  fi
  name=${number[$ended]}
  unset "number[$ended]"
  # After a failure, a process that ends with status 137 was killed by this script.
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
