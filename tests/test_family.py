"""The four scripts are one family: what they share is the same in each, word for word, and each stands alone."""

import ast
import difflib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("vae", "gan", "dcgan", "pix2pix")
# Names that several scripts define. OWN are the model, its data and its pictures, another thing in each.
OWN = {"parse_args", "load_images", "batches", "train", "evaluate", "generate", "sample", "initialize", "discriminator_loss"}
OWN |= {"generator_loss", "Generator", "Discriminator", "NETWORK", "METRICS"}
SHARED = dict.fromkeys(["RANK, RANKS", "TERMINAL", "above", "parallel", "load_checkpoint", "save_checkpoint", "first_free", "main"], 4)
SHARED |= {"FORMAT": 4, "synthetic_digits": 3, "slerp": 2, "IN_MEMORY": 2, "CORES": 2, "WORKERS": 2, "stacked": 2, "whole": 2}
# How many lines of a function are the same, in the same order, in vae.py and gan.py, gan.py and dcgan.py, dcgan.py and
# pix2pix.py. Fewer: one of two was changed, and the other was forgotten. More: raise the number.
LINES = {
    "parse_args": (32, 36, 33),
    "load_images": (16, 14, 0),
    "batches": (8, 5, 10),
    "discriminator_loss": (0, 3, 2),
    "generator_loss": (0, 1, 2),
    "initialize": (0, 0, 3),
    "train": (58, 77, 71),
    "generate": (0, 4, 0),
    "sample": (10, 17, 4),
}


def parts(script):
    """Name to source of what a script defines, with its own name, its images or pairs and its advice on memory left open."""
    text = (ROOT / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            source = re.sub(rf"\b{script}\b", "SCRIPT", ast.get_source_segment(text, node))
            source = re.sub(r"out of memory: .*\"", 'out of memory"', source).replace("metrics", "METRICS")
            source = re.sub(r"\b(pair|image)(s?)\b", r"thing\2", source).replace("PairFiles", "ImageFiles")
            name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0]).strip("()")
            found[name] = source.replace("evaluate_checkpoint(args) if args.eval else ", "")
    return found


def test_what_bears_one_name_is_one_text():
    scripts, shared = [parts(script) for script in SCRIPTS], {}
    for name in set().union(*scripts) - OWN:
        sources = [script[name] for script in scripts if name in script]
        assert len(set(sources)) == 1, name
        if len(sources) > 1:
            shared[name] = len(sources)
    assert shared == SHARED


@pytest.mark.parametrize("function", LINES)
def test_lines_that_two_scripts_share_stay_the_same(function):
    for count, pair in zip(LINES[function], itertools.pairwise(SCRIPTS)):
        a, b = (parts(script).get(function, "").splitlines() for script in pair)
        blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
        differ = "\n".join(difflib.unified_diff(a, b, *pair, n=0, lineterm=""))
        assert sum(line.strip() > "" for block in blocks for line in a[block.a : block.a + block.size]) == count, differ


def flags(script):
    """Flag to its group and its definition without the default, in the order of --help."""
    found, group = {}, ""
    for line in parts(script)["parse_args"].splitlines():
        group = line if "add_argument_group" in line else group
        if flag := re.match(r'    add\("--([a-z0-9-]+)", (.*)\)', line):
            found[flag[1]] = group, re.sub(r"default=[^,]+, ", "", flag[2])
    return found


def test_shared_flags_have_one_place_and_one_text():
    everywhere = ["epochs", "batch-size", "lr", "seed", "cuda", "bf16", "compile", "dataset", "data-dir", "out-dir", "resume", "sample", "num-samples"]
    texts = {"dataset": 3} | dict.fromkeys(["batch-size", "lr", "data-dir", "width", "thing-size", "sample", "num-samples", "interpolate"], 2)
    scripts = [flags(script) for script in SCRIPTS]
    for script in scripts:
        assert [flag for flag in script if flag in everywhere] == everywhere
    for flag in set().union(*scripts):
        groups, definitions = zip(*(script[flag] for script in scripts if flag in script))
        assert len(set(groups)) == 1 and len(set(definitions)) == texts.get(flag, 1), flag


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
