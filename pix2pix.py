"""pix2pix: Isola, Zhu, Zhou & Efros, "Image-to-Image Translation with Conditional Adversarial Networks" (2017,
arXiv:1611.07004).

    python pix2pix.py --cuda                                         facades, labels to photo, downloaded to data/
    python pix2pix.py --dataset folder --data-dir pairs --cuda       your own pairs
    torchrun --nproc-per-node 8 pix2pix.py --cuda                    eight GPUs, --batch-size is that of each
    python pix2pix.py --resume runs/pix2pix/checkpoint.pt            go on
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt            translate the held-out pairs
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt --input sketches       a folder, or one image

A folder of pairs holds train/ and a held-out val/ (or test/), files with A and B side by side; or A/ and B/ with equal
file names, of which every tenth is held out.

Writes to runs/pix2pix: checkpoint.pt every 5 epochs, metrics.csv, samples/real.png of the training set (sources beside
targets), and samples/epoch_0001.png, ..., rows of source, output and target, twice, of the same held-out pairs.

Differences from the paper:
1. InstanceNorm, not BatchNorm: at the paper's batch of one they are the same, and at any other no output depends on
   its neighbours. The innermost level has none, as in the authors' code: a single pixel less its mean is 0.
2. Inference has the same dropout for each image, drawn from --seed: an output depends on its source and the seed
   alone. --deterministic leaves dropout out.
3. The U-Net has a level for each halving of --image-size, at most 8; at 256 it is the paper's.
4. D halves an image three times whatever its size, so at 64 pixels one of its patches is the whole of it.
5. The rate is constant, as in section 6.2; --decay-epochs is what the authors' later PyTorch code does by default.
6. Images are resized to a square, and in two folders paired by name: as in the authors' code, not in the paper.
"""

import argparse
import csv
import glob
import gzip
import itertools
import json
import math
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and its checkpoints
RANK = int(os.environ.get("RANK", 0))  # which of torchrun's processes this is
RANKS = int(os.environ.get("WORLD_SIZE", 1))  # and of how many
# Facades and maps, with train/ and val/.
URL = "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{}.tar.gz"


class Generator(nn.Module):
    """U-Net from source to image, (B, 3, image_size, image_size) in [-1, 1]: section 6.1.1. Dropout is its noise z."""

    def __init__(self, image_size, width):
        super().__init__()
        # Down to 1x1; from 512 to 2x2, from 1024 to 4x4.
        levels = min(image_size.bit_length() - 1, 8)
        channels = [width * min(2**i, 8) for i in range(levels)]

        # (B, 3, image_size, image_size) to (B, width, h, h), h = image_size/2
        self.encoder = nn.ModuleList([nn.Conv2d(3, width, 4, 2, 1)])
        for i, (before, after) in enumerate(itertools.pairwise(channels), 2):
            # (B, before, h, h) to (B, after, h/2, h/2)
            normed = i < levels
            level = [
                nn.LeakyReLU(0.2),
                nn.Conv2d(before, after, 4, 2, 1, bias=not normed),
            ]
            if normed:
                level += [nn.InstanceNorm2d(after, affine=True)]
            self.encoder.append(nn.Sequential(*level))

        self.decoder = nn.ModuleList()
        for i, (before, after) in enumerate(itertools.pairwise(channels[::-1])):
            # (B, inputs, h, h), the skip's channels among them, to (B, after, 2h, 2h)
            inputs = before if i == 0 else 2 * before
            level = [
                nn.ReLU(),
                nn.ConvTranspose2d(inputs, after, 4, 2, 1, bias=False),
                nn.InstanceNorm2d(after, affine=True),
            ]
            if i < 3:
                level += [nn.Dropout(0.5)]
            self.decoder.append(nn.Sequential(*level))
        level = [
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 3, 4, 2, 1),
            nn.Tanh(),
        ]
        self.decoder.append(nn.Sequential(*level))
        initialize(self)

    def forward(self, x):
        skips = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        x = self.decoder[0](skips.pop())
        for level in self.decoder[1:]:
            x = level(torch.cat([x, skips.pop()], 1))
        return x


