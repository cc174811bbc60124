"""Deep convolutional GAN: Radford, Metz & Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks" (2016, arXiv:1511.06434).

    python dcgan.py --epochs 25 --cuda                         MNIST, downloaded to data/
    python dcgan.py --dataset folder --data-dir photos --cuda  your own images, at 64x64
    torchrun --nproc-per-node 8 dcgan.py --cuda                eight GPUs, --batch-size for each
    python dcgan.py --resume runs/dcgan --epochs 30            continue training
    python dcgan.py --sample runs/dcgan --num-samples 10000    write images
    python dcgan.py --sample runs/dcgan --interpolate 8        walk from image to image

Writes to runs/dcgan: checkpoint.pt, metrics.csv, args.json, samples/real.png with training images,
and samples/epoch_0001.png, ... with images from the same noise after every epoch.

Differences from the paper:
1. The depth follows the image size b * 2**k, with b from 4 to 7: k levels of stride 2 from b x b,
   and channels that double up to 16 times --width. With --image-size 64 --width 128 it is figure 1.
2. Kernels are 4x4, not 5x5. At stride 2, every output then comes from equally many inputs.
3. z ~ N(0, I), not uniform.
4. D ends in a convolution over the whole map, which equals the paper's flattening into one output.
5. Digits are padded to --image-size; --sample crops them back to 28x28.
6. Samples use BatchNorm in eval mode, so that no image depends on the others.
7. G's step reuses the fake images of D's step, which saves a forward pass.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import socket
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.optim import Adam
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and marks its checkpoints
RANK = int(os.environ.get("RANK", 0))  # the number of this process under torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "cifar10": CIFAR10}


def base_and_widths(image_size, width):
    """Halves image_size until it is at most 7. Returns that side, and the channels of each level on
    the way, from `width` on."""
    base, channels = image_size, []
    while base > 7 and base % 2 == 0:
        base //= 2
        channels.append(width * min(2 ** len(channels), 16))
    return base, channels


class Generator(nn.Sequential):
    """Maps z (B, latent_dim) to images (B, channels, image_size, image_size) in (-1, 1): figure 1.

    To add inputs such as labels, make it an nn.Module with a forward() of its own."""

    def __init__(self, image_size, channels, latent_dim, width):
        base, widths = base_and_widths(image_size, width)
        c = widths[-1]
        layers = [
            nn.Linear(latent_dim, c * base**2, bias=False),
            nn.Unflatten(1, (c, base, base)),
        ]
        for before, after in itertools.pairwise(reversed(widths)):
            # (B, before, h, h) to (B, after, 2h, 2h)
            layers += [
                nn.BatchNorm2d(before),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
            ]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())
        self.apply(initialize)


class Discriminator(nn.Sequential):
    """Maps images (B, channels, image_size, image_size) to logits (B,); D(x) is their sigmoid."""

    def __init__(self, image_size, channels, width):
        base, widths = base_and_widths(image_size, width)
        # No BatchNorm on D's input, nor on G's output: section 3.
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
        self.apply(initialize)


def initialize(layer):
    """Section 4: weights from N(0, 0.02); those of BatchNorm from N(1, 0.02), as in the authors'
    code; biases 0. Other types of layers keep PyTorch's initialization."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
        nn.init.normal_(layer.weight, mean, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: the negative of eq. 1 of Goodfellow et al. 2014, which D
    maximizes.

    With D = sigmoid(l), -log D = log(1 + exp(-l)) = softplus(-l) and -log(1 - D) = softplus(l)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """-E[log D(G(z))]: the non-saturating loss of Goodfellow et al. 2014, section 3."""
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    device = select_device(args.cuda, checkpoint)
    images = load_images(args)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)  # they fit into half of its free memory
    args.channels = images.shape[1]
    steps = len(images) // args.batch_size
    if steps == 0:
        sys.exit(f"error: {len(images)} images per process are too few: lower --batch-size")

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    discriminator = Discriminator(args.image_size, args.channels, args.width)
    generator.to(device, memory_format=torch.channels_last)
    discriminator.to(device, memory_format=torch.channels_last)
    optimizer_g = Adam(generator.parameters(), args.lr, (0.5, 0.999), fused=True)
    optimizer_d = Adam(discriminator.parameters(), args.lr, (0.5, 0.999), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
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
        # The optimizers restore the old learning rate, but --lr may be new.
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = args.lr

    if RANK == 0:
        args.out_dir = args.out_dir or new_folder(f"runs/{NAME}")
        samples = args.out_dir / "samples"
        # Fails if another run has just taken this folder.
        samples.mkdir(parents=True, exist_ok=os.path.exists(args.out_dir / "checkpoint.pt"))
        save_grid(images[:64] / 127.5 - 1, samples / "real.png")
        print(f"{args.dataset}: {len(images) * WORLD_SIZE:,} images, {steps:,} steps per epoch")
        if steps * args.epochs < 2000:
            enough = math.ceil(4000 / steps)
            print(f"few steps, so expect blurry images: --epochs {enough} makes 4,000 steps")
        print(f"on {device.type}, writing to {args.out_dir}", flush=True)

    for epoch in range(len(history) + 1, args.epochs + 1):
        # Reseed every epoch, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        batches = torch.randperm(len(images), device=images.device).split(args.batch_size)[:steps]
        sums = defaultdict(float)
        # progress() shows the means of sums, and at the end of the epoch appends them to history.
        for index in progress(batches, sums, history, args):
            x = images[index].to(device) / 127.5 - 1
            x = x.contiguous(memory_format=torch.channels_last)
            z = torch.randn(args.batch_size, args.latent_dim, device=device)

            # D: minimize -log D(x) - log(1 - D(G(z))). fake is detached, since this step must not
            # change G. Real and fake images go through D in separate batches, so that BatchNorm
            # does not mix their statistics.
            with autocast:
                fake = generator(z)
                real_logits = discriminator(x).float()
                fake_logits = discriminator(fake.detach()).float()
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            average_gradients(discriminator)
            optimizer_d.step()

            # G, through the updated D: minimize -log D(G(z)).
            discriminator.requires_grad_(False)
            with autocast:
                logits = discriminator(fake)
            loss_g = generator_loss(logits.float())
            optimizer_g.zero_grad()
            loss_g.backward()
            average_gradients(generator)
            optimizer_g.step()
            discriminator.requires_grad_(True)

            # Add up the metrics on the GPU. .item() would wait for it.
            with torch.no_grad():
                sums["loss_d"] += loss_d
                sums["loss_g"] += loss_g
                sums["d_real"] += real_logits.sigmoid().mean()
                sums["d_fake"] += fake_logits.sigmoid().mean()

        if RANK == 0:
            with torch.no_grad():
                generator.eval()
                grid = generator.forward(fixed_noise)  # uncompiled, or it would recompile for eval
                generator.train()
            if not grid.isfinite().all():
                sys.exit(f"error: weights not finite in epoch {epoch}, not saved: lower --lr")
            # Save the checkpoint last: a run killed before that repeats this epoch.
            save_grid(grid, samples / f"epoch_{epoch:04d}.png")
            save(state, history, args)

    if RANK == 0:
        print(f"done after epoch {len(history)}, pictures in {samples}")


def average_gradients(network):
    """Averages the gradients over all processes, so that they all take the same step."""
    if WORLD_SIZE > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad.div_(WORLD_SIZE))


