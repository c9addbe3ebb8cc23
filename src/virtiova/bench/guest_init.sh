#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# A guest that reads disks when it is told to: each line from the console is a command of this shell, answered by
# "@ words" lines and by "@ done STATUS".
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

# Make the IOMMU group of /dev/NAME one of TYPE (DMA-FQ: lazy), and say what the disk is: bit 33 (the string of features
# begins with bit 0), and how its group is translated.
disk() {
    d=$(realpath "/sys/block/$1/device")
    group=$(realpath "$d/../iommu_group")
    [ -z "$2" ] || echo "$2" >"$group/type"
    say disk "$1" "$(cut -c34 "$d/features")" "$(cat "$group/type")"
}

# DEPTH readers of 4 KiB at random places of /dev/NAME for SECONDS, each with one request at a time, and without the page
# cache: for each how many requests, and in how many nanoseconds.
readers() {
    rm -f /tmp/r.*
    for n in $(seq "$2"); do
        ioping -D -B -q -i 0 -w "$3" -s 4k -S "$4" -e "$n" "/dev/$1" >"/tmp/r.$n" 2>&1 &
    done
    wait
    cat /tmp/r.* | while read -r _ _ _ _ _ _ _ _ count time rest; do say read "$count" "$time"; done
}

# Complaints of the IOMMU and of the drivers.
complaints() { dmesg | grep -i -E 'DMAR:.*fault|I/O error|blk_update' | head -5 | while read -r l; do say complaint "$l"; done; true; }

say up "$(uname -r)"
say done 0
while read -r line; do
    eval "$line"
    say done $?
done
poweroff -f
