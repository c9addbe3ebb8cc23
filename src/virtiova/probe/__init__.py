# SPDX-License-Identifier: Apache-2.0
"""Experiments, canaries, judging: where did a real device's bytes land?"""
