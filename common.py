"""What the four scripts share: choosing the device, and saving a grid of images."""

import os
import sys

import torch
from torchvision.utils import save_image

# Large tensors in large pages (Linux; PyTorch reads it at its first allocation): dcgan.py --bf16 at 64x64 is a tenth
# faster on a CPU, other sizes about the same.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def select_device(cuda):
    """The GPU if `cuda` is set and there is one, else the CPU, with a warning on stderr.

    Under torchrun each process takes a GPU of its own; OSError if there are too few."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and torch.cuda.is_available():
        if rank >= torch.cuda.device_count():
            raise OSError(f"--cuda: {torch.cuda.device_count()} GPUs here, so --nproc-per-node is at most that")
        torch.cuda.set_device(rank)
        torch.backends.cudnn.benchmark = True  # shapes never change, so the search for the fastest kernel pays
        return torch.device("cuda", rank)
    if cuda and rank == 0:
        print("warning: --cuda: PyTorch finds no CUDA GPU here, using the CPU", file=sys.stderr)
    return torch.device("cpu")


def save_grid(images, path, columns=8, value_range=(-1, 1)):
    """Writes images, (N, C, H, W) or a list, to one picture, row by row. `value_range` is what black and white stand
    for: fixed, not the minimum and maximum of the images, so that contrast can be compared between pictures."""
    save_image(images, path, nrow=columns, normalize=True, value_range=value_range)
