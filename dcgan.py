"""Deep convolutional GAN: Radford, Metz & Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (2016, arXiv:1511.06434).

    python dcgan.py --epochs 25 --cuda                               MNIST, downloaded to data/
    python dcgan.py --dataset folder --data-dir photos --cuda        your own images, at 64x64
    torchrun --nproc-per-node 8 dcgan.py --cuda                      eight GPUs, --batch-size is that of each
    python dcgan.py --resume runs/dcgan/checkpoint.pt --epochs 30    go on
    python dcgan.py --sample runs/dcgan/checkpoint.pt --num-samples 10000
    python dcgan.py --sample runs/dcgan/checkpoint.pt --interpolate 8

Writes to runs/dcgan: checkpoint.pt, metrics.csv, samples/real.png of the training set, and samples/epoch_0001.png, ..., the
same noise after every epoch.

Differences from the paper:
1. The depth follows the image size, b * 2**k with b from 4 to 7: start at b x b, k levels of stride 2, channels doubling
   to at most 16 times --width. At 64 pixels and --width 128 those are figure 1's: 1024, 512, 256, 128.
2. Kernels are 4x4, not figure 1's 5x5: at stride 2, every output then comes from equally many inputs.
3. z ~ N(0, I), not uniform: of it the points of a walk (--interpolate) are drawn, too.
4. D ends in a convolution over all that is left, which is the paper's flattening into one output, as a logit.
5. Digits are padded to 32x32, not stretched, and written back at 28x28.
6. Grids and samples use BatchNorm's running averages, so that an image does not depend on those beside it.
"""

import argparse
import csv
import glob
import itertools
import json
import math
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and its checkpoints
RANK = int(os.environ.get("RANK", 0))  # which of torchrun's processes this is
RANKS = int(os.environ.get("WORLD_SIZE", 1))  # and of how many
DIGITS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}  # gray, 28x28
DATASETS = {**DIGITS, "cifar10": datasets.CIFAR10}


def base_and_channels(image_size, width):
    """The side of the smallest map, found by halving, and the channels of the levels above it, the narrowest first."""
    base, channels = image_size, []
    while base > 7 and base % 2 == 0:
        base //= 2
        channels.append(width * min(2 ** len(channels), 16))
    return base, channels


class Generator(nn.Sequential):
    """z (B, latent_dim) to images (B, channels, image_size, image_size) in (-1, 1): section 3, figure 1."""

    def __init__(self, image_size, channels, latent_dim, width):
        base, widths = base_and_channels(image_size, width)
        c = widths[-1]
        layers = [nn.Linear(latent_dim, c * base**2, bias=False)]
        layers += [nn.Unflatten(1, (c, base, base))]
        for before, after in itertools.pairwise(widths[::-1]):
            # (B, before, h, h) to (B, after, 2h, 2h)
            layers += [
                nn.BatchNorm2d(before),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
            ]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())
        initialize(self)


