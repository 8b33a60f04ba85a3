# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Other layouts of an INT8 checkpoint of AMD Quark, its numbers bit for bit, without vLLM, torch or a GPU.

One direction: plan → layouts → compressed → write → conversion → command. Only `write` writes.
"""
