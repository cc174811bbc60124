"""Deep convolutional GAN: Radford, Metz & Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (2016, arXiv:1511.06434).

    python dcgan.py --epochs 25 --cuda                               MNIST, downloaded to data/
    python dcgan.py --dataset folder --data-dir photos --cuda        your own images, at 64x64
    torchrun --nproc-per-node 8 dcgan.py --cuda                      eight GPUs, --batch-size is that of each
    python dcgan.py --resume runs/dcgan/checkpoint.pt --epochs 30    go on
    python dcgan.py --sample runs/dcgan/checkpoint.pt --num-samples 10000
    python dcgan.py --sample runs/dcgan/checkpoint.pt --interpolate 8

Writes to runs/dcgan: checkpoint.pt, metrics.csv, and samples/epoch_0001.png, ..., the same noise after every epoch.

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
import sys
import tempfile
import time
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
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, EOFError, HTTPException)
DIGITS = ("mnist", "fashion-mnist", "synthetic")  # 28x28, of one channel


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
        layers = [nn.Linear(latent_dim, c * base**2, bias=False), nn.Unflatten(1, (c, base, base))]
        for before, after in itertools.pairwise(widths[::-1]):  # (B, before, h, h)
            layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]  # (B, after, 2h, 2h)
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())
        self.apply(initialize)


class Discriminator(nn.Sequential):
    """Images (B, channels, image_size, image_size) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, image_size, channels, width):
        base, widths = base_and_channels(image_size, width)
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for before, after in itertools.pairwise(widths):  # (B, before, h, h)
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False)]  # (B, after, h/2, h/2)
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
        # (B, c, base, base) to (B,)
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, base), nn.Flatten(0))
        self.apply(initialize)


