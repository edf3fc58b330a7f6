#!/usr/bin/env bash
#
# Runs a Python script on several ranks under Horovod: on this machine, or on given
# hosts, over Gloo (default) or MPI. launch/build-horovod installs Horovod in .venv; any
# other one is called by way of its Python: --python PATH.
#
# usage: launch/horovodrun.sh [OPTION ...] SCRIPT [ARGUMENT ...]
#
#   -n, --ranks N        ranks in all (default: 2, or the slots of all hosts)
#   --hosts H1:S1,H2:S2  hosts with their slots: as many ranks as that run there
#                        (default: this machine). They need this folder at the same
#                        path, and ssh from here without a password.
#   --interface NAME     the network interface that ranks talk through, such as eth0
#   --mpi                MPI in place of Gloo, the one that mpi4py uses
#   --python PATH        the Python of the ranks, which has Horovod (default: .venv's)
#   --command            what follows is a command with its arguments, not a script
#   --dry-run            print the command and do not run it
#   -h, --help           this text
#
# examples:
#   launch/horovodrun.sh -n 2 examples/horovod_torch.py --density 0.01
#   launch/horovodrun.sh --hosts node1:4,node2:4 --interface eth0 examples/horovod_torch.py

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/mpi-environment.sh"

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
    printf 'horovodrun.sh: %s\n' "$@" >&2
    exit 2
}

RANKS=""
HOSTS=""
INTERFACE=""
TRANSPORT=--gloo
DRY_RUN=""
SCRIPT=(python)
while (($#)); do
    case $1 in
        -n | --ranks | --hosts | --interface | --python)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            case $1 in
                -n | --ranks) RANKS=$2 ;;
                --hosts) HOSTS=$2 ;;
                --interface) INTERFACE=$2 ;;
                --python) PYTHON=$2 ;;
            esac
            shift 2
            ;;
        --mpi)
            TRANSPORT=--mpi
            shift
            ;;
        --command)
            SCRIPT=()
            shift
            ;;
        --dry-run)
            DRY_RUN=1
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) fail "unknown option: $1 (launch/horovodrun.sh --help)" ;;
        *) break ;;
    esac
done
[[ ${#SCRIPT[@]} == 0 ]] || SCRIPT=("$PYTHON")
(($#)) || fail "which script? (launch/horovodrun.sh --help)"
[[ -n $RANKS ]] || RANKS=$(slots_of "$HOSTS")
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "--ranks must be a positive number, got $RANKS"
BIN=$(command -v "$PYTHON") || fail "there is no $PYTHON: launch/setup makes .venv"
BIN=${BIN%/*}
[[ -x $BIN/horovodrun ]] || fail "Horovod is not in ${BIN%/bin}: call launch/build-horovod"

if [[ $TRANSPORT == --gloo && -z $DRY_RUN ]] && ! getent hosts "$(uname -n)" >/dev/null; then
    # Gloo looks its own host up, whatever the interface is, and crashes without an answer
    fail "this host's own name, $(uname -n), does not resolve: add it to /etc/hosts, or use --mpi"
fi

# TensorFlow is quiet about this CPU
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"

# Fills COMMAND with horovodrun and its options.
with_horovodrun() {
    local search=$BIN
    [[ $TRANSPORT == --gloo ]] || search=${MPIRUN%/*}:$search # where mpirun is looked for
    COMMAND=(
        env
        PATH="$search:$PATH"
        OMP_NUM_THREADS="$(threads_of "$RANKS")"
        "$BIN/horovodrun"
        -np "$RANKS"
        "$TRANSPORT"
        -H "${HOSTS:-localhost:$RANKS}" # as many slots as ranks, however many cores
        --start-timeout 120             # seconds for slow hosts to come
    )
    [[ -z $INTERFACE ]] || COMMAND+=(--network-interface "$INTERFACE")
    [[ $TRANSPORT == --mpi ]] || return 0
    MPI_COMMAND=()
    mpi_placement # containers often forbid binding; and more ranks than cores are welcome
    COMMAND+=(--binding-args="${MPI_COMMAND[*]}")
    if ((RANKS > $(mpi_cores))) && [[ -z $HOSTS ]]; then
        COMMAND+=(--mpi-args="--mca mpi_yield_when_idle 1") # as mpi_yield
    fi
}

# Fills COMMAND with mpirun: horovodrun does not know MPICH by its version, and has no
# flags for Intel MPI.
with_mpirun() {
    mpi_command "$RANKS"
    [[ -z $HOSTS ]] || mpi_hosts "$HOSTS"
    mpi_network "$INTERFACE"
    COMMAND=("${MPI_COMMAND[@]}" -genv HOROVOD_CONTROLLER mpi -genv HOROVOD_CPU_OPERATIONS mpi)
}

if [[ $TRANSPORT == --mpi ]]; then
    find_mpi
    printf 'horovodrun.sh: %s (%s)\n' "$MPI_NAME" "${MPIRUN#"$PROJECT"/}" >&2
fi
case $TRANSPORT${MPI:-} in
    --mpimpich | --mpiintel) with_mpirun ;;
    *) with_horovodrun ;;
esac

if [[ -n $DRY_RUN ]]; then
    printf '%q ' "${COMMAND[@]}" "${SCRIPT[@]}" "$@"
    echo
    exit 0
fi
exec "${COMMAND[@]}" "${SCRIPT[@]}" "$@"
