"""What the four scripts share: choosing the device, and saving a grid of images."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torchvision.utils import save_image


def select_device(cuda):
    """The GPU if `cuda` is set and there is one, else the CPU, with a warning on stderr.

    One of several processes under torchrun (WORLD_SIZE) joins the others here, each on a GPU of its own; with fewer
    GPUs than processes the program ends with one line."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if cuda and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if rank >= gpus:
            sys.exit(f"error: --cuda: {gpus} GPUs here, so --nproc-per-node is at most {gpus}")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        # Shapes never change: look for the fastest kernel once. TF32 in linear layers, as in convolutions.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif cuda and rank == 0:
        print("warning: --cuda: PyTorch finds no CUDA GPU here, using the CPU", file=sys.stderr)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Two hours must outlast what the others wait for: a download, the first process's evaluation.
        gpu = device if device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=gpu)
    return device


def save_grid(images, path, columns=8, value_range=(-1, 1)):
    """Writes images, (N, C, H, W) or a list of (C, H, W), to one picture, row by row.

    `value_range` is what black and white stand for: fixed, not the minimum and maximum of the images, so that contrast
    can be compared between pictures."""
    save_image(images, path, nrow=columns, normalize=True, value_range=value_range)
