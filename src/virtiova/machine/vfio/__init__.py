# SPDX-License-Identifier: Apache-2.0
"""A physical device behind the physical IOMMU, as the kernel's VFIO gives it to user space."""
