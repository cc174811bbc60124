"""The original GAN: Goodfellow et al., "Generative Adversarial Nets" (2014, arXiv:1406.2661).

    python gan.py --cuda                                             MNIST, downloaded to data/
    python gan.py --saturating --d-steps 2                           the minimax value function, k = 2
    torchrun --nproc-per-node 8 gan.py --cuda                        eight GPUs, --batch-size is that of each
    python gan.py --resume runs/gan/checkpoint.pt --epochs 120       go on
    python gan.py --sample runs/gan/checkpoint.pt --num-samples 10000
    python gan.py --sample runs/gan/checkpoint.pt --interpolate 8

Writes to runs/gan: checkpoint.pt, metrics.csv, samples/real.png of the training set, and samples/epoch_0001.png, ..., the
same noise after every epoch.

Differences from the paper:
1. G is 100-256-512-1024-784 with BatchNorm, LeakyReLU and tanh, not ReLU and sigmoid; D is 784-1024-512-256-1 with
   LeakyReLU and dropout 0.3, not maxout.
2. Adam at 4e-4 with beta1 0.5, not momentum, and batches of 64, not 100.
3. Images are drawn by a running average of G's weights, as G itself oscillates.
4. G descends -log D(G(z)), which the paper recommends, and not algorithm 1's log(1 - D(G(z))): --saturating.
5. G steps on the images that D saw last, not on new ones, which saves a forward.
6. z ~ N(0, I), of which the points of a walk (--interpolate) are drawn too; the paper leaves it open.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import shutil
import socket
import sys
import time
from collections import Counter
from http.client import HTTPException
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and its checkpoints
RANK = int(os.environ.get("RANK", 0))  # which of torchrun's processes this is
RANKS = int(os.environ.get("WORLD_SIZE", 1))  # and of how many
DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}


class Generator(nn.Sequential):
    """z (B, latent_dim) to images (B, pixels) in (-1, 1)."""

    def __init__(self, latent_dim, width, pixels=784):
        layers = []
        for before, after in itertools.pairwise((latent_dim, width, 2 * width, 4 * width)):
            # (B, before) to (B, after)
            layers += [
                nn.Linear(before, after),
                nn.BatchNorm1d(after),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Linear(4 * width, pixels), nn.Tanh())


class Discriminator(nn.Sequential):
    """Images (B, pixels) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, width, pixels=784):
        layers = []
        for before, after in itertools.pairwise((pixels, 4 * width, 2 * width, width)):
            # (B, before) to (B, after)
            layers += [
                nn.Linear(before, after),
                nn.LeakyReLU(0.2),
                nn.Dropout(0.3),
            ]
        super().__init__(*layers, nn.Linear(width, 1), nn.Flatten(0))


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: eq. 1, which D maximizes, with its sign changed.

    softplus(l) = log(1 + exp(l)), so with D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits, saturating):
    """-E[log D(G(z))], section 3, whose gradient stays strong where D wins; or E[log(1 - D(G(z)))], what eq. 1 says."""
    if saturating:
        return -F.softplus(fake_logits).mean()
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    # Under torchrun each process has its share of the images, and all make the same number of steps.
    device = select_device(args.cuda)
    images = load_images(args).to(device)
    batch = args.batch_size * args.d_steps * RANKS  # images for a step of G, in all processes
    steps = fewest(len(images) * RANKS // batch, device)

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    generator = Generator(args.latent_dim, args.width)
    discriminator = Discriminator(args.width)
    networks = nn.ModuleList([generator, discriminator]).to(device)
    averaged = copy.deepcopy(generator)  # what grids and samples are drawn with
    # The weights and BatchNorm's averages of both, without the counts of batches.
    average = list(filter(torch.is_floating_point, averaged.state_dict().values()))
    current = list(filter(torch.is_floating_point, generator.state_dict().values()))
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
        "averaged": averaged,
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
        real = to_images(next(batches(images, 64)))
        save_grid(real, samples / "real.png")
    print(f"{len(images):,} images of {args.dataset}, on {device.type}, to {args.out_dir}")
    for network in networks:
        count = sum(p.numel() for p in network.parameters())
        print(f"{type(network).__name__}: {count:,} parameters", flush=True)

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process, the same in every run: a resumed one draws what an
        # uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        data = batches(images, args.batch_size)
        # The steps' metrics are added up (as a Counter's update() does) on the device: reading one waits.
        sums = Counter()
        began = shown = time.perf_counter()
        for step in range(1, steps + 1):
            # Algorithm 1. k steps of D: descend -log D(x) - log(1 - D(G(z))), each on its own data
            # and noise. They are no steps of G: fake is detached. One forward, as D has no BatchNorm.
            for x in itertools.islice(data, args.d_steps):  # the next k batches
                z = torch.randn(args.batch_size, args.latent_dim, device=device)
                with autocast:
                    fake = generator(z)
                    logits = discriminator(torch.cat([x, fake.detach()]))
                real_logits, fake_logits = logits.float().chunk(2)
                loss_d = discriminator_loss(real_logits, fake_logits)
                optimizer_d.zero_grad()
                loss_d.backward()
                average_gradients(discriminator)
                optimizer_d.step()

            # G: descend -log D(G(z)), or log(1 - D(G(z))), through the new D, without D's gradients.
            with autocast:
                logits = discriminator(fake)
            loss_g = generator_loss(logits.float(), args.saturating)
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            average_gradients(generator)
            optimizer_g.step()

            # A mean over the last tenth of G's steps, from step 10,000 over the last 1000 or so, after
            # Yazici et al. 2019 (arXiv:1806.04498).
            total = (epoch - 1) * steps + step
            torch._foreach_lerp_(average, current, max(0.001, 10 / (10 + total)))

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
            save_grid(generate(averaged, fixed_noise), samples / f"epoch_{epoch:04d}.png")
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


def to_images(x):
    """(N, 784) to (N, 1, 28, 28)."""
    return x.view(-1, 1, 28, 28)


@torch.no_grad()
def generate(generator, z):
    """G(z), images (B, 1, 28, 28) in (-1, 1), by BatchNorm's running averages, which it leaves as they are."""
    generator.eval()
    images = to_images(generator(z))
    generator.train()
    return images


def sample(args, checkpoint):
    device = select_device(args.cuda)
    generator = Generator(args.latent_dim, args.width).to(device)
    generator.load_state_dict(checkpoint["averaged"])
    torch.manual_seed(args.seed)
    if args.interpolate:
        name, z = "interpolation", walks(args.interpolate, args.latent_dim)
    else:
        name, z = "generated", torch.randn(args.num_samples, args.latent_dim)
    folder = first_free(args.out_dir / name)
    images = generate(generator, z.to(device)).cpu()
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
    """This process's share of the training set: floats (N, 784) in [-1, 1].

    Where no set was named and MNIST cannot be had, warns and sets args.dataset to synthetic."""
    named = args.dataset
    args.dataset = named or "mnist"
    source = DATASETS.get(args.dataset)
    if source and RANK == 0:
        socket.setdefaulttimeout(10)  # seconds: a dead network would hang
        try:
            source(args.data_dir, download=True)
        except DOWNLOAD_ERRORS as error:
            reason = (
                f"no {args.dataset} in {args.data_dir}, nor at {source.mirrors} ({error!r})"
            )
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
    return images[RANK::RANKS].flatten(1).float().div(127.5).sub(1)


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


def batches(images, batch_size):
    """One epoch in random order: (batch_size, 784) each, the last one perhaps fewer."""
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        yield images.index_select(0, index)


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
FIXED = ("dataset", "latent_dim", "width")
MAY_BE_ZERO = ("seed",)


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=100, help="passes over the training set (%(default)s)")
    add("--batch-size", type=int, default=64, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=4e-4, help="learning rate of Adam (%(default)s)")
    add("--d-steps", type=int, default=1, help="k, steps of D for each of G (%(default)s)")
    add("--saturating", action=yes_or_no, default=False, help="G descends log(1 - D(G(z)))")
    add("--seed", type=int, default=0, help="repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=(*DATASETS, "synthetic"),
        help="default: mnist, or synthetic if it cannot be had",
    )
    add("--data-dir", type=os.path.abspath, default="data", help="where the sets are (data)")

    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=int, default=100, help="size of z (%(default)s)")
    add("--width", type=int, default=256, help="units of the narrowest layer (%(default)s)")

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

    for name, value in vars(args).items():
        if type(value) not in (int, float) or (value == 0 and name in MAY_BE_ZERO):
            continue
        if not 0 < value < 2**31:
            parser.error(f"--{name.replace('_', '-')} {value} is too small or too large")
    if args.batch_size == 1:
        parser.error("--batch-size: BatchNorm takes 2 images or more")
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
