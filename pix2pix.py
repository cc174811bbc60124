"""pix2pix: Isola, Zhu, Zhou & Efros, "Image-to-Image Translation with Conditional Adversarial
Networks" (2017, arXiv:1611.07004).

    python pix2pix.py --cuda                                  facades, labels to photo
    python pix2pix.py --image-size 64 --width 32 --epochs 20  the same, small enough for a CPU
    python pix2pix.py --dataset folder --data-dir pairs       your own pairs
    torchrun --nproc-per-node 8 pix2pix.py --cuda             eight GPUs, --batch-size for each
    python pix2pix.py --resume runs/pix2pix --epochs 300      continue training
    python pix2pix.py --sample runs/pix2pix                   translate the held-out pairs
    python pix2pix.py --sample runs/pix2pix --input DIR       translate a folder, or one image

A folder of pairs has train/ and val/ (or test/) with files that hold A and B side by side, or A/
and B/ with files of equal names, where every tenth pair is held out.

Writes to runs/pix2pix: checkpoint.pt every 5 epochs, metrics.csv, args.json, samples/real.png with
sources and targets of the training set, and samples/epoch_0001.png, ... with source, output and
target of the same held-out pairs after every epoch.

Differences from the paper:
1. InstanceNorm, not BatchNorm. At a batch size of 1, the paper's for facades, they are the same,
   and at any other no output depends on its neighbours. The innermost level has none, as in the
   authors' code: up to 256 pixels it is a single pixel, which a norm would turn into 0.
2. Held-out and --sample images all get the same dropout, drawn from --seed.
3. The U-Net has a level for each halving of --image-size, at most 8. At 256 it is the paper's.
4. D always halves an image three times, so at 64 pixels its patches are larger than the image.
5. --decay-epochs adds the falling learning rate of the authors' later PyTorch code.
6. Images are resized to a square, as in the authors' code.
"""

import argparse
import csv
import gzip
import io
import itertools
import json
import math
import os
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.optim import Adam
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and marks its checkpoints
RANK = int(os.environ.get("RANK", 0))  # the number of this process under torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
URL = "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{}.tar.gz"


