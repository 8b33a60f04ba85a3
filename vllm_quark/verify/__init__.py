# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Whether the vLLM of this Python, on this machine, computes what an INT8 checkpoint of AMD Quark says.

One direction: layers, tensors → emulate → build → measure → report, command. `build` alone imports vllm.
"""
