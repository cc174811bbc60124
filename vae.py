"""Variational autoencoder: Kingma & Welling, "Auto-Encoding Variational Bayes" (2014, arXiv:1312.6114), and its
deterministic twin, the autoencoder.

    python vae.py --cuda                                             MNIST, downloaded to data/
    python vae.py --latent-dim 2                                     ends with the paper's figure 4, manifold.png
    python vae.py --autoencoder                                      z = the mean, no KL term
    torchrun --nproc-per-node 8 vae.py --cuda                        eight GPUs, --batch-size is that of each
    python vae.py --resume runs/vae/checkpoint.pt --epochs 12        go on, the rate's cycle stretched
    python vae.py --sample runs/vae/checkpoint.pt --num-samples 10000
    python vae.py --sample runs/vae/checkpoint.pt --interpolate 8
    python vae.py --eval runs/vae/checkpoint.pt --importance-samples 5000

Writes to runs/vae: checkpoint.pt, metrics.csv, and every epoch samples/ (from the same noise) and reconstructions/
(held-out images above their reconstructions). The metrics are the negative ELBO and its terms, nats an image, whatever
--beta is; of an autoencoder, the reconstruction alone.

Differences from the paper:
1. The learning rate makes one cycle (Smith & Topin 2018, arXiv:1708.07120), up to 5e-3 and down to 0; --constant-lr is
   Adam's 1e-3.
2. Adam, not Adagrad; ReLU, not tanh; PyTorch's initial weights, no weight decay; 400 hidden units, not 500; batches of
   128, not 100, the last partial one of an epoch dropped: as public implementations have it.
3. Gray values in [0, 1] serve as Bernoulli targets, not binarized. That is no density of gray values, so these bounds
   compare only with others computed so, and not with those on binarized MNIST.
"""

import argparse
import csv
import itertools
import json
import math
import os
import socket
import sys
import time
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
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, EOFError, HTTPException)


class VAE(nn.Module):
    """Encoder q(z|x) = N(mean, exp(logvar)) and decoder p(x|z), both MLPs with one hidden layer: appendix C."""

    def __init__(self, width, latent_dim, autoencoder=False, pixels=784):
        super().__init__()
        self.autoencoder = autoencoder
        self.encoder = nn.Sequential(
            nn.Linear(pixels, width),
            nn.ReLU(),
            nn.Linear(width, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, width),
            nn.ReLU(),
            nn.Linear(width, pixels),
        )

    def encode(self, x):
        """x (B, pixels) in [0, 1] to mean and logvar, each (B, latent_dim)."""
        return self.encoder(x).float().chunk(2, dim=1)

    def forward(self, x, epsilon):
        """x (B, pixels) in [0, 1] and epsilon (B, latent_dim) from N(0, I) to logits (B, pixels), mean and logvar."""
        mean, logvar = self.encode(x)
        z = mean if self.autoencoder else reparameterize(mean, logvar, epsilon)
        return self.decoder(z).float(), mean, logvar


def reparameterize(mean, logvar, epsilon):
    """z ~ N(mean, exp(logvar)) as a function of epsilon ~ N(0, I) that gradients pass through: section 2.4."""
    return mean + torch.exp(0.5 * logvar) * epsilon


def reconstruction_loss(logits, x):
    """-log p(x|z), nats, of x (B, pixels) and logits (..., B, pixels): (..., B). A Bernoulli distribution for each pixel
    (app. C.1), summed over the pixels; its mean, what a picture shows, is sigmoid(logits)."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def kl_divergence(mean, logvar):
    """KL(q(z|x) || N(0, I)), nats, of (B, latent_dim): (B,). Appendix B, summed over the latent dimensions."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)


