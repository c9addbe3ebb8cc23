#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Mounts the host's files read-only and starts its Python as process 1, with /dev/ttyS1 as standard input and output.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
dmesg -n 1
while read -r m; do
    insmod "/modules/$m.ko" 2>/dev/null || echo "insmod $m failed"
done </modules/order
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose hostroot /newroot || { echo "no 9p"; sleep 2; poweroff -f; }
for each in proc sys dev; do mount --move /$each /newroot/$each; done
mount -t tmpfs tmpfs /newroot/run
mkdir -p /newroot/dev/shm && mount -t tmpfs tmpfs /newroot/dev/shm
mount -t tracefs tracefs /newroot/sys/kernel/tracing 2>/dev/null
mount -t debugfs debugfs /newroot/sys/kernel/debug 2>/dev/null
value() { sed -n "s/.*virtiova\.$1=\([^ ]*\).*/\1/p" /newroot/proc/cmdline; }
stty -F /newroot/dev/ttyS1 raw -echo 2>/dev/null
python=$(value python) path=$(value path) module=$(value module) words=$(value words | tr ',' ' ')
export PYTHONPATH="$path" PYTHONDONTWRITEBYTECODE=1 HOME=/run TMPDIR=/run PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
# shellcheck disable=SC2086 # words are several
exec switch_root /newroot "$python" -m "$module" $words </newroot/dev/ttyS1 >/newroot/dev/ttyS1 2>/newroot/dev/ttyS0
