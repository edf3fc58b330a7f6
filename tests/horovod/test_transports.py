"""The laws of transports, for both ways through Horovod: what they gather."""

import itertools

import horovod.torch as hvd
import pytest
from transports import GATHERING, UNEVEN

from hvd_sparse.torch.exchanges import EmbeddedExchange, GatheredExchange

pytestmark = [pytest.mark.ranks, pytest.mark.transport]

NUMBERS = itertools.count()  # the same on every rank: Horovod knows tensors by name


class OverAllgather:
    """All tensors share one, but for those that come alone."""

    def __init__(self, *, padded=False, together=True):
        prefix = f"law{next(NUMBERS)}"
        group = hvd.global_process_set
        self.exchange = GatheredExchange(lambda: group, prefix, padded=padded)
        if together:
            self.exchange.plan({f"w{place}": 1000 for place in range(3)})

    def travel(self, handles):
        self.exchange.arrive(handles[0])

    def close(self):
        pass


class OverAllreduce:
    """The optimizer's own."""

    def __init__(self):
        self.number = next(NUMBERS)
        self.exchange = EmbeddedExchange(lambda: hvd.global_process_set)

    def travel(self, handles):
        for handle in handles:
            buffer = self.exchange.to_reduce(handle)
            total = hvd.allreduce(buffer, name=f"law{self.number}.{handle}", op=hvd.Sum)
            self.exchange.reduced(handle, total)

    def close(self):
        pass


ENDS = {
    "gathered": OverAllgather,
    "gathered alone": lambda: OverAllgather(together=False),
    "gathered, padded": lambda: OverAllgather(padded=True),
    "embedded": OverAllreduce,
}


@pytest.mark.parametrize("make", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("law", GATHERING, ids=lambda law: law.__name__)
def test_payloads_are_gathered(law, make):
    law(make())


@pytest.mark.parametrize("law", UNEVEN, ids=lambda law: law.__name__)
def test_sizes_may_differ(law):
    law(OverAllgather(padded=True))
