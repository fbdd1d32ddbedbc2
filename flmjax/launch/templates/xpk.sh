#!/usr/bin/env bash
{{ mark }}
# {{ machine.description }} (mesh.topology={{ machine.topology.name }}).
# Every pod finds the others by the variables that GKE sets for TPUs. xpk restarts the run --max-restarts times in all,
# and counts crashes, saved runs and preemptions alike; exit status 2 (the command or the config is wrong) ends the run.
set -euo pipefail

pod_command() {
  cat << 'FLMJAX_END'
{% for line in site.setup %}
{{ line }}
{% endfor %}
export PYTHONUNBUFFERED=1
exec {{ command.line }}
FLMJAX_END
}

exec xpk workload create \
  --workload={{ command.name }} \
  --cluster={{ settings.cluster | shell }} \
{% for option in ("project", "zone") if settings[option] %}
  --{{ option }}={{ settings[option] | shell }} \
{% endfor %}
  --tpu-type={{ tpu.xpk }}-{{ machine.shape }} \
  --num-slices={{ machine.topology.slices }} \
  --docker-image={{ settings.image | shell }} \
  --max-restarts={{ settings.max_restarts }} \
  --restart-on-exit-codes=1,3-126 \
  --termination-grace-period-seconds={{ site.grace_seconds }} \
{% for name, value in env.items() %}
  --env={{ (name ~ "=" ~ value) | shell }} \
{% endfor %}
{% for option in settings.options %}
  {{ option | shell }} \
{% endfor %}
  --command="eval \"\$(base64 -d <<< $(pod_command | base64 -w 0))\"" # xpk's own YAML takes one line only