class Generator(nn.Module):
    """U-Net of section 6.1.1: maps sources (B, source_channels, image_size, image_size) in [-1, 1]
    to images with target_channels in (-1, 1). Dropout is its noise z."""

    def __init__(self, image_size, width, source_channels=3, target_channels=3):
        super().__init__()
        # C64-C128-C256-C512-C512-C512-C512-C512 at 256 pixels, down to 1x1.
        levels = min(image_size.bit_length() - 1, 8)
        channels = [width * factor for factor in (1, 2, 4, 8, 8, 8, 8, 8)[:levels]]

        # (B, source_channels, image_size, image_size) to (B, width, h, h), h = image_size / 2
        self.encoder = nn.ModuleList([nn.Conv2d(source_channels, width, 4, 2, 1)])
        for before, after in itertools.pairwise(channels):
            # (B, before, h, h) to (B, after, h/2, h/2)
            innermost = len(self.encoder) == levels - 1
            level = [nn.LeakyReLU(0.2), nn.Conv2d(before, after, 4, 2, 1, bias=innermost)]
            if not innermost:
                level += [nn.InstanceNorm2d(after, affine=True)]
            self.encoder.append(nn.Sequential(*level))

        self.decoder = nn.ModuleList()
        before = channels[-1]
        for after in channels[-2::-1]:
            # (B, before, h, h) to (B, after, 2h, 2h)
            level = [
                nn.ReLU(),
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                nn.InstanceNorm2d(after, affine=True),
            ]
            if len(self.decoder) < 3:
                level += [nn.Dropout(0.5)]
            self.decoder.append(nn.Sequential(*level))
            before = 2 * after  # with the channels of the skip connection
        level = [nn.ReLU(), nn.ConvTranspose2d(before, target_channels, 4, 2, 1), nn.Tanh()]
        self.decoder.append(nn.Sequential(*level))
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
    """PatchGAN of section 6.1.2: maps sources and images, (B, C, H, W) each, to a logit for each
    patch of 70x70 pixels, (B, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self, width, source_channels=3, target_channels=3):
        # C64-C128-C256-C512
        inputs = source_channels + target_channels
        layers = [nn.Conv2d(inputs, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        c = width  # (B, c, H/2, W/2)
        for stride in (2, 2, 1):  # to (B, 2c, H/4, W/4), ..., (B, 8 * width, H/8 - 1, W/8 - 1)
            layers += [
                nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False),
                nn.InstanceNorm2d(2 * c, affine=True),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            c *= 2
        super().__init__(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        self.apply(initialize)

    def forward(self, source, image):
        return super().forward(torch.cat([source, image], 1))


def initialize(layer):
    """Section 6.2: weights from N(0, 0.02); those of the norms from N(1, 0.02), as in the authors'
    code; biases 0. Other types of layers keep PyTorch's initialization."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d)):
        mean = 1.0 if isinstance(layer, nn.InstanceNorm2d) else 0.0
        nn.init.normal_(layer.weight, mean, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def discriminator_loss(real_logits, fake_logits):
    """(-E[log D(x, y)] - E[log(1 - D(x, G(x, z)))]) / 2: the negative of eq. 1, which D maximizes,
    halved as in section 3.3.

    With D = sigmoid(l), -log D = log(1 + exp(-l)) = softplus(-l) and -log(1 - D) = softplus(l)."""
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def generator_loss(fake_logits):
    """-E[log D(x, G(x, z))]: section 3.3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    device = select_device(args.cuda, checkpoint)
    download(args)
    pairs, _ = load_pairs(args, train=True)
    held_out, _ = load_pairs(args, train=False)
    if device.type == "cuda" and pairs.nbytes < torch.cuda.mem_get_info()[0] / 2:
        pairs = pairs.to(device)  # they fit into half of its free memory
    steps = len(pairs) // args.batch_size
    if steps == 0:
        sys.exit(f"error: {len(pairs)} pairs per process are too few: lower --batch-size")

    torch.manual_seed(args.seed)
    generator = Generator(args.image_size, args.width).to(device)
    discriminator = Discriminator(args.width).to(device)
    optimizer_g = Adam(generator.parameters(), args.lr, (0.5, 0.999), fused=True)
    optimizer_d = Adam(discriminator.parameters(), args.lr, (0.5, 0.999), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    jitter = Compose([RandomCrop(args.image_size), RandomHorizontalFlip()])
    if args.compile:
        generator.compile(dynamic=False)
        discriminator.compile(dynamic=False)

    state = {  # what a checkpoint restores
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": optimizer_g,
        "optimizer_d": optimizer_d,
    }
    history = []  # a row of metrics for each epoch
    if checkpoint:
        history = checkpoint["metrics"]
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])

    if RANK == 0:
        args.out_dir = args.out_dir or new_folder(f"runs/{NAME}")
        samples = args.out_dir / "samples"
        # Fails if another run has just taken this folder.
        samples.mkdir(parents=True, exist_ok=os.path.exists(args.out_dir / "checkpoint.pt"))
        real = torch.stack(source_and_target(pairs[:32].cpu(), args), 1).flatten(0, 1)
        save_grid(real, samples / "real.png")
        print(f"{args.dataset}: {len(pairs) * WORLD_SIZE:,} pairs, {steps:,} steps per epoch")
        if steps * args.epochs < 2000:
            enough = math.ceil(4000 / steps)
            print(f"few steps, so expect blurry images: --epochs {enough} makes 4,000 steps")
        print(f"on {device.type}, writing to {args.out_dir}", flush=True)

    for epoch in range(len(history) + 1, args.epochs + 1):
        # Reseed every epoch, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        # Constant at first. Over the last --decay-epochs it falls towards 0.
        lr = args.lr * min(1, (args.epochs - epoch + 1) / (args.decay_epochs + 1))
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = lr
        batches = torch.randperm(len(pairs), device=pairs.device).split(args.batch_size)[:steps]
        sums = defaultdict(float)
        # progress() shows the means of sums, and at the end of the epoch appends them to history.
        for index in progress(batches, sums, history, args):
            batch = pairs[index].to(device)
            if args.jitter:  # the same crop and mirroring for both images of a pair: section 6.2
                batch = torch.stack([jitter(pair) for pair in batch])
            source, target = source_and_target(batch, args)

            # D: minimize (-log D(x, y) - log(1 - D(x, G(x, z)))) / 2. fake is detached, since this
            # step must not change G.
            with autocast:
                fake = generator(source)
                real_logits = discriminator(source, target).float()
                fake_logits = discriminator(source, fake.detach()).float()
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            average_gradients(discriminator)
            optimizer_d.step()

            # G, through the updated D: minimize -log D(x, G(x, z)) + 100 |y - G(x, z)|, which is
            # eq. 4 with the non-saturating loss of section 3.3.
            discriminator.requires_grad_(False)
            with autocast:
                logits = discriminator(source, fake)
            loss_gan = generator_loss(logits.float())
            loss_l1 = F.l1_loss(fake.float(), target)
            loss_g = args.gan_weight * loss_gan + args.l1_weight * loss_l1
            optimizer_g.zero_grad()
            loss_g.backward()
            average_gradients(generator)
            optimizer_g.step()
            discriminator.requires_grad_(True)

            # Add up the metrics on the GPU. .item() would wait for it.
            with torch.no_grad():
                sums["loss_d"] += loss_d
                sums["loss_g_gan"] += loss_gan
                sums["loss_g_l1"] += loss_l1

        if RANK == 0:
            with autocast:
                grid, tested = evaluate(generator, held_out, args, device)
            print("  ".join(f"{name} {mean:.5g}" for name, mean in tested.items()), flush=True)
            history[-1] = {"epoch": epoch, **tested, **history[-1]}
            # Save the checkpoint last: a run killed before that repeats this epoch.
            save_grid(grid, samples / f"epoch_{epoch:04d}.png", columns=6)
            save(state, history, args)

    if RANK == 0:
        print(f"done after epoch {len(history)}, pictures in {samples}")


def average_gradients(network):
    """Averages the gradients over all processes, so that they all take the same step."""
    if WORLD_SIZE > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad.div_(WORLD_SIZE))


@torch.no_grad()
def translate(generator, source, seed):
    """Returns G(source, z) for one source (1, C, H, W), with the dropout that `seed` draws."""
    torch.manual_seed(seed)  # training is seeded again in each epoch
    return generator.forward(source).float()  # uncompiled, or it would recompile for this size


def evaluate(generator, held_out, args, device):
    """Translates the held-out pairs. Returns source, output and target of the first 8, (24, C, H,
    W), and the means of L1 and PSNR, the latter in dB."""
    grid = []
    l1 = psnr = 0
    for pair in held_out.split(1):
        source, target = source_and_target(pair.to(device), args)
        output = translate(generator, source, args.seed)
        mse = F.mse_loss(output, target).clamp(min=1e-10)
        l1 += F.l1_loss(output, target).item()
        psnr += 10 * math.log10(4 / mse)  # 4: the square of the range of values
        if len(grid) < 24:
            grid += [source, output, target]
    count = len(held_out)
    return torch.cat(grid), {"val_l1": l1 / count, "val_psnr": psnr / count}


def sample(args, checkpoint):
    """Translates the held-out pairs or --input: single images, and a grid of the first."""
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.width).to(device)
    generator.load_state_dict(checkpoint["generator"])
    generator.train(not args.deterministic)  # with dropout, as in training
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    folder = args.input
    if folder is None:
        download(args)
        pairs, names = load_pairs(args, train=False)
    else:
        if os.path.isfile(folder):
            names = [folder.name]
            folder = folder.parent
        else:
            names = list_files(folder)
        # Pairs of an image with itself, so that the sources are made as in training.
        pairs, names = read_pairs([folder, folder], names, args.image_size)

    out = new_folder(args.out_dir / "generated")
    grid = []
    for pair, name in zip(pairs.split(1), names[: args.num_samples]):
        source, target = source_and_target(pair.to(device), args)
        with autocast:
            output = translate(generator, source, args.seed)
        if len(grid) < 48:
            grid += [source, output] if folder else [source, output, target]

        image = to_pil_image((output[0] * 127.5 + 128).byte())
        if folder:
            image = image.resize(read_image(folder / name).size)
        path = (out / name).with_suffix(".png")
        while path.exists():  # a.gif and a.jpg would both become a.png
            path = Path(f"{path}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    save_grid(torch.cat(grid), f"{out}.png", columns=4 if folder else 6)
    print(f"translated images in {out}, a grid in {out}.png")


def source_and_target(pairs, args):
    """Maps pairs, uint8 (B, 2, 3, H, W), to sources and targets, floats (B, 3, H, W) in [-1, 1]."""
    a, b = (pairs / 127.5 - 1).unbind(1)
    return (a, b) if args.direction == "AtoB" else (b, a)


def download(args):
    """Downloads facades or maps if they are not in --data-dir, whole or not at all.

    Without --dataset and without facades, sets args.dataset to synthetic."""
    name = args.dataset or "facades"
    folder = Path(args.data_dir, name)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine
    if name in ("facades", "maps") and first and not folder.exists():
        url = URL.format(name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                # 10 seconds, so that no download hangs. Mode "r|gz" would not notice an archive
                # that ends between two files.
                with urllib.request.urlopen(url, timeout=10) as response:
                    with tarfile.open(fileobj=gzip.open(response), mode="r|") as archive:
                        archive.extractall(part, filter="data")
                if not folder.exists():  # another machine may have the same disk
                    os.replace(Path(part, name), folder)
        except (OSError, EOFError, tarfile.TarError, zlib.error, HTTPException) as error:
            reason = f"no {folder}, and no download: {error}"
            # Never replace a set the user named. Several processes must train on the same one.
            if args.dataset or WORLD_SIZE > 1:
                sys.exit(f"error: {reason} from {url}")
            print(f"warning: {reason}: training on synthetic facades", file=sys.stderr)
            args.dataset = "synthetic"
    if WORLD_SIZE > 1:
        dist.barrier()  # wait for the download
    args.dataset = args.dataset or name


def load_pairs(args, train):
    """Returns this process's share of the training pairs, or all held-out pairs, and their names:
    uint8 (N, 2, 3, size, size), A first, for training with room for the jitter."""
    size = round(args.image_size * 286 / 256) if train and args.jitter else args.image_size
    share = slice(RANK, None, WORLD_SIZE) if train else slice(None)
    if args.dataset == "synthetic":
        pairs = synthetic_facades(400 if train else 100, size, seed=int(train))[share]
        names = [f"{n:05d}" for n in range(len(pairs))]
    else:
        folder = Path(args.data_dir)
        if args.dataset != "folder":
            folder /= args.dataset
        sides, names = find_pairs(folder, train)
        pairs, names = read_pairs(sides, names[share], size)
    if WORLD_SIZE > 1 and train:
        # Equal shares, so that all processes make the same number of steps.
        counts = [0] * WORLD_SIZE
        dist.all_gather_object(counts, len(pairs))
        pairs = pairs[: min(counts)]
    return pairs, names


def find_pairs(folder, train):
    """Returns the folders with the two sides of the split's pairs, or the one folder with files
    that hold both, and the names of the files."""
    apart = os.path.isdir(folder / "A")
    split = "val" if os.path.isdir(folder / "val") else "test"
    sides = ["A", "B"] if apart else ["train" if train else split]
    sides = [folder / side for side in sides]
    names = {name for side in sides for name in list_files(side)}
    names = sorted(names - {"Thumbs.db", "desktop.ini"})  # Windows' own
    nested = any(os.sep in name for name in names)
    if not names or nested or apart == os.path.isdir(folder / "train"):
        sys.exit(
            f"error: {folder} must have train/ and val/ (or test/) with files that hold A and B "
            f"side by side, or A/ and B/ with files of equal names, and no folders in these"
        )
    if apart:
        held_out = {*(names[9::10] or names[-1:])}
        names = [name for name in names if (name in held_out) != train]
    return sides, names


def read_pairs(sides, names, size):
    """Returns the pairs that can be read, uint8 (N, 2, 3, size, size), and their names.

    They are in a temporary file that is mapped into memory, so that the set may be larger than
    memory."""
    file = tempfile.TemporaryFile()
    kept = []
    square = None
    skipped = Counter()  # by suffix
    paths = [[side / name for side in sides] for name in names]
    with ThreadPoolExecutor() as pool:
        for name, (pair, note) in zip(names, pool.map(read_pair, paths, itertools.repeat(size))):
            if pair is None:
                skipped[Path(name).suffix] += 1
                if skipped.total() <= 5:
                    print(f"skipped {note}", file=sys.stderr)
                continue
            square = square or note
            file.write(pair.numpy().tobytes())
            kept.append(name)
    if skipped.total() > 5:
        print("skipped files by suffix:", dict(skipped), file=sys.stderr)
    if not kept:
        sys.exit(f"error: no images read from {sides[0]}, or under torchrun fewer than processes")
    if square:
        print(f"warning: {square}", file=sys.stderr)
    pairs = np.memmap(file, mode="c", shape=(len(kept), 2, 3, size, size))
    return torch.from_numpy(pairs), kept


def list_files(folder):
    """Returns the names of all files below `folder`, relative to it and sorted, without hidden
    ones. Reads a folder once, however many links lead to it. Reports unreadable ones on stderr."""
    names = []
    seen = set()
    skip = partial(print, "skipped", file=sys.stderr)
    for parent, folders, files in os.walk(folder, onerror=skip, followlinks=True):
        real = os.path.realpath(parent)
        for entries in (folders, files):
            entries[:] = sorted(e for e in entries if e[0] != "." and real not in seen)
        seen.add(real)
        names += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    return sorted(names)


def read_pair(paths, size):
    """Returns the pair, uint8 (2, 3, size, size), A first, and a warning or None; or None and an
    error."""
    try:
        images = [read_image(path) for path in paths]
    except OSError as error:
        return None, error
    a = images[0]
    b = images[-1]
    note = None
    if len(paths) == 1:
        if a.width == a.height:
            note = f"{paths[0]} is square, but was cut in half: A and B must be side by side"
        half = a.width // 2
        b = a.crop((half, 0, a.width, a.height))
        a = a.crop((0, 0, half, a.height))
    if a.size != b.size:
        return None, f"{paths[0]}: the sizes of A and B differ: {a.size} and {b.size}"
    return torch.stack([to_square(a, size), to_square(b, size)]), note


def read_image(path):
    """Returns the image, upright and in RGB. Raises OSError with the path and Pillow's error."""
    try:
        image = Image.open(path)
        if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PPM", "PNG")):
            raise ValueError(f"its values ({image.mode}) have no agreed black and white")
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"{path}: {error}") from error
    if image.mode.startswith("I"):  # unsigned 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_square(image, size):
    return pil_to_tensor(image.resize((size, size)))  # bicubic, as is Pillow's default


