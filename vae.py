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

Writes to runs/vae: checkpoint.pt, metrics.csv, samples/real.png of the training set, and every epoch samples/ (from the
same noise, but not of an autoencoder) and reconstructions/ (held-out images above their reconstructions). The metrics are
the negative ELBO and its terms, nats an image, whatever --beta is; the KL of an autoencoder is 0.

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
        if self.autoencoder:
            # z is the mean; and zeros, for which kl_divergence() is 0.
            return self.decoder(mean).float(), torch.zeros_like(mean), torch.zeros_like(mean)
        z = reparameterize(mean, logvar, epsilon)
        return self.decoder(z).float(), mean, logvar


def reparameterize(mean, logvar, epsilon):
    """z ~ N(mean, exp(logvar)) as a function of epsilon ~ N(0, I) that gradients pass through: section 2.4."""
    return mean + torch.exp(0.5 * logvar) * epsilon


def reconstruction_loss(logits, x):
    """-log p(x|z), nats, of x (B, pixels) and logits (..., B, pixels): (..., B). A Bernoulli distribution for each pixel
    (app. C.1), summed over the pixels; its mean, what a picture shows, is sigmoid(logits)."""
    x = x.expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def kl_divergence(mean, logvar):
    """KL(q(z|x) || N(0, I)), nats, of (B, latent_dim): (B,). Appendix B, summed over the latent dimensions."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)


def train(args, checkpoint):
    # Under torchrun each process has its share of the images, and all make the same number of steps.
    device = select_device(args.cuda)
    images, held_out = (part.to(device) for part in load_images(args))
    batch = args.batch_size * RANKS  # images for a step, in all processes
    steps = fewest(len(images) * RANKS // batch, device)

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    model = VAE(args.width, args.latent_dim, args.autoencoder).to(device)
    peak = args.lr or (1e-3 if args.constant_lr else 5e-3)
    optimizer = torch.optim.Adam(model.parameters(), peak, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        model.compile()

    # Go on where the checkpoint stopped; the rate's cycle ends with --epochs as they are now.
    parts = {"model": model, "optimizer": optimizer}
    rows = []  # of metrics, one for each epoch done
    if checkpoint:
        rows = checkpoint["metrics"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    if not args.constant_lr:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            peak,
            total_steps=max(args.epochs, len(rows)) * steps,
            cycle_momentum=False,
            last_epoch=len(rows) * steps - 1,
        )

    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs", NAME))
        samples, reconstructions = args.out_dir / "samples", args.out_dir / "reconstructions"
        make_folder(samples)
        make_folder(reconstructions)
        real = to_images(next(batches(images, 64)))
        save_grid(real, samples / "real.png", value_range=(0, 1))
    print(f"{len(images):,} images of {args.dataset}, on {device.type}, to {args.out_dir}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    for epoch in range(len(rows) + 1, args.epochs + 1):
        # A seed for each epoch and process, the same in every run: a resumed one draws what an
        # uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        # The steps' metrics are added up (as a Counter's update() does) on the device: reading one waits.
        sums = Counter()
        began = shown = time.perf_counter()
        for step, x in zip(range(1, steps + 1), batches(images, args.batch_size)):
            # Algorithm 1: descend eq. 10 with its sign changed, one z for each image.
            epsilon = torch.randn(args.batch_size, args.latent_dim, device=device)
            with autocast:
                logits, mean, logvar = model(x, epsilon)
            reconstruction = reconstruction_loss(logits, x).mean()
            kl = kl_divergence(mean, logvar).mean()
            loss = reconstruction + args.beta * kl
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()
            if not args.constant_lr:
                schedule.step()

            with torch.no_grad():
                sums.update(train_loss=reconstruction + kl)
            if step < steps and time.perf_counter() - shown > PAUSE:
                show(summary(sums, step, batch, began, rows), args, step / steps)
                shown = time.perf_counter()

        row = summary(sums, steps, batch, began, rows)
        if not all(p.isfinite().all() for p in model.parameters()):
            fail(f"weights not finite in epoch {epoch}, not saved: lower --lr or --beta")
        rows.append(row)
        if RANK == 0:
            model.eval()
            rows[-1] = {"epoch": epoch, **evaluate(model, held_out, args), **row}
            # The checkpoint comes last: a run killed before it repeats the epoch, and these files.
            picture = f"epoch_{epoch:04d}.png"
            x = held_out[:16]
            pairs = torch.cat([to_images(x), decode(model, model.encode(x)[0])])
            save_grid(pairs, reconstructions / picture, columns=len(x), value_range=(0, 1))
            if not args.autoencoder:
                drawn = decode(model, fixed_noise)
                save_grid(drawn, samples / picture, value_range=(0, 1))
            save(parts, rows, args)
            show(rows[-1], args)
            model.train()

    print(f"{len(rows)} epochs done, more by --resume {args.out_dir} --epochs N")
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
            dist.all_reduce(p.grad.div_(RANKS))


def to_images(x):
    """(N, 784) to (N, 1, 28, 28)."""
    return x.view(-1, 1, 28, 28)


@torch.no_grad()
def decode(model, z):
    """z (N, latent_dim) to the means of p(x|z), images (N, 1, 28, 28) in [0, 1]."""
    return to_images(model.decoder(z).sigmoid())


@torch.no_grad()
def evaluate(model, x, args):
    """Means over images x (N, 784), in nats: the negative ELBO, with z sampled, and its two terms."""
    random = torch.Generator(x.device).manual_seed(args.seed)
    epsilon = torch.randn(len(x), args.latent_dim, generator=random, device=x.device)
    logits, mean, logvar = model.forward(x, epsilon)  # not compiled anew for this mode and size
    reconstruction = reconstruction_loss(logits, x).mean().item()
    kl = kl_divergence(mean, logvar).mean().item()
    return {
        "test_loss": reconstruction + kl,
        "test_reconstruction": reconstruction,
        "test_kl": kl,
    }


@torch.no_grad()
def log_likelihood_bound(model, x, count):
    """Lower bounds (B,) on log p(x), in nats, for x (B, 784): Burda et al. 2016 (arXiv:1509.00519), eq. 8.

    The logarithm of the mean of `count` weights p(x, z) / q(z|x) with z ~ q(z|x)."""
    mean, logvar = model.encode(x)
    epsilon = torch.randn(count, *mean.shape, device=x.device)
    z = reparameterize(mean, logvar, epsilon)  # (count, B, latent_dim)
    logits = model.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # (count, B, 784)
    log_px_z = -reconstruction_loss(logits, x)  # (count, B)
    log_pz_qz = 0.5 * (epsilon.square() + logvar - z.square()).sum(-1)  # both have log(2 pi)
    return torch.logsumexp(log_px_z + log_pz_qz, 0) - math.log(count)


def evaluate_checkpoint(args, checkpoint):
    model, device = restore(args, checkpoint)
    count = args.importance_samples
    held_out = load_images(args)[1].to(device)
    parts = held_out.split(max(1, 5000 // count))  # as many as fit into a moderate memory
    bounds = torch.cat([log_likelihood_bound(model, x, count) for x in parts])
    error = bounds.std() / math.sqrt(len(bounds))
    print(
        f"{args.dataset}: log p(x) >= {bounds.mean():.2f} nats, mean of {len(bounds):,} held-out "
        f"images (standard error {error:.2f}), {count} importance samples"
    )


def sample(args, checkpoint):
    model, device = restore(args, checkpoint)
    if args.interpolate:
        held_out = load_images(args)[1].to(device)
        name, z = "interpolation", walks(model, held_out, args.interpolate)
    else:
        name, z = "generated", torch.randn(args.num_samples, args.latent_dim)
    folder = first_free(args.out_dir / name)
    images = decode(model, z.to(device)).cpu()
    for n, image in enumerate(images):
        to_pil_image(image.mul(255).round().byte()).save(folder / f"{n:05d}.png")
    save_grid(images[:64], folder.with_suffix(".png"), value_range=(0, 1))
    print(f"{len(images):,} images in {folder}, a grid in {folder}.png")


@torch.no_grad()
def walks(model, x, count):
    """z (8 * count, latent_dim): from the encoding of an image straight to another's, eight points each."""
    if len(x) < 2 * count:
        fail(f"--interpolate: {len(x):,} held-out images are too few, two a walk")
    a, b = model.encode(x[: 2 * count])[0].view(2, count, 1, -1)
    return torch.lerp(a, b, torch.linspace(0, 1, 8, device=x.device)[:, None]).flatten(0, 1)


