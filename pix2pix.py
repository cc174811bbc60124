"""pix2pix: Isola, Zhu, Zhou & Efros, "Image-to-Image Translation with Conditional Adversarial Networks" (2017,
arXiv:1611.07004).

    python pix2pix.py --cuda                                         facades, labels to photo, downloaded to data/
    python pix2pix.py --dataset folder --data-dir pairs --cuda       your own pairs
    torchrun --nproc-per-node 8 pix2pix.py --cuda                    eight GPUs, --batch-size is that of each
    python pix2pix.py --resume runs/pix2pix/checkpoint.pt            go on
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt            translate the held-out pairs
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt --input sketches

A folder of pairs holds train/ and a held-out val/ (or test/), files with A and B side by side; or A/ and B/ with equal
file names, of which every tenth is held out.

Writes to runs/pix2pix: checkpoint.pt, metrics.csv, and samples/epoch_0001.png, ..., rows of source, output and target,
twice, for the same held-out pairs after every epoch.

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
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

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

        self.encoder = nn.ModuleList([nn.Conv2d(3, width, 4, 2, 1)])  # (B, width, size/2, size/2)
        for i, (before, after) in enumerate(itertools.pairwise(channels), 2):  # (B, before, h, h)
            normed = i < levels
            level = [nn.LeakyReLU(0.2)]
            level += [nn.Conv2d(before, after, 4, 2, 1, bias=not normed)]  # (B, after, h/2, h/2)
            if normed:
                level += [nn.InstanceNorm2d(after, affine=True)]
            self.encoder.append(nn.Sequential(*level))

        self.decoder = nn.ModuleList()
        for i, (before, after) in enumerate(itertools.pairwise(channels[::-1])):
            inputs = before if i == 0 else 2 * before  # with the skip's: (B, inputs, h, h)
            level = [nn.ReLU(), nn.ConvTranspose2d(inputs, after, 4, 2, 1, bias=False)]
            level += [nn.InstanceNorm2d(after, affine=True)]  # (B, after, 2h, 2h)
            if i < 3:
                level += [nn.Dropout(0.5)]
            self.decoder.append(nn.Sequential(*level))
        self.decoder.append(
            nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh())
        )
        self.apply(initialize)

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
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)]
            layers += [nn.InstanceNorm2d(2 * c, affine=True), nn.LeakyReLU(0.2, inplace=True)]
            c *= 2
        super().__init__(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        self.apply(initialize)

    def forward(self, source, image):
        return super().forward(torch.cat([source, image], 1))


def initialize(module):
    """Section 6.2: weights from N(0, 0.02). Those of the norms from N(1, 0.02), as in the authors' code; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d)):
        mean = 1.0 if isinstance(module, nn.InstanceNorm2d) else 0.0
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x, y)] - E[log(1 - D(x, G(x, z)))], halved (section 3.3): eq. 1, which D maximizes, its sign changed.

    softplus(l) = log(1 + exp(l)), so with D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits):
    """-E[log D(x, G(x, z))]: section 3.3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    # Under torchrun each process has its share of the pairs, and all make as many steps.
    device = select_device(args.cuda)
    pairs, held_out = load_pairs(args, "train"), load_pairs(args, "val")
    if device.type == "cuda" and pairs.nbytes < torch.cuda.mem_get_info()[0] / 2:
        pairs = pairs.to(device)
    steps = fewest(len(pairs) // args.batch_size, device)

    torch.manual_seed(args.seed)
    generator = Generator(args.image_size, args.width).to(device)
    discriminator = Discriminator(args.width).to(device)
    adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        generator.compile()
        discriminator.compile()

    # Go on where the checkpoint stopped.
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    rows, seconds = [], 0.0  # a row for each epoch done
    if checkpoint:
        rows = checkpoint["metrics"]
        seconds = rows[-1]["seconds"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        make_folder(args.out_dir / "samples")
    where = f"process 1 of {RANKS}, on {device.type}"
    counts = f"{len(pairs):,} pairs, {len(held_out):,} held out"
    print(f"{args.dataset} {args.direction}: {counts}, in {where}, to {args.out_dir}", flush=True)
    if len(rows) >= args.epochs:
        print(f"epoch {len(rows)} is done: raise --epochs to go on")

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        # Constant but for the last --decay-epochs, over which it falls to 0.
        lr = args.lr * min(1, (args.epochs - epoch + 1) / (args.decay_epochs + 1))
        for optimizer in (optimizer_g, optimizer_d):
            optimizer.param_groups[0]["lr"] = lr
        progress = Progress(epoch, args.epochs, steps, RANKS * args.batch_size)
        for source, target in itertools.islice(batches(pairs, args, device), steps):
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
            progress.add(loss_d=loss_d, loss_g_gan=loss_gan, loss_g_l1=loss_l1)

        metrics = progress.means()
        seconds += progress.seconds
        weights = itertools.chain(generator.parameters(), discriminator.parameters())
        if not all(p.isfinite().all() for p in weights):
            fail(f"weights not finite in epoch {epoch}, which is not saved: lower --lr")
        if RANK == 0:
            with autocast:
                grid, val_l1, val_psnr = evaluate(generator, held_out, args, device)
            metrics |= {"val_l1": val_l1, "val_psnr": val_psnr}
            speed = {"images_per_second": progress.rate, "seconds": seconds}
            rows.append({"epoch": epoch, **metrics, **speed})
            # The checkpoint comes last: a run killed before it does the epoch again, and these files.
            picture = args.out_dir / "samples" / f"epoch_{epoch:04d}.png"
            save_grid(grid, picture, columns=6)
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
def translate(generator, source, seed):
    """G(source) for one source (1, 3, H, W), its dropout drawn from `seed` and not from the training's generator."""
    with torch.random.fork_rng([source.device] if source.is_cuda else []):
        torch.manual_seed(seed)
        return generator.forward(source).float()  # not compiled anew for this size


