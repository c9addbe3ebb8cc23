#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# A guest that does what it is told over its console: each line is a command of this shell, answered by "@ words" lines
# and by "@ done STATUS".
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
dmesg -n 1
stty -echo </dev/console

say() { echo "@ $*"; }

while read -r m; do
    insmod "/modules/$m.ko" || say "insmod $m failed"
done </modules/order

# Wait up to five seconds for a file.
await() {
    i=0
    while [ ! -e "$1" ]; do
        i=$((i + 1))
        [ $i -lt 50 ] || return 1
        sleep 0.1
    done
}

# What each virtio device is, whether bit 33 was accepted (the string of features begins with bit 0), and its group.
devices() {
    for d in /sys/bus/virtio/devices/*; do
        parent=$(dirname "$(realpath "$d")")
        type=none
        [ -e "$parent/iommu_group/type" ] && type=$(cat "$parent/iommu_group/type")
        say device "$(cat "$d/device")" "$(cut -c34 "$d/features")" "$type"
    done
}

# MD5 of the whole disk, or of COUNT blocks of 64 KiB from the block SKIP on, read without the page cache.
md5() { await /dev/vda && say md5 "$(dd if=/dev/vda bs=65536 skip="${1:-0}" ${2:+count=$2} iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1)"; }

# Write COUNT blocks that say WORD at the block SEEK, and make them stable.
put() {
    yes "$3" | dd bs=65536 count="$2" iflag=fullblock 2>/dev/null >/tmp/put
    dd if=/tmp/put of=/dev/vda bs=65536 seek="$1" oflag=direct conv=notrunc,fsync 2>/dev/null || return
    say put "$(md5sum </tmp/put | cut -d' ' -f1)"
}

# Write 128 KiB at block 32 * N of 4 KiB, each of ROUNDS times something else, in requests of 4 KiB; read each back.
writer() {
    for round in $(seq "$2"); do
        yes "writer $1 round $round" | dd bs=4096 count=32 iflag=fullblock 2>/dev/null >"/tmp/w$1"
        dd if="/tmp/w$1" of=/dev/vda bs=4096 seek=$((32 * $1)) oflag=direct conv=notrunc 2>/dev/null || return
        dd if=/dev/vda bs=4096 skip=$((32 * $1)) count=32 iflag=direct 2>/dev/null | cmp - "/tmp/w$1" || return
    done
    echo "$round" >"/tmp/wrote$1"
}

# Two pieces from the entropy device.
rng() {
    await /dev/hwrng && say rng "$(cat /sys/class/misc/hw_random/rng_current)"
    for _ in 1 2; do say random "$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | md5sum | cut -d' ' -f1)"; done
}

net() { ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0; }

# COUNT echo requests of SIZE bytes; how many were answered.
echoes() { say echoes "$(ping -q -c "$1" -s "$2" -W 2 -i 0.1 10.0.2.2 | sed -n 's/.*transmitted, \([0-9]*\) packets received.*/\1/p')"; }

# Complaints of the IOMMU and of the drivers.
complaints() { dmesg | grep -i -E 'DMAR:.*fault|virtio.*(fail|error)|I/O error|blk_update' | head -5 | while read -r l; do say complaint "$l"; done; true; }

say up "$(cut -d' ' -f1 /proc/uptime)" "$(uname -r)"
say done 0
while read -r line; do
    eval "$line"
    say done $?
done
poweroff -f
