"""One thread a process: the tests' matrices are small, and run in several processes at once."""

import torch

torch.set_num_threads(1)
