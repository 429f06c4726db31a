#!/bin/bash
# Made by peft-dist VERSION; job.sbatch starts it once on each node of the job, and
# once more, with arguments, where the job is over and nobody has decided what comes of the run.
# shellcheck disable=SC1090,SC1091 # what the set-up reads is on the cluster
# shellcheck disable=SC2016 # a value that holds a dollar sign is text
set -eo pipefail
umask "${PEFT_DIST_UMASK:-077}" # what runs before Python is the site's; Python sets its own

# Whatever ends this script before Python takes over is left beside the logs, for who decides.
signal=
leave() { # CODE
  local mark=$PEFT_DIST_LOGS/$SLURMD_NODENAME.$PEFT_DIST_NONCE.set-up
  case $1 in 129 | 130 | 138 | 140 | 143) signal=${signal:-$(kill -l "$1")} ;; esac
  if [ -n "$signal" ]; then
    echo "SIG$signal" >"$mark-stopped"
    return
  fi
  echo "$SLURMD_NODENAME: code $1: $(tail -n 1 "$PEFT_DIST_LOGS/$SLURMD_NODENAME.log")" >"$mark-failed"
  # Slurm ends the other nodes with this one; do they fail as well?
  for _ in {1..20}; do
    set -- "$PEFT_DIST_LOGS"/*."$PEFT_DIST_NONCE".set-up-failed
    [ $# -lt "$SLURM_JOB_NUM_NODES" ] || return
    sleep 0.5
  done
}
if [ $# -eq 0 ]; then
  for name in HUP INT USR1 USR2 TERM; do
    # shellcheck disable=SC2064 # the name of now
    trap "signal=$name; exit 75" "$name"
  done
  trap 'leave $?' EXIT
fi

set -u
threads=$((SLURM_CPUS_ON_NODE / 4))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export PYTHONSAFEPATH=1
python=(/opt/venv/bin/python)
share=$("${python[@]}" -c 'from peft_dist.common import paths; print(paths.root())' | tail -n 1) # behind what an image says first
export PET_RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$PEFT_DIST_NONCE
rendezvous=node=$SLURM_PROCID,host=$PEFT_DIST_HEAD,port=$PEFT_DIST_PORT,join_timeout_s=120

exec "${python[@]}" -m peft_dist.slurm.rank_supervisor \
  --run-dir /scratch/alice/runs/first \
  --max-starts 100 \
  --max-starts-without-progress 5 \
  --per-rank \
  --devices 4 \
  --preflight-timeout-s 60 \
  --arrival-s 1800 \
  --min-free-gb 1 \
  --max-clock-offset-s 60 "$@" -- \
  /opt/venv/bin/python -m accelerate.commands.launch \
  --config_file "$share/launch/strategies/fsdp.yaml" \
  --num_processes 8 \
  --num_machines 8 \
  --machine_rank "$SLURM_PROCID" \
  --main_process_ip "$PEFT_DIST_HEAD" \
  --main_process_port "$PEFT_DIST_PORT" \
  --rdzv_conf "$rendezvous" \
  --rdzv_backend peft-dist \
  --max_restarts 3 \
  "$share/launch/train.py" /scratch/alice/runs/first/recipe.yaml
