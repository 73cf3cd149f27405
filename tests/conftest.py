"""Triton's kernels run in its interpreter where there is no GPU; it reads this before the first kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
