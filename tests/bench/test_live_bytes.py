"""Live bytes: memory counts once, as long as anybody holds it."""

import torch

from planish.tools.bench.live_bytes import LiveBytes


def test_memory_counts_from_its_making_to_its_end() -> None:
    given = torch.zeros(100)
    with LiveBytes() as live:
        a = given + 1
        assert (live.now, live.peak) == (400, 400)
        b = a * 2
        view = b[:10].reshape(2, 5)
        assert (live.now, live.peak, live.made) == (800, 800, 800)
        del b
        assert live.now == 800  # the view holds it
        del view
        assert live.now == 400
        c = a.double()
        assert (live.now, live.peak, live.made) == (1200, 1200, 1600)
        a += 1
        given.t()
        assert live.made == 1600
    del a, c
    assert (live.now, live.peak) == (0, 1200)


def test_a_tensor_laid_over_memory_that_was_there_makes_none() -> None:
    given = torch.zeros(100)
    with LiveBytes() as live:
        over = torch.empty(0).set_(given.untyped_storage())
    assert over.numel() == 100
    assert live.made == 0


def test_fake_and_empty_tensors_have_no_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with LiveBytes() as live, FakeTensorMode():
        held = torch.empty(1000) + 1
    with live:
        empty = torch.ones(0) + 1
    assert live.made == 0
    assert held.shape == (1000,)
    assert empty.numel() == 0
