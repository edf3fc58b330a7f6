#!/usr/bin/env bash
#
# Runs a Python script on several ranks over MPI: on this machine, or on given hosts.
# Serves plain MPI (hvd_sparse.mpi, hvd_sparse.torch.DistributedOptimizer) and Horovod,
# which uses MPI as its transport when it is started so. The MPI is the one that mpi4py
# of the ranks' Python uses: Open MPI, MPICH or Intel MPI.
#
# usage: launch/mpirun.sh [OPTION ...] SCRIPT [ARGUMENT ...]
#
#   -n, --ranks N        ranks in all (default: 2, or the slots of all hosts)
#   --hosts H1:S1,H2:S2  hosts with their slots: as many ranks as that run there
#                        (default: this machine). They need this folder at the same
#                        path, and ssh from here without a password.
#   --interface NAME     the network interface that ranks talk through, such as eth0
#                        (default: all but loopback and docker's)
#   --python PATH        the Python of the ranks (default: .venv's)
#   --command            what follows is a command with its arguments, not a script
#   --dry-run            print the command and do not run it
#   -h, --help           this text
#
# examples:
#   launch/mpirun.sh -n 2 examples/torch_digits.py --density 0.01
#   launch/mpirun.sh --hosts node1:4,node2:4 --interface eth0 examples/horovod_torch.py

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/mpi-environment.sh"

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
    printf 'mpirun.sh: %s\n' "$@" >&2
    exit 2
}

RANKS=""
HOSTS=""
INTERFACE=""
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
        -*) fail "unknown option: $1 (launch/mpirun.sh --help)" ;;
        *) break ;;
    esac
done
[[ ${#SCRIPT[@]} == 0 ]] || SCRIPT=("$PYTHON")
(($#)) || fail "which script? (launch/mpirun.sh --help)"
[[ -n $RANKS ]] || RANKS=$(slots_of "$HOSTS")
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "--ranks must be a positive number, got $RANKS"

mpi_command "$RANKS"
[[ -z $HOSTS ]] || mpi_hosts "$HOSTS"
mpi_network "$INTERFACE"
printf 'mpirun.sh: %s (%s)\n' "$MPI_NAME" "${MPIRUN#"$PROJECT"/}" >&2

if [[ -n $DRY_RUN ]]; then
    printf '%q ' "${MPI_COMMAND[@]}" "${SCRIPT[@]}" "$@"
    echo
    exit 0
fi
exec "${MPI_COMMAND[@]}" "${SCRIPT[@]}" "$@"
