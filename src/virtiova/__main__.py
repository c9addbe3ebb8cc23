# SPDX-License-Identifier: Apache-2.0
"""``python -m virtiova``."""

from virtiova.cli.main import entry

entry()
