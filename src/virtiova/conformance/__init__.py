# SPDX-License-Identifier: Apache-2.0
"""Conformance cases: what a vhost-user back end has to do behind an IOMMU, each put to a real one as a question."""
