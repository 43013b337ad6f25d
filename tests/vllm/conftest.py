"""Tests of the serving plugin on single vLLM Linears, run in the environment that serves:

.venvs/serve/bin/python -m pytest tests/vllm

Where vLLM is not installed, nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # or W4A16 rounds activations where the CPU has AMX

_found = find_spec("vllm")
if _found is None or _found.origin is None:  # this folder itself, where `tests` is on the path
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True, scope="session")
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Linears ask vLLM for their rank: this process is the only one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{tmp_path_factory.mktemp('ranks')}/init",
            backend="gloo",
        )
        initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()