class Discriminator(nn.Sequential):
    """PatchGAN: source and image, each (B, 3, H, W), to a logit for each patch of 70x70, (B, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self, width):
        layers = [nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        c = width  # (B, c, H/2, W/2)
        for stride in (2, 2, 1):  # to (B, 2c, H/4, W/4), ..., (B, 8 * width, H/8 - 1, W/8 - 1)
            layers += [
                nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False),
                nn.InstanceNorm2d(2 * c, affine=True),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            c *= 2
        super().__init__(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        initialize(self)

    def forward(self, source, image):
        return super().forward(torch.cat([source, image], 1))


def initialize(network):
    """Section 6.2: weights from N(0, 0.02). Those of the norms from N(1, 0.02), as in the authors' code; biases 0."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            mean = 1.0 if p.ndim == 1 else 0.0  # a norm's weights are a vector
            nn.init.normal_(p, mean, 0.02)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x, y)] - E[log(1 - D(x, G(x, z)))], halved (section 3.3): eq. 1, which D maximizes, its sign changed.

    softplus(l) = log(1 + exp(l)), so with D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits):
    """-E[log D(x, G(x, z))]: section 3.3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    # Under torchrun each process has its share of the pairs, and all make the same number of steps.
    device = select_device(args.cuda)
    pairs, held_out = load_pairs(args, "train"), load_pairs(args, "val")
    if device.type == "cuda" and pairs.nbytes < torch.cuda.mem_get_info()[0] / 2:
        pairs = pairs.to(device)
    batch = args.batch_size * RANKS  # pairs for a step, in all processes
    steps = fewest(len(pairs) * RANKS // batch, device)

    torch.manual_seed(args.seed)
    generator = Generator(args.image_size, args.width)
    discriminator = Discriminator(args.width)
    networks = nn.ModuleList([generator, discriminator]).to(device)
    adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        for network in networks:
            network.compile()

    # Go on where the checkpoint stopped.
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

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        samples = args.out_dir / "samples"
        make_folder(samples)
        real = torch.stack(split_pairs(pairs[:32], args.direction), 1).flatten(0, 1)
        save_grid(real, samples / "real.png")
    print(f"{len(pairs):,} pairs of {args.dataset}, on {device.type}, to {args.out_dir}")
    for network in networks:
        count = sum(p.numel() for p in network.parameters())
        print(f"{type(network).__name__}: {count:,} parameters", flush=True)

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process, the same in every run: a resumed one draws what an
        # uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        # Constant but for the last --decay-epochs, over which it falls towards 0.
        lr = args.lr * min(1, (args.epochs - epoch + 1) / (args.decay_epochs + 1))
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = lr
        # The steps' metrics are added up (as a Counter's update() does) on the device: reading one waits.
        sums = Counter()
        began = shown = time.perf_counter()
        for step, (source, target) in zip(range(1, steps + 1), batches(pairs, args, device)):
            # D: descend the halved -log D(x, y) - log(1 - D(x, G(x))). Not G's step: fake is detached.
            with autocast:
                fake = generator(source)
                real_logits = discriminator(source, target).float()
                fake_logits = discriminator(source, fake.detach()).float()
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            average_gradients(discriminator)
            optimizer_d.step()

            # G: descend eq. 4, -log D(x, G(x)) + 100 |y - G(x)|, through the new D.
            with autocast:
                logits = discriminator(source, fake).float()
            loss_gan = generator_loss(logits)
            loss_l1 = F.l1_loss(fake.float(), target)
            loss_g = args.gan_weight * loss_gan + args.l1_weight * loss_l1
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            average_gradients(generator)
            optimizer_g.step()

            with torch.no_grad():
                sums.update(loss_d=loss_d, loss_g_gan=loss_gan, loss_g_l1=loss_l1)
            if step < steps and time.perf_counter() - shown > PAUSE:
                show(summary(sums, step, batch, began, rows), args, step / steps)
                shown = time.perf_counter()

        row = summary(sums, steps, batch, began, rows)
        if not all(p.isfinite().all() for p in networks.parameters()):
            fail(f"weights not finite in epoch {epoch}, not saved: lower --lr")
        rows.append(row)
        if RANK == 0:
            # The checkpoint comes last: a run killed before it repeats the epoch, and these files.
            with autocast:
                grid, tested = evaluate(generator, held_out, args, device)
            rows[-1] = {"epoch": epoch, **tested, **row}
            save_grid(grid, samples / f"epoch_{epoch:04d}.png", columns=6)
            save(parts, rows, args)
            show(rows[-1], args)

    print(f"{len(rows)} epochs done, more by --resume {args.out_dir} --epochs N")
    if RANKS > 1:
        dist.destroy_process_group()


def average_gradients(network):
    """Replaces the gradients by their means over torchrun's processes, so that all make the same step."""
    if RANKS > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad.div_(RANKS))


