#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# What the guest knows of its virtio devices, one fact a line: "@virtiova KEY VALUE" between "begin" and "end".
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
dmesg -n 1

say() { echo "@virtiova $*"; }

echo
say begin 1
say up "$(cut -d' ' -f1 /proc/uptime)"
say kernel "$(uname -r) $(uname -m)"

# Count calls of the DMA API for each device: a device's name is the first word of its first member.
t=/sys/kernel/tracing
counting=no
if [ -e $t/kprobe_events ]; then
    # How a first argument is called; not every kernel knows the first name.
    for arg in '$arg1' %di %x0 %gpr3 %r2; do
        probe() { echo "p:v/$1 $2 dev=+0(+0($arg)):string" >>$t/kprobe_events; }
        if { probe map dma_map_page_attrs && probe alloc dma_alloc_attrs; } 2>/dev/null; then
            for f in xen_swiotlb_map_page s390_dma_map_pages; do probe "$f" "$f" 2>/dev/null; done
            echo 1 >$t/events/v/enable && counting=yes
            break
        fi
    done
fi
say counting $counting

while read -r m; do
    insmod "/modules/$m.ko" 2>/dev/null
done </modules/order

# The devices are there when their drivers are bound; that takes a moment after the last module.
want=$(sed -n 's/.*virtiova.disks=\([0-9]*\).*/\1/p' /proc/cmdline)
i=0
while [ $i -lt 50 ]; do
    n=0
    for b in /sys/block/vd*; do [ -e "$b/serial" ] && n=$((n + 1)); done
    [ "$n" -ge "${want:-1}" ] && break
    i=$((i + 1))
    sleep 0.1
done

for b in /sys/block/vd*; do
    [ -e "$b/serial" ] || continue
    name=$(basename "$b")
    id=$(cat "$b/serial")
    virtio=$(realpath "$b/device")
    parent=$(dirname "$virtio")
    [ -d "$parent/iommu_group" ] || [ -e "$parent/dma_mask_bits" ] || [ -e "$parent/driver" ] || parent=$virtio
    dev=$(basename "$parent")
    say disk "$id" "sha256=$(dd if=/dev/$name bs=4096 count=16 2>/dev/null | sha256sum | cut -d' ' -f1)"
    say disk "$id" "dev=$dev"
    say disk "$id" "features=$(cat "$virtio/features")"
    say disk "$id" "status=$(cat "$virtio/status")"
    if [ -e "$parent/iommu_group" ]; then
        group=$(realpath "$parent/iommu_group")
        say disk "$id" "group=$(basename "$group")"
        say disk "$id" "group_type=$(cat "$group/type" 2>/dev/null)"
    fi
    if [ $counting = yes ]; then
        say disk "$id" "dma_map=$(grep -c " map: .*dev=\"$dev\"" $t/trace)"
        say disk "$id" "dma_alloc=$(grep -c " alloc: .*dev=\"$dev\"" $t/trace)"
        for f in xen_swiotlb_map_page s390_dma_map_pages; do
            [ -d $t/events/v/$f ] && say disk "$id" "$f=$(grep -c " $f: .*dev=\"$dev\"" $t/trace)"
        done
    fi
done
say iommus "$(ls /sys/class/iommu 2>/dev/null | tr '\n' ' ')"
say groups "$(ls /sys/kernel/iommu_groups 2>/dev/null | wc -l)"
say hypervisor "$(cat /sys/hypervisor/type 2>/dev/null)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
# The end of the kernel's own page numbers: in a Xen domain they are not the machine's.
say pages_end_kib "$(awk '$1 == "spanned" { n = $2 } $1 == "start_pfn:" && n + $2 > m { m = n + $2 } END { print m * '"$(($(getconf PAGESIZE 2>/dev/null || echo 4096) / 1024))"' }' /proc/zoneinfo)"
# What a system without Python sends elsewhere, as text.
if [ -e /gather.sh ]; then
    mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
    say gathering "$(cut -d' ' -f1 /proc/uptime)"
    sh /gather.sh /tmp/box 2>&1
    say gathered "$(cut -d' ' -f1 /proc/uptime)"
    base64 /tmp/box | sed 's/^/@box /'
    say box "$(sha256sum </tmp/box | cut -d' ' -f1)"
fi
say end "$(cut -d' ' -f1 /proc/uptime)"

if grep -q virtiova.shell /proc/cmdline; then
    echo "A shell in the guest; 'poweroff -f' ends it."
    setsid cttyhack sh
    poweroff -f
fi
while :; do sleep 60; done
