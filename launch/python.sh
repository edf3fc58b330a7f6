# shellcheck shell=bash
# Which Pythons the project runs with, and the one line that installs one here.
#
# usage (source it, do not run it):
#   . "$(dirname "${BASH_SOURCE[0]}")/python.sh"
#   version_of python3            # prints 3.10 ... 3.14, or fails
#   find_python [WANTED]          # prints the path of one that can make a .venv, or fails
#   missing_packages              # prints the system's packages that bring one, or nothing
#   install_line PACKAGE ...      # prints the command that installs them
#   constraints_of 3.12           # prints the file with the releases that go together there
#   why_no_horovod                # prints why .venv can have none, or nothing
#   why_no_keras_3, why_no_tensorflow    # the same, of .venv-keras3 and .venv

# In this order: those with wheels of TensorFlow 2.15, with which Horovod can be built,
# those with wheels of the newest TensorFlow, and one that has torch alone.
PYTHONS=(3.11 3.10 3.13 3.12 3.14)
OS_RELEASE=/etc/os-release

# version_of PYTHON: fails for one that is too old, too new, broken or not there.
version_of() {
    "$1" -c 'import sys; v = sys.version_info[:2]
print("%d.%d" % v) if (3, 10) <= v <= (3, 14) else sys.exit(1)' 2>/dev/null
}

has_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# candidates [WANTED]: every Python there may be, or the wanted one alone
candidates() {
    if [[ -n ${1:-} ]]; then echo "$1"; else printf '%s\n' "${PYTHONS[@]/#/python}" python3; fi
}

find_python() {
    local candidate
    while read -r candidate; do
        if version_of "$candidate" >/dev/null && has_venv "$candidate"; then
            command -v "$candidate"
            return
        fi
    done < <(candidates "${1:-}")
    return 1
}

# version_of_system: of the Python that a Debian or Ubuntu, or what is made from
# one, has in its own packages. Fails for others and for those with one that is too old.
version_of_system() {
    local name
    # shellcheck source=/dev/null # the system's own file
    name=$(. "$OS_RELEASE" 2>/dev/null && echo "${UBUNTU_CODENAME:-${VERSION_CODENAME:-}}")
    case $name in
        jammy) echo 3.10 ;;             # Ubuntu 22.04
        bookworm) echo 3.11 ;;          # Debian 12
        noble) echo 3.12 ;;             # Ubuntu 24.04
        trixie | plucky | questing) echo 3.13 ;; # Debian 13, Ubuntu 25.04 and 25.10
        *) return 1 ;;
    esac
}

# missing_packages: of a Python that has no venv the rest, else a whole one. Nothing
# where there is one already; fails where the system's packages have none.
missing_packages() {
    local candidate version=""
    find_python >/dev/null && return
    while read -r candidate; do
        version=$(version_of "$candidate") && break
    done < <(candidates)
    [[ -n $version ]] || version=$(version_of_system) || return
    command -v apt-get >/dev/null || return
    echo "python$version python$version-venv"
}

install_line() {
    local sudo=""
    [[ $(id -u) == 0 ]] || sudo="sudo "
    echo "${sudo}apt-get update && ${sudo}apt-get install -y $*"
}

constraints_of() {
    case $1 in
        3.10 | 3.11) echo constraints.txt ;;
        *) echo constraints-3.12.txt ;;
    esac
}

# has_horovod FRAMEWORK: torch or tensorflow. Asked from elsewhere: tests/ has a folder of
# that name.
# shellcheck disable=SC2153 # PYTHON comes from mpi-environment.sh
has_horovod() { (cd / && "$PYTHON" -c "import horovod.$1") >/dev/null 2>&1; }

# version_here: of the Python in .venv, or of the one that it will have
version_here() { version_of "$PYTHON" || version_of "$(find_python)"; }

KERAS_2="TensorFlow 2.15, which has wheels for Python 3.10 and 3.11"

# launch/build-horovod builds one for torch, and for TensorFlow 2.15 where that is. One
# from elsewhere does, too.
why_no_horovod() {
    case $(version_here) in
        3.1[0123]) ;;
        *) echo "needs Horovod, which was built with Python 3.10 to 3.13" ;;
    esac
}

why_no_tensorflow() {
    case $(version_here) in
        3.1[01]) ;;
        *) echo "needs $KERAS_2; --keras3 runs it with the newest" ;;
    esac
}

why_no_keras_3() {
    [[ $(version_of "$PYTHON") != 3.14 ]] ||
        echo "needs TensorFlow, which has wheels for Python 3.10 to 3.13"
}