@torch.no_grad()
def sample(args, checkpoint):
    """Writes generated images, each to a file, and the first 64 of them as a grid."""
    device = select_device(args.cuda)
    generator = Generator(args.image_size, args.channels, args.latent_dim, args.width)
    generator.load_state_dict(checkpoint["generator"])
    generator.to(device, memory_format=torch.channels_last).eval()
    torch.manual_seed(args.seed)
    name = "generated"
    z = torch.randn(args.num_samples, args.latent_dim)
    if args.interpolate:
        # Eight points from a to b, all from N(0, I), since cos^2 + sin^2 = 1. On a straight line
        # they would come too close to 0.
        a, b = torch.randn(2, args.interpolate, 1, args.latent_dim)
        t = torch.linspace(0, torch.pi / 2, 8)[:, None]
        z = (t.cos() * a + t.sin() * b).flatten(0, 1)
        name = "interpolation"

    z = z.to(device)
    folder = new_folder(args.out_dir / name)
    size = 28 if args.dataset not in ("cifar10", "folder") else args.image_size  # without padding
    for n, one in enumerate(z.split(1)):  # one by one, to need no more memory for many
        image = center_crop(generator(one)[0], size) * 127.5 + 128
        to_pil_image(image.byte()).save(folder / f"{n:05d}.png")
    save_grid(center_crop(generator(z[:64]), size), f"{folder}.png")
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def load_images(args):
    """Returns this process's share of the training set: uint8 (N, C, image_size, image_size).

    Pads digits with black, resizes CIFAR-10. Without --dataset and without MNIST, sets args.dataset
    to synthetic."""
    if args.dataset == "folder":
        return read_folder(args.data_dir, args)
    source = DATASETS.get(args.dataset or "mnist")
    if source and os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each machine
        socket.setdefaulttimeout(10)  # seconds, so that no download hangs
        try:
            source(args.data_dir, download=True)
        except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:
            files = Path(args.data_dir, source.__name__, "raw").glob("*-ubyte")
            damaged = len(list(files)) == 4  # none was missing, so it was not the download
            problem = "damaged, so delete it" if damaged else "missing, and no download"
            reason = f"{source.__name__} in {args.data_dir} is {problem}: {error!r:.300}"
            # Never replace a set the user named. Several processes must train on the same one.
            if damaged or args.dataset or WORLD_SIZE > 1:
                sys.exit(f"error: {reason} {source.url if source is CIFAR10 else ''}")
            print(f"warning: {reason}: training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if WORLD_SIZE > 1:
        dist.barrier()  # wait for the download

    args.dataset = args.dataset or "mnist"
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
    else:
        images = torch.as_tensor(source(args.data_dir).data)
    # Equal shares, so that all processes make the same number of steps.
    images = images[RANK::WORLD_SIZE][: len(images) // WORLD_SIZE]
    if args.dataset == "cifar10":
        return resize(images.permute(0, 3, 1, 2), [args.image_size, args.image_size])
    if args.image_size < 28:
        sys.exit("error: digits need --image-size 28 or more")
    return center_crop(images, args.image_size).unsqueeze(1)  # pads what is smaller


def read_folder(folder, args):
    """Returns this process's share of the images below `folder`, as load_images() does.

    They are in a temporary file that is mapped into memory, so that the set may be larger than
    memory. If you add labels, leave out those of skipped images."""
    paths = [os.path.join(folder, name) for name in list_files(folder)[RANK::WORLD_SIZE]]
    file = tempfile.TemporaryFile()
    counts = [0]
    skipped = Counter()  # by suffix
    with ThreadPoolExecutor() as pool:
        for path, (image, error) in zip(paths, pool.map(read_image, paths, itertools.repeat(args))):
            if error:
                skipped[Path(path).suffix] += 1
                if skipped.total() <= 5:
                    print(f"skipped {path}: {error}", file=sys.stderr)
                continue
            file.write(image.tobytes())
            counts[0] += 1
    if skipped.total() > 5:
        print("skipped files by suffix:", dict(skipped), file=sys.stderr)
    if WORLD_SIZE > 1:  # another process may have skipped more files
        counts *= WORLD_SIZE
        dist.all_gather_object(counts, counts[0])
    if min(counts) == 0:
        sys.exit(f"error: no images read from {folder}, or under torchrun fewer than processes")
    shape = (min(counts), args.image_size, args.image_size, args.channels or 3)
    return torch.from_numpy(np.memmap(file, mode="c", shape=shape)).permute(0, 3, 1, 2)


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


def read_image(path, args):
    """Returns the image, upright, cropped and resized to --image-size, and None; or None and
    Pillow's error."""
    size = (args.image_size, args.image_size)
    try:
        image = Image.open(path)
        if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PPM", "PNG")):
            raise ValueError(f"its values ({image.mode}) have no agreed black and white")
        image.draft(None, size)  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds
        return None, error
    if image.mode.startswith("I"):  # unsigned 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return ImageOps.fit(image.convert("L" if args.channels == 1 else "RGB"), size), None


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font under random affine maps: uint8 (count, 28, 28)."""
    glyphs = torch.zeros(10, 1, 28, 28)
    font = ImageFont.load_default(26)
    for digit in range(10):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = pil_to_tensor(image)

    torch.manual_seed(seed)
    glyphs = glyphs[torch.randint(10, (count,))]
    # The identity, with each entry changed by up to a quarter.
    maps = torch.eye(2, 3) + torch.empty(count, 2, 3).uniform_(-0.25, 0.25)
    grid = F.affine_grid(maps, glyphs.shape, align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False).byte().squeeze(1)


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
    """Writes args.json and metrics.csv, and replaces checkpoint.pt in one step: a kill or a full
    disk leaves the old one or the new one. Ends the program if a metric is not finite."""
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
    names = ["checkpoint.pt"]
    if args.keep_every and len(history) % args.keep_every == 0:
        names.insert(0, f"checkpoint_{len(history):04d}.pt")
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
    add("--epochs", **number, default=25, help="total passes over the training set (%(default)s)")
    add("--batch-size", **number, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=2e-4, help="Adam's learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="makes CPU runs bit-reproducible (0)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, one per process")
    add("--bf16", **switch, help="autocast to bfloat16")
    add("--compile", **switch, help="torch.compile the networks")
    sets = (*DATASETS, "synthetic", "folder")
    add("--dataset", choices=sets, help="default: mnist, if available")
    where = "where the data sets are, or with --dataset folder your images (data)"
    add("--data-dir", type=os.path.abspath, default="data", help=where)
    sizes = [base * 2**k for k in range(1, 9) for base in range(4, 8)]
    size = "4 to 7 times a power of two, up to 1792 (64 for a folder, else 32)"
    add("--image-size", type=int, choices=sizes, metavar="N", help=size)
    add("--channels", type=int, choices=(1, 3), help="of a folder, 1 for gray (3)")
    add("--latent-dim", **number, default=100, help="size of z (%(default)s)")
    add("--width", **number, default=64, help="channels of the narrowest level (%(default)s)")
    add("--out-dir", type=Path, help="default: a new folder in runs/")
    add("--keep-every", **number, help="also keep every N-th epoch's checkpoint")
    use = parser.add_mutually_exclusive_group().add_argument
    use("--resume", type=Path, help="continue from that run or checkpoint")
    use("--sample", type=Path, help="write images from that run or checkpoint")
    add("--num-samples", **number, default=64, help="with --sample: images (%(default)s)")
    add("--interpolate", **number, help="with --sample: number of interpolations")

    args = parser.parse_args(argv)
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
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
    args.image_size = args.image_size or (64 if args.dataset == "folder" else 32)
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
