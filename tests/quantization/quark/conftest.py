# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import logging

import pytest


@pytest.fixture
def caplog_vllm(caplog):
    """caplog for vLLM's logger, which does not propagate."""
    logger = logging.getLogger("vllm")
    old = logger.propagate
    logger.propagate = True
    try:
        with caplog.at_level(logging.INFO, logger="vllm"):
            yield caplog
    finally:
        logger.propagate = old
