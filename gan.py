"""The original GAN: Goodfellow et al., "Generative Adversarial Nets" (2014, arXiv:1406.2661).

    python gan.py --cuda                                     MNIST, downloaded to data/
    python gan.py --saturating --d-steps 2                   the minimax loss, k = 2
    torchrun --nproc-per-node 8 gan.py --cuda                eight GPUs, --batch-size for each
    python gan.py --resume runs/gan --epochs 120             continue training
    python gan.py --sample runs/gan --num-samples 10000      write images
    python gan.py --sample runs/gan --interpolate 8          walk from image to image

Writes to runs/gan: checkpoint.pt, metrics.csv, args.json, samples/real.png with training images,
and samples/epoch_0001.png, ... with images from the same noise after every epoch.

Differences from the paper:
1. G is 100-256-512-1024-784 with BatchNorm, LeakyReLU and tanh, not ReLU and sigmoid; D is
   784-1024-512-256-1 with LeakyReLU and dropout 0.3, not maxout.
2. Adam at 4e-4 with beta1 0.5, batches of 64 and PyTorch's initial weights. The authors' code has
   SGD with momentum and a falling rate, batches of 100 and uniform initial weights.
3. Samples come from a running average of G's weights, because G itself oscillates.
4. G minimizes -log D(G(z)), which the paper recommends. --saturating restores log(1 - D(G(z))).
5. G's step reuses the fake images of D's last step, which saves a forward pass.
6. z ~ N(0, I); the paper leaves it open.
"""

import argparse
import copy
import csv
import io
import itertools
import json
import math
import os
import socket
import sys
from collections import defaultdict
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim import Adam
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and marks its checkpoints
RANK = int(os.environ.get("RANK", 0))  # the number of this process under torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}


class Generator(nn.Sequential):
    """Maps z (B, latent_dim) to images (B, 1, 28, 28) in (-1, 1).

    To add inputs such as labels, make it an nn.Module with a forward() of its own."""

    def __init__(self, latent_dim, width):
        layers = []
        for before, after in itertools.pairwise((latent_dim, width, 2 * width, 4 * width)):
            # (B, before) to (B, after)
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(4 * width, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))]
        super().__init__(*layers)


