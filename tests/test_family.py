"""The four scripts are one family: what they share is the same in each, word for word, and each stands alone."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("vae", "gan", "dcgan", "pix2pix")
# What bears the same name in several scripts and is another thing in each: the model, its data and its pictures.
OWN = {"parse_args", "load_images", "batches", "train", "evaluate", "generate", "sample", "initialize", "discriminator_loss"}
OWN |= {"generator_loss", "Generator", "Discriminator", "NETWORK", "METRICS"}


def parts(script):
    """Name to source of what a script defines, with its own name and its advice on memory left open."""
    text = (ROOT / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            source = re.sub(rf"\b{script}\b", "SCRIPT", ast.get_source_segment(text, node))
            source = re.sub(r"out of memory: .*\"", 'out of memory"', source)
            name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0])
            found[name] = source.replace("evaluate_checkpoint(args) if args.eval else ", "")
    return found


def test_what_bears_one_name_is_one_text():
    scripts, shared = [parts(script) for script in SCRIPTS], 0
    for name in set().union(*scripts) - OWN:
        sources = [script[name] for script in scripts if name in script]
        assert len(set(sources)) == 1, name
        shared += len(sources) > 1
    assert shared >= 12


# The first and the last line of each block of dcgan.py's train() that all four have.
BLOCKS = [
    ("    if RANKS > 1:  # torchrun", "    if RANK:\n        dist.barrier()"),
    ("    if RANKS > 1 and RANK == 0:\n", "        dist.barrier()\n    steps"),
    ("    start, seconds, rows = 0", "    if args.checkpoint:\n"),
    ("        for name, part in parts.items()", "        part.load_state_dict"),
    ("        torch.set_rng_state", "    if RANK == 0:\n        args.out_dir"),
    ("    if start >= args.epochs", "            torch.manual_seed(hash"),
    ("            if args.compile:", "cudagraph_mark_step_begin()"),
    ("            if RANKS > 1 and step == steps", "TERMINAL and time.perf_counter() - shown > 0.5:\n"),
    ("                left = timedelta", "(args.epochs - epoch + 1) * steps - step)))"),
    ('                line = f"epoch', '            print(f"\\r{line[:width]:{width}}", end="", flush=True)\n'),
    ("        if RANK:\n            continue", "        # The checkpoint comes last"),
    ('        lines = [("epoch"', '        checkpoint["cuda_rng"] ='),
    ("        save_checkpoint(checkpoint", "        dist.destroy_process_group()"),
]


def test_train_has_the_same_blocks_in_the_same_order():
    texts = {script: parts(script)["train"].replace("metrics,", "METRICS,").replace("*metrics", "*METRICS") for script in SCRIPTS}
    texts["pix2pix"] = texts["pix2pix"].replace("{rate:,.1f}", "{rate:,.0f}")  # a handful a second
    places = dict.fromkeys(SCRIPTS, 0)
    for first, last in BLOCKS:
        model = texts["dcgan"]
        block = model[model.index(first) : model.index(last, model.index(first)) + len(last)]
        for script, text in texts.items():
            assert text.count(block) >= 1, (script, block)
            assert text.index(block, places[script]) >= places[script]
            places[script] = text.index(block, places[script])


def flags(script):
    """Flag to the text of its definition, without its default."""
    found = re.findall(r'add\("--([a-z0-9-]+)", (.*)\)', parts(script)["parse_args"])
    return {flag: re.sub(r"default=[^,]+, ", "", text) for flag, text in found}


def test_shared_flags_have_one_text():
    own = {"dataset", "sample", "data-dir", "width", "lr", "batch-size", "image-size", "interpolate", "num-samples"}  # what they mean differs
    scripts, shared = [flags(script) for script in SCRIPTS], 0
    for flag in set().union(*scripts) - own:
        texts = {script[flag] for script in scripts if flag in script}
        assert len(texts) == 1, (flag, texts)
        shared += sum(flag in script for script in scripts) > 1
    assert shared >= 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_common_are_a_project(script, tmp_path):
    """Copied into an empty folder, it trains there."""
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    small = {"vae": "--hidden-dim 8", "gan": "--width 2", "dcgan": "--width 2 --image-size 28", "pix2pix": "--width 2 --image-size 32"}
    command = [sys.executable, f"{script}.py", "--dataset", "synthetic", "--epochs", "1", *small[script].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "runs" / script / "checkpoint.pt").exists()


def test_only_the_listed_packages_are_imported():
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL", "common"}
    for script in (*SCRIPTS, "common"):
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, script