class Discriminator(nn.Sequential):
    """Images (B, channels, image_size, image_size) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, image_size, channels, width):
        base, widths = base_and_channels(image_size, width)
        # No BatchNorm here, nor on G's output: section 3.
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for before, after in itertools.pairwise(widths):
            # (B, before, h, h) to (B, after, h/2, h/2)
            layers += [
                nn.Conv2d(before, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        # (B, c, base, base) to (B,)
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, base), nn.Flatten(0))
        initialize(self)


def initialize(network):
    """Section 4: weights from N(0, 0.02). Those of BatchNorm from N(1, 0.02), as in the authors' code; biases 0."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            mean = 1.0 if p.ndim == 1 else 0.0  # a norm's weights are a vector
            nn.init.normal_(p, mean, 0.02)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: Goodfellow et al. 2014, eq. 1, which D maximizes, with its sign changed.

    softplus(l) = log(1 + exp(l)), so with D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """-E[log D(G(z))]: the non-saturating loss of Goodfellow et al. 2014, section 3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    # Under torchrun each process has its share of the images, and all make the same number of steps.
    device = select_device(args.cuda)
    images = load_images(args)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    batch = args.batch_size * RANKS  # images for a step, in all processes
    steps = fewest(len(images) * RANKS // batch, device)

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    discriminator = Discriminator(args.image_size, args.channels, args.width)
    networks = nn.ModuleList([generator, discriminator])
    networks.to(device, memory_format=torch.channels_last)
    adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        for network in networks:
            network.compile()

    # Go on where the checkpoint stopped, with --lr as it is now, and Adam's other settings as saved.
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": optimizer_g,
        "optimizer_d": optimizer_d,
    }
    rows = []  # of metrics, one for each epoch done
    if checkpoint:
        rows = checkpoint["metrics"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = args.lr

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        samples = args.out_dir / "samples"
        make_folder(samples)
        save_grid(next(batches(images, 64, device)), samples / "real.png")
    print(f"{len(images):,} images of {args.dataset}, on {device.type}, to {args.out_dir}")
    for network in networks:
        count = sum(p.numel() for p in network.parameters())
        print(f"{type(network).__name__}: {count:,} parameters", flush=True)

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process, the same in every run: a resumed one draws what an
        # uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        # The steps' metrics are added up (as a Counter's update() does) on the device: reading one waits.
        sums = Counter()
        began = shown = time.perf_counter()
        for step, x in zip(range(1, steps + 1), batches(images, args.batch_size, device)):
            # D: descend -log D(x) - log(1 - D(G(z))). The step is not G's: fake is detached. Real and
            # fake go through D apart, or its BatchNorm would mix their statistics.
            z = torch.randn(args.batch_size, args.latent_dim, device=device)
            with autocast:
                fake = generator(z)
                real_logits = discriminator(x).float()
                fake_logits = discriminator(fake.detach()).float()
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            average_gradients(discriminator)
            optimizer_d.step()

            # G: descend -log D(G(z)) through the new D, without D's gradients.
            with autocast:
                logits = discriminator(fake).float()
            loss_g = generator_loss(logits)
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            average_gradients(generator)
            optimizer_g.step()

            with torch.no_grad():
                d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
                sums.update(loss_d=loss_d, loss_g=loss_g, d_real=d_real, d_fake=d_fake)
            if step < steps and time.perf_counter() - shown > PAUSE:
                show(summary(sums, step, batch, began, rows), args, step / steps)
                shown = time.perf_counter()

        row = summary(sums, steps, batch, began, rows)
        if not all(p.isfinite().all() for p in networks.parameters()):
            fail(f"weights not finite in epoch {epoch}, not saved: lower --lr")
        rows.append(row)
        if RANK == 0:
            # The checkpoint comes last: a run killed before it repeats the epoch, and these files.
            save_grid(generate(generator, fixed_noise), samples / f"epoch_{epoch:04d}.png")
            save(parts, rows, args)
            show(row, args)

    print(f"{len(rows)} epochs done, more by --resume {args.out_dir} --epochs N")
    if RANKS > 1:
        dist.destroy_process_group()


def average_gradients(network):
    """Replaces the gradients by their means over torchrun's processes, so that all make the same step."""
    if RANKS > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad.div_(RANKS))


@torch.no_grad()
def generate(generator, z):
    """G(z) by BatchNorm's running averages, which it leaves as they are."""
    generator.eval()
    images = generator.forward(z)  # not compiled anew for these modes and sizes
    generator.train()
    return images


