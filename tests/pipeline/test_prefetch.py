import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.data.run_order import pretraining_order
from pipeline.plan import resolve_model
from pipeline.prefetch import Prefetched
from pipeline.sources import PretrainingSource
from pipeline.trainer import Trainer
from tests.distributed.parity import Case, run_config


class Counting:
    """A source whose shares are their step; notes who asked, and fails at one step."""

    names = ("only",)

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.asked = []

    def share(self, step, rank, world_size):
        self.asked.append((step, threading.current_thread() is threading.main_thread()))
        if step == self.fails_at:
            raise ValueError(f"step {step} cannot be made")
        return SimpleNamespace(step=step, rank=rank, world_size=world_size)

    def epochs(self, step):
        return {"only": step / 4}


def test_shares_are_the_sources_and_those_after_the_first_come_from_a_thread():
    source = Counting()
    prefetched = Prefetched(source, 5, pinned=False)
    shares = [prefetched.share(step, 1, 2) for step in range(5)]
    assert [(s.step, s.rank, s.world_size) for s in shares] == [(i, 1, 2) for i in range(5)]
    # Each once, nothing beyond the last step.
    assert source.asked == [(0, True), *((step, False) for step in range(1, 5))]
    assert prefetched.epochs(2) == {"only": 0.5}
    assert prefetched.names == ("only",)


def test_what_goes_wrong_is_raised_where_its_share_is_asked_for():
    prefetched = Prefetched(Counting(fails_at=2), 9, pinned=False)
    assert [prefetched.share(step, 0, 1).step for step in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="step 2 cannot be made"):
        prefetched.share(2, 0, 1)
    assert prefetched.share(3, 0, 1).step == 3


def test_another_step_than_the_next_is_made_anew():
    source = Counting()
    prefetched = Prefetched(source, 9, pinned=False)
    assert [prefetched.share(step, 0, 1).step for step in (0, 5, 6, 2)] == [0, 5, 6, 2]
    assert (5, True) in source.asked
    prefetched.close()
    assert threading.active_count() == 1 or not any(
        thread.name.startswith("batches of") for thread in threading.enumerate()
    )


def test_what_hangs_does_not_keep_a_run_from_ending():
    source, hung = Counting(), threading.Event()
    make = source.share

    def hanging(step, rank, world_size):
        if step:
            hung.wait(30)
        return make(step, rank, world_size)

    source.share = hanging
    prefetched = Prefetched(source, 3, pinned=False)
    prefetched.share(0, 0, 1)
    prefetched.close(patience=0.05)
    left = [thread for thread in threading.enumerate() if thread.name == "batches of 1"]
    assert [thread.daemon for thread in left] == [True]
    hung.set()
    left[0].join(10)


def test_no_batch_is_made_while_the_run_goes_back_to_its_start():
    """DeepSpeed's way of building a model would change its tensors."""
    source, slow = Counting(), threading.Event()
    make = source.share

    def slowly(step, rank, world_size):
        if step:
            slow.wait(0.3)
        return make(step, rank, world_size)

    def return_to(*_):
        assert source.asked == [(0, True), (1, False)]
        return {"step": 0}

    source.share = slowly
    prefetched = Prefetched(source, 3, pinned=False)
    prefetched.share(0, 0, 1)
    start = SimpleNamespace(return_to=return_to)
    trainer = SimpleNamespace(_source=prefetched, start=start, engine=None, world=None)
    assert Trainer.return_to_start(trainer) == {"step": 0}
    assert prefetched.share(1, 0, 1).step == 1
    assert source.asked[2] == (1, True)
    prefetched.close()


def test_gradients_and_random_numbers_of_the_main_thread_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prefetched = Prefetched(Counting(), 3, pinned=False)
    prefetched.share(0, 0, 1)
    assert torch.equal(torch.rand(2), expected)
    assert torch.is_grad_enabled()
    prefetched.close()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_batches_of_the_real_order_are_the_same_at_any_depth(shards_dir: Path, depth: int) -> None:
    plain = run_config(Case(), shards_dir, 40)
    config = replace(plain, document_masks=True, weight_stages={100: {"github": 1.0}})
    model = resolve_model(config, 512)

    def source() -> PretrainingSource:
        return PretrainingSource(config, model, pretraining_order(config), bos=1, pad=0)

    direct = source()
    ahead = source()
    layers = []
    for _ in range(depth):
        ahead = Prefetched(ahead, config.steps, pinned=False)
        layers.append(ahead)
    # Straight on, past plans and a change of weights; a rollback; a leap; other ranks.
    asked = [(step, 1, 2) for step in [*range(12), 3, 4, 5, 30, 31]] + [(32, 2, 3), (33, 2, 3)]
    for step in asked:
        found, expected = ahead.share(*step), direct.share(*step)
        assert found.sample_hash == expected.sample_hash
        assert found.row_sources == expected.row_sources
        for one, other in zip(found.micro_batches, expected.micro_batches, strict=True):
            for name, tensor in vars(other).items():
                assert tensor is None or torch.equal(tensor, getattr(one, name))
    for layer in reversed(layers):
        layer.close()
