#!/bin/sh
# Train a controller into one folder, however often it takes: start there, or go on from what an earlier try left.
#
#     sh infra/ppo.sh /esper/runs/first --set ppo.iterations=200
#
# The same command may be given again after any death (KubeRay's `backoffLimit`, a shell's `until`), from the root of
# the clone or image. The folder must outlive the driver's node. What follows it goes to `pipelines/ppo.py` at the
# start; a training that goes on takes all from its folder.
#
# Tried: as a Ray job on two nodes with token authentication, killed with its head and given again; tests/test_infra.py
# runs it. Never tried: inside Kubernetes.
set -eu

if [ $# -eq 0 ]; then
    echo "error: no folder named: sh infra/ppo.sh FOLDER, and then whatever pipelines/ppo.py takes." >&2
    exit 2
fi
out=$1
shift

if [ -e "$out/summary.json" ]; then
    echo "$out is complete: for more iterations, python pipelines/ppo.py --resume $out --set ppo.iterations=N."
    exit 0
fi
if [ -e "$out/pins.json" ]; then
    exec python pipelines/ppo.py --resume "$out"
fi
exec python pipelines/ppo.py --out "$out" "$@"
