"""Deep convolutional GAN: Radford, Metz & Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (2016, arXiv:1511.06434).

    python dcgan.py --epochs 25 --cuda                               MNIST, downloaded to data/
    python dcgan.py --dataset folder --data-dir photos --cuda        your own images, at 64x64
    torchrun --nproc-per-node 8 dcgan.py --cuda                      eight GPUs, --batch-size is that of each
    python dcgan.py --resume runs/dcgan/checkpoint.pt --epochs 30    go on
    python dcgan.py --sample runs/dcgan/checkpoint.pt --num-samples 10000
    python dcgan.py --sample runs/dcgan/checkpoint.pt --interpolate 8

Writes to runs/dcgan: checkpoint.pt, metrics.csv, and samples/epoch_0001.png, ..., the same noise after every epoch.

Measured on MNIST (--bf16 --seed 0, torch 2.15, AMD EPYC with AVX-512 bf16): Fréchet distance to the test set in the
features of tests/benchmark.py's digit classifier 485, 94, 46 and 19.6 after 1, 5, 10 and 25 epochs (two halves of the
test set: 3.2), every digit between 8 and 12 % of 10,000 samples. On two cores 654 images/s at 32x32 and 129 at
64x64, against 308 and 57 of a plain loop in the same process (tests/benchmark.py). Not yet run on a GPU.

Differences from the paper:
1. The depth follows the image size, b * 2**k with b from 4 to 7: start at b x b, k levels of stride 2. At 64 pixels
   those are the paper's four, with figure 1's 1024, 512, 256 and 128 channels at --width 128; the default is half.
2. Kernels are 4x4, not figure 1's 5x5: at stride 2, every output then comes from equally many inputs.
3. z is normal, not uniform: no corners, and the sphere on which slerp() walks is where its mass lies.
4. D ends in a convolution over all that is left, which is the paper's flattening into one output, as a logit.
5. Digits are padded to 32x32, not stretched; two levels at 28x28 end at four times the distance.
6. Grids and samples use BatchNorm's running averages, so that an image does not depend on those beside it.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import shutil
import signal
import socket
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from common import save_grid, select_device

FORMAT = "dcgan 1"  # marks a checkpoint: one of another script, or of another version, is refused
DIGITS = ("mnist", "fashion-mnist", "synthetic")  # one channel, 28x28, padded to the image size
NETWORK = ("dataset", "image_size", "channels", "latent_dim", "width")  # what a checkpoint fixes
METRICS = ("loss_d", "loss_g", "d_real", "d_fake")  # the last two are mean D(x) and D(G(z)), probabilities
IN_MEMORY = 2**32  # bytes of images on the device; a larger folder streams from the disk
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = max(1, min(8, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # per process, to decode images
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says, else one
TERMINAL = sys.stdout is not None and sys.stdout.isatty()  # else no progress is shown within an epoch


def above(low, kind=int, high=2**33):
    def number(text):
        if not low < kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser("dcgan.py", argparse.SUPPRESS)  # no usage, which would go before every error
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=above(0), default=25, metavar="N", help="passes over the training set (%(default)s)")
    add("--batch-size", type=above(0), default=128, metavar="N", help="images per step and process (%(default)s)")
    add("--lr", type=above(0, float, math.inf), default=2e-4, metavar="X", help="learning rate of Adam (%(default)s)")
    add("--seed", type=above(-1), default=0, metavar="N", help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="train on the GPU; under torchrun, each process on its own")
    add("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=(*DIGITS, "cifar10", "folder"), help="default: mnist, or synthetic if offline")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are; with folder, the images")
    add("--image-size", type=above(0), metavar="N", help="4 to 7 times a power of two; default: 32, with folder 64")
    add("--channels", type=int, choices=(1, 3), help="with folder: gray or colour; default: colour")
    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=above(0), default=100, metavar="N", help="size of z (%(default)s)")
    add("--width", type=above(0), default=64, metavar="N", help="channels of the narrowest level (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, metavar="DIR", help="where to write; default: the first free of runs/dcgan, -2, ...")
    add("--resume", type=Path, metavar="CKPT", help="continue from that checkpoint, in its folder")
    add("--sample", type=Path, metavar="CKPT", help="no training: write images from that checkpoint, to its folder")
    add("--num-samples", type=above(0), default=64, metavar="N", help="how many images --sample writes (%(default)s)")
    add("--interpolate", type=above(0), metavar="N", help="with --sample: N walks between two z instead")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    try:
        if args.resume and args.sample or args.interpolate and not args.sample:
            raise ValueError("--interpolate needs --sample, and --sample excludes --resume")
        if path:  # its arguments become the defaults, so that no other flag is needed
            checkpoint = load_checkpoint(path)
            parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
            args = parser.parse_args(argv)
            for name in (*NETWORK, "seed") if args.resume else NETWORK:
                if getattr(args, name) != checkpoint["args"][name]:
                    raise ValueError(f"--{name.replace('_', '-')} is fixed by {path}: leave it out")
        elif args.channels and args.dataset != "folder":
            raise ValueError("--channels is for --dataset folder")
        args.checkpoint, args.data_dir = checkpoint, os.path.abspath(args.data_dir)  # to resume from another folder
        args.channels = args.channels or (3 if args.dataset in ("cifar10", "folder") else 1)
        args.image_size = args.image_size or (64 if args.dataset == "folder" else 32)
        base_and_steps(args.image_size)
        if args.dataset in (None, *DIGITS) and args.image_size < 28:
            raise ValueError("--image-size: digits of 28x28 are padded, never cropped, so 28 or more")
        args.training = not args.sample
        written = args.out_dir and args.out_dir / "checkpoint.pt"
        if args.training and written and written.exists() and not (args.resume and args.resume.samefile(written)):
            raise ValueError(f"{args.out_dir} holds a run: --resume {written}, or choose another --out-dir")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def load_images(args, device):
    """The training set: uint8 (N, channels, image_size, image_size) on the device, or the ImageFiles to stream it from.

    Digits are padded with black, CIFAR-10 is resized. Where no set was named and MNIST cannot be had, warns and sets
    args.dataset to synthetic. Raises OSError if a named set is neither there nor downloadable."""
    if args.dataset == "folder":
        return load_folder(Path(args.data_dir), args.image_size, args.channels, device)
    if args.dataset != "synthetic":
        name = args.dataset or "mnist"
        kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
        socket.setdefaulttimeout(10)  # seconds; torchvision sets none, and a dead network would hang
        try:
            images, args.dataset = torch.as_tensor(kind(args.data_dir, download=True).data), name
        except Exception as error:  # no network, no room, a truncated file: torchvision raises many kinds
            why = " ".join(str(error).split())
            reason = f"{name} is not in {args.data_dir}, or not whole, and its download failed ({why})"
            if args.dataset or RANKS > 1:  # or some of the processes could train on another set
                raise OSError(f"{reason}: put it there, or choose another --data-dir or --dataset") from error
            print(f"warning: {reason}, training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
    if args.dataset == "cifar10":
        return resize(images.permute(0, 3, 1, 2), [args.image_size, args.image_size]).to(device)
    return F.pad(images, [(args.image_size - 28) // 2] * 4).unsqueeze(1).to(device)  # every image size is even


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font, randomly turned, scaled, slanted and moved: uint8 (count, 28, 28)."""
    glyphs = []
    for digit in "0123456789":
        glyphs.append(Image.new("L", (28, 28)))
        ImageDraw.Draw(glyphs[-1]).text((14, 14), digit, 255, ImageFont.load_default(26), anchor="mm")
    random = torch.Generator().manual_seed(seed)
    glyphs = torch.stack([pil_to_tensor(glyph).float() for glyph in glyphs])
    glyphs = glyphs[torch.randint(10, (count,), generator=random)]
    turn, slant, wide, tall, right, down = torch.empty(6, count).uniform_(-1, 1, generator=random)
    wide, tall, sin, cos = 1.1 + 0.2 * wide, 1.1 + 0.15 * tall, torch.sin(turn / 4), torch.cos(turn / 4)
    warp = torch.stack([wide * cos, wide * (slant / 3 - sin), right / 6, tall * sin, tall * cos, down / 6], 1)
    grid = F.affine_grid(warp.view(count, 2, 3), [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False).round().byte().squeeze(1)


class ImageFiles(Dataset):
    """Image files as uint8 (channels, size, size): upright, short side resized to `size`, the centre cropped out.

    For a file that cannot be decoded: a string, its path and the reason."""

    def __init__(self, paths, size, channels):
        self.paths, self.size, self.channels = paths, size, channels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            image = Image.open(self.paths[i])
            image.draft(None, (self.size, self.size))  # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16 bits, which convert() would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = ImageOps.fit(image.convert("RGB" if self.channels == 3 else "L"), (self.size, self.size))
            return pil_to_tensor(image)
        except Exception as error:  # Pillow's decoders raise many kinds
            return f"{self.paths[i]}: {error}"


def stacked(images):
    """What ImageFiles gives for a batch as one tensor, so that workers pass one file on; or the first string in it."""
    return next((image for image in images if isinstance(image, str)), None) or torch.stack(images)


def whole(image):
    """What ImageFiles or stacked() gives; OSError if it is why there is no image."""
    if isinstance(image, str):
        raise OSError(image)
    return image


def load_folder(folder, size, channels, device):
    """All images below `folder`, as in load_images. Decodes each once, and names and leaves out what is no image;
    OSError if nothing is left."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    fits = len(paths) * channels * size**2 <= IN_MEMORY
    images, good = torch.empty(len(paths) if fits else 0, channels, size, size, dtype=torch.uint8), []
    decoded = DataLoader(ImageFiles(paths, size, channels), batch_size=None, num_workers=WORKERS)
    for n, (path, image) in enumerate(zip(paths, decoded), 1):
        if TERMINAL:
            print(f"\rdecoding {n:,} of {len(paths):,} files", end="\n" if n == len(paths) else "", flush=True)
        if isinstance(image, str):
            if RANK == 0:
                print(f"skipped {image}", file=sys.stderr)
            continue
        if fits:
            images[len(good)] = image
        good.append(path)
    if not good:
        raise OSError(f"no image in {folder}: name the folder that holds them with --data-dir")
    return images[: len(good)].to(device) if fits else ImageFiles(good, size, channels)


def batches(images, batch_size, device):
    """One epoch in random order, dealt out to the processes, the last partial batch dropped:
    floats (batch_size, C, H, W) in [-1, 1]."""
    order = torch.randperm(len(images)).to(device)
    if RANKS > 1:
        dist.broadcast(order, 0)
    steps = len(images) // (batch_size * RANKS)
    order = order[: steps * RANKS * batch_size].view(steps, RANKS, batch_size)[:, RANK]
    if isinstance(images, torch.Tensor):
        parts = (images.index_select(0, index) for index in order)
    else:  # a generator of its own, or DataLoader would draw from the one that training draws from
        options = dict(collate_fn=stacked, num_workers=WORKERS, generator=torch.Generator())
        parts = DataLoader(images, batch_sampler=order.tolist(), **options)
        parts = (whole(part).to(device) for part in parts)
    for x in parts:
        yield x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def base_and_steps(image_size):
    """(base, steps) with image_size = base * 2**steps and base from 4 to 7, a number of three bits; else ValueError."""
    steps = max(image_size.bit_length() - 3, 1)
    base = image_size >> steps
    if base < 4 or base << steps != image_size:
        nearest = sorted({max(8, base << steps), max(8, base + 1 << steps)})
        raise ValueError(f"--image-size is 4, 5, 6 or 7 times a power of two: try {' or '.join(map(str, nearest))}")
    return base, steps


class Generator(nn.Sequential):
    """z (B, latent_dim) to images (B, channels, image_size, image_size) in (-1, 1): section 3, figure 1."""

    def __init__(self, image_size, channels, latent_dim, width):
        base, steps = base_and_steps(image_size)
        c = width << (steps - 1)
        levels = [nn.Linear(latent_dim, c * base**2, bias=False), nn.Unflatten(1, (c, base, base))]
        for _ in range(steps - 1):
            levels += [nn.BatchNorm2d(c), nn.ReLU(inplace=True)]  # (B, c, h, h), h = base at first
            levels += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)]  # (B, c/2, 2h, 2h)
            c //= 2
        levels += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.ConvTranspose2d(c, channels, 4, 2, 1), nn.Tanh()]
        super().__init__(*levels)
        self.apply(initialize)


class Discriminator(nn.Sequential):
    """Images (B, channels, image_size, image_size) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, image_size, channels, width):
        base, steps = base_and_steps(image_size)
        c = width
        levels = [nn.Conv2d(channels, c, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]  # (B, c, h, h), h = image_size/2
        for _ in range(steps - 1):
            levels += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False)]  # (B, 2c, h/2, h/2)
            levels += [nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2, inplace=True)]
            c *= 2
        levels += [nn.Conv2d(c, 1, base), nn.Flatten(0)]  # (B, c, base, base) to (B,): all into one output
        super().__init__(*levels)
        self.apply(initialize)


