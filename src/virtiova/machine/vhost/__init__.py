# SPDX-License-Identifier: Apache-2.0
"""The back ends of this machine's kernel: ``/dev/vhost-net``, ``/dev/vhost-vsock``; we are their front end."""
