"""Triton's kernels run in its interpreter where there is no GPU; it reads this before the first kernel is defined."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_is_left() -> Iterator[None]:
    """A file that joins a process group in this process leaves none to the next, whose children would inherit it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