def initialize(module):
    """Section 4: weights from N(0, 0.02). Those of BatchNorm from N(1, 0.02), as in the authors' code; biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: Goodfellow et al. 2014, eq. 1, which D maximizes, with its sign changed.

    softplus(l) = log(1 + exp(l)), so with D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """-E[log D(G(z))]: the non-saturating loss of Goodfellow et al. 2014, section 3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    # Under torchrun each process has its share of the images, and all make as many steps.
    device = select_device(args.cuda)
    images = load_images(args)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    steps = fewest(len(images) // args.batch_size, device)

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    discriminator = Discriminator(args.image_size, args.channels, args.width)
    generator.to(device, memory_format=torch.channels_last)
    discriminator.to(device, memory_format=torch.channels_last)
    adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        generator.compile()
        discriminator.compile()

    # Go on where the checkpoint stopped, with --lr as it is now, and Adam's other settings as saved.
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    rows, seconds = [], 0.0  # a row for each epoch done
    if checkpoint:
        rows = checkpoint["metrics"]
        seconds = rows[-1]["seconds"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        for optimizer in (optimizer_g, optimizer_d):
            optimizer.param_groups[0]["lr"] = args.lr

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        make_folder(args.out_dir / "samples")
    where = f"process 1 of {RANKS}, on {device.type}"
    print(f"{args.dataset}: {len(images):,} images in {where}, to {args.out_dir}", flush=True)
    if len(rows) >= args.epochs:
        print(f"epoch {len(rows)} is done: raise --epochs to go on")

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        progress = Progress(epoch, args.epochs, steps, RANKS * args.batch_size)
        for x in itertools.islice(batches(images, args.batch_size, device), steps):
            # D: descend -log D(x) - log(1 - D(G(z))). The step is not G's: fake is detached. Real and
            # fake go through D apart, or its BatchNorm would mix their statistics.
            with autocast:
                fake = generator(torch.randn(args.batch_size, args.latent_dim, device=device))
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

            d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
            progress.add(loss_d=loss_d, loss_g=loss_g, d_real=d_real, d_fake=d_fake)

        metrics = progress.means()
        seconds += progress.seconds
        weights = itertools.chain(generator.parameters(), discriminator.parameters())
        if not all(p.isfinite().all() for p in weights):
            fail(f"weights not finite in epoch {epoch}, which is not saved: lower --lr")
        if RANK == 0:
            speed = {"images_per_second": progress.rate, "seconds": seconds}
            rows.append({"epoch": epoch, **metrics, **speed})
            # The checkpoint comes last: a run killed before it does the epoch again, and these files.
            picture = args.out_dir / "samples" / f"epoch_{epoch:04d}.png"
            save_grid(generate(generator, fixed_noise), picture)
            save_metrics(rows, args.out_dir / "metrics.csv")
            save_checkpoint(parts, rows, args, args.out_dir / "checkpoint.pt")
            progress.show(metrics)

    if RANKS > 1:
        dist.destroy_process_group()


def average_gradients(network):
    """Replaces the gradients by their means over torchrun's processes, so that all make the same step."""
    if RANKS > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad)
            p.grad /= RANKS


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
    z, name, columns = torch.randn(args.num_samples, args.latent_dim), "generated", 8
    if args.interpolate:
        z, name, columns = walks(args.interpolate, args.latent_dim), "interpolation", 10
    images = torch.cat([generate(generator, part.to(device)).cpu() for part in z.split(500)])
    if args.dataset in DIGITS:  # without their padding
        images = center_crop(images, [28, 28])
    folder = first_free(args.out_dir / name)
    for n, image in enumerate(images):
        to_pil_image(image.add(1).mul(127.5).round().byte()).save(folder / f"{n:05d}.png")
    save_grid(images if args.interpolate else images[:64], folder.with_suffix(".png"), columns)
    print(f"{len(images):,} images in {folder}, a grid in {folder}.png")


def walks(count, latent_dim):
    """z (10 * count, latent_dim), ten from each of `count` points to another. Divided by the root each is from N(0, I)
    like the ends; a straight walk would pass nearer to 0 than almost any z of the training."""
    a, b = torch.randn(2, count, 1, latent_dim)
    t = torch.linspace(0, 1, 10)[:, None]
    return (((1 - t) * a + t * b) / ((1 - t).square() + t.square()).sqrt()).flatten(0, 1)


def load_images(args):
    """This process's share of the training set: uint8 (N, channels, image_size, image_size).

    Digits are padded with black, CIFAR-10 is resized. Where no set was named and MNIST cannot be had, warns and sets
    args.dataset to synthetic."""
    if args.dataset == "folder":
        paths = list_files(Path(args.data_dir))[RANK::RANKS]
        if not paths:
            fail(f"no files in {args.data_dir}: name the folder of the images with --data-dir")
        read = partial(read_image, channels=args.channels, size=args.image_size)
        return decode(read, paths, (args.channels, args.image_size, args.image_size))
    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}
    kinds["cifar10"] = datasets.CIFAR10
    named = args.dataset
    args.dataset = named or "mnist"
    if args.dataset in kinds and RANK == 0:
        socket.setdefaulttimeout(10)  # seconds: a dead network would hang
        try:
            kinds[args.dataset](args.data_dir, download=True)
        except DOWNLOAD_ERRORS as error:
            reason = f"no whole {args.dataset} in {args.data_dir}, and no download ({error!r})"
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
        images = kinds[args.dataset](args.data_dir).data
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
    size, folder = len(paths) * math.prod(shape), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free  # asked first: a full disk would kill the process
    if size > free:
        fail(f"{folder} has {free:,} bytes free, the images need {size:,}: set TMPDIR")
    images = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=(max(len(paths), 1), *shape))
    count = 0
    with ThreadPool() as pool:
        results = pool.imap(read, paths)
        for _ in paths:
            try:
                images[count] = next(results)
                count += 1
            except BadImage as error:
                print(f"skipped {error}", file=sys.stderr)
    if count == 0:
        fail(f"none of {len(paths):,} files could be used: is --data-dir the right folder?")
    return torch.from_numpy(images[:count])


class BadImage(Exception):
    """A file that Pillow cannot read."""


