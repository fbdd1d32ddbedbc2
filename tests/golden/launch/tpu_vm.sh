#!/usr/bin/env bash
# A launch file, written by: flmjax launch tpu_vm --config=configs/flm_101b.py:tpu_v5p --workdir=gs://bucket/runs/flm_101b --site=./site.toml
# 1 slice of 256 v5p chips; hosts of a slice: 64 (mesh.topology=v5p:4x8x8).
# Asks for the slices, runs the command on all of their hosts, and deletes them at its end. A preempted slice is deleted
# and asked for again, and the run goes on from its newest checkpoint. Run it where gcloud is logged in and for as long
# as the run takes, on a small machine of the same zone for example; started again it goes on too. Ctrl-C saves the run
# and leaves the slices.
set -euo pipefail
name=flm-101b
workdir=gs://bucket/runs/flm_101b
place=(--project=project --zone=us-central2-b)
nodes=("$name")
max_crashes=3 # in a row, without a new checkpoint between them
poll=60 # seconds between two looks at the slices

host_command() { # what every host runs
  cat << 'FLMJAX_END'
export NCCL_IB_HCA=mlx5_0,mlx5_1
module load cuda
export PYTHONUNBUFFERED=1
flmjax train --config=configs/flm_101b.py:tpu_v5p --workdir=gs://bucket/runs/flm_101b
echo "flmjax-exit $?"
FLMJAX_END
}

stop_command() { # SIGNAL: for the processes of the run, not for the shells that started them
  echo "pkill -$1 -f '^[^ ]*python[^ ]* [^ ]*flmjax train'"
}

say() { echo "launch file: $*" >&2; }
queue() { # VERB ARGUMENTS of queued resources
  gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"
}
ssh=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all)

create() {
  queue create --type=v5p --topology=4x8x8 \
    --runtime-version=v2-alpha-tpuv5 \
    --node-id="$name" \
    --spot \
    --quiet
}

describe() { # KIND NAME FIELD: the field; ABSENT, or UNKNOWN where gcloud cannot tell
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$2" "${place[@]}" --format="value($3)" 2>&1); then
    tail -n 1 <<< "$answer" # warnings stand before it
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

state() { # of all slices: READY, or the first other word for one
  local now node
  now=$(describe queued-resources "$name" state.state)
  if [ "$now" = ACTIVE ]; then
    for node in "${nodes[@]}"; do
      now=$(describe tpu-vm "$node" state)
      if [ "$now" = ABSENT ]; then now=LOST; fi
      if [ "$now" != READY ]; then break; fi
    done
  fi
  echo "$now"
}

wait_for_slices() {
  local now last=
  while now=$(state) && [ "$now" != READY ]; do
    if [ "$now" != "$last" ]; then say "slices: $now"; fi
    last=$now
    case $now in
      ABSENT) create || say "gcloud refused; tried again in $poll seconds" ;;
      SUSPENDING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED | LOST)
        queue delete --force --quiet || say "gcloud refused; tried again in $poll seconds"
        ;;
    esac
    sleep "$poll"
  done
}

newest_checkpoint() { # 0 without one
  { gcloud storage ls "$workdir/checkpoints/" 2> /dev/null || true; echo /0/; } |
    sed -n 's#.*/\([0-9][0-9]*\)/$#\1#p' | sort -n | tail -n 1
}

running=
stop() {
  say "interrupted: the run saves; the slices stay: gcloud compute tpus queued-resources delete $name ${place[*]} --force"
  if [ -n "$running" ]; then
    "${ssh[@]}" --command="$(stop_command TERM)" > /dev/null 2>&1 || true
    wait "$running" || true
  fi
  exit 130
}
trap stop INT TERM

count=0 before=0 starts=0
while true; do
  wait_for_slices
  starts=$((starts + 1)) log=$name.$starts.log
  say "start $starts: $log"
  # A run whose connection was lost may go on; two runs in one workdir do not.
  "${ssh[@]}" --command="$(stop_command KILL)" > /dev/null 2>&1 || true
  "${ssh[@]}" --command="$(host_command)" > "$log" 2>&1 &
  running=$!
  while kill -0 "$running" 2> /dev/null; do
    sleep "$poll"
    case $(state) in READY | UNKNOWN) ;; *) kill "$running" 2> /dev/null || true ;; esac
  done
  lost=0
  wait "$running" || lost=$?
  running=
  # The largest status of all hosts; a host that says none has lost its connection.
  status=$(sed -n 's/.*flmjax-exit \([0-9][0-9]*\)$/\1/p' "$log" | sort -n | tail -n 1)
  if [ "${status:-0}" -eq 0 ] && [ "$lost" -ne 0 ]; then status=255; fi
  case ${status:-255} in
    0)
      say "the run has ended; its slices are deleted"
      queue delete --force --quiet
      exit 0
      ;;
    2)
      say "exit status 2: the command or the config cannot be meant; see $log. The slices stay"
      exit 2
      ;;
    75)
      say "saved; started again"
      continue
      ;;
  esac
  case $(state) in
    READY | UNKNOWN) ;;
    *)
      say "a slice is lost; started again on new ones"
      continue
      ;;
  esac
  newest=$(newest_checkpoint)
  if [ "$newest" -gt "$before" ]; then count=0; fi
  count=$((count + 1)) before=$newest
  if [ "$count" -ge "$max_crashes" ]; then
    say "exit status $status, crash $count of $max_crashes in a row at checkpoint $newest; see $log. The slices stay"
    exit 1
  fi
  say "exit status $status, crash $count of $max_crashes in a row at checkpoint $newest; started again"
done
