#!/usr/bin/env bash
{{ mark }}
# {{ machine.words }} (mesh.topology={{ machine.topology.name }}).
# Every pod finds the others by the variables that GKE sets for TPUs. xpk restarts the run after every exit status but 2
# (the command or the config cannot be meant), --max-restarts times in all.
set -euo pipefail

pod_command() {
  cat << 'FLMJAX_END'
{% for line in site.setup %}
{{ line }}
{% endfor %}
export PYTHONUNBUFFERED=1
exec {{ run.command }}
FLMJAX_END
}

exec xpk workload create \
  --workload={{ run.name }} \
  --cluster={{ settings.cluster | shell }} \
{% for option in ("project", "zone") if settings[option] %}
  --{{ option }}={{ settings[option] | shell }} \
{% endfor %}
  --tpu-type={{ tpu.xpk }}-{{ machine.shape }} \
  --num-slices={{ machine.topology.slices }} \
  --docker-image={{ settings.image | shell }} \
  --max-restarts={{ site.max_crashes }} \
  --restart-on-exit-codes=1,3-126 \
  --termination-grace-period-seconds={{ site.grace_seconds }} \
{% for name, value in env.items() %}
  --env={{ (name ~ "=" ~ value) | shell }} \
{% endfor %}
{% for option in settings.options %}
  {{ option | shell }} \
{% endfor %}
  --command="$(pod_command)"
