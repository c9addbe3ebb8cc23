# SPDX-License-Identifier: Apache-2.0
"""Independent tasks, run side by side: in local processes or on a Dask cluster; results stream, and resume."""
