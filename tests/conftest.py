"""Every test computes with one thread in its own process: on models this small, threads cost more than they give."""

import torch

torch.set_num_threads(1)
