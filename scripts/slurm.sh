#!/usr/bin/env bash
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=slurm-%j.out
# Training on a cluster, from the repository's folder, which all nodes must see:
#
#   sbatch scripts/slurm.sh --work_dir runs/e2e --train_data ... --init_checkpoint ...
#   sbatch --nodes=1 --gpus-per-node=1 scripts/slurm.sh ...      sbatch's own flags come first
#
# The arguments go to gpt2_ft.py. One torchrun per node, which meet on the first node by
# c10d; NPROC processes each (the node's GPUs, or 1). A worker that dies is started again with all
# others, MAX_RESTARTS=3 times. Three minutes before its time is up the job gets SIGTERM, finishes
# its step and saves; the same command again resumes from there, and may be queued in advance with
#   sbatch --dependency=singleton scripts/slurm.sh ...
# The environment is made once, where there is a network: source scripts/venv.sh requirements.txt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch; start this script with it}"
source .venv/bin/activate
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${NPROC:-${SLURM_GPUS_ON_NODE:-1}} cores=${SLURM_CPUS_PER_TASK:-1}
# Waiting threads sleep in place of spinning, and the node's cores are shared out.
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + processes - 1) / processes))}
# srun no longer takes the number of cores from sbatch. Jobs that share a node have a port each.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$cores" torchrun \
  --nnodes "${SLURM_NNODES:-1}" --nproc_per_node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
  gpt2_ft.py --resume auto "$@"
