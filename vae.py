"""Variational autoencoder: Kingma & Welling, "Auto-Encoding Variational Bayes" (2014, arXiv:1312.6114), and its
deterministic twin, the autoencoder.

    python vae.py --cuda                                             MNIST, downloaded to data/
    python vae.py --latent-dim 2                                     ends with the paper's figure 4, manifold.png
    python vae.py --autoencoder                                      z = the mean, no KL term
    torchrun --nproc-per-node 8 vae.py --cuda                        eight GPUs, --batch-size is that of each
    python vae.py --sample runs/vae/checkpoint.pt --num-samples 10000
    python vae.py --sample runs/vae/checkpoint.pt --interpolate 8
    python vae.py --eval runs/vae/checkpoint.pt --importance-samples 5000

Writes to runs/vae: checkpoint.pt, metrics.csv, and every epoch samples/ (from the same noise) and reconstructions/
(held-out images above their reconstructions). The metrics are the negative ELBO and its terms, nats an image, whatever
--beta is; of an autoencoder, the reconstruction alone. --resume with more --epochs stretches the learning rate's cycle.

Measured on MNIST (torch 2.15, two cores of an AMD EPYC): test loss 102.99 nats, mean of seeds 0 to 2 (102.97, 102.91,
103.09); with --bf16 102.96; log p(x) >= -99.31 with K = 100 (seed 0). 23,500 images/s, with --bf16 26,800, against
8,200 of a plain loop (tests/benchmark.py). Not yet run on a GPU.

Differences from the paper:
1. The learning rate makes one cycle, up to 5e-3 and down to 0: 2.7 nats better after ten epochs than Adam's 1e-3, which
   --constant-lr gives (105.72; 105.69 with --bf16).
2. Adam, not Adagrad; ReLU, not tanh; PyTorch's initial weights, no weight decay; 400 hidden units, not 500; batches of
   128, not 100, the last partial one of an epoch dropped: as public implementations have it.
3. Gray values in [0, 1] serve as Bernoulli targets, not binarized. That is no density of gray values, so these bounds
   compare only with others computed so, and not with those on binarized MNIST.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import shutil
import signal
import socket
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

FORMAT = "vae 1"  # marks a checkpoint: one of another script, or of another version, is refused
NETWORK = ("dataset", "hidden_dim", "latent_dim", "autoencoder")  # what a checkpoint fixes
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says, else one
TERMINAL = sys.stdout is not None and sys.stdout.isatty()  # else no progress is shown within an epoch


def above(low, kind=int, high=2**33):
    def number(text):
        if not low < kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser("vae.py", argparse.SUPPRESS)  # no usage, which would go before every error
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=above(0), default=10, metavar="N", help="passes over the training set (%(default)s)")
    add("--batch-size", type=above(0), default=128, metavar="N", help="images per step and process (%(default)s)")
    add("--lr", type=above(0, float, math.inf), metavar="X", help="default: 5e-3 at the peak, 1e-3 with --constant-lr")
    add("--constant-lr", action=argparse.BooleanOptionalAction, default=False, help="a constant rate, not one cycle")
    add("--beta", type=above(0, float, math.inf), default=1.0, metavar="X", help="weight of the KL term (%(default)s)")
    add("--seed", type=above(-1), default=0, metavar="N", help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="train on the GPU; under torchrun, each process on its own")
    add("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("mnist", "fashion-mnist", "synthetic"), help="default: mnist, or synthetic if offline")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are")
    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=above(0), default=20, metavar="N", help="size of z (%(default)s)")
    add("--hidden-dim", type=above(0), default=400, metavar="N", help="units of the hidden layers (%(default)s)")
    add("--autoencoder", action="store_true", help="the deterministic twin: z is the mean, and there is no KL term")
    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, metavar="DIR", help="where to write; default: the first free of runs/vae, -2, ...")
    add("--resume", type=Path, metavar="CKPT", help="continue from that checkpoint, in its folder")
    add("--sample", type=Path, metavar="CKPT", help="no training: write images from that checkpoint, to its folder")
    add("--num-samples", type=above(0), default=64, metavar="N", help="how many images --sample writes (%(default)s)")
    add("--interpolate", type=above(0), metavar="N", help="with --sample: N walks between two held-out images instead")
    add("--eval", type=Path, metavar="CKPT", help="no training: print the bound on log p(x) of that checkpoint")
    add("--importance-samples", type=above(0), default=100, metavar="K", help="draws of z for --eval (%(default)s)")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample or args.eval
    try:
        if sum(map(bool, (args.resume, args.sample, args.eval))) > 1 or args.interpolate and not args.sample:
            raise ValueError("--interpolate needs --sample; --resume, --sample and --eval exclude each other")
        if path:  # its arguments become the defaults, so that no other flag is needed
            checkpoint = load_checkpoint(path)
            parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
            args = parser.parse_args(argv)
            for name in (*NETWORK, "seed") if args.resume else NETWORK:
                if getattr(args, name) != checkpoint["args"][name]:
                    raise ValueError(f"--{name.replace('_', '-')} is fixed by {path}: leave it out")
        if args.autoencoder and (args.eval or args.sample and not args.interpolate):
            raise ValueError(f"{path} is an autoencoder: no prior to sample from, no likelihood; try --interpolate")
        args.checkpoint, args.data_dir = checkpoint, os.path.abspath(args.data_dir)  # to resume from another folder
        args.training = not (args.sample or args.eval)
        written = args.out_dir and args.out_dir / "checkpoint.pt"
        if args.training and written and written.exists() and not (args.resume and args.resume.samefile(written)):
            raise ValueError(f"{args.out_dir} holds a run: --resume {written}, or choose another --out-dir")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def load_images(args, device):
    """The training and the held-out images: two uint8 tensors (N, 784) on the device.

    Where no set was named and MNIST cannot be had, warns and sets args.dataset to synthetic. Raises OSError if a
    named set is neither there nor downloadable."""
    if args.dataset != "synthetic":
        name = args.dataset or "mnist"
        kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
        socket.setdefaulttimeout(10)  # seconds; torchvision sets none, and a dead network would hang
        try:
            images = [kind(args.data_dir, train=train, download=True).data for train in (True, False)]
            args.dataset = name
        except Exception as error:  # no network, no room, a truncated file: torchvision raises many kinds
            why = " ".join(str(error).split())
            reason = f"{name} is not in {args.data_dir}, or not whole, and its download failed ({why})"
            if args.dataset or RANKS > 1:  # or some of the processes could train on another set
                raise OSError(f"{reason}: put it there, or choose another --data-dir or --dataset") from error
            print(f"warning: {reason}, training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if args.dataset == "synthetic":
        images = [synthetic_digits(20_000, seed=0), synthetic_digits(2_000, seed=1)]
    return [part.flatten(1).to(device) for part in images]


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font, randomly turned, scaled, slanted and moved: uint8 (count, 28, 28)."""
    glyphs = []
    for digit in "0123456789":
        glyphs.append(Image.new("L", (28, 28)))
        ImageDraw.Draw(glyphs[-1]).text((14, 14), digit, 255, ImageFont.load_default(26), anchor="mm")
    random = torch.Generator().manual_seed(seed)
    glyphs = torch.stack([pil_to_tensor(glyph).float() for glyph in glyphs])
    glyphs = glyphs[torch.randint(10, (count,), generator=random)]
    turn, slant, wide, tall, right, down = torch.empty(6, count).uniform_(-1, 1, generator=random)
    wide, tall, sin, cos = 1.1 + 0.2 * wide, 1.1 + 0.15 * tall, torch.sin(turn / 4), torch.cos(turn / 4)
    warp = torch.stack([wide * cos, wide * (slant / 3 - sin), right / 6, tall * sin, tall * cos, down / 6], 1)
    grid = F.affine_grid(warp.view(count, 2, 3), [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False).round().byte().squeeze(1)


def batches(images, batch_size):
    """One epoch in random order, dealt out to the processes, the last partial batch dropped:
    floats (batch_size, 784) in [0, 1]."""
    order = torch.randperm(len(images)).to(images.device)
    if RANKS > 1:
        dist.broadcast(order, 0)
    steps = len(images) // (batch_size * RANKS)
    order = order[: steps * RANKS * batch_size].view(steps, RANKS, batch_size)[:, RANK]
    for index in order:
        yield images.index_select(0, index).float().div_(255)


class VAE(nn.Module):
    """Encoder q(z|x) = N(mean, exp(logvar)) and decoder p(x|z) = Bernoulli(sigmoid(logits)), both MLPs (appendix C)."""

    def __init__(self, hidden_dim, latent_dim, autoencoder=False):
        super().__init__()
        self.autoencoder = autoencoder
        self.encoder = nn.Sequential(nn.Linear(784, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 784))

    def encode(self, x):
        """x (B, 784) in [0, 1] to mean and logvar, each (B, latent_dim)."""
        return self.encoder(x).float().chunk(2, dim=1)

    def forward(self, x, epsilon):
        """x (B, 784) in [0, 1] and epsilon (B, latent_dim) from N(0, I) to logits (B, 784), mean and logvar."""
        mean, logvar = self.encode(x)
        z = mean if self.autoencoder else reparameterize(mean, logvar, epsilon)
        return self.decoder(z).float(), mean, logvar


def reparameterize(mean, logvar, epsilon):
    """z ~ N(mean, exp(logvar)) as a function of epsilon ~ N(0, I) that gradients pass through: section 2.4."""
    return mean + torch.exp(0.5 * logvar) * epsilon


def reconstruction_loss(logits, x):
    """-log p(x|z), nats: the Bernoulli cross-entropy (app. C.1), summed over pixels, averaged over the batch."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl_divergence(mean, logvar):
    """KL(q(z|x) || N(0, I)), nats: appendix B, summed over latent dimensions, averaged over the batch."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum() / len(mean)


def one_cycle(progress):
    """Learning rate as a share of its peak, at `progress` from 0 to 1: a cosine from 0.04 to 1 for the first 30 %, then
    one down to 0. The shape of PyTorch's OneCycleLR, momentum left alone (Smith & Topin 2018, arXiv:1708.07120)."""
    if progress < 0.3:
        return 0.52 - 0.48 * math.cos(math.pi * progress / 0.3)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7)


