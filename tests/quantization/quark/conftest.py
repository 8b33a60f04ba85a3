# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import logging

import pytest
import torch

from vllm.plugins import load_general_plugins

from .utils import vllm_environment

# As engines do: the native operators may come with one.
load_general_plugins()


@pytest.fixture
def caplog_vllm(caplog):
    """The caplog fixture for vLLM's logger, which does not propagate."""
    logger = logging.getLogger("vllm")
    old = logger.propagate
    logger.propagate = True
    try:
        with caplog.at_level(logging.INFO, logger="vllm"):
            yield caplog
    finally:
        logger.propagate = old


@pytest.fixture(scope="module")
def one_environment():
    with vllm_environment() as config:
        yield config


@pytest.fixture
def layer_environment(one_environment):
    """One environment for all tests of a module; default dtype, device and what
    tests change in its config are restored."""
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        yield one_environment
    one_environment.quant_config = None
    one_environment.load_config.load_format = "auto"
    one_environment.parallel_config.enable_expert_parallel = False