def evaluate(generator, held_out, args, device):
    """Translates the held-out pairs: a grid of the first 8, (24, 3, H, W), their mean L1 and their mean PSNR in dB."""
    grid, l1, psnr = [], [], []
    for pair in held_out.split(1):
        source, target = split_pairs(pair.to(device), args.direction)
        output = translate(generator, source, args.seed)
        l1.append(F.l1_loss(output, target))
        mse = F.mse_loss(output, target).clamp(min=1e-10)
        psnr.append(10 * torch.log10(4 / mse))  # 4: the square of the range of values
        if len(grid) < 24:
            grid += [source, output, target]
    return torch.cat(grid), torch.stack(l1).mean().item(), torch.stack(psnr).mean().item()


def sample(args, checkpoint):
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.width).to(device)
    generator.load_state_dict(checkpoint["generator"])
    generator.train(not args.deterministic)  # with dropout, as in training
    folder, grid, count = None, [], 0
    for name, source, target in itertools.islice(sources(args), args.num_samples):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            output = translate(generator, source.to(device), args.seed).cpu()
        folder = folder or first_free(args.out_dir / "generated")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(output[0].add(1).mul(127.5).round().byte()).save(path, quality=95)
        images = [source, output] if target is None else [source, output, target]
        if count < 16:
            grid += images
        count += 1
    if count == 0:
        fail(f"no images in {args.input}: name the folder that holds them with --input")
    save_grid(torch.cat(grid), folder.with_suffix(".png"), columns=2 * len(images))
    print(f"{count:,} images in {folder}, a grid in {folder}.png")


def sources(args):
    """What --sample translates: a name for the result, the source (1, 3, H, W), and the target, None with --input."""
    if args.input is None:
        for n, pair in enumerate(load_pairs(args, "val").split(1)):
            yield f"{n:05d}.png", *split_pairs(pair, args.direction)
        return
    for path in list_files(args.input):
        try:
            image = read_image(path)
        except BadImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        name = path.relative_to(args.input)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"):
            name = f"{name}.png"
        yield name, to_floats(to_square(image, args.image_size)[None]), None


