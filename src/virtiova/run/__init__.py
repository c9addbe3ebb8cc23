# SPDX-License-Identifier: Apache-2.0
"""Independent tasks, run side by side: threads, local processes, or a Dask cluster; results stream, and resume."""