@torch.no_grad()
def translate(generator, source, seed):
    """G(source) for one source (1, 3, H, W), its dropout drawn from `seed` and not from the training's generator."""
    with torch.random.fork_rng([source.device] if source.is_cuda else []):
        torch.manual_seed(seed)
        return generator.forward(source).float()  # not compiled anew for this size


def evaluate(generator, held_out, args, device):
    """Translates the held-out pairs: a grid of the first 8, (24, 3, H, W), and their mean L1 and PSNR in dB."""
    grid, sums = [], Counter()
    for pair in held_out.split(1):
        source, target = split_pairs(pair.to(device), args.direction)
        output = translate(generator, source, args.seed)
        mse = F.mse_loss(output, target).clamp(min=1e-10)
        psnr = 10 * torch.log10(4 / mse)  # 4: the square of the range of values
        sums.update(val_l1=F.l1_loss(output, target), val_psnr=psnr)
        if len(grid) < 24:
            grid += [source, output, target]
    means = {name: total.item() / len(held_out) for name, total in sums.items()}
    return torch.cat(grid), means


def sample(args, checkpoint):
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.width).to(device)
    generator.load_state_dict(checkpoint["generator"])
    generator.train(not args.deterministic)  # with dropout, as in training
    folder, grid, count = None, [], 0
    for name, size, source, *target in itertools.islice(sources(args), args.num_samples):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            output = translate(generator, source.to(device), args.seed).cpu()
        folder = folder or first_free(args.out_dir / "generated")
        while (folder / name).exists():  # a.gif.png, beside a.gif
            name += ".png"
        make_folder((folder / name).parent)
        image = to_pil_image(output[0].add(1).mul(127.5).round().byte())
        image.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=95)
        count += 1
        if count <= 16:
            grid += [source, output, *target]
    if count == 0:
        fail(f"no images in {args.input}: name one, or their folder, with --input")
    columns = 2 * (2 + len(target))
    save_grid(torch.cat(grid), folder.with_suffix(".png"), columns)
    print(f"{count:,} images in {folder}, a grid in {folder}.png")


