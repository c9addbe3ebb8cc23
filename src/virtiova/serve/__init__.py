# SPDX-License-Identifier: Apache-2.0
"""Devices served over vhost-user: back ends that honour the IOMMU."""

from virtiova.serve.server import serve as serve
