"""The benchmark against ENTP's authors: refused without their code, and equal to a stand-in's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.benchmarks import entp_authors
from tests.benchmarks.entp_steps import Shape, exact_step
from tests.benchmarks.measure import NotRun
from tests.benchmarks.model_steps import same_numbers

# The names and shapes of the authors' package: matrices are [in, out], the head is tied, and
# `decoder=False` encodes every prefix anew.
STAND_IN = """
import dataclasses, torch
from torch import nn
from torch.nn import functional as F

@dataclasses.dataclass
class TransformerConfig:
    n_positions: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class Conv(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        return x @ self.weight + self.bias

def group(**modules):
    made = nn.Module()
    for name, module in modules.items():
        made.add_module(name, module)
    return made

class TransformerLMHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, d = c.n_head, c.n_embd
        blocks = [group(ln_1=nn.LayerNorm(d), ln_2=nn.LayerNorm(d),
                        attn=group(c_attn=Conv(d, 3 * d), c_proj=Conv(d, d)),
                        mlp=group(c_fc=Conv(d, 4 * d), c_proj=Conv(4 * d, d)))
                  for _ in range(c.n_layer)]
        self.transformer = group(wte=nn.Embedding(c.vocab_size, d), h=nn.ModuleList(blocks),
                                 wpe=nn.Embedding(c.n_positions, d), ln_f=nn.LayerNorm(d))

    def forward(self, ids, decoder):
        assert not decoder
        t, read = self.transformer, []
        for n in range(1, ids.shape[1] + 1):
            x = t.wte(ids[:, :n]) + t.wpe.weight[:n]
            for b in t.h:
                q, k, v = b.attn.c_attn(b.ln_1(x)).chunk(3, -1)
                q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
                w = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
                x = x + b.attn.c_proj((w @ v).transpose(1, 2).flatten(2))
                x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x)), approximate="tanh"))
            read.append(t.ln_f(x[:, -1]))
        return torch.stack(read, 1) @ t.wte.weight.T
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that ENTP_DIR names, empty."""
    monkeypatch.setenv("ENTP_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, entp_authors.PACKAGE, raising=False)
    yield tmp_path
    sys.modules.pop(entp_authors.PACKAGE, None)


def test_what_is_missing_is_told(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRun, match="has no nano_transformer"):
        entp_authors.against_authors(checkout, Shape(4))
    package = checkout / "nano_transformer" / "__init__.py"
    package.parent.mkdir()
    for text, words in (("import nothing_of_this_name", "nothing_of_this_name"), ("", "has no Tr")):
        package.write_text(text)
        with pytest.raises(NotRun, match=words):
            entp_authors.against_authors(checkout, Shape(4))
        sys.modules.pop(entp_authors.PACKAGE, None)
    monkeypatch.delenv("ENTP_DIR")
    with pytest.raises(NotRun, match="set ENTP_DIR"):
        entp_authors.against_authors(checkout, Shape(4))


def test_our_step_comes_to_the_loss_and_the_gradient_of_theirs(checkout: Path) -> None:
    package = checkout / "nano_transformer" / "__init__.py"
    package.parent.mkdir()
    package.write_text(STAND_IN)
    shape, threads = Shape(6, batch=2), torch.get_num_threads()
    try:
        same_numbers(exact_step(shape)(), entp_authors.authors_step(shape)())
    finally:
        torch.set_num_threads(threads)