def sample(args, checkpoint):
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    generator.load_state_dict(checkpoint["generator"])
    generator.to(device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    if args.interpolate:
        name, z = "interpolation", walks(args.interpolate, args.latent_dim)
    else:
        name, z = "generated", torch.randn(args.num_samples, args.latent_dim)
    images = torch.cat([generate(generator, part.to(device)).cpu() for part in z.split(500)])
    if args.dataset in ("synthetic", *DIGITS):  # without their padding
        images = center_crop(images, [28, 28])
    folder = first_free(args.out_dir / name)
    for n, image in enumerate(images):
        to_pil_image(image.add(1).mul(127.5).round().byte()).save(folder / f"{n:05d}.png")
    save_grid(images[:64], folder.with_suffix(".png"))
    print(f"{len(images):,} images in {folder}, a grid in {folder}.png")


def walks(count, latent_dim):
    """z (8 * count, latent_dim): `count` walks, each eight points from a draw a to a draw b. As cos^2 + sin^2 = 1, all are from
    N(0, I), as a and b are; those of a straight line would be nearer to 0."""
    a, b = torch.randn(2, count, 1, latent_dim)
    t = torch.linspace(0, math.pi / 2, 8)[:, None]
    return (t.cos() * a + t.sin() * b).flatten(0, 1)


DOWNLOAD_ERRORS = (OSError, RuntimeError, LookupError, ValueError, AssertionError, EOFError)
DOWNLOAD_ERRORS += (HTTPException,)


def load_images(args):
    """This process's share of the training set: uint8 (N, channels, image_size, image_size).

    Digits are padded with black, CIFAR-10 is resized. Where no set was named and MNIST cannot be had, warns and sets
    args.dataset to synthetic."""
    if args.dataset == "folder":
        paths = list_files(Path(args.data_dir))[RANK::RANKS]
        read = partial(read_image, channels=args.channels, size=args.image_size)
        return decode(read, paths, (args.channels, args.image_size, args.image_size))
    named = args.dataset
    args.dataset = named or "mnist"
    source = DATASETS.get(args.dataset)
    if source and RANK == 0:
        socket.setdefaulttimeout(10)  # seconds: a dead network would hang
        try:
            source(args.data_dir, download=True)
        except DOWNLOAD_ERRORS as error:
            site = source.mirrors if args.dataset in DIGITS else source.url
            reason = f"no {args.dataset} in {args.data_dir}, nor at {site} ({error!r})"
            # A named set is never replaced, and several processes must not find different ones.
            if named or RANKS > 1:
                fail(f"{reason}: put it there, or choose another --data-dir")
            print(f"warning: {reason}: training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if RANKS > 1:
        dist.barrier()  # the first process has downloaded, the others find the files
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
    else:
        images = source(args.data_dir).data
    images = torch.as_tensor(images[RANK::RANKS])
    if args.dataset == "cifar10":
        return resize(images.permute(0, 3, 1, 2), [args.image_size, args.image_size])
    margin = (args.image_size - 28) // 2  # every image size is even
    return F.pad(images, (margin,) * 4).unsqueeze(1)


def list_files(folder):
    """The paths of all files below `folder`, in order, without hidden ones."""
    names = sorted(glob.glob("**", root_dir=folder, recursive=True))
    return [folder / name for name in names if (folder / name).is_file()]


def decode(read, paths, shape):
    """read(path) of all paths, in order: uint8 (N, *shape), in a file of TMPDIR that is mapped into memory. A path for
    which it raises BadImage is named and left out."""
    size = len(paths) * math.prod(shape) * RANKS
    folder = tempfile.gettempdir()
    if size > shutil.disk_usage(folder).free:  # asked, as a full disk would kill the process
        fail(f"{folder} has no room for {size:,} bytes of images: set TMPDIR")
    # One image more, as an empty file cannot be mapped.
    images = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=(len(paths) + 1, *shape))
    count = 0
    pool = ThreadPool()
    results = pool.imap(read, paths)
    try:
        for _ in paths:
            try:
                images[count] = next(results)
                count += 1
            except BadImage as error:
                print(f"skipped {error}", file=sys.stderr)
    finally:  # after Ctrl-C, too: a thread still within torch at the program's end aborts it
        pool.terminate()
        pool.join()
    if count == 0:
        fail(f"none of {len(paths):,} files could be used: is --data-dir the right folder?")
    return torch.from_numpy(images[:count])


class BadImage(Exception):
    """A file that Pillow cannot read."""


PILLOW_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
PILLOW_ERRORS += (struct.error,)  # of a damaged EXIF part


def read_image(path, channels, size):
    """uint8 (channels, size, size): upright, the short side resized to `size`, the middle cut out. Raises BadImage."""
    try:
        image = Image.open(path)
        image.draft(None, (size, size))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
    except PILLOW_ERRORS as error:
        raise BadImage(f"{path}: {error}") from error
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (size, size))
    return pil_to_tensor(image).numpy()


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font under random affine maps: uint8 (count, 28, 28)."""
    glyphs = torch.zeros(10, 1, 28, 28)
    for digit in range(10):
        image = Image.new("L", (28, 28))
        font = ImageFont.load_default(26)
        ImageDraw.Draw(image).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = pil_to_tensor(image)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    # The identity, each entry off by up to a quarter.
    maps = torch.eye(2, 3) + torch.empty(count, 2, 3).uniform_(-0.25, 0.25, generator=random)
    grid = F.affine_grid(maps, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs[labels], grid, align_corners=False).byte().squeeze(1)


def batches(images, batch_size, device):
    """One epoch in random order: floats (batch_size, C, H, W) in [-1, 1], the last batch perhaps of fewer."""
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        x = images.index_select(0, index).to(device).float().div(127.5).sub(1)
        yield x.contiguous(memory_format=torch.channels_last)


def fewest(steps, device):
    """The number of steps that all processes can make; the program ends if one has too few images for any."""
    steps = torch.tensor(steps, device=device)
    if RANKS > 1:
        dist.all_reduce(steps, dist.ReduceOp.MIN)
    if steps == 0:
        fail("too few images for a step: lower --batch-size")
    return steps.item()


TERMINAL = sys.stdout.isatty()
PAUSE = 0.5 if TERMINAL else 60  # seconds between lines of progress within an epoch


def summary(sums, step, batch, began, rows):
    """The row of metrics after `step` steps, of `batch` images each: their means, images per second, and the run's seconds."""
    row = {"epoch": len(rows) + 1}
    row |= {name: total.item() / step for name, total in sums.items()}  # waits for the GPU
    seconds = time.perf_counter() - began
    before = rows[-1]["seconds"] if rows else 0
    return {**row, "images_per_second": step * batch / seconds, "seconds": before + seconds}


