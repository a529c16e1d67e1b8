"""ENTP's exact step against its authors' own model, from a user's checkout.

ENTP_DIR names a checkout of github.com/ethanewer/encoder-addition, or of another of the authors'
repositories that has the package `nano_transformer`. Its encoder loops over the prefixes; it gets
our weights and our batch, and has to come to our loss and to the norm of our gradient.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.benchmarks.entp_steps import (
    SIZES,
    VOCAB_SIZE,
    Shape,
    Step,
    build_entp,
    contest,
    norm_and_clear,
)
from tests.benchmarks.measure import Benchmark, Contest, NotRun
from tests.benchmarks.model_steps import random_ids

PACKAGE = "nano_transformer"


def authors_package() -> ModuleType:
    """The package in the checkout. Raises NotRun."""
    folder = os.environ.get("ENTP_DIR")
    if not folder:
        raise NotRun("set ENTP_DIR to a checkout of github.com/ethanewer/encoder-addition")
    path = Path(folder, PACKAGE, "__init__.py")
    if not path.is_file():
        raise NotRun(
            f"ENTP_DIR={folder!r} has no {PACKAGE}/__init__.py; give a checkout of "
            "github.com/ethanewer/encoder-addition"
        )
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(PACKAGE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[PACKAGE]
        raise NotRun(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    for name in ("TransformerConfig", "TransformerLMHead"):
        if not hasattr(module, name):
            raise NotRun(f"{path} has no {name}; give a checkout that has")
    return module


def authors_model(shape: Shape) -> Any:
    """Their language model with our first weights. Raises NotRun."""
    import torch

    package = authors_package()
    ours = build_entp(shape)
    config = ours.config
    model = package.TransformerLMHead(
        package.TransformerConfig(
            n_positions=shape.seq_len,
            vocab_size=VOCAB_SIZE,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.d_model,
        )
    )
    stack = model.transformer
    with torch.no_grad():
        stack.wte.weight.copy_(ours.embedding.weight)
        stack.wpe.weight.copy_(ours.position_embedding.weight)
        _copy(stack.ln_f, ours.final_norm)
        for theirs, block in zip(stack.h, ours.blocks, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            _copy(theirs.ln_1, block.attention_norm)
            _copy(theirs.attn.c_attn, attention.query, attention.key, attention.value)
            _copy(theirs.attn.c_proj, attention.output)
            _copy(theirs.ln_2, block.feed_forward_norm)
            _copy(theirs.mlp.c_fc, feed_forward.up)
            _copy(theirs.mlp.c_proj, feed_forward.down)
    return model


def _copy(theirs: Any, *ours: Any) -> None:
    """Weights and biases of `ours`, one after the other; a matrix of theirs is [in, out]."""
    import torch

    theirs.weight.copy_(torch.cat([module.weight for module in ours]).t())
    theirs.bias.copy_(torch.cat([module.bias for module in ours]))


def authors_step(shape: Shape) -> Step:
    """Every prefix encoded by itself by their class; one backward pass, as they train."""
    import torch.nn.functional as F

    model = authors_model(shape)
    ids = random_ids(shape.batch, shape.seq_len + 1, VOCAB_SIZE)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def step() -> tuple[float, float]:
        logits = model(inputs, decoder=False)
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        return float(loss.detach()), norm_and_clear(model)

    return step


def against_authors(folder: Path, shape: Shape) -> Contest:
    """See `BENCHMARKS`."""
    authors_package()
    return contest(folder, authors_step, shape)


def _benchmark(shape: Shape) -> Benchmark:
    deep = "" if shape.size == "entp-small" else f"-{shape.size.removeprefix('entp-')}"
    return Benchmark(
        name=f"entp-authors{deep}-{shape.seq_len}",
        ours="ENTP's exact step",
        theirs="the authors' own model and loss, eager",
        process="one process",
        prepare=partial(against_authors, shape=shape),
        peer=True,
        note=f"{SIZES[shape.size]}, T {shape.seq_len}, batch {shape.batch}, V {VOCAB_SIZE}, fp32; "
        "ENTP_DIR; peak MiB as of entp-loop-*",
    )


_SHAPES = (Shape(64), Shape(128), Shape(64, size="entp-medium", batch=2))
BENCHMARKS = tuple(_benchmark(shape) for shape in _SHAPES)