def restore(args, checkpoint):
    """The trained model and its device. What is drawn from now on follows from --seed."""
    device = select_device(args.cuda)
    model = VAE(args.width, args.latent_dim, args.autoencoder)
    model.load_state_dict(checkpoint["model"])
    torch.manual_seed(args.seed)
    return model.eval().to(device), device


DOWNLOAD_ERRORS = (OSError, RuntimeError, LookupError, ValueError, AssertionError, EOFError)
DOWNLOAD_ERRORS += (HTTPException,)


def load_images(args):
    """This process's share of the training set, and the whole held-out set: floats (N, 784) in [0, 1], each.

    Where no set was named and MNIST cannot be had, warns and sets args.dataset to synthetic."""
    named = args.dataset
    args.dataset = named or "mnist"
    source = DATASETS.get(args.dataset)
    if source and RANK == 0:
        socket.setdefaulttimeout(10)  # seconds: a dead network would hang
        try:
            for train in (True, False):
                source(args.data_dir, train, download=True)
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
        sets = synthetic_digits(20_000, seed=0), synthetic_digits(2_000, seed=1)
    else:
        sets = [source(args.data_dir, train).data for train in (True, False)]
    images, held_out = (part.flatten(1).float().div(255) for part in sets)
    return images[RANK::RANKS], held_out


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
ONE_COMMAND += ("eval", "importance_samples")
FIXED = ("dataset", "latent_dim", "width", "autoencoder", "lr", "constant_lr")
MAY_BE_ZERO = ("seed", "beta")


