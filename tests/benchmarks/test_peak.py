"""Bytes are counted exactly."""

import torch
from torch import nn

from benchmarks.peak import PeakBytes


def test_every_storage_counts_once_while_it_lives():
    with PeakBytes() as count:
        a = torch.zeros(100)
        assert count.now == 400
        view = a.view(10, 10).mT[2:]
        a.add_(1)
        assert count.now == 400
        b = view.double()
        assert count.now == 400 + 8 * 80
        del a
        assert count.now == 400 + 8 * 80  # the view holds it
        del view, b
        assert count.now == 0
        assert count.peak == 400 + 8 * 80
        count.restart()
        assert (count.peak, count.largest) == (0, 0)
        torch.ones(3, dtype=torch.int8) + torch.ones(3, dtype=torch.int8)
        assert (count.now, count.peak, count.largest) == (0, 9, 3)


def test_what_was_there_before_counts_when_it_is_added():
    kept = [torch.zeros(5), torch.zeros(3)]
    more = [*kept, kept[0].view(5, 1), None]
    with PeakBytes() as count:
        assert count.add(more) == 32
        more.clear()
        assert count.add(kept) == 0
        kept.pop()
        assert (count.now, count.peak) == (20, 32)


def test_what_autograd_keeps_counts_until_the_backward_pass():
    layer = nn.Linear(10, 20, bias=False)
    with PeakBytes() as count:
        count.add(layer.parameters())
        x = torch.randn(4, 10)
        loss = layer(x).square().sum()
        assert count.now == 4 * (200 + 40 + 80 + 1)  # weight, input, output, loss
        loss.backward()
        assert count.now == 4 * (200 + 40 + 200 + 1)  # the gradient, but the output no more
        layer.zero_grad()
        assert count.now == 4 * (200 + 40 + 1)
