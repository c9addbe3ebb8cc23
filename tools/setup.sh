#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Set up all that is missing to run (and with "dev": to test and check) virtiova from this checkout:
# a virtual environment in .venv with the package in it, QEMU, and a C compiler. System packages are
# installed with apt-get where that exists and is allowed (root, or sudo without a password); where it is
# not, what is missing is said, and the rest goes on. Does nothing, in no time, if nothing changed.
#
# usage: tools/setup.sh [run|dev]       PYTHON=... chooses the interpreter
set -eu

cd "$(dirname "$0")/.."
level=${1:-run}
here=$(pwd -P)
venv=.venv
log=build/setup.log
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 LC_ALL=C.UTF-8
# meson looks for cython, ninja and python3 on the path.
PATH=$here/$venv/bin:$PATH

say() { echo "set-up: $*" >&2; }
die() { say "$@"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# A bounded, silent command; its output is shown if it fails.
quietly() { # SECONDS COMMAND...
    seconds=$1; shift
    mark=$(wc -c <"$log")
    echo "+ $*" >>"$log"
    timeout -k 10 "$seconds" "$@" </dev/null >>"$log" 2>&1 && return 0
    code=$?
    [ $code -ne 124 ] || echo "(stopped after $seconds s)" >>"$log"
    return $code
}
show_failure() { tail -c "+$((mark + 1))" "$log" | tail -n 25 | sed 's/^/    /' >&2; }

# --- system packages -------------------------------------------------------------------------------------

may_apt() { have apt-get && { [ "$(id -u)" = 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }; }
if [ "$(id -u)" = 0 ]; then apt="apt-get"; else apt="sudo -n DEBIAN_FRONTEND=noninteractive apt-get"; fi
apt="$apt -q -y -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o DPkg::Lock::Timeout=120"

# Installs with the lists that are there, and with fresh ones if that fails: a fresh container has none.
apt_install() { # PACKAGE...
    may_apt || return 1
    say "installing $* with apt-get"
    # shellcheck disable=SC2086 # $apt is several words
    quietly 600 $apt install --no-install-recommends "$@" && return 0
    # shellcheck disable=SC2086
    quietly 180 $apt update || quietly 180 $apt update || say "apt-get update failed, trying without"
    # shellcheck disable=SC2086
    quietly 600 $apt install --no-install-recommends "$@" && return 0
    say "apt-get could not install $*:"
    show_failure
    return 1
}

# A failed attempt is not repeated for an hour: without a network it takes minutes to fail.
tried() { [ -n "$(find "$venv/.tried-$1" -mmin -60 2>/dev/null)" ]; }

need_qemu() {
    have qemu-system-x86_64 && return 0
    if ! tried qemu; then
        apt_install qemu-system-x86 && have qemu-system-x86_64 && return 0
        touch "$venv/.tried-qemu"
    fi
    say "QEMU is missing: only the in-process machine can be probed."
    say "  to have it: apt install qemu-system-x86 | dnf install qemu-system-x86-core | pacman -S qemu-system-x86"
}

# The tests hold our reading of PCI configuration space against the real lspci.
need_lspci() {
    have lspci && return 0
    if ! tried lspci; then
        apt_install pciutils && have lspci && return 0
        touch "$venv/.tried-lspci"
    fi
    say "lspci is missing: some tests need it (to have it: apt install pciutils)"
}

# The filter of a server's sandbox. Debian's own apt needs it; elsewhere it may be missing.
need_seccomp() {
    seccomp="import ctypes; ctypes.CDLL('libseccomp.so.2')"
    "$venv/bin/python" -c "$seccomp" 2>/dev/null && return 0
    if ! tried seccomp; then
        apt_install libseccomp2 && "$venv/bin/python" -c "$seccomp" 2>/dev/null && return 0
        touch "$venv/.tried-seccomp"
    fi
    say "libseccomp is missing: the sandbox of virtiova serve is not tested (to have it: apt install libseccomp2)"
}

# Instructions are counted, and held against those that are recorded (tools/instructions.py).
need_valgrind() {
    have valgrind && return 0
    if ! tried valgrind; then
        apt_install valgrind && have valgrind && return 0
        touch "$venv/.tried-valgrind"
    fi
    say "valgrind is missing: instructions are not counted (to have it: apt install valgrind)"
}

# The native half is fuzzed with clang's libFuzzer (tools/fuzz.py). About 60 MB, less where QEMU has brought LLVM along.
need_fuzzer() {
    "$venv/bin/python" -c 'import sys; sys.path.insert(0, "tools"); import fuzz; fuzz.clang()' 2>/dev/null && return 0
    if ! tried clang; then
        apt_install clang libclang-rt-dev && return 0
        touch "$venv/.tried-clang"
    fi
    say "clang's libFuzzer is missing: the native half is not fuzzed (to have it: apt install clang libclang-rt-dev)"
}

# A vhost-user back end that offers bit 33, for the tests of our front end. 100 MB in 200 small packages.
need_testpmd() {
    have dpdk-testpmd && return 0
    if ! tried testpmd; then
        apt_install dpdk-dev && have dpdk-testpmd && return 0
        touch "$venv/.tried-testpmd"
    fi
    say "dpdk-testpmd is missing: no back end with bit 33 is tested (to have it: apt install dpdk-dev)"
}

# Pages are tested in a real browser. About 100 MB.
need_browser() {
    have chromium && have chromedriver && return 0
    if ! tried chromium; then
        apt_install chromium chromium-driver && have chromium && have chromedriver && return 0
        touch "$venv/.tried-chromium"
    fi
    say "chromium is missing: pages are not tested in a browser (to have it: apt install chromium chromium-driver)"
}

# Other processors' QEMU: without one, its tests are skipped and say so. BINARY:PACKAGE of each.
other_qemus="qemu-system-aarch64:qemu-system-arm qemu-system-sparc64:qemu-system-sparc qemu-system-ppc64:qemu-system-ppc"
need_other_qemu() { # BINARY PACKAGE
    have "$1" && return 0
    if ! tried "$2"; then
        apt_install "$2" && have "$1" && return 0
        touch "$venv/.tried-$2"
    fi
    say "$1 is missing: its machines are not tested (to have it: apt install $2)"
}

# QEMU 10, for tests of what 7.2 does not have: into the user's cache, nothing is installed. About 21 MB.
newer_suite=bookworm-backports
need_newer_qemu() {
    have apt-get || return 0
    tried newer-qemu && return 0
    touch "$venv/.tried-newer-qemu"
    quietly 300 "$venv/bin/virtiova" matrix --qemu "$newer_suite" --only riscv-virt --only virt --list && return 0
    say "no QEMU out of $newer_suite: what needs it is not tested (log: $log)"
}

# Our reading of a domain is held against the real libvirt and its schemas: its QEMU driver inside virsh, no daemon.
libvirt_packages="libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu libxml2-utils"
have_libvirt() {
    have virsh && have xmllint && [ -n "$(find /usr/lib /usr/lib64 -name libvirt_driver_qemu.so 2>/dev/null)" ]
}
need_libvirt() {
    have_libvirt && return 0
    if ! tried libvirt; then
        # shellcheck disable=SC2086 # several words
        apt_install $libvirt_packages && have_libvirt && return 0
        touch "$venv/.tried-libvirt"
    fi
    say "libvirt is missing: domains are not held against it (to have it: apt install $libvirt_packages)"
}

need_compiler() {
    cc --version >/dev/null 2>&1 && return 0
    [ -z "${CC:-}" ] || return 0
    if ! tried cc; then
        apt_install gcc libc6-dev && cc --version >/dev/null 2>&1 && return 0
        touch "$venv/.tried-cc"
    fi
    say "no C compiler (to have one: apt install gcc libc6-dev); using the one in the ziglang wheel, 100 MB"
}

# --- Python ----------------------------------------------------------------------------------------------

check_python='
import os, sys, sysconfig
want = sys.argv[1]
if sys.version_info < (3, 11): sys.exit(1)
if want == "all":
    import ensurepip, venv
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")): sys.exit(1)
'
find_python() { # any|all: "all" has venv, ensurepip and Python.h
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3}; do
        have "$name" && "$name" -c "$check_python" "$1" >/dev/null 2>&1 && { command -v "$name"; return 0; }
    done
    return 1
}

make_venv() {
    python=$(find_python all) || {
        # Debian splits Python up; its own python3 is old enough to be there already, or comes now.
        apt_install python3 python3-venv python3-dev || true
        python=$(find_python all) || python=$(find_python any) ||
            die "no Python 3.11 or newer found; install one, or set PYTHON"
    }
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python cannot make virtual environments (to have it: apt install python3-venv)"
    rm -rf "$venv"
    quietly 180 "$python" -m venv "$venv" || { show_failure; die "could not make $venv with $python"; }
    echo "$here" >"$venv/.where"
}

pip_install() {
    quietly 900 "$venv/bin/python" -m pip install --quiet --retries 3 --timeout 30 "$@" && return 0
    show_failure
    return 1
}

fingerprint() { cat "$@" | cksum; }
fresh() { [ "$(cat "$venv/.stamp-$1" 2>/dev/null)" = "$2" ]; }

# --- what is done ----------------------------------------------------------------------------------------

mkdir -p build
touch "$log"
# Two set-ups at a time (make -j) take turns.
if have flock; then
    exec 9>build/setup.lock
    flock -w 1800 9 || die "another set-up is still running"
fi
have timeout || timeout() { shift 3; "$@"; } # not everywhere; then without bounds

# A moved checkout, or an interpreter that is gone, makes a new environment.
if [ "$(cat "$venv/.where" 2>/dev/null)" != "$here" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "making a virtual environment in $venv"
    make_venv
fi

native=$(fingerprint pyproject.toml meson.build tools/build_backend.py src/virtiova/*.pyx src/virtiova/*.pxi src/virtiova/*.h)
version=$(grep '^__version__' src/virtiova/__init__.py)
package="$native $version"
if ! fresh package "$package" || ! [ -e src/virtiova/_core.abi3.so ] || ! [ -e src/virtiova/_load.abi3.so ]; then
    rm -f "$venv/.stamp-package"
    need_compiler
    say "building and installing virtiova"
    "$venv/bin/python" tools/build_backend.py >"$venv/.requires"
    pip_install -r "$venv/.requires" || die "could not install what the build needs (log: $log)"
    pip_install --no-build-isolation -e . || {
        "$venv/bin/python" -c "$check_python" all || say "Python.h is missing (to have it: apt install python3-dev)"
        die "could not build virtiova (log: $log)"
    }
    echo "$package" >"$venv/.stamp-package"
fi

if [ "$level" = dev ]; then
    tools=$(fingerprint pyproject.toml)
    if ! fresh dev "$tools"; then
        say "installing the tools for tests and checks"
        "$venv/bin/python" tools/build_backend.py test dev >"$venv/.requires-dev"
        pip_install -r "$venv/.requires-dev" || die "could not install the tools (log: $log)"
        echo "$tools" >"$venv/.stamp-dev"
    fi
    need_lspci
    need_libvirt
    need_seccomp
    need_valgrind
    need_fuzzer
    need_browser
fi

need_qemu
if [ "$level" = dev ]; then
    need_testpmd
    for pair in $other_qemus; do need_other_qemu "${pair%%:*}" "${pair#*:}"; done
    need_newer_qemu
fi
