#!/usr/bin/env bash
# A launch file, written by: flmjax launch tpu_vm --config=configs/flm_101b.py:tpu_v5p '--config.mesh.topology=v5p:4x8x8*2' '--config.stages[0].mesh.replica=2' '--config.stages[1].mesh.replica=2' '--config.stages[2].mesh.replica=2' --workdir=gs://bucket/runs/flm_101b --site=./site.toml
# 2 slices of 256 v5p chips; hosts of a slice: 64 (mesh.topology=v5p:4x8x8*2).
# Requests the slices, runs the command on all hosts, and deletes the slices at the end. A preempted slice is requested
# again, and the run continues from its newest checkpoint. Keep this script running as long as the run, for example on a
# small VM; it may be restarted. Ctrl-C saves the run and keeps the slices. The slices also stay, and cost money, after
# exit status 2 or too many crashes. Needs gcloud, logged in, and `gcloud components install alpha`.
set -euo pipefail
name=flm-101b
workdir=gs://bucket/runs/flm_101b
place=(--project=project --zone=us-central2-b)
nodes=("$name"-{0..1})
max_crashes=3 # in a row, without a new checkpoint between them
poll=60 # seconds between two looks at the slices

host_command() { # START: what every host runs
  # gcloud repeats a command after a lost connection: the host then goes on with the first one.
  echo "mkdir /tmp/flmjax-$1 || exit 0"
  cat << 'FLMJAX_END'
export NCCL_IB_HCA=mlx5_0,mlx5_1
module load cuda
export PYTHONUNBUFFERED=1
flmjax train --config=configs/flm_101b.py:tpu_v5p '--config.mesh.topology=v5p:4x8x8*2' '--config.stages[0].mesh.replica=2' '--config.stages[1].mesh.replica=2' '--config.stages[2].mesh.replica=2' --workdir=gs://bucket/runs/flm_101b
echo "flmjax-exit $?"
FLMJAX_END
}

stop_command() { # ends the run of a host, but not the shell that started it; it may save before it is killed
  cat << 'FLMJAX_END'
run='^[^ ]*python[^ ]* [^ ]*flmjax train'
pkill -TERM -f "$run"
for ((second = 0; second < 300; second++)); do
  pgrep -f "$run" > /dev/null || exit 0
  sleep 1
done
pkill -KILL -f "$run"
FLMJAX_END
}

say() { echo "launch file: $*" >&2; }
queue() { # VERB ARGUMENTS of queued resources
  gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" --quiet "${@:2}"
}

on_all_hosts() { # COMMAND: on every host of every slice at the same time (queued-resources ssh takes 64 at a time)
  local node pid pids=() status=0
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --quiet \
      --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=10 --command="$1" < /dev/null &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

create() { # by gcloud alpha, which alone has v5e and newer TPUs
  gcloud alpha compute tpus queued-resources create "$name" "${place[@]}" --quiet \
    --type=v5p --topology=4x8x8 \
    --runtime-version=v2-alpha-tpuv5 \
    --spot \
    --node-count=2 --node-prefix="$name"
}

describe() { # KIND NAME FIELD: the field; ABSENT; or UNKNOWN if gcloud cannot tell, with the reason in NAME.gcloud
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$2" "${place[@]}" --format="value($3)" 2> "$name.gcloud"); then
    echo "$answer"
  elif grep -q NOT_FOUND "$name.gcloud"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

state() { # READY if all slices are; otherwise the state of the first that is not
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
  local now last='' failed=0
  while now=$(state) && [ "$now" != READY ]; do
    if [ "$now" != "$last" ]; then
      say "slices: $now"
      case $now in
        UNKNOWN) say "gcloud: $(tail -n 1 "$name.gcloud")" ;;
        FAILED) failed=$((failed + 1)) ;;
      esac
      last=$now
    fi
    if [ "$failed" -ge "$max_crashes" ]; then
      say "the request failed $failed times in a row: gcloud compute tpus queued-resources describe $name ${place[*]}"
      exit 1
    fi
    case $now in
      ABSENT) create || say "gcloud refused; tried again in $poll seconds" ;;
      SUSPENDING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED | LOST)
        queue delete --force || say "gcloud refused; tried again in $poll seconds"
        ;;
    esac
    sleep "$poll"
  done
}

newest_checkpoint() { # 0: no checkpoint
  { gcloud storage ls "$workdir/checkpoints/" 2> /dev/null || true; echo /0/; } |
    sed -n 's#.*/\([0-9][0-9]*\)/$#\1#p' | sort -n | tail -n 1
}

exit_status() { # LOG: the most important status of all hosts: a crash, 2, 75, 0; 255 if no host has one
  sed -n 's/.*flmjax-exit \([0-9][0-9]*\)$/\1/p' "$1" |
    awk '{ rank = $1 == 0 ? 1 : $1 == 75 ? 2 : $1 == 2 ? 3 : 4 }
         rank > highest { highest = rank; status = $1 }
         END { print highest ? status : 255 }'
}

running=
stop() {
  trap - INT TERM # a second Ctrl-C ends this script at once
  if [ -n "$running" ]; then
    say "interrupted: the run saves"
    on_all_hosts "$(stop_command)" > /dev/null 2>&1 || true
    wait "$running" || true
  fi
  say "the slices stay: gcloud compute tpus queued-resources delete $name ${place[*]} --force"
  exit 130
}
trap stop INT TERM

count=0 before=0 starts=0
while true; do
  wait_for_slices
  starts=$((starts + 1)) log=$name.$starts.log
  say "start $starts: $log"
  # The run of a lost connection may still be there; two runs in one workdir are refused.
  on_all_hosts "$(stop_command)" > /dev/null 2>&1 || true
  set -m # a process group for the run's connections: Ctrl-C does not reach them, and all can be ended at once
  on_all_hosts "$(host_command "$(date +%s)-$starts")" > "$log" 2>&1 &
  running=$!
  set +m
  while kill -0 "$running" 2> /dev/null; do
    sleep "$poll"
    case $(state) in READY | UNKNOWN) ;; *) kill -- "-$running" 2> /dev/null || true ;; esac
  done
  lost=0
  wait "$running" || lost=$?
  running=
  status=$(exit_status "$log")
  if [ "$status" -eq 0 ] && [ "$lost" -ne 0 ]; then status=255; fi # a host without a status has lost its connection
  case $status in
    0)
      say "the run has ended"
      until queue delete --force || [ "$(state)" = ABSENT ]; do
        say "gcloud refused to delete the slices; tried again in $poll seconds"
        sleep "$poll"
      done
      say "the slices are deleted"
      exit 0
      ;;
    2)
      say "exit status 2: the command or the config is wrong; see $log. The slices stay"
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
  crash="exit status $status, crash $count of $max_crashes in a row at checkpoint $newest"
  if [ "$count" -ge "$max_crashes" ]; then
    say "$crash; see $log. The slices stay"
    exit 1
  fi
  say "$crash; started again"
done
