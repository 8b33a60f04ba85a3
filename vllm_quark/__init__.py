# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Structural patches for vLLM: know a tree, patch it, format it for git.

Modules run one way: patches -> series -> edit -> tree -> (commits, release, shadow) -> cli.
"""
