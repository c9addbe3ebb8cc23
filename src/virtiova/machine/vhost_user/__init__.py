# SPDX-License-Identifier: Apache-2.0
"""A vhost-user socket as a machine: our own front end, its memory, and the IOMMU that the back end has to ask."""
