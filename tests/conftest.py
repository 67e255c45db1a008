"""One Hypothesis profile: the same cases on every run, their number set by ``LAWS_EXAMPLES``."""

import os

import torch
from hypothesis import settings

settings.register_profile(
    "laws",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=int(os.environ.get("LAWS_EXAMPLES", "20")),
)
settings.load_profile("laws")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, and are tested there
torch.set_num_threads(1)  # the tests run side by side
