#!/bin/bash
# Made by peft-dist VERSION; job.sbatch starts it once on each node of the job, and
# once more, with arguments, where the job is over and nobody has decided what comes of the run.
# shellcheck disable=SC1090,SC1091 # what the set-up reads is on the cluster
# shellcheck disable=SC2016 # a value that holds a dollar sign is text
set -eo pipefail
umask 077

set -u
threads=$((SLURM_CPUS_ON_NODE / 4))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export PET_RDZV_ENDPOINT=127.0.0.1:0
export PYTHONSAFEPATH=1
python=(/opt/venv/bin/python)
share=$("${python[@]}" -c 'from peft_dist.common import paths; print(paths.root())')

exec "${python[@]}" -m peft_dist.slurm.supervisor \
  --run-dir /scratch/alice/runs/first/000 \
  --max-starts 100 \
  --max-starts-without-progress 5 \
  --devices 4 \
  --preflight-timeout-s 60 \
  --min-free-gb 1 \
  --max-clock-offset-s 60 "$@" -- \
  /opt/venv/bin/python -m accelerate.commands.launch \
  --config_file "$share/launch/strategies/ddp.yaml" \
  --num_processes 4 \
  --rdzv_backend peft-dist \
  --max_restarts 3 \
  "$share/launch/train.py" /scratch/alice/runs/first/000/recipe.yaml
