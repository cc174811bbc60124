"""What the four scripts share: choosing the device, and saving a grid of images."""

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torchvision.utils import save_image


def select_device(cuda, checkpoint=None):
    """Returns the GPU if `cuda` is set and there is one, else the CPU. Warns if it was set in vain.

    Under torchrun, each process joins the process group here and, with `cuda`, takes its own GPU.
    The program ends with one line if there are fewer GPUs than processes, a process is missing, or
    the processes have checkpoints of different epochs."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if cuda and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            sys.exit(f"error: --cuda: this machine has {gpus} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # All steps have the same shapes, so measure once which kernels are fastest. Use TF32 in
        # linear layers, as PyTorch does in convolutions.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif cuda and local_rank == 0:
        print("warning: --cuda: no CUDA GPU is available, using the CPU", file=sys.stderr)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        join(device, len(checkpoint["metrics"]) if checkpoint else 0)
    return device


def join(device, epochs):
    """Joins torchrun's other processes. Ends with one line if one of them ended before joining, or
    has done a different number of epochs."""
    soon = timedelta(seconds=45)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=soon))
        store.set(f"joined {rank}", str(epochs))
        keys = [f"joined {n}" for n in range(world_size)]
        store.wait(keys, soon)
        found = [int(store.get(key)) for key in keys]
    except RuntimeError:
        sys.exit("error: another process has ended, or did not start within 45 seconds")
    if len(set(found)) > 1:
        sys.exit(f"error: different checkpoints, of epochs {found}: copy one to all machines")

    # The timeout is two hours, because the others wait while one process downloads or evaluates.
    # If a process ends, its connections close, and the others fail at once.
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(hours=2),
        device_id=gpu,
    )
    atexit.register(leave)


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def save_grid(images, path, columns=8, value_range=(-1, 1)):
    """Writes images, (N, C, H, W) or a list of (C, H, W), to one picture, row by row.

    `value_range` gives the values of black and white. It is fixed, not the minimum and maximum of
    the images, so that contrast can be compared between pictures."""
    save_image(images, path, nrow=columns, normalize=True, value_range=value_range)