def train(args, checkpoint):
    # Under torchrun each process has its share of the images, and all make as many steps.
    device = select_device(args.cuda)
    images, held_out = (part.to(device) for part in load_images(args))
    steps = fewest(len(images) // args.batch_size, device)

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    model = VAE(args.width, args.latent_dim, args.autoencoder).to(device)
    peak = args.lr
    if peak is None:
        peak = 1e-3 if args.constant_lr else 5e-3
    optimizer = torch.optim.Adam(model.parameters(), peak, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        model.compile()

    # Go on where the checkpoint stopped; the rate's cycle ends with --epochs as they are now.
    parts = {"model": model, "optimizer": optimizer}
    rows, seconds = [], 0.0  # a row for each epoch done
    if checkpoint:
        rows = checkpoint["metrics"]
        seconds = rows[-1]["seconds"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    schedule = None
    if not args.constant_lr:
        options = {"total_steps": max(args.epochs, len(rows)) * steps, "cycle_momentum": False}
        options["last_epoch"] = len(rows) * steps - 1  # the steps done are 0, 1, ..., this one
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, **options)

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        make_folder(args.out_dir / "reconstructions")
        if not args.autoencoder:
            make_folder(args.out_dir / "samples")
    where = f"process 1 of {RANKS}, on {device.type}"
    print(f"{args.dataset}: {len(images):,} images in {where}, to {args.out_dir}", flush=True)
    if len(rows) >= args.epochs:
        print(f"epoch {len(rows)} is done: raise --epochs to go on")

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        progress = Progress(epoch, args.epochs, steps, RANKS * args.batch_size)
        for x in itertools.islice(batches(images, args.batch_size), steps):
            # Algorithm 1: descend eq. 10 with its sign changed, one z for each image.
            epsilon = torch.randn(args.batch_size, args.latent_dim, device=device)
            with autocast:
                logits, mean, logvar = model(x, epsilon)
            reconstruction = reconstruction_loss(logits, x).mean()
            kl = kl_divergence(mean, logvar).mean()
            loss = reconstruction if args.autoencoder else reconstruction + args.beta * kl
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()
            if schedule:
                schedule.step()

            if args.autoencoder:
                progress.add(train_reconstruction=reconstruction)
            else:
                progress.add(train_loss=reconstruction + kl)

        metrics = progress.means()
        seconds += progress.seconds
        if not all(p.isfinite().all() for p in model.parameters()):
            fail(f"weights not finite in epoch {epoch}, which is not saved: lower --lr or --beta")
        if RANK == 0:
            model.eval()
            metrics |= evaluate(model, held_out, args)
            speed = {"images_per_second": progress.rate, "seconds": seconds}
            rows.append({"epoch": epoch, **metrics, **speed})
            # The checkpoint comes last: a run killed before it does the epoch again, and these files.
            picture = f"epoch_{epoch:04d}.png"
            x = held_out[:16].float().div(255)
            pairs = torch.cat([x.view(-1, 1, 28, 28), decode(model, model.encode(x)[0])])
            save_grid(pairs, args.out_dir / "reconstructions" / picture, len(x), value_range=(0, 1))
            if not args.autoencoder:
                drawn = decode(model, fixed_noise)
                save_grid(drawn, args.out_dir / "samples" / picture, value_range=(0, 1))
            save_metrics(rows, args.out_dir / "metrics.csv")
            save_checkpoint(parts, rows, args, args.out_dir / "checkpoint.pt")
            progress.show(metrics)
            model.train()

    if RANKS > 1:
        dist.destroy_process_group()
    if args.latent_dim == 2 and not args.autoencoder and RANK == 0:
        # Figure 4: the unit square through the Gaussian's quantiles, z_1 to the right and z_2 upwards.
        quantiles = torch.special.ndtri((torch.arange(20) + 0.5) / 20)
        z = torch.cartesian_prod(-quantiles, quantiles).flip(1).to(device)
        drawn = decode(model.eval(), z)
        save_grid(drawn, args.out_dir / "manifold.png", columns=20, value_range=(0, 1))


def average_gradients(network):
    """Replaces the gradients by their means over torchrun's processes, so that all make the same step."""
    if RANKS > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad)
            p.grad /= RANKS


@torch.no_grad()
def decode(model, z):
    """z (..., latent_dim) to the means of p(x|z), images (N, 1, 28, 28) in [0, 1]."""
    return model.decoder(z).sigmoid().view(-1, 1, 28, 28)


@torch.no_grad()
def evaluate(model, images, args):
    """Means over images, uint8 (N, 784), in nats: the negative ELBO, with z sampled, and its two terms."""
    random = torch.Generator(images.device).manual_seed(args.seed)
    terms = []
    for part in images.split(1000):
        x = part.float().div(255)
        epsilon = torch.randn(len(x), args.latent_dim, generator=random, device=x.device)
        logits, mean, logvar = model.forward(x, epsilon)  # not compiled anew for this mode and size
        terms.append(torch.stack([reconstruction_loss(logits, x), kl_divergence(mean, logvar)]))
    reconstruction, kl = torch.cat(terms, 1).double().mean(1).tolist()
    if args.autoencoder:
        return {"test_reconstruction": reconstruction}
    return {"test_loss": reconstruction + kl, "test_reconstruction": reconstruction, "test_kl": kl}


@torch.no_grad()
def log_likelihood_bound(model, x, count, random):
    """Lower bounds (B,) on log p(x), in nats, for x (B, 784): Burda et al. 2016 (arXiv:1509.00519), eq. 8.

    The logarithm of the mean of `count` weights p(x, z) / q(z|x) with z ~ q(z|x), 50 at a time to bound the memory."""
    mean, logvar = model.encode(x)
    log_weights = []
    for first in range(0, count, 50):
        shape = (min(50, count - first), *mean.shape)
        epsilon = torch.randn(shape, generator=random, device=x.device)
        z = reparameterize(mean, logvar, epsilon)  # (50, B, latent_dim)
        logits = model.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # (50, B, 784)
        log_px_z = -reconstruction_loss(logits, x)  # (50, B)
        log_pz_qz = 0.5 * (epsilon.square() + logvar - z.square()).sum(-1)  # the two 2 pi cancel
        log_weights.append(log_px_z + log_pz_qz)
    return torch.logsumexp(torch.cat(log_weights), 0) - math.log(count)


def evaluate_checkpoint(args, checkpoint):
    device = select_device(args.cuda)
    model = restore(args, checkpoint, device)
    random = torch.Generator(device).manual_seed(args.seed)
    count, bounds = args.importance_samples, []
    for part in load_images(args)[1].to(device).split(100):
        bounds.append(log_likelihood_bound(model, part.float().div(255), count, random))
        if sys.stdout.isatty():
            print(f"{100 * len(bounds):,} images", end="\r", flush=True)
    bounds = torch.cat(bounds).double()
    error = bounds.std() / math.sqrt(len(bounds))
    print(f"{args.dataset}: log p(x) >= {bounds.mean():.2f} nats", end=", ")
    print(f"the mean of {len(bounds):,} held-out images (standard error {error:.2f}), K = {count}")


def sample(args, checkpoint):
    device = select_device(args.cuda)
    model = restore(args, checkpoint, device)
    torch.manual_seed(args.seed)
    z, name, columns = torch.randn(args.num_samples, args.latent_dim), "generated", 8
    if args.interpolate:
        z, name, columns = walks(model, load_images(args)[1], args.interpolate), "interpolation", 10
    images = torch.cat([decode(model, part.to(device)).cpu() for part in z.split(500)])
    folder = first_free(args.out_dir / name)
    for n, image in enumerate(images):
        to_pil_image(image.mul(255).round().byte()).save(folder / f"{n:05d}.png")
    shown = images if args.interpolate else images[:64]
    save_grid(shown, folder.with_suffix(".png"), columns, value_range=(0, 1))
    print(f"{len(images):,} images in {folder}, a grid in {folder}.png")


@torch.no_grad()
def walks(model, images, count):
    """z (10 * count, latent_dim): from the encoding of an image straight to another's, ten points each."""
    if len(images) < 2 * count:
        fail(f"--interpolate: {len(images):,} held-out images are too few, two a walk")
    x = images[: 2 * count].to(model.decoder[0].weight.device).float().div(255)
    a, b = model.encode(x)[0].view(2, count, 1, -1)
    t = torch.linspace(0, 1, 10, device=x.device)[:, None]
    return torch.lerp(a, b, t).flatten(0, 1)


def restore(args, checkpoint, device):
    model = VAE(args.width, args.latent_dim, args.autoencoder).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def load_images(args):
    """This process's share of the training set, and the whole held-out set: uint8 (N, 784), each.

    Where no set was named and MNIST cannot be had, warns and sets args.dataset to synthetic."""
    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}
    named = args.dataset
    args.dataset = named or "mnist"
    if args.dataset in kinds and RANK == 0:
        socket.setdefaulttimeout(10)  # seconds: a dead network would hang
        try:
            for train in (True, False):
                kinds[args.dataset](args.data_dir, train, download=True)
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
        images, held_out = synthetic_digits(20_000, seed=0), synthetic_digits(2_000, seed=1)
    else:
        images = kinds[args.dataset](args.data_dir, train=True).data
        held_out = kinds[args.dataset](args.data_dir, train=False).data
    return images[RANK::RANKS].flatten(1), held_out.flatten(1)


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