class Discriminator(nn.Sequential):
    """Maps images (B, 1, 28, 28) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, width):
        layers = [nn.Flatten()]
        for before, after in itertools.pairwise((784, 4 * width, 2 * width, width)):
            # (B, before) to (B, after)
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2), nn.Dropout(0.3)]
        super().__init__(*layers, nn.Linear(width, 1), nn.Flatten(0))


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: the negative of eq. 1, which D maximizes.

    With D = sigmoid(l), -log D = log(1 + exp(-l)) = softplus(-l) and -log(1 - D) = softplus(l)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits, saturating):
    """-E[log D(G(z))] of section 3, whose gradient stays strong while D wins. If `saturating`,
    E[log(1 - D(G(z)))] of eq. 1."""
    if saturating:
        return -F.softplus(fake_logits).mean()
    return F.softplus(-fake_logits).mean()


def train(args, checkpoint):
    device = select_device(args.cuda, checkpoint)
    images = load_images(args).to(device)
    images_per_step = args.batch_size * args.d_steps  # k batches for D, then one step of G
    steps = len(images) // images_per_step
    if steps == 0 or args.batch_size == 1:  # BatchNorm needs two images
        most = len(images) // args.d_steps
        sys.exit(f"error: --batch-size must be 2 to {most}, the images per process / --d-steps")

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    generator = Generator(args.latent_dim, args.width).to(device)
    discriminator = Discriminator(args.width).to(device)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)  # draws the grids and samples
    optimizer_g = Adam(generator.parameters(), args.lr, (0.5, 0.999), fused=True)
    optimizer_d = Adam(discriminator.parameters(), args.lr, (0.5, 0.999), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        generator.compile(dynamic=False)
        discriminator.compile(dynamic=False)

    state = {  # what a checkpoint restores
        "generator": generator,
        "discriminator": discriminator,
        "averaged": averaged,
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
        save_grid(images[:64], samples / "real.png")
        print(f"{args.dataset}: {len(images) * WORLD_SIZE:,} images, {steps:,} steps per epoch")
        print(f"on {device.type}, writing to {args.out_dir}", flush=True)

    step = len(history) * steps  # steps of G so far
    for epoch in range(len(history) + 1, args.epochs + 1):
        # Reseed every epoch, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        batches = torch.randperm(len(images), device=device).split(images_per_step)[:steps]
        sums = defaultdict(float)
        # progress() shows the means of sums, and at the end of the epoch appends them to history.
        for index in progress(batches, sums, history, args):
            # Algorithm 1: k steps of D, each on new data and noise. Minimize
            # -log D(x) - log(1 - D(G(z))). fake is detached, since this step must not change G.
            # D has no BatchNorm, so real and fake images can share one forward pass.
            for x in images[index].split(args.batch_size):
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

            # One step of G, on the last fake images and through the updated D: minimize
            # -log D(G(z)), or log(1 - D(G(z))).
            discriminator.requires_grad_(False)
            with autocast:
                logits = discriminator(fake)
            loss_g = generator_loss(logits.float(), args.saturating)
            optimizer_g.zero_grad()
            loss_g.backward()
            average_gradients(generator)
            optimizer_g.step()
            discriminator.requires_grad_(True)

            # Average G and its BatchNorm statistics, after Yazici et al. 2019 (arXiv:1806.04498):
            # with this weight over about the last tenth of its steps, and from step 10,000 on over
            # the last 1,000.
            step += 1
            weight = max(0.001, 10 / (10 + step))
            current = generator.state_dict()
            for name, average in averaged.state_dict().items():
                if average.is_floating_point():
                    average.lerp_(current[name], weight)

            # Add up the metrics on the GPU, with D's of its last step. .item() would wait for it.
            with torch.no_grad():
                sums["loss_d"] += loss_d
                sums["loss_g"] += loss_g
                sums["d_real"] += real_logits.sigmoid().mean()
                sums["d_fake"] += fake_logits.sigmoid().mean()

        if RANK == 0:
            grid = averaged(fixed_noise)
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
    generator = Generator(args.latent_dim, args.width).to(device).eval()
    generator.load_state_dict(checkpoint["averaged"])
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
    for n, one in enumerate(z.split(1)):  # one by one, to need no more memory for many
        image = generator(one)[0] * 127.5 + 128
        to_pil_image(image.byte()).save(folder / f"{n:05d}.png")
    save_grid(generator(z[:64]), f"{folder}.png")
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def load_images(args):
    """Returns this process's share of the training set: floats (N, 1, 28, 28) in [-1, 1].

    Without --dataset and without MNIST, sets args.dataset to synthetic."""
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
                sys.exit(f"error: {reason}")
            print(f"warning: {reason}: training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if WORLD_SIZE > 1:
        dist.barrier()  # wait for the download

    args.dataset = args.dataset or "mnist"
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
    else:
        images = source(args.data_dir).data
    # Equal shares, so that all processes make the same number of steps.
    images = images[RANK::WORLD_SIZE][: len(images) // WORLD_SIZE]
    return images.unsqueeze(1) / 127.5 - 1


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
    add("--epochs", **number, default=100, help="total passes over the training set (%(default)s)")
    add("--batch-size", **number, default=64, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=4e-4, help="Adam's learning rate (%(default)s)")
    add("--d-steps", **number, default=1, help="k, steps of D per step of G (%(default)s)")
    add("--saturating", **switch, help="G minimizes log(1 - D(G(z)))")
    add("--seed", type=int, default=0, help="makes CPU runs bit-reproducible (0)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, one per process")
    add("--bf16", **switch, help="autocast to bfloat16")
    add("--compile", **switch, help="torch.compile the networks")
    add("--dataset", choices=(*DATASETS, "synthetic"), help="default: mnist, if available")
    add("--data-dir", type=os.path.abspath, default="data", help="where the data sets are (data)")
    add("--latent-dim", **number, default=100, help="size of z (%(default)s)")
    add("--width", **number, default=256, help="units of the narrowest layer (%(default)s)")
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