def show(row, args, part=1):
    """Prints the metrics after a part of the epoch, and the time left at the run's mean rate."""
    numbers = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
    left = row["seconds"] * (args.epochs / (row["epoch"] - 1 + part) - 1) / 60
    line = f"{left:.1f} min left, {part:.0%} of {numbers}"
    if TERMINAL and part < 1:  # ?7l cuts it off at the edge, K erases what stands there
        print(f"\033[?7l{line}\033[K\033[?7h", end="\r", flush=True)
    else:
        print(f"\033[K{line}" if TERMINAL else line, flush=True)


def save(parts, rows, args):
    """Writes metrics.csv. Every --save-every or --keep-every epochs, and after the last one, replaces checkpoint.pt in one
    step, too: after a kill or on a full disk it is the old one or the new one."""
    with open(args.out_dir / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, rows[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    epoch = len(rows)
    keep = args.keep_every and epoch % args.keep_every == 0
    if not keep and epoch % args.save_every and epoch != args.epochs:
        return
    flags = {name: value for name, value in vars(args).items() if name not in ONE_COMMAND}
    # Plain values, whatever a new flag or metric is: load_checkpoint() takes no others.
    checkpoint = {"script": NAME, "torch": torch.__version__, "args": flags, "metrics": rows}
    checkpoint = json.loads(json.dumps(checkpoint, default=str))
    for name, part in parts.items():
        checkpoint[name] = part.state_dict()
    with open(args.out_dir / "checkpoint.part", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if keep:
        shutil.copy(file.name, args.out_dir / f"checkpoint_{epoch:04d}.pt")
    os.replace(file.name, args.out_dir / "checkpoint.pt")


def load_checkpoint(path):
    """What save() wrote to `path`. Runs no code in it; ends with one line if it is anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != NAME:
            raise ValueError(checkpoint["script"])
        return checkpoint
    except Exception as error:  # torch.load raises eight kinds
        fail(f"{path} is no checkpoint of {NAME}.py, or damaged: {error!r:.200}")


def first_free(path):
    """Makes the first folder of `path`, `path`-2, `path`-3, ... that is not there yet, and returns its path."""
    free = path
    for n in itertools.count(2):
        if not os.path.exists(free.with_suffix(".png")) and make_folder(free):
            return free
        free = path.with_name(f"{path.name}-{n}")


def make_folder(path):
    """Makes the folder; False if it was there, perhaps made just now by another run."""
    try:
        path.mkdir(parents=True)
        return True
    except OSError as error:
        if not os.path.isdir(path):
            fail(f"cannot make the folder {path}: {error.strerror}")
        return False


def fail(reason):
    """Ends the program with one line on stderr: for what its user can mend."""
    sys.exit(f"{NAME}.py: error: {reason}")


# Flags of one command, which a checkpoint does not keep, those that it fixes, and those of which 0 is a value.
ONE_COMMAND = ("cuda", "out_dir", "resume", "sample", "num_samples", "interpolate")
FIXED = ("dataset", "image_size", "channels", "latent_dim", "width")
MAY_BE_ZERO = ("seed",)


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=25, help="passes over the training set (%(default)s)")
    add("--batch-size", type=int, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam (%(default)s)")
    add("--seed", type=int, default=0, help="repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=(*DATASETS, "synthetic", "folder"),
        help="default: mnist, or synthetic if it cannot be had",
    )
    where = "where the sets are, or a folder's images (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    add("--image-size", type=int, help="4 to 7 times a power of two (32; folder: 64)")
    add("--channels", type=int, choices=(1, 3), help="of a folder: gray or colour (3)")

    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=int, default=100, help="size of z (%(default)s)")
    add("--width", type=int, default=64, help="channels of the narrowest level (%(default)s)")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"default: the first free of runs/{NAME}, ...")
    add("--save-every", type=int, default=1, help="epochs between checkpoints (%(default)s)")
    add("--keep-every", type=int, help="also keep every N-th epoch's, as checkpoint_0025.pt")
    add("--resume", type=Path, help="go on from that checkpoint, or that run's folder")
    add("--sample", type=Path, help="no training: write images from that checkpoint")
    add("--num-samples", type=int, default=64, help="images that --sample writes (%(default)s)")
    add("--interpolate", type=int, help="with --sample: so many walks between two z")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    if path:
        if os.path.isdir(path):
            path /= "checkpoint.pt"
        # What the checkpoint keeps becomes the defaults, so that no other flag is needed.
        checkpoint = load_checkpoint(path)
        parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
        args = parser.parse_args(argv)
        for name in FIXED:
            if getattr(args, name) != checkpoint["args"].get(name):
                parser.error(f"--{name.replace('_', '-')} is fixed by {path}: leave it out")

    if args.channels and not path and args.dataset != "folder":
        parser.error("--channels is for --dataset folder")
    colored = args.dataset in ("cifar10", "folder")
    if args.channels is None:
        args.channels = 3 if colored else 1
    if args.image_size is None:
        args.image_size = 64 if args.dataset == "folder" else 32
    smallest = 8 if colored else 28  # digits are padded, never cropped
    base, _ = base_and_channels(args.image_size, args.width)
    if args.image_size < smallest or not 4 <= base <= 7:
        sizes = f"4 to 7 times a power of two, {smallest} or more (28, 32, 40, 48, 56, 64, ...)"
        parser.error(f"--image-size {args.image_size} is not {sizes}")
    for name, value in vars(args).items():
        if type(value) not in (int, float) or (value == 0 and name in MAY_BE_ZERO):
            continue
        if not 0 < value < 2**31:
            parser.error(f"--{name.replace('_', '-')} {value} is too small or too large")
    if args.sample and (args.resume or RANKS > 1):
        parser.error("--sample goes without --resume, and without torchrun")
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
    if args.out_dir and not args.sample and os.path.isdir(args.out_dir):
        if path != args.out_dir / "checkpoint.pt" and any(args.out_dir.glob("checkpoint*.pt")):
            parser.error(f"{args.out_dir} holds a run: --resume it, or use another --out-dir")
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        run = sample if args.sample else train
        run(args, checkpoint)
    except KeyboardInterrupt:
        saved = run is train and args.out_dir and (args.out_dir / "checkpoint.pt").exists()
        advice = f": python {NAME}.py --resume {args.out_dir} goes on" if saved else ""
        print(f"\nstopped{advice}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
