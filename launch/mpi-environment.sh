# shellcheck shell=bash disable=SC2034 # PYTHON and MPI_COMMAND are for the caller
# What every script under launch/ must know to start ranks on this machine.
#
# usage (source it, do not run it):
#   . "$(dirname "${BASH_SOURCE[0]}")/mpi-environment.sh"
#   mpi_command 2                          # fills the array MPI_COMMAND
#   exec "${MPI_COMMAND[@]}" "$PYTHON" examples/torch_digits.py
#
# Gives PROJECT (the project's root), VENV, PYTHON and MPIRUN (those of .venv, so
# that nothing has to be activated), and mpi_command RANKS. MPI_COMMAND starts
# with env and works with exec, with timeout, and with plain "${MPI_COMMAND[@]}".

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$PROJECT/.venv
PYTHON=$VENV/bin/python
MPIRUN=$VENV/bin/mpirun

# A virtual environment or an MPI of somebody else must not leak into ours.
unset PYTHONHOME PYTHONPATH OPAL_PREFIX

# mpirun refuses to run as root unless told twice; containers run as root.
if [[ $(id -u) == 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# mpirun aborts without ssh, also where every rank is local.
if ! command -v ssh >/dev/null; then
    export OMPI_MCA_plm_rsh_agent=/bin/false
fi

# Cores this process may use. nproc heeds OMP_NUM_THREADS, which is not the question.
mpi_cores() {
    env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc
}

# threads_of RANKS: threads that each of the ranks may use. Ranks that busy-wait share
# the cores with them: no more threads than cores. A caller's own OMP_NUM_THREADS wins.
threads_of() {
    local share=$(($(mpi_cores) / $1))
    echo "${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}"
}

# slots_of HOST:SLOTS,...: how many ranks fit in all; 2 on this machine.
slots_of() {
    local host sum=0
    [[ -n $1 ]] || { echo 2; return; }
    for host in ${1//,/ }; do
        [[ $host == *:* ]] && sum=$((sum + ${host##*:})) || sum=$((sum + 1))
    done
    echo "$sum"
}

# mpi_command RANKS: the start of a command line that runs RANKS ranks here.
mpi_command() {
    local ranks=$1
    MPI_COMMAND=(
        env
        "OMP_NUM_THREADS=$(threads_of "$ranks")"
        "$MPIRUN"
        -np "$ranks"
        --oversubscribe # more ranks than cores are welcome
        --bind-to none  # containers often forbid binding; the kernel does well
    )
    if ((ranks > $(mpi_cores))); then
        # A waiting rank gives its core to one that has work.
        MPI_COMMAND+=(--mca mpi_yield_when_idle 1)
    fi
}
