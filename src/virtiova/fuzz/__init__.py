# SPDX-License-Identifier: Apache-2.0
"""Fuzzing a vhost-user back end: messages, rings and IOTLB traffic from a seed, and what they bring out."""

from virtiova.fuzz.findings import Finding
from virtiova.fuzz.play import Player
from virtiova.fuzz.script import replay

__all__ = ["Finding", "Player", "replay"]
