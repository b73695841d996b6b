#!/usr/bin/env bash
# Makes .venv with the pinned packages of one extra: `bash tools/setup.sh all|test`. Instant when nothing has changed.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

extra=${1:?usage: bash tools/setup.sh all|test}
python=.venv/bin/python
stamp=.venv/.setup
torch_index=https://download.pytorch.org/whl/cpu

main() {
    # The path is part of the stamp: a checkout that was moved or copied would otherwise run the code of the old place.
    local inputs
    inputs="$(pwd) $(cat pyproject.toml constraints.txt tools/setup.sh | cksum)"
    if is_done "$inputs"; then return; fi
    make_venv
    install_torch
    say "installing the other packages (about 200 MB to download)"
    pip_install -e ".[$extra]"
    printf '%s\n%s\n' "$inputs" "$extra" >"$stamp"
    say "ready in ${SECONDS} s: .venv is $(du -sh .venv | cut -f1)"
}

# [test] contains [all], so its stamp serves both.
is_done() {
    [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$1" ] || return 1
    case "$(sed -n 2p "$stamp")" in "$extra" | test) return 0 ;; *) return 1 ;; esac
}

make_venv() {
    if is_python "$python" && "$python" -m pip --version >/dev/null 2>&1; then return; fi
    local found
    found=$(find_python)
    say "making .venv with $("$found" --version 2>&1) ($found)"
    "$found" -m venv --clear .venv
}

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Print the first Python >= 3.11 that can make virtual environments, or stop with the line that installs one.
find_python() {
    local candidate bare=
    if [ -n "${PYTHON:-}" ] && ! is_python "$PYTHON"; then stop "PYTHON=$PYTHON is not Python 3.11 or newer"; fi
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
        is_python "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        bare=${bare:-$candidate}
    done
    if ! command -v apt-get >/dev/null; then
        stop "needs Python 3.11 or newer with the venv module; install it, then type make again"
    fi
    local version=
    if [ -n "$bare" ]; then
        version=$("$bare" -c 'import sys; print("3.%d" % sys.version_info[1])')
        stop "$bare has no venv module; type:  $(apt_line "python$version-venv")"
    fi
    for version in 3.13 3.12 3.11 3; do
        if [ -n "$(apt-cache show "python$version-venv" 2>/dev/null)" ]; then break; fi
    done
    stop "no Python 3.11 or newer found; type:  $(apt_line "python$version python$version-venv")"
}

apt_line() {
    local sudo=sudo\ 
    if [ "$(id -u)" -eq 0 ]; then sudo=; fi
    echo "${sudo}apt-get update && ${sudo}apt-get install -y $1"
}

# torch first and alone, because where it comes from depends on the machine. Build tools go with it, pinned too.
install_torch() {
    if timeout 20 nvidia-smi >/dev/null 2>&1; then
        need_disk 10 "torch with CUDA"
        say "installing torch with CUDA (about 3 GB to download)"
        pip_install torch setuptools
    elif index_answers; then
        need_disk 3 "torch for CPU"
        say "no NVIDIA driver: installing torch for CPU (about 200 MB to download)"
        pip_install --extra-index-url "$torch_index" torch setuptools
    else
        need_disk 3 "torch for CPU"
        say "no NVIDIA driver, and $torch_index does not answer:"
        say "installing torch from pip's own index (200 MB, or 3 GB and 8 GB of disk if it holds only the CUDA build)"
        pip_install torch setuptools
    fi
}

index_answers() {
    timeout 4 "$python" - "$torch_index/torch/" >/dev/null 2>&1 <<'END'
import sys
import urllib.request

urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
END
}

need_disk() {
    if compgen -G ".venv/lib/python3*/site-packages/torch" >/dev/null; then return; fi
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -lt "$1" ]; then
        stop "$free GB free in $(pwd), but $2 needs about $1 GB: free some space, or move this checkout to a larger disk"
    fi
}

pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-build-isolation -c constraints.txt "$@" ||
        stop "pip failed, as it says above; type make again to go on from here"
}

say() { echo "setup: $*" >&2; }

stop() {
    say "$*"
    exit 1
}

main
