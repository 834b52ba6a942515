# What train.sbatch and score.sbatch share: one `remit` task per GPU, and what becomes of the job afterwards. Sourced by them.
# shellcheck shell=bash

say() { printf '%s: %s\n' "${SLURM_JOB_NAME:-remit}" "$1" >&2; }
fail() {
  say "$1"
  exit 2
}

# run_ranks COMMAND CONFIG [ARGUMENTS]: `remit COMMAND CONFIG ...` on every task of the job; ends this script with its exit code.
run_ranks() {
  [[ -n "${SLURM_JOB_ID:-}" ]] || fail "found no SLURM_JOB_ID; expected to be submitted: sbatch $1.sbatch CONFIG"
  (($# >= 2)) || fail "found no configuration; expected: sbatch $1.sbatch CONFIG [a.b=c ...]"
  # Paths are relative to where the job was submitted.
  cd -- "$SLURM_SUBMIT_DIR" || fail "$SLURM_SUBMIT_DIR: cannot be entered"
  [[ -f "$2" ]] || fail "$2: no such file in $SLURM_SUBMIT_DIR"

  local hosts flags container remit code
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]}
  # Below the ephemeral ports; two jobs on one node differ.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Order of kernels and communication under tensor parallelism.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export PYTHONNOUSERSITE=1

  # All GPUs of a node stay visible to each of its tasks, which choose theirs by SLURM_LOCALID (no --gpus-per-task).
  # The first rank that ends does not take the others with it: they may be at the end of a save. After 120 s it does.
  flags=(--kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  container=${REMIT_CONTAINER-$SLURM_SUBMIT_DIR/remit_megatron.sqsh}
  if [[ -n "$container" ]]; then
    case $container in
      /* | ./* | *.sqsh)
        [[ -f "$container" ]] ||
          fail "REMIT_CONTAINER: found $container, which is no file; expected an image (empty runs .venv)"
        ;;
    esac
    flags+=(--container-image="$container" --container-workdir="$SLURM_SUBMIT_DIR")
    flags+=(--container-mounts="$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR${REMIT_MOUNTS:+,$REMIT_MOUNTS}")
    remit=remit
  else
    remit="$SLURM_SUBMIT_DIR/.venv/bin/remit"
    [[ -x "$remit" ]] || fail "$remit: not there; expected what ./scripts/setup.sh makes"
  fi

  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${SLURM_NTASKS:-1} ranks on ${#hosts[@]} nodes"
  say "rendezvous at $MASTER_ADDR:$MASTER_PORT"
  code=0
  srun "${flags[@]}" "$remit" "$@" || code=$?

  case $code in
    0) say "done" ;;
    75)
      say "stopped before its end; requeued to go on"
      # Asked for last: Slurm ends this script for it.
      scontrol requeue "$SLURM_JOB_ID" || say "could not be requeued; submit it again to go on"
      ;;
    2 | 70) say "exit code $code: starting again would end the same way" ;;
    *) say "exit code $code: not started again by itself; submit it again to go on" ;;
  esac
  exit "$code"
}
