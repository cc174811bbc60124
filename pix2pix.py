"""pix2pix: Isola, Zhu, Zhou & Efros, "Image-to-Image Translation with Conditional Adversarial Networks" (2017,
arXiv:1611.07004).

    python pix2pix.py --cuda                                         facades, labels to photo, downloaded to data/
    python pix2pix.py --dataset folder --data-dir pairs --cuda       your own pairs
    torchrun --nproc-per-node 8 pix2pix.py --cuda                    eight GPUs, --batch-size is that of each
    python pix2pix.py --resume runs/pix2pix/checkpoint.pt            go on
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt            translate the held-out pairs
    python pix2pix.py --sample runs/pix2pix/checkpoint.pt --input sketches

A folder of pairs holds train/ and a held-out val/ (or test/), files with A and B side by side; or A/ and B/ with equal
file names. Where A/ and B/ have no such folders of their own, every tenth pair is held out.

Writes to runs/pix2pix: checkpoint.pt, metrics.csv, and samples/epoch_0001.png, ..., rows of source, output and target,
twice, for the same held-out pairs after every epoch.

Measured on facades, labels to photo, at 64x64 with --width 32 --bf16 (torch 2.15, one core of an AMD EPYC with AVX-512
bf16): held-out L1 0.340 and 13.3 dB after 20 epochs, 0.348 and 13.0 dB after 100; the labels that tests/benchmark.py's
segmenter reads in the results are right at 79 and 93 % of the rate of real photos (L1 alone: 60 % after 20). At 256x256
on two cores 0.48 s a step with --bf16 and 0.67 s without, against 0.84 s of a plain loop in the same process. Not yet
run on a GPU.

Differences from the paper:
1. Inference takes one image at a time, by its own statistics, with the same dropout for each, drawn from --seed: an
   output depends on its source and the seed alone. --deterministic leaves dropout out.
2. The U-Net has a level for each halving of --image-size, at most 8; at 256 it is the paper's. A 1x1
   bottleneck has no norm, as in the authors' code: a single pixel less its mean is 0.
3. D halves an image three times whatever its size, so at 64 pixels one of its patches is the whole of it.
4. The rate is constant, as in section 6.2; --decay-epochs is what the authors' later PyTorch code does by default.
5. Images are resized to a square, and in two folders paired by name: as in the authors' code, not in the paper.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from common import save_grid, select_device

FORMAT = "pix2pix 1"  # marks a checkpoint: one of another script, or of another version, is refused
ARCHIVES = ("facades", "maps")  # the authors', with train/, val/ and, facades, test/
URL = "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{}.tar.gz"
NETWORK = ("dataset", "direction", "image_size", "norm", "width")  # what a checkpoint fixes
METRICS = ("loss_d", "loss_g_gan", "loss_g_l1", "val_l1", "val_psnr")  # L1 of images in [-1, 1], PSNR in dB
WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")  # others become PNG
IN_MEMORY = 2**32  # bytes of pairs on the device; a larger folder streams from the disk
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
    parser = argparse.ArgumentParser("pix2pix.py", argparse.SUPPRESS)  # no usage, which would go before every error
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=above(0), default=200, metavar="N", help="passes over the training set (%(default)s)")
    add("--decay-epochs", type=above(-1), default=0, metavar="N", help="the last of them, over which --lr falls to 0")
    add("--batch-size", type=above(0), default=1, metavar="N", help="pairs per step and process (%(default)s)")
    add("--lr", type=above(0, float, math.inf), default=2e-4, metavar="X", help="learning rate of Adam (%(default)s)")
    add("--l1-weight", type=above(-1, float, math.inf), default=100.0, metavar="X", help="of the L1 loss (%(default)s)")
    add("--gan-weight", type=above(-1, float, math.inf), default=1.0, metavar="X", help="0: no D at all (%(default)s)")
    add("--seed", type=above(-1), default=0, metavar="N", help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="train on the GPU; under torchrun, each process on its own")
    add("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add = parser.add_argument_group("data").add_argument
    datasets = (*ARCHIVES, "folder", "synthetic")
    add("--dataset", choices=datasets, help="default: facades, or synthetic if offline")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are; with folder, the pairs")
    add("--direction", choices=("AtoB", "BtoA"), help="default: AtoB; facades and synthetic BtoA, labels to photo")
    add("--image-size", type=int, default=256, metavar="N", help="a power of two from 32 to 512 (%(default)s)")
    add("--jitter", action=argparse.BooleanOptionalAction, default=True, help="crop from 286/256 of the size, mirror")
    add = parser.add_argument_group("networks").add_argument
    add("--width", type=above(0), default=64, metavar="N", help="channels of the narrowest level (%(default)s)")
    add("--norm", choices=("batch", "instance"), default="batch", help="the same at one pair per step (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, metavar="DIR", help="where to write; default: the first free of runs/pix2pix, -2, ...")
    add("--resume", type=Path, metavar="CKPT", help="continue from that checkpoint, in its folder")
    add("--sample", type=Path, metavar="CKPT", help="no training: translate images, to the folder of that checkpoint")
    add("--num-samples", type=above(0), metavar="N", help="how many images --sample writes; default: all")
    add("--input", type=Path, metavar="DIR", help="with --sample: the images to translate; default: held-out pairs")
    add("--deterministic", action="store_true", help="with --sample: without dropout")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    try:
        if args.resume and args.sample or (args.input or args.deterministic) and not args.sample:
            raise ValueError("--input and --deterministic need --sample, and --sample excludes --resume")
        if path:  # its arguments become the defaults, so that no other flag is needed
            checkpoint = load_checkpoint(path)
            parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
            args = parser.parse_args(argv)
            for name in (*NETWORK, "seed") if args.resume else NETWORK:
                if getattr(args, name) != checkpoint["args"][name]:
                    raise ValueError(f"--{name.replace('_', '-')} is fixed by {path}: leave it out")
        args.checkpoint, args.data_dir = checkpoint, os.path.abspath(args.data_dir)  # to resume from another folder
        args.direction = args.direction or ("AtoB" if args.dataset in ("maps", "folder") else "BtoA")
        if args.image_size not in (32, 64, 128, 256, 512):
            raise ValueError("--image-size: the U-Net halves it level by level, so 32, 64, 128, 256 or 512")
        if min(args.l1_weight, args.gan_weight) < 0 or args.l1_weight == args.gan_weight == 0:
            raise ValueError("--l1-weight, --gan-weight: neither below 0, nor both 0")
        if args.decay_epochs > args.epochs:
            raise ValueError("--decay-epochs are part of --epochs, so at most as many")
        args.training = not args.sample
        written = args.out_dir and args.out_dir / "checkpoint.pt"
        if args.training and written and written.exists() and not (args.resume and args.resume.samefile(written)):
            raise ValueError(f"{args.out_dir} holds a run: --resume {written}, or choose another --out-dir")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def load_pairs(args, split, device):
    """The pairs of the split "train" or of "val", held out: uint8 (N, 2, 3, size, size) on the device, A first, or the
    PairFiles to stream them from. In "train" the size has room for the jitter.

    Where no set was named and facades cannot be had, warns and sets args.dataset to synthetic. Raises OSError if a
    named set is neither there nor downloadable, or with the path of a file that is no pair."""
    size = round(args.image_size * 286 / 256) if split == "train" and args.jitter else args.image_size
    folder = Path(args.data_dir)
    if args.dataset in (None, *ARCHIVES):
        name = args.dataset or "facades"
        folder = folder / name
        try:
            if not folder.exists():
                download(name, folder.parent)
            args.dataset = name
        except Exception as error:  # no network, no room, a truncated archive: many kinds
            why = " ".join(str(error).split())
            reason = f"{name} is not in {args.data_dir}, and its download failed ({why})"
            if args.dataset or RANKS > 1:  # or some of the processes could train on another set
                raise OSError(f"{reason}: put it there, or choose another --data-dir or --dataset") from error
            print(f"warning: {reason}, training on synthetic facades", file=sys.stderr)
            args.dataset = "synthetic"
    if args.dataset == "synthetic":
        pairs = synthetic_facades(*((400, 0) if split == "train" else (100, 1)))
        return resize(pairs.flatten(0, 1), [size, size]).view(-1, 2, 3, size, size).to(device)

    files = PairFiles(find_pairs(folder, split), size)
    fits = len(files) * 6 * size**2 <= IN_MEMORY
    pairs = torch.empty(len(files) if fits else 0, 2, 3, size, size, dtype=torch.uint8)
    for n, pair in enumerate(DataLoader(files, batch_size=None, num_workers=WORKERS)):
        if TERMINAL:
            print(f"\rdecoding {n + 1:,} of {len(files):,} pairs", end="\n" if n + 1 == len(files) else "", flush=True)
        pair = whole(pair)
        if fits:
            pairs[n] = pair
    return pairs.to(device) if fits else files


def download(name, folder):
    """Makes folder/name from the authors' archive, whole or not at all; a member that points outside it is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    if TERMINAL:
        print(f"downloading {URL.format(name)} to {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        with urllib.request.urlopen(URL.format(name), timeout=10) as response:  # seconds; a dead network would hang
            with tarfile.open(fileobj=response, mode="r|gz") as archive:
                archive.extractall(part, filter="data")
        os.replace(Path(part) / name, folder / name)


def find_images(folder):
    """The image files below `folder`, by their suffixes, in order; names what it leaves out, but not hidden files."""
    images, suffixes = [], Image.registered_extensions()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() in suffixes:
            images.append(path)
        elif RANK == 0:
            print(f"skipped {path}: no image by its name", file=sys.stderr)
    return images


def find_pairs(folder, split):
    """The files of a split: [(path,), ...] of side-by-side pairs, or [(path in A, path in B), ...]."""
    sides = [folder / "A", folder / "B"]
    apart = all(side.is_dir() for side in sides)
    if split == "val" and not ((sides[0] if apart else folder) / "val").is_dir():
        split = "test"
    if not apart:
        pairs = [(path,) for path in find_images(folder / split)]
    else:
        parted = (sides[0] / "train").is_dir()
        sides = [side / split if parted else side for side in sides]
        names = [{path.relative_to(side) for path in find_images(side)} for side in sides]
        for name in sorted(names[0] ^ names[1]):
            there, missing = sides if name in names[0] else sides[::-1]
            raise OSError(f"{there / name} has no partner: {missing / name} is missing")
        pairs = [tuple(side / name for side in sides) for name in sorted(names[0])]
        if not parted:
            held_out = pairs[9::10] or pairs[-1:]
            pairs = sorted({*pairs} - {*held_out}) if split == "train" else held_out
    if not pairs:
        raise OSError(f"no {split} pairs in {folder}: it needs train/ and val/ or test/, or A/ and B/ with two pairs")
    return pairs


class PairFiles(Dataset):
    """Pairs of image files as uint8 (2, 3, size, size), A first. For what is no pair: a string, its path and why."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        try:
            images = [open_image(path) for path in self.pairs[i]]
            if len(images) == 1:
                (both,) = images
                if both.width % 2:
                    raise ValueError(f"two images side by side have an even width, this has {both.width}")
                w = both.width // 2
                images = [both.crop((left, 0, left + w, both.height)) for left in (0, w)]
            elif images[0].size != images[1].size:
                raise ValueError(f"its size is {images[0].size}, that of {self.pairs[i][1]} is {images[1].size}")
            return torch.stack([to_network_size(image, self.size) for image in images])
        except Exception as error:  # Pillow's decoders raise many kinds
            return f"{self.pairs[i][0]}: {error}"


def stacked(pairs):
    """What PairFiles gives for a batch as one tensor, so that workers pass one file on; or the first string in it."""
    return next((pair for pair in pairs if isinstance(pair, str)), None) or torch.stack(pairs)


def whole(pair):
    """What PairFiles or stacked() gives; OSError if it is why there is no pair."""
    if isinstance(pair, str):
        raise OSError(pair)
    return pair


def open_image(path):
    """An RGB image, upright, whatever the file's mode."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_network_size(image, size):
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def synthetic_facades(count, seed):
    """`count` pairs, a rendered facade and its labels in the colours of CMP's: uint8 (count, 2, 3, 256, 256)."""
    random, pairs = np.random.default_rng(seed), []
    down = np.linspace(0, 1, 256)[:, None, None]
    for _ in range(count):
        sky = (120, 170, 230) + (1 - down) * (-60, -40, 20) + random.normal(0, 12, 3)
        photo = Image.fromarray(np.broadcast_to(sky.clip(0, 255).astype(np.uint8), (256, 256, 3)).copy())
        labels = Image.new("RGB", (256, 256), (0, 0, 222))  # background
        on_photo, on_labels = ImageDraw.Draw(photo), ImageDraw.Draw(labels)

        def box(x, y, w, h, color, label=None):
            on_photo.rectangle((x, y, x + w - 1, y + h - 1), tuple(np.clip(color, 0, 255).astype(int)))
            if label:
                on_labels.rectangle((x, y, x + w - 1, y + h - 1), label)

        wall, glass = random.uniform((110, 70, 50), (220, 190, 170)), random.uniform(20, 80) + np.array((0, 8, 20))
        left, top, margin = random.integers(0, 40, 3)
        floors, columns = random.integers(3, 7, 2)
        width, height = (256 - left - margin) // columns, (206 - top) // floors  # of a window and the wall around it
        w, h = int(width * random.uniform(0.35, 0.65)), int(height * random.uniform(0.45, 0.7))
        box(left, top, 256 - left - margin, 256 - top, wall, (0, 48, 255))  # facade
        box(left, top, 256 - left - margin, 8, 1.2 * wall, (255, 80, 0))  # cornice
        balconies, first = random.random() < 0.4, left + (width - w) // 2
        for y, x in itertools.product(top + 14 + height * np.arange(floors), first + width * np.arange(columns)):
            box(x, y, w, h, 0.5 * wall, (0, 128, 255))  # window
            box(x + 2, y + 2, w - 4, h - 4, glass)
            on_photo.polygon([(x + 2, y + 2), (x + w - 3, y + 2), (x + 2, y + h // 2)], tuple((glass + 50).astype(int)))
            box(x + w // 2, y, 2, h, 0.8 * wall)
            box(x - 2, y + h, w + 4, 4, 1.15 * wall, (112, 255, 142))  # sill
            if balconies:
                box(x - 3, y + h - h // 3, w + 6, h // 3, (45, 45, 50), (192, 255, 63))
        box(left, 226, 256 - left - margin, 30, 0.6 * wall, (174, 0, 0))  # shop
        door = random.uniform((40, 20, 10), (120, 70, 50))
        box(first + width * random.integers(columns), 214, w, 42, door, (0, 207, 255))
        light = 1 + random.normal(0, 0.15) * (down - 0.5) + random.normal(0, 0.03, (256, 256, 1))
        pairs.append(np.stack([(np.asarray(photo) * light).clip(0, 255).astype(np.uint8), np.asarray(labels)]))
    return torch.from_numpy(np.stack(pairs)).permute(0, 1, 4, 2, 3).contiguous()


def batches(pairs, args, device):
    """One epoch in random order, dealt out to the processes, the last partial batch dropped:
    source and target as in split_pairs(), jittered."""
    order = torch.randperm(len(pairs)).to(device)
    if RANKS > 1:
        dist.broadcast(order, 0)
    steps = len(pairs) // (args.batch_size * RANKS)
    order = order[: steps * RANKS * args.batch_size].view(steps, RANKS, args.batch_size)[:, RANK]
    if isinstance(pairs, torch.Tensor):
        parts = (pairs.index_select(0, index) for index in order)
    else:  # a generator of its own, or DataLoader would draw from the one that training draws from
        options = dict(collate_fn=stacked, num_workers=WORKERS, generator=torch.Generator())
        parts = DataLoader(pairs, batch_sampler=order.tolist(), **options)
        parts = (whole(part).to(device) for part in parts)
    for part in parts:
        yield split_pairs(jitter(part, args.image_size) if args.jitter else part, args.direction)


def jitter(pairs, size):
    """Random crops of (B, 2, 3, larger, larger) to `size`, half of them mirrored: section 6.2, drawn once a pair."""
    top, left = torch.randint(pairs.shape[-1] - size + 1, (2, len(pairs))).tolist()
    mirror = torch.randint(2, (len(pairs),)).tolist()
    crops = [pair[..., y : y + size, x : x + size] for pair, y, x in zip(pairs, top, left)]
    return torch.stack([crop.flip(-1) if mirrored else crop for crop, mirrored in zip(crops, mirror)])


def split_pairs(pairs, direction):
    """uint8 pairs (B, 2, 3, H, W) to source and target, each floats (B, 3, H, W) in [-1, 1]."""
    a, b = map(to_floats, pairs.unbind(1))
    return (a, b) if direction == "AtoB" else (b, a)


def to_floats(x):
    return x.float().div(127.5).sub(1).contiguous(memory_format=memory_format(x.device))


def memory_format(device):
    """channels_last for cuDNN; on a CPU it would make a step of one pair a third longer, most of it in Adam."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def normalization(norm, channels):
    """Always by the statistics of its own input, in eval mode too: section 3.3."""
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels, track_running_stats=False)


class Generator(nn.Module):
    """U-Net from source to image, (B, 3, image_size, image_size) in [-1, 1]: section 6.1.1. Dropout is its noise z."""

    def __init__(self, image_size, width, norm):
        super().__init__()
        levels = min(image_size.bit_length() - 1, 8)  # down to 1x1; from 512 to 2x2
        channels = [width * min(2**i, 8) for i in range(levels)]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(channels):  # (B, channels[i-1], h, h) to (B, c, h/2, h/2)
            normed = i > 0 and image_size >> (i + 1) > 1  # a single pixel less its mean would be 0
            level = [nn.LeakyReLU(0.2)] if i > 0 else []
            level += [nn.Conv2d(channels[i - 1] if i > 0 else 3, c, 4, 2, 1, bias=not normed)]
            level += [normalization(norm, c)] if normed else []
            self.encoder.append(nn.Sequential(*level))
        for i in reversed(range(1, levels)):  # (B, channels[i] and the skip's, h, h) to (B, channels[i-1], 2h, 2h)
            skip = 1 if i == levels - 1 else 2
            level = [nn.ReLU(), nn.ConvTranspose2d(skip * channels[i], channels[i - 1], 4, 2, 1, bias=False)]
            level += [normalization(norm, channels[i - 1])]
            level += [nn.Dropout(0.5)] if i >= levels - 3 else []
            self.decoder.append(nn.Sequential(*level))
        self.decoder.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh()))
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

    def __init__(self, width, norm):
        c = width
        levels = [nn.Conv2d(6, c, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]  # (B, c, H/2, W/2)
        for stride in (2, 2, 1):
            levels += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), normalization(norm, 2 * c)]  # to H/8 - 1
            levels += [nn.LeakyReLU(0.2, inplace=True)]
            c *= 2
        super().__init__(*levels, nn.Conv2d(c, 1, 4, 1, 1))
        self.apply(initialize)

    def forward(self, source, image):
        return super().forward(torch.cat([source, image], 1))


def initialize(module):
    """Section 6.2: weights from N(0, 0.02). Those of the norms from N(1, 0.02), as in the authors' code; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d)):
        nn.init.normal_(module.weight, float(isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d))), 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x, y)] - E[log(1 - D(x, G(x, z)))], halved (section 3.3): eq. 1, which D maximizes, its sign changed."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    return (real + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))) / 2


def generator_loss(fake_logits):
    """-E[log D(x, G(x, z))]: section 3.3."""
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
    pairs, held_out = load_pairs(args, "train", device), load_pairs(args, "val", device)
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    steps = len(pairs) // (args.batch_size * RANKS)
    if steps == 0:
        reason = f"--batch-size: {args.dataset} has {len(pairs):,} pairs, too few for a step"
        raise argparse.ArgumentError(None, reason)

    torch.manual_seed(args.seed)
    generator = Generator(args.image_size, args.width, args.norm)
    discriminator = Discriminator(args.width, args.norm)
    generator.to(device, memory_format=memory_format(device))
    discriminator.to(device, memory_format=memory_format(device))
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
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
        for p, state in [*optimizer_g.state.items(), *optimizer_d.state.items()]:  # in this device's memory_format()
            state.update({name: torch.empty_like(p).copy_(mean) for name, mean in state.items() if mean.dim()})
        torch.set_rng_state(args.checkpoint["rng"])
        if device.type == "cuda" and args.checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(args.checkpoint["cuda_rng"], device)
    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs/pix2pix"))
        (args.out_dir / "samples").mkdir(parents=True, exist_ok=True)
    size = f"3x{args.image_size}x{args.image_size}"
    print(f"{args.dataset} {args.direction}: {len(pairs):,} pairs of {size}, {len(held_out):,} held out, ", end="")
    print(f"on {device.type}, to {args.out_dir}", flush=True)
    if start >= args.epochs:
        print(f"epoch {start} is done: raise --epochs to go on")

    for epoch in range(start + 1, args.epochs + 1):
        if RANK:  # noise of its own, and the same when resumed; the checkpoint holds the first process's state
            torch.manual_seed(hash((args.seed, epoch, RANK)))
        lr = args.lr * min(1, (args.epochs - epoch + 1) / (args.decay_epochs + 1))
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = lr
        totals = torch.zeros(3, device=device)
        began = shown = time.perf_counter()
        for step, (source, target) in enumerate(batches(pairs, args, device), 1):
            if args.compile:  # the last step's CUDA graphs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            with autocast:
                fake = ddp_g(source)
            loss_d = loss_gan = torch.zeros((), device=device)
            if args.gan_weight:
                # D: descend the halved -log D(x, y) - log(1 - D(x, G(x)))
                with autocast:
                    real_logits = ddp_d(source, target).float()
                    fake_logits = ddp_d(source, fake.detach()).float()
                loss_d = discriminator_loss(real_logits, fake_logits)
                optimizer_d.zero_grad()
                loss_d.backward()
                optimizer_d.step()

                with autocast:
                    logits = discriminator(source, fake).float()
                loss_gan = generator_loss(logits)
            # G: descend eq. 4, -log D(x, G(x)) + 100 |y - G(x)|, through the new D, whose own gradients are not taken
            loss_l1 = F.l1_loss(fake.float(), target)
            optimizer_g.zero_grad()
            (args.gan_weight * loss_gan + args.l1_weight * loss_l1).backward(inputs=list(generator.parameters()))
            optimizer_g.step()

            totals += torch.stack([loss_d, loss_gan, loss_l1]).detach()
            if RANKS > 1 and step == steps:
                dist.all_reduce(totals.div_(RANKS))
            if step == steps or TERMINAL and time.perf_counter() - shown > 0.5:
                means = (totals / step).tolist()  # only here does the CPU wait for the GPU
                shown = time.perf_counter()
                rate = step * args.batch_size * RANKS / (shown - began)
                left = timedelta(seconds=round((shown - began) / step * ((args.epochs - epoch + 1) * steps - step)))
                if step == steps:
                    with autocast:
                        grid, *tested = evaluate(generator, held_out, args, device)
                    means += tested
                losses = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(METRICS, means))
                line = f"epoch {epoch}/{args.epochs}  {step}/{steps}  {losses}  {rate:,.1f} images/s  {left} left"
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
        save_grid(grid, args.out_dir / "samples" / f"epoch_{epoch:04d}.png", columns=6)
        lines = [("epoch", *METRICS, "images_per_second", "seconds"), *rows]
        (args.out_dir / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= dict(format=FORMAT, epoch=epoch, seconds=seconds, metrics=rows, rng=torch.get_rng_state())
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kept = (*NETWORK, "epochs", "decay_epochs", "batch_size", "lr", "l1_weight", "gan_weight", "jitter")
        checkpoint["args"] = {name: getattr(args, name) for name in (*kept, "seed", "bf16", "compile", "data_dir")}
        save_checkpoint(checkpoint, args.out_dir / "checkpoint.pt")
        print(f"\r{line}" if TERMINAL else line, flush=True)
    if RANKS > 1:
        dist.destroy_process_group()


@torch.no_grad()
def translate(generator, source, seed):
    """G(source) for one source (1, 3, H, W), its dropout drawn from `seed` and not from the training's generator.

    One at a time, so that no output depends on other images: section 3.3."""
    with torch.random.fork_rng([source.device] if source.is_cuda else []):
        torch.manual_seed(seed)
        return generator.forward(source).float()  # uncompiled, also with --compile


def evaluate(generator, held_out, args, device):
    """Translates the held-out pairs: a grid of the first 8, (24, 3, H, W), their mean L1 and their mean PSNR in dB."""
    shown = min(len(held_out), 8)
    grid = torch.zeros(3 * shown, 3, args.image_size, args.image_size, device=device)
    sums = torch.zeros(2, device=device)
    for n in range(RANK, len(held_out), RANKS):
        source, target = split_pairs(whole(held_out[n])[None].to(device), args.direction)
        output = translate(generator, source, args.seed)
        psnr = 10 * torch.log10(4 / F.mse_loss(output, target).clamp(min=1e-10))  # 2 squared, the range of values
        sums += torch.stack([F.l1_loss(output, target), psnr])
        if n < shown:
            grid[3 * n : 3 * n + 3] = torch.cat([source, output, target])
    if RANKS > 1:
        dist.all_reduce(grid)
        dist.all_reduce(sums)
    return grid, *(sums / len(held_out)).tolist()


def sample(args):
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.width, args.norm)
    generator.load_state_dict(args.checkpoint["generator"])
    generator.to(device, memory_format=memory_format(device)).train(not args.deterministic)  # for dropout
    if args.input:
        paths = find_images(args.input)
        names = [path.relative_to(args.input) for path in paths]
    else:
        pairs = load_pairs(args, "val", device)
        names = [f"{n:05d}.png" for n in range(len(pairs))]
    folder, grid, count = None, [], 0
    for n, name in enumerate(names):
        if count == args.num_samples:
            break
        if args.input:
            try:
                images = [to_floats(to_network_size(open_image(paths[n]), args.image_size)[None].to(device))]
            except Exception as error:  # Pillow's decoders raise many kinds
                print(f"skipped {paths[n]}: {error}", file=sys.stderr)
                continue
        else:
            images = list(split_pairs(whole(pairs[n])[None].to(device), args.direction))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            images.insert(1, translate(generator, images[0], args.seed))  # source, output, and target if there is one
        folder, count = folder or first_free(args.out_dir / "generated"), count + 1
        path = folder / name
        if path.suffix.lower() not in WRITTEN:
            path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(images[1][0].add(1).mul(127.5).round().byte().cpu()).save(path, quality=95)
        grid += images if count <= 16 else []
    if not folder:
        raise OSError(f"no image in {args.input}: name the folder that holds them with --input")
    save_grid(torch.cat(grid), folder.with_suffix(".png"), columns=2 * len(images))
    print(f"{count:,} images in {folder}, a grid in {folder}.png")


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
        sys.exit(f"pix2pix.py: error: {error}")
    except RuntimeError as error:
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"pix2pix.py: error: --compile does not work here: {str(error).splitlines()[0]}")
        if any(word in str(error) for word in ("out of memory", "allocate", "ALLOC_FAILED", "overflowed")):
            sys.exit("pix2pix.py: error: out of memory: lower --batch-size, --width or --image-size")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            sys.exit(f"pix2pix.py: error: {str(error).splitlines()[0]} (did another process end? --resume goes on)")
        raise


if __name__ == "__main__":
    main()