def read_image(path, channels, size):
    """uint8 (channels, size, size): upright, the short side resized to `size`, the middle cut out. Raises BadImage."""
    try:
        image = Image.open(path)
        image.draft(None, (size, size))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {error}") from error
    if image.mode.startswith("I;16"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
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
    digits = glyphs[torch.randint(10, (count,), generator=random)]
    # The identity, each entry off by up to a quarter.
    maps = torch.eye(2, 3) + torch.empty(count, 2, 3).uniform_(-0.25, 0.25, generator=random)
    grid = F.affine_grid(maps, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False).byte().squeeze(1)


def batches(images, batch_size, device):
    """One epoch in random order, the last partial batch dropped: floats (batch_size, C, H, W) in [-1, 1]."""
    order = torch.randperm(len(images), device=images.device)
    for index in order.split(batch_size)[: len(images) // batch_size]:
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


class Progress:
    """Sums an epoch's metrics and shows their means: on a terminal twice a second, in a log once a minute."""

    def __init__(self, epoch, epochs, steps, images):
        """`images` are those of a step, in all processes."""
        self.title, self.steps, self.images = f"epoch {epoch}/{epochs}", steps, images
        self.run = (epochs - epoch + 1) * steps  # steps from here to the end
        self.step, self.sums = 0, {}
        self.began = self.shown = time.perf_counter()

    def add(self, **metrics):
        """Counts a step, with its metrics, scalar tensors or numbers."""
        self.step += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach()
        pause = 0.5 if sys.stdout.isatty() else 60
        if self.step < self.steps and time.perf_counter() - self.shown > pause:
            self.show(self.means())

    def means(self):
        """The metrics so far, floats. Waits for the GPU, then takes the time."""
        means = {name: total.item() / self.step for name, total in self.sums.items()}
        self.shown = time.perf_counter()
        self.seconds = self.shown - self.began
        self.rate = self.step * self.images / self.seconds
        return means

    def show(self, metrics):
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        left = self.seconds * (self.run / self.step - 1) / 60
        line = f"{self.title}  {self.step}/{self.steps}  {numbers}"
        line += f"  {self.rate:,.1f} images/s  {left:,.1f} min left"
        end = "\n"
        if sys.stdout.isatty():
            line = f"\033[?7l{line}\033[K\033[?7h"  # cut off at the edge, what stood there cleared
            end = "\n" if self.step == self.steps else "\r"
        print(line, end=end, flush=True)


def save_metrics(rows, path):
    """A line an epoch; the columns are those of the newest, as --resume may come with other metrics."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(parts, rows, args, path):
    """Replaces the file at `path` in one step: after a kill or on a full disk it is the old one or the new one."""
    kept = {name: value for name, value in vars(args).items() if name not in ONE_COMMAND}
    checkpoint = {"script": NAME, "args": kept, "metrics": rows}
    # Plain values, whatever a new flag or metric is: load_checkpoint() takes no others.
    checkpoint = json.loads(json.dumps(checkpoint, default=str))
    for name, part in parts.items():
        checkpoint[name] = part.state_dict()
    with open(path.with_suffix(".part"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load_checkpoint(path):
    """What save_checkpoint() wrote to `path`. Runs no code in it; ends with one line if it is anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises eight kinds
        reason = str(error).partition("\n")[0]
        fail(f"{path} is no checkpoint, or damaged ({type(error).__name__}: {reason})")
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != NAME:
        fail(f"{path} is not a checkpoint of {NAME}.py")
    return checkpoint


def first_free(path):
    """Makes the first folder of `path`, `path`-2, `path`-3, ... that is not there yet, and returns its path."""
    make_folder(path.parent)
    for n in itertools.count(1):
        free = path if n == 1 else path.with_name(f"{path.name}-{n}")
        if not free.with_suffix(".png").exists():  # the grid of an earlier --sample
            try:
                free.mkdir()
                return free
            except FileExistsError:  # an earlier run, or one that was faster just now
                continue
            except OSError as error:
                fail(f"cannot make the folder {free}: {error.strerror}")


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {path}: {error.strerror}")


def fail(reason):
    """Ends the program with one line on stderr: for what its user can mend."""
    sys.exit(f"{NAME}.py: error: {reason}")


# Flags of one command, which a checkpoint does not keep, and those that it fixes.
ONE_COMMAND = ("cuda", "out_dir", "resume", "sample", "num_samples", "interpolate")
FIXED = ("dataset", "image_size", "channels", "latent_dim", "width")


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    usage, about = f"{NAME}.py [flags]", __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(usage=usage, description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=25, help="passes over the training set (%(default)s)")
    add("--batch-size", type=int, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam (%(default)s)")
    add("--seed", type=int, default=0, help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    names = (*DIGITS, "cifar10", "folder")
    add("--dataset", choices=names, help="default: mnist, or synthetic if it cannot be had")
    where = "where the sets are, or a folder's images (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    add("--image-size", type=int, help="4 to 7 times a power of two; default: 32, of a folder 64")
    add("--channels", type=int, choices=(1, 3), help="of a folder: gray or colour; default: colour")

    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=int, default=100, help="size of z (%(default)s)")
    add("--width", type=int, default=64, help="channels of the narrowest level (%(default)s)")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"where to write; default: the first free of runs/{NAME}, ...")
    add("--resume", type=Path, help="go on from that checkpoint, in its folder")
    add("--sample", type=Path, help="no training: write images from that checkpoint, to its folder")
    add("--num-samples", type=int, default=64, help="how many images --sample writes (%(default)s)")
    add("--interpolate", type=int, help="with --sample: so many walks between two z instead")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    if path:
        # What the checkpoint keeps becomes the defaults, so that no other flag is needed.
        checkpoint = load_checkpoint(path)
        parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
        args = parser.parse_args(argv)

    if args.channels and args.dataset != "folder" and not path:
        parser.error("--channels is for --dataset folder")
    args.channels = args.channels or (3 if args.dataset in ("cifar10", "folder") else 1)
    if args.image_size is None:
        args.image_size = 64 if args.dataset == "folder" else 32
    base, levels = base_and_channels(args.image_size, args.width)
    if not 4 <= base <= 7 or not levels:
        sizes = "28, 32, 40, 48, 56, 64, 80, 96, 112, 128, ..."
        parser.error(f"--image-size {args.image_size}: take 4 to 7 times a power of two ({sizes})")
    if args.image_size < 28 and args.dataset in (None, *DIGITS):
        parser.error("--image-size: digits of 28x28 are padded, never cropped: 28 or more")
    # The numbers among the flags, and their lowest values.
    lowest = {
        "epochs": 1,
        "batch_size": 1,
        "lr": 0,
        "seed": 0,
        "latent_dim": 1,
        "width": 1,
        "num_samples": 1,
        "interpolate": 1,
    }
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in lowest and value is not None and not lowest[name] <= value < 2**31:
            parser.error(f"{flag} {value} is not between {lowest[name]} and 2**31")
        if path and name in FIXED and value != checkpoint["args"].get(name, value):
            parser.error(f"{flag} is fixed by {path}: leave it out")
    if args.resume and args.sample:
        parser.error("--sample does not train: leave --resume out")
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
    if args.sample and RANKS > 1:
        parser.error("--sample is for one process: leave torchrun out")
    if args.out_dir and not args.sample:
        there = args.out_dir / "checkpoint.pt"
        if there != args.resume and os.path.exists(there):
            parser.error(f"{args.out_dir} holds a run: --resume {there}, or another --out-dir")
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        if args.sample:
            sample(args, checkpoint)
        else:
            train(args, checkpoint)
    except KeyboardInterrupt:
        more = ""
        if args.out_dir and (args.out_dir / "checkpoint.pt").exists():
            more = f": python {NAME}.py --resume {args.out_dir}/checkpoint.pt goes on"
        if RANK == 0:
            print(f"\nstopped{more}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