def parse_args(argv=None):
    """The arguments, and the checkpoint that --resume or --sample names, else None."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=about)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the training set (%(default)s)")
    add("--batch-size", type=int, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, help="learning rate of Adam; default: at most 5e-3, constant 1e-3")
    add("--constant-lr", action=yes_or_no, default=False, help="a constant rate, not one cycle")
    add("--beta", type=float, default=1.0, help="weight of the KL term (%(default)s)")
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
    add("--latent-dim", type=int, default=20, help="size of z (%(default)s)")
    add("--width", type=int, default=400, help="units of the hidden layers (%(default)s)")
    add("--autoencoder", action="store_true", help="the deterministic twin: z is the mean")

    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, help=f"default: the first free of runs/{NAME}, ...")
    add("--save-every", type=int, default=1, help="epochs between checkpoints (%(default)s)")
    add("--keep-every", type=int, help="also keep every N-th epoch's, as checkpoint_0025.pt")
    add("--resume", type=Path, help="go on from that checkpoint, or that run's folder")
    add("--sample", type=Path, help="no training: write images from that checkpoint")
    add("--num-samples", type=int, default=64, help="images that --sample writes (%(default)s)")
    add("--interpolate", type=int, help="with --sample: walks between two held-out images")
    add("--eval", type=Path, help="no training: print a bound on log p(x) of that checkpoint")
    add("--importance-samples", type=int, default=100, help="z for --eval (%(default)s)")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample or args.eval
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
    uses = args.sample or args.eval
    if uses and (args.resume or RANKS > 1 or (args.sample and args.eval)):
        parser.error("--sample and --eval go alone: without --resume, and without torchrun")
    if args.autoencoder and uses and not args.interpolate:
        parser.error("an autoencoder has neither prior nor likelihood: try --interpolate")
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
    if args.out_dir and not uses and os.path.isdir(args.out_dir):
        if path != args.out_dir / "checkpoint.pt" and any(args.out_dir.glob("checkpoint*.pt")):
            parser.error(f"{args.out_dir} holds a run: --resume it, or use another --out-dir")
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        run = sample if args.sample else train
        if args.eval:
            run = evaluate_checkpoint
        run(args, checkpoint)
    except KeyboardInterrupt:
        saved = run is train and args.out_dir and (args.out_dir / "checkpoint.pt").exists()
        advice = f": python {NAME}.py --resume {args.out_dir} goes on" if saved else ""
        print(f"\nstopped{advice}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
