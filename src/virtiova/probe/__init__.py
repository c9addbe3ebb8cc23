# SPDX-License-Identifier: Apache-2.0
"""Experiments, canaries, judging: where did a real device's bytes land?"""

from virtiova.probe.api import default, model, qemu, vdpa, vfio, vhost, vhost_user
from virtiova.probe.plan import Runner, Task

__all__ = ["Runner", "Task", "default", "model", "qemu", "vdpa", "vfio", "vhost", "vhost_user"]