@torch.no_grad()
def evaluate(model, images, seed):
    """Means over images, uint8 (N, 784), in nats: the negative ELBO, with z sampled, and its two terms."""
    random = torch.Generator(images.device).manual_seed(seed)
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    for n, part in enumerate(images.split(1000)):
        epsilon = torch.randn(len(part), model.decoder[0].in_features, generator=random, device=images.device)
        if n % RANKS != RANK:
            continue
        x = part.float().div(255)
        logits, mean, logvar = model.forward(x, epsilon)  # uncompiled, also with --compile
        reconstruction, kl = reconstruction_loss(logits, x), kl_divergence(mean, logvar)
        sums += len(x) * torch.stack([reconstruction + kl, reconstruction, kl]).double()
    if RANKS > 1:
        dist.all_reduce(sums)
    return (sums / len(images)).tolist()


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
    images, held_out = load_images(args, device)
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    steps = len(images) // (args.batch_size * RANKS)
    if steps == 0:
        reason = f"--batch-size: {args.dataset} has {len(images):,} images, too few for a step"
        raise argparse.ArgumentError(None, reason)

    torch.manual_seed(args.seed)
    model = VAE(args.hidden_dim, args.latent_dim, args.autoencoder).to(device)
    peak = args.lr or (1e-3 if args.constant_lr else 5e-3)
    optimizer = torch.optim.Adam(model.parameters(), peak, fused=True)
    fixed_noise = torch.randn(64, args.latent_dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
    if args.compile:  # the same random numbers as without it
        model.compile(options={"fallback_random": True, "triton.cudagraphs": device.type == "cuda"})
    ddp = parallel(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    metrics = ("train_loss", "test_loss", "test_reconstruction", "test_kl")  # loss: the negative ELBO, nats an image
    if args.autoencoder:
        metrics = ("train_reconstruction", "test_reconstruction")

    parts = dict(model=model, optimizer=optimizer)
    start, seconds, rows = 0, 0.0, []
    if args.checkpoint:
        start, seconds, rows = (args.checkpoint[name] for name in ("epoch", "seconds", "metrics"))
        for name, part in parts.items():
            part.load_state_dict(args.checkpoint[name])
        torch.set_rng_state(args.checkpoint["rng"])
        if device.type == "cuda" and args.checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(args.checkpoint["cuda_rng"], device)
    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs/vae"))
        (args.out_dir / "reconstructions").mkdir(parents=True, exist_ok=True)
        if not args.autoencoder:
            (args.out_dir / "samples").mkdir(exist_ok=True)
    print(f"{args.dataset}: {len(images):,} images of 1x28x28, on {device.type}, to {args.out_dir}", flush=True)
    if start >= args.epochs:
        print(f"epoch {start} is done: raise --epochs to go on")

    for epoch in range(start + 1, args.epochs + 1):
        if RANK:  # noise of its own, and the same when resumed; the checkpoint holds the first process's state
            torch.manual_seed(hash((args.seed, epoch, RANK)))
        totals = torch.zeros(3, device=device)
        began = shown = time.perf_counter()
        for step, x in enumerate(batches(images, args.batch_size), 1):
            if args.compile:  # the last step's CUDA graphs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            progress = ((epoch - 1) * steps + step - 1) / (args.epochs * steps)
            optimizer.param_groups[0]["lr"] = peak if args.constant_lr else peak * one_cycle(progress)
            with autocast:
                logits, mean, logvar = ddp(x, torch.randn(args.batch_size, args.latent_dim, device=device))
            reconstruction, kl = reconstruction_loss(logits, x), kl_divergence(mean, logvar)
            loss = reconstruction + (0 if args.autoencoder else args.beta * kl)  # eq. 10, its sign changed
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            totals += torch.stack([reconstruction + kl, reconstruction, kl]).detach()
            if RANKS > 1 and step == steps:
                dist.all_reduce(totals.div_(RANKS))
            if step == steps or TERMINAL and time.perf_counter() - shown > 0.5:
                trained = (totals / step).tolist()  # only here does the CPU wait for the GPU
                shown = time.perf_counter()
                rate = step * args.batch_size * RANKS / (shown - began)
                left = timedelta(seconds=round((shown - began) / step * ((args.epochs - epoch + 1) * steps - step)))
                tested = evaluate(model, held_out, args.seed) if step == steps else []
                means = [trained[1], *tested[1:2]] if args.autoencoder else [trained[0], *tested]
                losses = "  ".join(f"{name} {mean:.2f}" for name, mean in zip(metrics, means))
                line = f"epoch {epoch}/{args.epochs}  {step}/{steps}  {losses}  {rate:,.0f} images/s  {left} left"
                if TERMINAL:
                    width = shutil.get_terminal_size().columns - 1
                    print(f"\r{line[:width]:{width}}", end="", flush=True)
        if not all(map(math.isfinite, means)):  # a weight that is not finite shows in the test loss
            raise FloatingPointError(f"losses not finite in epoch {epoch}, which is not saved: lower --lr or --beta")
        if RANK:
            continue
        seconds += shown - began
        rows.append([epoch, *means, rate, seconds])
        # The checkpoint comes last: a run killed before it does the whole epoch again, and these files with it.
        name = f"epoch_{epoch:04d}.png"
        if not args.autoencoder:
            save_grid(decode(model, fixed_noise), args.out_dir / "samples" / name, value_range=(0, 1))
        x = held_out[:32].float().div(255)
        pairs = torch.stack([x.view(-1, 8, 784), decode(model, model.encode(x)[0]).view(-1, 8, 784)], 1)  # rows of 8
        save_grid(pairs.view(-1, 1, 28, 28), args.out_dir / "reconstructions" / name, value_range=(0, 1))
        lines = [("epoch", *metrics, "images_per_second", "seconds"), *rows]
        (args.out_dir / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= dict(format=FORMAT, epoch=epoch, seconds=seconds, metrics=rows, rng=torch.get_rng_state())
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kept = (*NETWORK, "epochs", "batch_size", "lr", "constant_lr", "beta", "seed", "bf16", "compile", "data_dir")
        checkpoint["args"] = {name: getattr(args, name) for name in kept}
        save_checkpoint(checkpoint, args.out_dir / "checkpoint.pt")
        print(f"\r{line}" if TERMINAL else line, flush=True)
    if RANKS > 1:
        dist.destroy_process_group()

    if args.latent_dim == 2 and not args.autoencoder and RANK == 0:
        # figure 4: the unit square through the Gaussian's quantiles
        quantiles = torch.special.ndtri((torch.arange(20) + 0.5) / 20)
        z = torch.cartesian_prod(-quantiles, quantiles).flip(1).to(device)  # z_2 upwards, z_1 to the right
        save_grid(decode(model, z), args.out_dir / "manifold.png", columns=20, value_range=(0, 1))


@torch.no_grad()
def decode(model, z):
    """z (B, latent_dim) to images (B, 1, 28, 28) in [0, 1]: the means of p(x|z)."""
    return model.decoder(z).sigmoid().view(-1, 1, 28, 28)


@torch.no_grad()
def log_likelihood_bound(model, x, count, random):
    """Lower bounds (B,) on log p(x), in nats, for x (B, 784): Burda et al. 2016 (arXiv:1509.00519), eq. 8.

    The logarithm of the mean of `count` weights p(x, z) / q(z|x) with z ~ q(z|x), 50 at a time to bound the memory."""
    mean, logvar = model.encode(x)
    log_sum = torch.full((len(x),), -math.inf, device=x.device)
    for first in range(0, count, 50):
        epsilon = torch.randn(min(50, count - first), *mean.shape, generator=random, device=x.device)
        z = reparameterize(mean, logvar, epsilon)  # (50, B, latent_dim)
        logits = model.decoder(z)  # (50, B, 784)
        log_px_z = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(2)
        log_pz_qz = 0.5 * (epsilon.square() + logvar - z.square()).sum(2)  # the two 2 pi cancel
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_px_z + log_pz_qz, 0))
    return log_sum - math.log(count)


def evaluate_checkpoint(args):
    device = select_device(args.cuda)
    model = restore(args, device)
    images, bounds = load_images(args, device)[1], []
    random = torch.Generator(device).manual_seed(args.seed)
    for first in range(0, len(images), 100):
        if TERMINAL:
            print(f"\r{first:,} of {len(images):,} images", end="", flush=True)
        x = images[first : first + 100].float().div(255)
        bounds.append(log_likelihood_bound(model, x, args.importance_samples, random))
    bounds = torch.cat(bounds).double()
    error = bounds.std() / math.sqrt(len(bounds))
    print(f"\r{args.dataset}: log p(x) >= {bounds.mean():.2f} nats, mean of {len(bounds):,} held-out images", end=" ")
    print(f"({args.importance_samples} importance samples, standard error over the images {error:.2f})")


@torch.no_grad()
def sample(args):
    device = select_device(args.cuda)
    model = restore(args, device)
    if args.interpolate:
        x = load_images(args, device)[1][: 2 * args.interpolate].float().div(255)
        if len(x) < 2 * args.interpolate:
            raise argparse.ArgumentError(None, f"--interpolate: only {len(x):,} held-out images, two a walk: try fewer")
        a, b = model.encode(x)[0].chunk(2)  # image i to image N + i, straight: encodings fill the space between them
        z = torch.lerp(a[:, None], b[:, None], torch.linspace(0, 1, 10, device=device)[:, None]).flatten(0, 1)
        columns, folder = 10, first_free(args.out_dir / "interpolation")
    else:
        random = torch.Generator().manual_seed(args.seed)
        z = torch.randn(args.num_samples, args.latent_dim, generator=random).to(device)
        columns, folder = 8, first_free(args.out_dir / "generated")
    grid = []
    for first in range(0, len(z), 500):
        images = decode(model, z[first : first + 500]).cpu()
        for n, image in enumerate(images, first):
            to_pil_image(image.mul(255).round().byte()).save(folder / f"{n:05d}.png")
        grid.extend(images if args.interpolate else images[: max(0, 64 - first)])
    save_grid(grid, folder.with_suffix(".png"), columns, value_range=(0, 1))
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def restore(args, device):
    model = VAE(args.hidden_dim, args.latent_dim, args.autoencoder)
    model.load_state_dict(args.checkpoint["model"])
    return model.to(device)


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
        evaluate_checkpoint(args) if args.eval else sample(args) if args.sample else train(args)
    except KeyboardInterrupt as interrupt:
        path = args.out_dir and args.out_dir / "checkpoint.pt"
        more = args.training and path and path.exists()
        if RANK == 0:
            print("\nstopped" + f"; go on with --resume {path}" * bool(more), file=sys.stderr)
        sys.exit(128 + interrupt.args[0])
    except (OSError, FloatingPointError, argparse.ArgumentError) as error:  # what train() and sample() raise themselves
        sys.exit(f"vae.py: error: {error}")
    except RuntimeError as error:
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"vae.py: error: --compile does not work here: {str(error).splitlines()[0]}")
        if any(word in str(error) for word in ("out of memory", "allocate", "ALLOC_FAILED", "overflowed")):
            sys.exit("vae.py: error: out of memory: lower --batch-size, --hidden-dim or --latent-dim")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            sys.exit(f"vae.py: error: {str(error).splitlines()[0]} (did another process end? --resume goes on)")
        raise


if __name__ == "__main__":
    main()
