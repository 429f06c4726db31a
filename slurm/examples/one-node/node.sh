#!/bin/bash
# Made by peft-dist 0.1.0; job.sbatch starts it once on each node of the job, and
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

# ---- set-up of the cluster file ----
module purge
module load cuda
source /scratch/venvs/peft-dist/bin/activate
# ---- end of set-up ----
set -eo pipefail # whatever those lines have set

set -u
threads=$((SLURM_CPUS_ON_NODE / 4))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export HF_HOME=/scratch/hf
export PET_RDZV_ENDPOINT=127.0.0.1:0
export PYTHONSAFEPATH=1
python=(/scratch/venvs/peft-dist/bin/python)
share=$("${python[@]}" -c 'from peft_dist.common import paths; print(paths.root())' | tail -n 1) # behind what an image says first
if [ $# -eq 0 ]; then
  PEFT_DIST_STAGED=$("${python[@]}" -m peft_dist.slurm.stage_model \
  --json /scratch/models/llama '/local/$USER' | tail -n 1)
  export PEFT_DIST_STAGED
fi

exec "${python[@]}" -m peft_dist.slurm.supervisor \
  --run-dir /scratch/alice/runs/one-node \
  --max-starts 100 \
  --max-starts-without-progress 5 \
  --secrets /home/alice/.config/peft-dist/secrets \
  --interface=ib0 \
  --devices 4 \
  --preflight-timeout-s 60 \
  --arrival-s 1800 \
  --min-free-gb 1 \
  --max-clock-offset-s 60 "$@" -- \
  /scratch/venvs/peft-dist/bin/python -m accelerate.commands.launch \
  --config_file "$share/launch/strategies/fsdp.yaml" \
  --num_processes 4 \
  --rdzv_backend peft-dist \
  --max_restarts 3 \
  "$share/launch/train.py" /scratch/alice/runs/one-node/recipe.yaml