def initialize(module):
    """Section 4: weights from N(0, 0.02). Those of BatchNorm from N(1, 0.02), as in the authors' code; biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: Goodfellow et al. 2014, eq. 1, which D maximizes, with its sign changed."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    return real + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """-E[log D(G(z))]: the non-saturating loss of Goodfellow et al. 2014, section 3."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def parallel(module):
    """`module`, its gradients averaged over torchrun's processes if there are several."""
    if RANKS > 1:
        module = DistributedDataParallel(module)
        module.broadcast_buffers = False  # or a second forward would change BatchNorm's before the backward
    return module


def train(args):
    device = select_device(args.cuda)
    if RANKS > 1:  # torchrun ends all when one fails; the timeout is for a lost machine, and must outlast the decoding
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2), device_id=gpu)
    if RANK:
        dist.barrier()  # the first process downloads, the others find the files
    images = load_images(args, device)
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    steps = len(images) // (args.batch_size * RANKS)
    if steps == 0:
        reason = f"--batch-size: {args.dataset} has {len(images):,} images, too few for a step"
        raise argparse.ArgumentError(None, reason)

    torch.manual_seed(args.seed)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    discriminator = Discriminator(args.image_size, args.channels, args.width)
    generator.to(device, memory_format=torch.channels_last)
    discriminator.to(device, memory_format=torch.channels_last)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_noise = torch.randn(64, args.latent_dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
    for network in (generator, discriminator) if args.compile else ():  # the same random numbers as without it
        network.compile(options={"fallback_random": True, "triton.cudagraphs": device.type == "cuda"})
    ddp_g, ddp_d = parallel(generator), parallel(discriminator)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    parts = dict(generator=generator, discriminator=discriminator, optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    start, seconds, rows = 0, 0.0, []
    if args.checkpoint:
        start, seconds, rows = (args.checkpoint[name] for name in ("epoch", "seconds", "metrics"))
        for name, part in parts.items():
            part.load_state_dict(args.checkpoint[name])
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = args.lr
        torch.set_rng_state(args.checkpoint["rng"])
        if device.type == "cuda" and args.checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(args.checkpoint["cuda_rng"], device)
    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs/dcgan"))
        (args.out_dir / "samples").mkdir(parents=True, exist_ok=True)
    size = f"{args.channels}x{args.image_size}x{args.image_size}"
    print(f"{args.dataset}: {len(images):,} images of {size}, on {device.type}, to {args.out_dir}", flush=True)
    if start >= args.epochs:
        print(f"epoch {start} is done: raise --epochs to go on")

    for epoch in range(start + 1, args.epochs + 1):
        if RANK:  # noise of its own, and the same when resumed; the checkpoint holds the first process's state
            torch.manual_seed(hash((args.seed, epoch, RANK)))
        totals = torch.zeros(len(METRICS), device=device)
        began = shown = time.perf_counter()
        for step, x in enumerate(batches(images, args.batch_size, device), 1):
            if args.compile:  # the last step's CUDA graphs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            # D: descend -log D(x) - log(1 - D(G(z))); real and fake apart, or BatchNorm would mix their statistics
            with autocast:
                fake = ddp_g(torch.randn(args.batch_size, args.latent_dim, device=device))
                real_logits, fake_logits = ddp_d(x).float(), ddp_d(fake.detach()).float()
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            # G: descend -log D(G(z)) through the new D, whose own gradients are not computed
            with autocast:
                logits = discriminator(fake).float()
            loss_g = generator_loss(logits)
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_g.step()

            with torch.no_grad():
                totals += torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()])
            if RANKS > 1 and step == steps:
                dist.all_reduce(totals.div_(RANKS))
            if step == steps or TERMINAL and time.perf_counter() - shown > 0.5:
                means = (totals / step).tolist()  # only here does the CPU wait for the GPU
                shown = time.perf_counter()
                rate = step * args.batch_size * RANKS / (shown - began)
                left = timedelta(seconds=round((shown - began) / step * ((args.epochs - epoch + 1) * steps - step)))
                losses = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(METRICS, means))
                line = f"epoch {epoch}/{args.epochs}  {step}/{steps}  {losses}  {rate:,.0f} images/s  {left} left"
                if TERMINAL:
                    width = shutil.get_terminal_size().columns - 1
                    print(f"\r{line[:width]:{width}}", end="", flush=True)
        weights = sum(p.detach().sum() for p in (*generator.parameters(), *discriminator.parameters()))
        if not all(map(math.isfinite, [*means, weights.item()])):
            raise FloatingPointError(f"losses or weights not finite in epoch {epoch}, which is not saved: lower --lr")
        if RANK:
            continue
        seconds += shown - began
        rows.append([epoch, *means, rate, seconds])
        # The checkpoint comes last: a run killed before it does the whole epoch again, and these files with it.
        save_grid(generate(generator, fixed_noise), args.out_dir / "samples" / f"epoch_{epoch:04d}.png")
        lines = [("epoch", *METRICS, "images_per_second", "seconds"), *rows]
        (args.out_dir / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= dict(format=FORMAT, epoch=epoch, seconds=seconds, metrics=rows, rng=torch.get_rng_state())
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kept = (*NETWORK, "epochs", "batch_size", "lr", "seed", "bf16", "compile", "data_dir")
        checkpoint["args"] = {name: getattr(args, name) for name in kept}
        save_checkpoint(checkpoint, args.out_dir / "checkpoint.pt")
        print(f"\r{line}" if TERMINAL else line, flush=True)
    if RANKS > 1:
        dist.destroy_process_group()


@torch.no_grad()
def generate(generator, z):
    """G(z) with BatchNorm's running averages, which it leaves as they are."""
    generator.eval()
    images = generator.forward(z)  # uncompiled, also with --compile
    generator.train()
    return images


def slerp(a, b, steps):
    """Walks between points a and b, (N, latent_dim): (N, steps, latent_dim), a first and b last.

    Along the great circle (Shoemake 1985): a straight line would pass nearer to 0 than almost any z ever lies."""
    angle = torch.acos(F.cosine_similarity(a, b).clamp(-0.9999, 0.9999))[:, None, None]  # never quite 0 or 180 degrees
    t = torch.linspace(0, 1, steps)[:, None]
    return (torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)


def sample(args):
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    generator.load_state_dict(args.checkpoint["generator"])
    generator.to(device, memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(args.seed)
    if args.interpolate:
        a, b = torch.randn(2, args.interpolate, args.latent_dim, generator=random)
        z, columns, folder = slerp(a, b, 10).flatten(0, 1), 10, first_free(args.out_dir / "interpolation")
    else:
        z = torch.randn(args.num_samples, args.latent_dim, generator=random)
        columns, folder = 8, first_free(args.out_dir / "generated")
    margin = (args.image_size - 28) // 2 if args.dataset in DIGITS else 0  # digits are written without their padding
    grid = []
    for first in range(0, len(z), 500):
        images = generate(generator, z[first : first + 500].to(device)).cpu()
        images = images[:, :, margin : args.image_size - margin, margin : args.image_size - margin]
        for n, image in enumerate(images, first):
            to_pil_image(image.add(1).mul(127.5).round().byte()).save(folder / f"{n:05d}.png")
        grid.extend(images if args.interpolate else images[: max(0, 64 - first)])
    save_grid(grid, folder.with_suffix(".png"), columns)
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def load_checkpoint(path):
    """The dict that train() saved to `path`. ValueError if it is damaged or of another script; runs no code in it."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or checkpoint["format"] != FORMAT:
            raise ValueError
        return checkpoint
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise error if isinstance(error, OSError) else ValueError(f"{path} is damaged, or no checkpoint of this script")


def save_checkpoint(checkpoint, path):
    """Replaces the file at `path` in one step: after a kill or on a full disk it is the old one or the new one."""
    buffer = io.BytesIO()  # not straight to the file, where a full disk is a RuntimeError without a reason
    torch.save(checkpoint, buffer)
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def first_free(path):
    """Makes the first folder of `path`, `path`-2, `path`-3, ... that is not there yet, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        free = path.with_name(f"{path.name}-{n}") if n > 1 else path
        with contextlib.suppress(FileExistsError):  # also where another run was faster
            if not free.with_suffix(".png").exists():  # an earlier --sample's grid
                free.mkdir()
                return free


def main():
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    args = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks and writes for all
        if not args.training:
            return
    try:
        sample(args) if args.sample else train(args)
    except KeyboardInterrupt as interrupt:
        path = args.out_dir and args.out_dir / "checkpoint.pt"
        more = args.training and path and path.exists()
        if RANK == 0:
            print("\nstopped" + f"; go on with --resume {path}" * bool(more), file=sys.stderr)
        sys.exit(128 + interrupt.args[0])
    except (OSError, FloatingPointError, argparse.ArgumentError) as error:  # what train() and sample() raise themselves
        sys.exit(f"dcgan.py: error: {error}")
    except RuntimeError as error:
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"dcgan.py: error: --compile does not work here: {str(error).splitlines()[0]}")
        if any(word in str(error) for word in ("out of memory", "allocate", "ALLOC_FAILED", "overflowed")):
            sys.exit("dcgan.py: error: out of memory: lower --batch-size, --width, --image-size or --latent-dim")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            sys.exit(f"dcgan.py: error: {str(error).splitlines()[0]} (did another process end? --resume goes on)")
        raise


if __name__ == "__main__":
    main()
