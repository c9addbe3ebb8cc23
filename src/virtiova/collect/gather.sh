#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Gathers what 'virtiova scan' reads of a machine, where there is no Python:
#     sh gather.sh FILE        (or to standard output, if that is no terminal)
# It needs a POSIX shell, tar, gzip, grep, sed, tr, cat, cp, mv, rm, mkdir, readlink, id, date and uname: busybox has
# all of them. It changes nothing. Without root some files cannot be read; which ones is noted.
set -u
umask 077
LC_ALL=C
export LC_ALL
say() { echo "gather: $*" >&2; }
if [ $# -gt 1 ] || { [ $# -eq 0 ] && [ -t 1 ]; }; then
    say "which file is it to be? sh gather.sh box.tar.gz"
    exit 2
fi
out=${1:--}
work=${TMPDIR:-/tmp}/virtiova-gather.$$
# mkdir makes a folder or fails: nobody can have put one there for us.
mkdir "$work" || exit 3
part=
trap 'rm -rf "$work" ${part:+"$part"}' EXIT
trap 'exit 130' HUP INT TERM
mkdir "$work/tree"
: >"$work/links"
: >"$work/.problems"

plain() { # is it a path that can be noted as it is?
    case $1 in
    *[!-+,./0-9:@A-Z_a-z]*) return 1 ;;
    esac
}

problem() { # PATH, and why in .why
    read -r why <"$work/.why" || :
    echo "$1: ${why##*: }" >>"$work/.problems"
}

put() { # TO COMMAND...: its output as a file of the box
    to=$work/$1
    shift
    [ -d "${to%/*}" ] || mkdir -p "${to%/*}"
    "$@" >"$to" 2>"$work/.why"
}

at() { # FOLDER: noted; is it there?
    [ -d "$1" ] && plain "$1" || return 1
    if [ -h "$1" ]; then
        link "$1"
    elif [ ! -d "$work/tree$1" ]; then
        mkdir -p "$work/tree$1"
    fi
}

get() { # FILE...: as far as they are there. Their sizes are wrong in sysfs: only reading tells.
    for file in "$@"; do
        [ -f "$file" ] && plain "$file" || continue
        if ! put "tree$file" cat "$file"; then
            rm -f "$work/tree$file"
            problem "$file"
        fi
    done
}

link() { # PATH...: where they lead
    for path in "$@"; do
        [ -h "$path" ] && plain "$path" || continue
        target=$(readlink "$path") && plain "$target" && printf '%s\t%s\n' "$path" "$target" >>"$work/links"
    done
}

words() { # FILE: a command line without passwords; its words end with NUL
    tr '\n\000' ' \n' <"$1" | sed -E @WORDS@ | tr '\n' '\000'
}

process() { # KIND PID
    put "$1/$2.cmdline" words "/proc/$2/cmdline"
    [ -s "$work/$1/$2.cmdline" ] || rm -f "$work/$1/$2.cmdline"
}

@ROWS@

[ -r @CPU@ ] && put tree@CPU@ sed '/^$/q' @CPU@
[ -r @IOMEM@ ] && { put tree@IOMEM@ grep -E @LINES@ @IOMEM@ || rm -f "$work/tree@IOMEM@"; }
[ -d /sys/kernel/debug ] && [ ! -r /sys/kernel/debug ] && echo "/sys/kernel/debug: Permission denied" >>"$work/.problems"
[ -r @OPTIONS@ ] && put tree@OPTIONS@ sed -E @KERNEL@ @OPTIONS@

for p in /proc/[0-9]*; do
    { read -r comm <"$p/comm"; } 2>/dev/null || continue
    case $comm in
    @HYPERVISORS@) process qemu "${p#/proc/}" ;;
    @BACKENDS@) process backend "${p#/proc/}" ;;
    esac
done

for xml in @XML@; do
    [ -f "$xml" ] && plain "$xml" || continue
    if ! put "libvirt$xml" sed -E @XMLRULES@ "$xml"; then
        rm -f "$work/libvirt$xml"
        problem "$xml"
    fi
done

mkdir "$work/log"
if dmesg >"$work/.dmesg" 2>"$work/.why"; then
    grep -iE @DMESG@ "$work/.dmesg" | sed -E @KERNEL@ >"$work/log/dmesg"
else
    problem /dev/kmsg
fi
[ -s "$work/log/dmesg" ] || rm -rf "$work/log"

string() { printf '%s' "$1" | tr -d '\000-\037\177' | sed 's/[\\"]/\\&/g'; }
kernel=$(uname -r)
machine=$(uname -m)
root=false
[ "$(id -u 2>/dev/null)" = 0 ] && root=true
host=
[ -r /proc/sys/kernel/hostname ] && read -r host </proc/sys/kernel/hostname
{
    echo '{"schema": "@SCHEMA@", "by": "gather.sh",'
    echo " \"host\": \"$(string "$host")\", \"kernel\": \"$(string "$kernel")\", \"machine\": \"$(string "$machine")\","
    echo " \"time\": \"$(date -u +%Y-%m-%dT%H:%M:%SZ)\", \"root\": $root,"
    echo ' "problems": ['
    tr -d '\000-\011\013-\037\177' <"$work/.problems" | sed 's/[\\"]/\\&/g; s/^/  "/; s/$/"/; $!s/$/,/'
    echo ' ]}'
} >"$work/@HEADER@"

# The header first, and nothing but what is ours.
set -- @HEADER@ links tree
for kind in qemu backend libvirt log; do
    [ -d "$work/$kind" ] && set -- "$@" "$kind"
done
tar -C "$work" -cf "$work/.tar" "$@" && gzip -6 <"$work/.tar" >"$work/.packed" || exit 3
if [ "$out" = - ]; then
    cat "$work/.packed" || exit 3
elif [ -e "$out" ] && [ ! -f "$out" ]; then
    cat "$work/.packed" >"$out" || exit 3
else
    part=$out.$$.part
    cp "$work/.packed" "$part" && mv "$part" "$out" || exit 3
    part=
fi
[ "$out" = - ] || while read -r line; do say "could not read $line"; done <"$work/.problems"
