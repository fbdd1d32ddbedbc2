#!/usr/bin/env bash
# Start N processes of one run on this machine: [DEVICES=K] launch/local.sh N COMMAND...
#   launch/local.sh 2 flmjax train --config=configs/quickstart.py --workdir=runs/two
# GPUs are split evenly over the processes; without GPUs each process has K devices of the CPU (1). SIGTERM, SIGUSR1 and
# Ctrl-C reach every process. When one fails, the others have 15 seconds to end, then they are killed. The exit status is
# that of the first process that failed, 75 if the run was stopped and goes on, else 0.
set -uo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: [DEVICES=K] launch/local.sh N COMMAND..." >&2
  exit 2
fi
processes=$1 devices=${DEVICES:-1} grace=15
shift

gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2> /dev/null | wc -l)
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
  fi
fi
if [ "$gpus" -gt 0 ] && [ $((gpus % processes)) -ne 0 ]; then
  echo "launch/local.sh: $gpus GPUs do not divide over $processes processes; choose them with CUDA_VISIBLE_DEVICES" >&2
  exit 2
fi
if [ "$gpus" -eq 0 ]; then
  if [ -n "${DEVICES:-}" ]; then export JAX_NUM_CPU_DEVICES=$devices; fi
  # A blocked exchange between processes holds a thread of XLA's pool: with too few threads a run waits for ever.
  threads=$((4 * devices > 8 ? 4 * devices : 8))
  export NPROC=$((${NPROC:-0} > threads ? NPROC : threads))
fi

port=$("${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit
export FLMJAX_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=127.0.0.1:$port

set -m # a process group for each process: Ctrl-C reaches this script alone, which passes it on once
pids=() local_ids=()
for ((i = 0; i < processes; i++)); do
  if [ "$gpus" -gt 0 ]; then
    share=$((gpus / processes))
    local_ids=(JAX_LOCAL_DEVICE_IDS="$(seq -s, $((i * share)) $((i * share + share - 1)))")
  fi
  env ${local_ids[@]+"${local_ids[@]}"} FLMJAX_PROCESS_ID=$i "$@" < /dev/null &
  pids+=($!)
done
set +m
trap 'kill -s TERM "${pids[@]}" 2> /dev/null' TERM
trap 'kill -s USR1 "${pids[@]}" 2> /dev/null' USR1
trap 'kill -s INT "${pids[@]}" 2> /dev/null' INT
trap 'kill -s KILL -- "${pids[@]/#/-}" 2> /dev/null' EXIT # with the processes that they have started

status=0 failed_at=
while [ ${#pids[@]} -gt 0 ]; do
  sleep 0.1
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then
      running+=("$pid")
      continue
    fi
    { wait "$pid"; } 2> /dev/null # without bash's own line about a killed process
    ended=$?
    if [ $ended -ne 0 ]; then
      failed_at=${failed_at:-$SECONDS}
      # 75 says that the run goes on: only if no process says otherwise
      if [ $status -eq 0 ] || [ $status -eq 75 ]; then status=$ended; fi
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  if [ -n "$failed_at" ] && [ ${#pids[@]} -gt 0 ] && [ $((SECONDS - failed_at)) -ge "$grace" ]; then
    echo "launch/local.sh: a process failed with status $status, ${#pids[@]} others are killed" >&2
    kill -s KILL -- "${pids[@]/#/-}"
    failed_at=$((SECONDS + 3600))
  fi
done
exit $status