def load_pairs(args, split):
    """This process's share of the split "train", or all of "val", held out: uint8 (N, 2, 3, size, size), A first, with
    room for the jitter in "train".

    Where no set was named and facades cannot be had, warns and sets args.dataset to synthetic."""
    size, share = args.image_size, slice(None)
    if split == "train":
        share = slice(RANK, None, RANKS)
        size = round(size * 286 / 256) if args.jitter else size
    named = args.dataset
    args.dataset = named or "facades"
    folder = Path(args.data_dir)
    if args.dataset in ("facades", "maps"):
        folder = folder / args.dataset
        if RANK == 0 and not os.path.exists(folder):
            try:
                download(args.dataset, folder.parent)
            except (OSError, tarfile.TarError, EOFError, zlib.error, HTTPException) as error:
                reason = f"no {args.dataset} in {args.data_dir}, and no download"
                reason += f" ({URL.format(args.dataset)}: {error!r})"
                # A named set is never replaced, and several processes must not find different ones.
                if named or RANKS > 1:
                    fail(f"{reason}: put it there, or choose another --data-dir")
                print(f"warning: {reason}: training on synthetic facades", file=sys.stderr)
                args.dataset = "synthetic"
    if RANKS > 1:
        dist.barrier()  # the first process has downloaded, the others find the files
    if args.dataset == "synthetic":
        count, seed = (400, 0) if split == "train" else (100, 1)
        return synthetic_facades(count, size, seed)[share]
    apart = os.path.isdir(folder / "A") and os.path.isdir(folder / "B")
    paths = pairs_in_two_folders(folder, split) if apart else pairs_side_by_side(folder, split)
    if not paths:
        fail(
            f"no {split} pairs in {folder}: it needs train/ and val/ or test/, or A/ and B/ with two pairs"
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


def pairs_side_by_side(folder, split):
    """Tuples of one path, a file with A and B, from train/ and from val/ or test/."""
    if split == "val" and not os.path.isdir(folder / "val"):
        split = "test"
    return [(path,) for path in list_files(folder / split)]


def pairs_in_two_folders(folder, split):
    """Tuples of a path in A/ and one in B/ of the same name; every tenth is held out."""
    suffixes = Image.registered_extensions()
    names = []
    for side in (folder / "A", folder / "B"):
        names.append(
            {path.relative_to(side) for path in list_files(side) if path.suffix.lower() in suffixes}
        )
    for name in sorted(names[0] ^ names[1]):
        fail(f"{name} is in one of {folder}/A and {folder}/B, and its partner is missing")
    chosen = sorted(names[0])
    held_out = chosen[9::10] or chosen[-1:]
    chosen = held_out if split == "val" else sorted(names[0].difference(held_out))
    return [(folder / "A" / name, folder / "B" / name) for name in chosen]


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
    """A file that Pillow cannot read, or that is no pair."""


def read_pair(paths, size):
    """uint8 (2, 3, size, size), A first, of one file with both side by side or of two. Raises BadImage."""
    images = [read_image(path) for path in paths]
    if len(images) == 1:
        width, height = images[0].size
        if width % 2:
            raise BadImage(f"{paths[0]}: two images side by side have an even width, not {width}")
        half = width // 2
        images = [images[0].crop((left, 0, left + half, height)) for left in (0, half)]
    elif images[0].size != images[1].size:
        raise BadImage(
            f"{paths[0]}: its size is {images[0].size}, that of {paths[1]} {images[1].size}"
        )
    return torch.stack([to_square(image, size) for image in images])


def read_image(path):
    """An RGB image, upright, whatever the file's mode. Raises BadImage."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {error}") from error
    if image.mode.startswith("I;16"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_square(image, size):
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def synthetic_facades(count, size, seed):
    """`count` pairs, a rendered facade and its labels in the colours of CMP's: uint8 (count, 2, 3, size, size)."""
    random, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        sky, wall, glass, door = random.integers((90, 110, 20, 40), (200, 220, 90, 120), (3, 4)).T
        photo, labels = (
            Image.new("RGB", (256, 256), tuple(sky)),
            Image.new("RGB", (256, 256), (0, 0, 222)),
        )

        def box(x, y, w, h, color, label):
            ImageDraw.Draw(photo).rectangle((x, y, x + w, y + h), tuple(color))
            ImageDraw.Draw(labels).rectangle((x, y, x + w, y + h), label)

        floors, columns = random.integers(3, 7, 2)
        width, height = 216 // columns, 190 // floors  # of a window and the wall around it
        w, h = int(width * random.uniform(0.35, 0.65)), int(height * random.uniform(0.45, 0.7))
        box(20, 20, 216, 236, wall, (0, 48, 255))  # facade
        box(20, 20, 216, 8, wall + 30, (255, 80, 0))  # cornice
        for y in range(34, 34 + floors * height, height):
            for x in range(20 + (width - w) // 2, 20 + columns * width, width):
                box(x, y, w, h, glass, (0, 128, 255))  # window
                box(x - 2, y + h, w + 4, 4, wall + 15, (112, 255, 142))  # sill
        box(20, 226, 216, 30, wall // 2, (174, 0, 0))  # shop
        box(20 + width * random.integers(columns), 214, w, 42, door, (0, 207, 255))
        noisy = Image.fromarray(
            np.uint8(np.clip(photo + random.normal(0, 8, (256, 256, 3)), 0, 255))
        )
        pairs.append(torch.stack([to_square(noisy, size), to_square(labels, size)]))
    return torch.stack(pairs)


def batches(pairs, args, device):
    """One epoch in random order, the last partial batch dropped: source and target as in split_pairs(), jittered."""
    order = torch.randperm(len(pairs), device=pairs.device)
    for index in order.split(args.batch_size)[: len(pairs) // args.batch_size]:
        part = pairs.index_select(0, index).to(device)
        yield split_pairs(jitter(part, args.image_size) if args.jitter else part, args.direction)


def jitter(pairs, size):
    """Random crops of (B, 2, 3, larger, larger) to `size`, half of them mirrored: section 6.2, drawn once a pair."""
    top, left = torch.randint(pairs.shape[-1] - size + 1, (2, len(pairs))).tolist()
    mirror = torch.randint(2, (len(pairs),)).tolist()
    crops = [pair[..., y : y + size, x : x + size] for pair, y, x in zip(pairs, top, left)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirror)])


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
ONE_COMMAND = ("cuda", "out_dir", "resume", "sample", "num_samples", "input", "deterministic")
FIXED = ("dataset", "direction", "image_size", "width")


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    usage, about = f"{NAME}.py [flags]", __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(usage=usage, description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=200, help="passes over the training set (%(default)s)")
    add("--decay-epochs", type=int, default=0, help="the last of them, over which --lr falls to 0")
    add("--batch-size", type=int, default=1, help="pairs per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam (%(default)s)")
    add("--l1-weight", type=float, default=100.0, help="of the L1 loss (%(default)s)")
    add("--gan-weight", type=float, default=1.0, help="of the GAN's loss (%(default)s)")
    add("--seed", type=int, default=0, help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    names = ("facades", "maps", "folder", "synthetic")
    add("--dataset", choices=names, help="default: facades, or synthetic if they cannot be had")
    where = "where the sets are, or a folder's pairs (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    add("--direction", choices=("AtoB", "BtoA"), help="default: AtoB; facades, synthetic: BtoA")
    add("--image-size", type=int, default=256, help="a power of two from 32 to 1024 (%(default)s)")
    add("--jitter", action=yes_or_no, default=True, help="crop from 286/256 of the size, mirror")

    add = parser.add_argument_group("networks").add_argument
    add("--width", type=int, default=64, help="channels of the narrowest level (%(default)s)")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"where to write; default: the first free of runs/{NAME}, ...")
    add("--resume", type=Path, help="go on from that checkpoint, in its folder")
    add("--sample", type=Path, help="no training: translate images, to that checkpoint's folder")
    add("--num-samples", type=int, help="how many images --sample writes; default: all")
    add("--input", type=Path, help="with --sample: a folder of images; default: the held-out pairs")
    add("--deterministic", action="store_true", help="with --sample: without dropout")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    if path:
        # What the checkpoint keeps becomes the defaults, so that no other flag is needed.
        checkpoint = load_checkpoint(path)
        parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
        args = parser.parse_args(argv)

    if args.direction is None:
        args.direction = "AtoB" if args.dataset in ("maps", "folder") else "BtoA"
    if args.image_size not in (32, 64, 128, 256, 512, 1024):
        parser.error(f"--image-size is a power of two from 32 to 1024, not {args.image_size}")
    if args.decay_epochs > args.epochs:
        parser.error("--decay-epochs are part of --epochs, so at most as many")
    # The numbers among the flags, and their lowest values.
    lowest = {
        "epochs": 1,
        "decay_epochs": 0,
        "batch_size": 1,
        "lr": 0,
        "l1_weight": 0,
        "gan_weight": 0,
        "seed": 0,
        "width": 1,
        "num_samples": 1,
    }
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in lowest and value is not None and not lowest[name] <= value < 2**31:
            parser.error(f"{flag} {value} is not between {lowest[name]} and 2**31")
        if path and name in FIXED and value != checkpoint["args"].get(name, value):
            parser.error(f"{flag} is fixed by {path}: leave it out")
    if args.resume and args.sample:
        parser.error("--sample does not train: leave --resume out")
    if (args.input or args.deterministic) and not args.sample:
        parser.error("--input and --deterministic need --sample")
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