def batches(images, batch_size):
    """One epoch in random order, the last partial batch dropped: floats (batch_size, 784) in [0, 1]."""
    order = torch.randperm(len(images), device=images.device)
    for index in order.split(batch_size)[: len(images) // batch_size]:
        yield images.index_select(0, index).float().div(255)


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
ONE_COMMAND += ("eval", "importance_samples")
FIXED = ("dataset", "latent_dim", "width", "autoencoder", "lr", "constant_lr")


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    usage, about = f"{NAME}.py [flags]", __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(usage=usage, description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the training set (%(default)s)")
    add("--batch-size", type=int, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, help="learning rate of Adam; default: at most 5e-3, constant 1e-3")
    add("--constant-lr", action=yes_or_no, default=False, help="a constant rate, not one cycle")
    add("--beta", type=float, default=1.0, help="weight of the KL term (%(default)s)")
    add("--seed", type=int, default=0, help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, each process its own")
    add("--bf16", action=yes_or_no, default=False, help="autocast to bfloat16")
    add("--compile", action=yes_or_no, default=False, help="torch.compile the networks")

    add = parser.add_argument_group("data").add_argument
    names = ("mnist", "fashion-mnist", "synthetic")
    add("--dataset", choices=names, help="default: mnist, or synthetic if it cannot be had")
    add("--data-dir", type=os.path.abspath, default="data", help="where the data sets are (data)")

    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=int, default=20, help="size of z (%(default)s)")
    add("--width", type=int, default=400, help="units of the hidden layers (%(default)s)")
    add("--autoencoder", action="store_true", help="the deterministic twin: z is the mean")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"where to write; default: the first free of runs/{NAME}, ...")
    add("--resume", type=Path, help="go on from that checkpoint, in its folder")
    add("--sample", type=Path, help="no training: write images from that checkpoint, to its folder")
    add("--num-samples", type=int, default=64, help="how many images --sample writes (%(default)s)")
    add("--interpolate", type=int, help="with --sample: so many walks between two held-out images")
    add("--eval", type=Path, help="no training: print a bound on log p(x) of that checkpoint")
    add("--importance-samples", type=int, default=100, help="draws of z for --eval (%(default)s)")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample or args.eval
    if path:
        # What the checkpoint keeps becomes the defaults, so that no other flag is needed.
        checkpoint = load_checkpoint(path)
        parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
        args = parser.parse_args(argv)

    # The numbers among the flags, and their lowest values.
    lowest = {
        "epochs": 1,
        "batch_size": 1,
        "lr": 0,
        "beta": 0,
        "seed": 0,
        "latent_dim": 1,
        "width": 1,
        "num_samples": 1,
        "interpolate": 1,
        "importance_samples": 1,
    }
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in lowest and value is not None and not lowest[name] <= value < 2**31:
            parser.error(f"{flag} {value} is not between {lowest[name]} and 2**31")
        if path and name in FIXED and value != checkpoint["args"].get(name, value):
            parser.error(f"{flag} is fixed by {path}: leave it out")
    if [args.resume, args.sample, args.eval].count(None) < 2:
        parser.error("--resume, --sample and --eval exclude each other")
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
    if args.autoencoder and (args.eval or (args.sample and not args.interpolate)):
        parser.error("an autoencoder has neither prior nor likelihood: try --interpolate")
    if (args.sample or args.eval) and RANKS > 1:
        parser.error("--sample and --eval are for one process: leave torchrun out")
    if args.out_dir and not args.sample and not args.eval:
        there = args.out_dir / "checkpoint.pt"
        if there != args.resume and os.path.exists(there):
            parser.error(f"{args.out_dir} holds a run: --resume {there}, or another --out-dir")
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        if args.eval:
            evaluate_checkpoint(args, checkpoint)
        elif args.sample:
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