def sources(args):
    """What --sample translates: a name and a size for the result, the source (1, 3, H, W), and, of a held-out pair, the
    target."""
    if args.input is None:
        size = (args.image_size, args.image_size)
        for n, pair in enumerate(load_pairs(args, "val").split(1)):
            yield f"{n:05d}.png", size, *split_pairs(pair, args.direction)
        return
    one = os.path.isfile(args.input)
    folder = args.input.parent if one else args.input
    for path in [args.input] if one else list_files(folder):
        try:
            image = read_image(path)
        except BadImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        name = str(path.relative_to(folder))
        if not name.lower().endswith(
            (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
        ):
            name += ".png"
        yield name, image.size, to_floats(to_square(image, args.image_size)[None])


def load_pairs(args, split):
    """This process's share of the split "train", or all of "val", held out: uint8 (N, 2, 3, size, size), A first, with
    room for the jitter in "train".

    Where no set was named and facades cannot be had, warns and sets args.dataset to synthetic."""
    train = split == "train"
    size = round(args.image_size * 286 / 256) if train and args.jitter else args.image_size
    share = slice(RANK, None, RANKS) if train else slice(None)
    named = args.dataset
    args.dataset = named or "facades"
    folder = Path(args.data_dir)
    if args.dataset in ("facades", "maps"):
        folder /= args.dataset
        if RANK == 0 and not os.path.exists(folder):
            try:
                download(args.dataset, folder.parent)
            except (OSError, tarfile.TarError, EOFError, zlib.error, HTTPException) as error:
                reason = f"no {folder}, no download of {URL.format(args.dataset)} ({error!r})"
                # A named set is never replaced, and several processes must not find different ones.
                if named or RANKS > 1:
                    fail(f"{reason}: put it there, or choose another --data-dir")
                print(f"warning: {reason}: training on synthetic facades", file=sys.stderr)
                args.dataset = "synthetic"
    if RANKS > 1:
        dist.barrier()  # the first process has downloaded, the others find the files
    if args.dataset == "synthetic":
        return synthetic_facades(400 if train else 100, size, seed=int(train))[share]
    apart = os.path.isdir(folder / "A") and os.path.isdir(folder / "B")
    paths = pairs_in_two_folders(folder, train) if apart else pairs_side_by_side(folder, train)
    if not paths:
        fail(
            f"no {split} pairs in {folder}: make train/ and val/ or test/, or A/ and B/ of two each"
        )
    return decode(partial(read_pair, size=size), paths[share], (2, 3, size, size))


def download(name, folder):
    """Makes folder/name from the authors' archive, whole or not at all; a member that points outside it is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        # 10 seconds: a dead network would hang.
        with urllib.request.urlopen(URL.format(name), timeout=10) as response:
            # Not mode "r|gz", to which a stream that breaks off between two members is whole.
            with tarfile.open(fileobj=gzip.open(response), mode="r|") as archive:
                archive.extractall(part, filter="data")
        os.replace(Path(part, name), folder / name)


def pairs_side_by_side(folder, train):
    """Tuples of one path, a file with A and B, from train/ or from val/, or test/ where there is no val/."""
    held_out = "val" if os.path.isdir(folder / "val") else "test"
    return [(path,) for path in list_files(folder / ("train" if train else held_out))]


def pairs_in_two_folders(folder, train):
    """Tuples of a path in A/ and the one in B/ of the same name; every tenth is held out."""
    a, b = folder / "A", folder / "B"
    pairs = [(path, b / path.relative_to(a)) for path in list_files(a)]
    lonely = {partner for _, partner in pairs} ^ {*list_files(b)}
    if lonely:
        fail(f"{min(lonely)} or its partner in {a} is missing")
    held_out = {*(pairs[9::10] or pairs[-1:])}
    return [pair for pair in pairs if (pair in held_out) != train]


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
    """A file that Pillow cannot read, or that is no pair."""


def read_pair(paths, size):
    """uint8 (2, 3, size, size), A first, of one file with both side by side or of two. Raises BadImage."""
    a = b = read_image(paths[0])
    if len(paths) == 2:
        b = read_image(paths[1])
    else:
        a = b.crop((0, 0, b.width // 2, b.height))
        b = b.crop((a.width, 0, b.width, b.height))
    if a.size != b.size:
        raise BadImage(f"{paths[0]}: the sizes of A and B differ: {a.size} and {b.size}")
    return torch.stack([to_square(a, size), to_square(b, size)])


PILLOW_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
PILLOW_ERRORS += (struct.error,)  # of a damaged EXIF part


def read_image(path):
    """An RGB image, upright, whatever the file's mode. Raises BadImage."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except PILLOW_ERRORS as error:
        raise BadImage(f"{path}: {error}") from error
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_square(image, size):
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def synthetic_facades(count, size, seed):
    """`count` pairs, a rendered facade and its labels in the colours of CMP's: uint8 (count, 2, 3, size, size)."""
    random, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        sky, wall, glass, door = random.integers((60, 80, 100), (160, 180, 220), (4, 3))
        w = 216 // random.integers(3, 7)  # of a window and the wall around it
        h = 180 // random.integers(3, 7)
        boxes = [
            (0, 0, 256, 256, sky, (0, 0, 222)),
            (20, 20, 216, 236, wall, (0, 48, 255)),
            (20 + random.integers(180), 214, 36, 42, door, (0, 207, 255)),
        ]
        for x in range(20 + w // 4, 220, w):
            for y in range(40, 200, h):
                boxes.append((x, y, w // 2, h // 2, glass // 3, (0, 128, 255)))  # window
        pair = np.zeros((2, 256, 256, 3))
        for x, y, w, h, *colors in boxes:
            pair[:, y : y + h, x : x + w] = np.reshape(colors, (2, 1, 1, 3))
        pair[0] += random.normal(0, 8, (256, 256, 3))
        pairs.append(pair.clip(0, 255).astype(np.uint8))
    pairs = torch.from_numpy(np.concatenate(pairs)).permute(0, 3, 1, 2)
    return resize(pairs, [size, size]).unflatten(0, (count, 2))


def batches(pairs, args, device):
    """One epoch in random order, as in split_pairs(); the last batch may have fewer. Crop and mirror are drawn once a
    pair, for both images: section 6.2."""
    jitter = Compose([RandomCrop(args.image_size), RandomHorizontalFlip()])
    for index in torch.randperm(len(pairs), device=pairs.device).split(args.batch_size):
        part = pairs.index_select(0, index).to(device)
        if args.jitter:
            part = torch.stack([jitter(pair) for pair in part])
        yield split_pairs(part, args.direction)


def split_pairs(pairs, direction):
    """uint8 pairs (B, 2, 3, H, W) to source and target, each floats (B, 3, H, W) in [-1, 1]."""
    a, b = map(to_floats, pairs.unbind(1))
    return (a, b) if direction == "AtoB" else (b, a)


def to_floats(x):
    return x.float().div(127.5).sub(1)


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
ONE_COMMAND = ("cuda", "out_dir", "resume", "sample", "num_samples", "input", "deterministic")
FIXED = ("dataset", "direction", "image_size", "width")
MAY_BE_ZERO = ("seed", "decay_epochs", "l1_weight", "gan_weight")


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=200, help="passes over the training set (%(default)s)")
    add("--decay-epochs", type=int, default=0, help="the last, with --lr falling to 0")
    add("--batch-size", type=int, default=1, help="pairs per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam (%(default)s)")
    add("--l1-weight", type=float, default=100.0, help="of the L1 loss (%(default)s)")
    add("--gan-weight", type=float, default=1.0, help="of the GAN's loss (%(default)s)")
    add("--seed", type=int, default=0, help="repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    names = ("facades", "maps", "folder", "synthetic")
    add("--dataset", choices=names, help="default: facades, or synthetic if they cannot be had")
    where = "where the sets are, or a folder's pairs (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    add("--direction", choices=("AtoB", "BtoA"), help="default: AtoB; facades, synthetic: BtoA")
    add("--image-size", type=int, default=256, help="32, 64, ..., 1024 (%(default)s)")
    add("--jitter", action=yes_or_no, default=True, help="crop of 286/256, mirror")

    add = parser.add_argument_group("networks").add_argument
    add("--width", type=int, default=64, help="channels of the narrowest level (%(default)s)")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"default: the first free of runs/{NAME}, ...")
    add("--save-every", type=int, default=5, help="epochs between checkpoints (%(default)s)")
    add("--keep-every", type=int, help="also keep every N-th epoch's, as checkpoint_0025.pt")
    add("--resume", type=Path, help="go on from that checkpoint, or that run's folder")
    add("--sample", type=Path, help="no training: translate images by that checkpoint")
    add("--num-samples", type=int, help="how many images --sample writes; default: all")
    add(
        "--input",
        type=Path,
        help="with --sample: an image or a folder; default: held-out pairs",
    )
    add("--deterministic", action="store_true", help="with --sample: without dropout")

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

    if args.direction is None:
        args.direction = "AtoB" if args.dataset in ("maps", "folder") else "BtoA"
    if args.image_size not in (32, 64, 128, 256, 512, 1024):
        parser.error(f"--image-size is a power of two from 32 to 1024, not {args.image_size}")
    if args.decay_epochs > args.epochs:
        parser.error("--decay-epochs are part of --epochs, so at most as many")
    for name, value in vars(args).items():
        if type(value) not in (int, float) or (value == 0 and name in MAY_BE_ZERO):
            continue
        if not 0 < value < 2**31:
            parser.error(f"--{name.replace('_', '-')} {value} is too small or too large")
    if args.sample and (args.resume or RANKS > 1):
        parser.error("--sample goes without --resume, and without torchrun")
    if (args.input or args.deterministic) and not args.sample:
        parser.error("--input and --deterministic need --sample")
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