def synthetic_facades(count, size, seed):
    """`count` drawn facades and their labels, in CMP's colours, under random affine maps: uint8
    (count, 2, 3, size, size)."""
    torch.manual_seed(seed)
    labels = torch.tensor([(0, 0, 222), (0, 48, 255), (0, 128, 255)])  # sky, wall, window
    pairs = torch.empty(count, 2, 3, size, size, dtype=torch.uint8)
    for pair in pairs:
        kinds = torch.zeros(1, 1, 16, 16)
        kinds[..., 2:, 2:14] = 1
        kinds[..., 3:15:2, 3:13:2] += torch.rand(6, 5) < 0.8
        # The identity, with each entry changed by up to a quarter.
        maps = torch.eye(2, 3) + torch.empty(1, 2, 3).uniform_(-0.25, 0.25)
        grid = F.affine_grid(maps, (1, 1, size, size), align_corners=False)
        kinds = F.grid_sample(kinds, grid, "nearest", align_corners=False).long().squeeze()
        colors = torch.randint(60, 220, (3, 3))
        colors[2] //= 3
        photo = colors[kinds] + torch.randint(-20, 21, (size, size, 1))
        pair[:] = torch.stack([photo, labels[kinds]]).permute(0, 3, 1, 2)
    return pairs


# Seconds between two lines of progress, and what a line starts and ends with. On a terminal: clear
# the old one, cut the new one at the edge (?7l to ?7h), and go back to its start.
PAUSE = 60
START = ""
END = "\n"
if sys.stdout.isatty():
    PAUSE = 0.5
    START = "\033[K\033[?7l"
    END = "\033[?7h\r"


