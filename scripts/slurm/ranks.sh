# What the batch scripts share: one `remit` task per GPU, and what becomes of the job afterwards. Sourced by them.
# shellcheck shell=bash

say() { printf '%s: %s\n' "${SLURM_JOB_NAME:-remit}" "$1" >&2; }
fail() {
  say "$1"
  exit 2
}

# job_field NAME, node_field NODE NAME: one value of what scontrol shows; empty where it does not.
job_field() { shown_field "$1" job "$SLURM_JOB_ID"; }
node_field() { shown_field "$2" node "$1"; }
shown_field() {
  local words word
  read -r -d '' -a words < <(scontrol --oneliner show "$2" "$3" 2> /dev/null) || true
  for word in "${words[@]}"; do
    if [[ "$word" == "$1="* ]]; then
      printf '%s\n' "${word#*=}"
      return 0
    fi
  done
}

# enter_submission: to the directory of submission, which has what the job needs. Paths are relative to it.
enter_submission() {
  [[ -n "${SLURM_JOB_ID:-}" ]] || fail "found no SLURM_JOB_ID; expected to be submitted: sbatch scripts/slurm/NAME.sbatch"
  cd -- "$SLURM_SUBMIT_DIR" || fail "$SLURM_SUBMIT_DIR: cannot be entered"
}

# choose_program: what srun starts, in `flags` (its options for pyxis) and `remit`.
choose_program() {
  local container=${REMIT_CONTAINER-$SLURM_SUBMIT_DIR/remit_megatron.sqsh}
  flags=()
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
}

# keep_caches_local: compilers write thousands of small files; a file system that the nodes share is the wrong place.
keep_caches_local() {
  local caches="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/remit-caches-${USER:-$UID}"
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}
  export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$caches/cuda}
}

# Passes on what srun says. Once a task has failed the others are given half a minute to end; those that have not are asked where they
# are: SIGCONT for one that was stopped, SIGQUIT for the stacks of all its threads. srun itself ends them later (--wait).
watch_tasks() {
  local line watch=""
  while IFS= read -r line || [[ -n "$line" ]]; do
    printf '%s\n' "$line" >&2
    if [[ -z "$watch" && "$line" == "srun: error: "*": task"*": "* && "$line" != *" exit code 75" ]]; then
      (
        sleep "${REMIT_STACKS_AFTER:-30}"
        say "a rank has failed and others are still there: their stacks follow"
        scancel --signal=CONT "$SLURM_JOB_ID.0"
        scancel --signal=QUIT "$SLURM_JOB_ID.0"
      ) &
      watch=$!
    fi
  done
  [[ -z "$watch" ]] || kill "$watch" 2> /dev/null || true
}

requeue() {
  # A job that somebody has cancelled is to end: Slurm would start it again all the same.
  if [[ "$(job_field JobState)" == CANCELLED* ]]; then
    say "cancelled; not started again"
    return 0
  fi
  # Asked for last: Slurm ends this script for it.
  scontrol requeue "$SLURM_JOB_ID" || say "could not be requeued; submit it again to go on"
}

# as_stopped: makes 75 of a `code` that says that SIGTERM or SIGUSR2 has ended a command. One that has begun handles both.
as_stopped() {
  if ((code == 143 || code == 140)); then
    say "stopped before it had begun"
    code=75
  fi
}

# after CODE: starts the job again, or says why not.
after() {
  local code=$1 file="$SLURM_SUBMIT_DIR/.remit-crashes-$SLURM_JOB_ID" limit=${REMIT_CRASHES:-3} count=0
  case $code in
    0)
      rm -f -- "$file"
      say "done"
      ;;
    75)
      rm -f -- "$file"
      say "stopped before its end; requeued to go on"
      requeue
      ;;
    2 | 70)
      rm -f -- "$file"
      say "exit code $code: starting again would end the same way"
      ;;
    *)
      # A node or a disk may be the reason, or the program; the second ends the same way every time.
      [[ ! -f "$file" ]] || count=$(< "$file")
      count=$((count + 1))
      if ((count > limit)); then
        rm -f -- "$file"
        say "exit code $code, crash $count in a row: not started again by itself; submit it again to go on"
      elif printf '%s\n' "$count" > "$file"; then
        say "exit code $code, crash $count in a row (REMIT_CRASHES allows $limit); requeued to go on"
        requeue
      else
        say "exit code $code: not started again, because its crashes cannot be counted; submit it again to go on"
      fi
      ;;
  esac
}

# run_ranks COMMAND CONFIG [ARGUMENTS]: `remit COMMAND CONFIG ...` on every task of the job; ends this script with its exit code.
run_ranks() {
  enter_submission
  (($# >= 2)) || fail "found no configuration; expected: sbatch $1.sbatch CONFIG [a.b=c ...]"
  [[ -f "$2" ]] || fail "$2: no such file in $SLURM_SUBMIT_DIR"

  local hosts address flags remit code
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # By which Slurm itself reaches the node; its name need not be known to the other nodes.
  address=$(node_field "${hosts[0]}" NodeAddr)
  export MASTER_ADDR=${address:-${hosts[0]}}
  # Below the ephemeral ports; two jobs on one node differ.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Order of kernels and communication under tensor parallelism.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export PYTHONNOUSERSITE=1
  keep_caches_local
  choose_program

  # Where a task sees all GPUs of its node it takes its own by SLURM_LOCALID; where it sees one (--gpus-per-task), that one.
  # The first rank that ends does not take the others with it: they may be at the end of a save. After 120 s it does.
  flags+=(--label --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${SLURM_NTASKS:-1} ranks on ${#hosts[@]} nodes"
  say "rendezvous at $MASTER_ADDR:$MASTER_PORT"
  code=0
  srun "${flags[@]}" "$remit" "$@" 2> >(watch_tasks) || code=$?
  wait || true
  as_stopped
  after "$code"
  exit "$code"
}

# run_one ARGUMENTS: `remit ARGUMENTS` once, on the first node, with all that the job has there; ends this script with its exit code.
run_one() {
  local flags remit code
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  export PYTHONNOUSERSITE=1
  keep_caches_local
  choose_program
  flags+=(--nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): remit $*"
  code=0
  srun "${flags[@]}" "$remit" "$@" || code=$?
  as_stopped
  after "$code"
  exit "$code"
}
