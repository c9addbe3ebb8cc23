# SPDX-License-Identifier: Apache-2.0
"""Facts in, allowed paths and the chain of reasons out: the patch's rule, as pure functions."""