def progress(batches, sums, history, args):
    """Yields the batches of an epoch, and prints the means of `sums` over the steps so far.

    At the end of the epoch, appends them to `history`."""
    epoch = len(history) + 1
    began = shown = perf_counter()
    for step, batch in enumerate(batches, 1):
        yield batch
        done = step / len(batches)
        if done < 1 and perf_counter() - shown < PAUSE:
            continue

        row = {name: float(total) / step for name, total in sums.items()}  # waits for the GPU
        shown = perf_counter()
        seconds = shown - began
        rate = step * len(batch) * WORLD_SIZE / seconds
        left = ((args.epochs - epoch + 1) / done - 1) * seconds / 60
        line = f"{START}epoch {epoch}/{args.epochs}  {done:.0%}  {left:.0f} min left"
        for name, mean in row.items():
            line += f"  {name} {mean:.3g}"
        if RANK == 0:
            end = END if done < 1 else END.replace("\r", "\n")
            print(f"{line}  {rate:,.0f} images/s", end=end, flush=True)

    if history:
        seconds += history[-1]["seconds"]  # of the whole run
    history.append(
        {
            "epoch": epoch,
            **row,
            "images_per_second": rate,
            "seconds": seconds,
        }
    )


def save(state, history, args):
    """Writes args.json, metrics.csv and, every --save-every epochs, replaces checkpoint.pt in one
    step: a kill or a full disk leaves the old one or the new one. Ends the program if a metric is
    not finite."""
    if not all(map(math.isfinite, history[-1].values())):
        sys.exit(f"error: not finite, so not saved: lower --lr: {history[-1]}")

    # Leave out the flags that are for this command only.
    flags = vars(args) | dict.fromkeys(("cuda", "out_dir", "resume", "sample"))
    # weights_only=True requires plain values. argparse turns strings into paths again.
    checkpoint = json.dumps({"script": NAME, "args": flags, "metrics": history}, default=os.fspath)
    checkpoint = json.loads(checkpoint)
    (args.out_dir / "args.json").write_text(json.dumps(checkpoint["args"], indent=4))
    with open(args.out_dir / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, history[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)

    for name, part in state.items():
        checkpoint[name] = part.state_dict()
    epoch = len(history)
    names = []
    if args.keep_every and epoch % args.keep_every == 0:
        names = [f"checkpoint_{epoch:04d}.pt"]
    if names or epoch % args.save_every == 0 or epoch == args.epochs:
        names.append("checkpoint.pt")
    new = args.out_dir / "checkpoint.part"
    for name in names:
        # In memory first: on a full disk, torch.save() to a file would raise a RuntimeError.
        data = io.BytesIO()
        torch.save(checkpoint, data)
        new.write_bytes(data.getbuffer())
        os.replace(new, args.out_dir / name)


def new_folder(path):
    """Makes and returns the first of the folders `path`, `path`-2, `path`-3, ... that is free."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        folder = Path(f"{path}-{n}" if n > 1 else path)
        # Never overwrite a grid of samples, even if its folder is gone.
        if not os.path.exists(f"{folder}.png"):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # perhaps made just now by another process
                continue


def positive(text):
    """For argparse: a whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    """Returns the arguments, and the checkpoint that --resume or --sample names, else None."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    number = {"type": positive, "metavar": "N"}
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--epochs", **number, default=200, help="total passes over the training set (%(default)s)")
    decay = "epochs at the end over which --lr falls (0)"
    add("--decay-epochs", type=int, metavar="N", default=0, help=decay)
    add("--batch-size", **number, default=1, help="pairs per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="Adam's learning rate (%(default)s)")
    add("--l1-weight", type=float, default=100.0, help="weight of the L1 loss (%(default)s)")
    add("--gan-weight", type=float, default=1.0, help="weight of the GAN loss (%(default)s)")
    add("--seed", type=int, default=0, help="makes CPU runs bit-reproducible (0)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, one per process")
    add("--bf16", **switch, help="autocast to bfloat16")
    add("--compile", **switch, help="torch.compile the networks")
    sets = ("facades", "maps", "folder", "synthetic")
    add("--dataset", choices=sets, help="default: facades, if available")
    where = "where the data sets are, or your pairs (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    add("--direction", choices=("AtoB", "BtoA"), help="AtoB; for facades and synthetic, BtoA")
    sizes = (32, 64, 128, 256, 512, 1024)
    add("--image-size", type=int, choices=sizes, default=256, help="(%(default)s)")
    jitter = {**switch, "default": True}
    add("--jitter", **jitter, help="random crop and mirroring of the training pairs (on)")
    add("--width", **number, default=64, help="channels of the narrowest level (%(default)s)")
    add("--out-dir", type=Path, help="default: a new folder in runs/")
    add("--save-every", **number, default=5, help="epochs between checkpoints (%(default)s)")
    add("--keep-every", **number, help="also keep every N-th epoch's checkpoint")
    use = parser.add_mutually_exclusive_group().add_argument
    use("--resume", type=Path, help="continue from that run or checkpoint")
    use("--sample", type=Path, help="translate the held-out pairs with that run or checkpoint")
    add("--num-samples", **number, help="with --sample: number of images (all)")
    add("--input", type=Path, help="with --sample: translate this image or folder")
    add("--deterministic", action="store_true", help="with --sample: without dropout")

    args = parser.parse_args(argv)
    if (args.input or args.deterministic) and not args.sample:
        parser.error("--input and --deterministic need --sample")
    checkpoint = None
    path = args.resume or args.sample
    if path:
        if os.path.isdir(path):
            path /= "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["script"] != NAME:
                raise ValueError(f"it is of {checkpoint['script']}.py")
            # What the checkpoint saved becomes the default, so that no flag need be repeated.
            parser.set_defaults(**checkpoint["args"])
        except Exception as error:  # torch.load raises many kinds
            parser.error(f"{path} cannot be read as a checkpoint of {NAME}.py: {error!r:.99}")
        if args.sample or path.name == "checkpoint.pt":
            parser.set_defaults(out_dir=path.parent)
        args = parser.parse_args(argv)

    if args.out_dir and not args.sample and os.path.isdir(args.out_dir):
        newest = (args.out_dir / "checkpoint.pt").resolve()
        if os.listdir(args.out_dir) and (not path or path.resolve() != newest):
            parser.error(f"{args.out_dir} is not empty: --resume it, or use another --out-dir")
    if not 0 < args.lr <= 1:
        parser.error("--lr must be above 0 and at most 1")
    if not 0 <= args.decay_epochs <= args.epochs:
        parser.error("--decay-epochs must be 0 to --epochs")
    if args.direction is None:
        args.direction = "AtoB" if args.dataset in ("maps", "folder") else "BtoA"
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    run = sample if args.sample else train
    try:
        run(args, checkpoint)
    except OSError as error:
        # The run's folder cannot be written, is gone, or the disk is full.
        if isinstance(error, FileNotFoundError) and f"{args.out_dir}/" not in str(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        line = "stopped"
        if run is train and RANK == 0:
            line += " before the first checkpoint"
            if os.path.exists(f"{args.out_dir}/checkpoint.pt"):
                line = f"stopped; to continue: python {NAME}.py --resume {args.out_dir}"
        print(f"\n{line}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
