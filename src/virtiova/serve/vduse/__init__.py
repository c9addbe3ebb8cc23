# SPDX-License-Identifier: Apache-2.0
"""Devices served to this machine's own kernel: VDUSE, a vDPA device whose data path is a process.

One more kind of front end of `serve.host`: `session` makes the same events of what the kernel says that a vhost-user
session makes of messages, `node` has the device file, `loop` the turns, `server` the device's life.
"""
