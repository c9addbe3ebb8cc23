# SPDX-License-Identifier: Apache-2.0
"""What honouring the IOMMU costs: served devices beside other back ends, driven by one front end in one run."""
