"""The terms of a step among the metrics of MONAI's engines."""

from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from privdistill.integrations.terms import finest, values
from privdistill.integrations.windows import unwrapped
from privdistill.step import Output


class TermMetrics:
    """Handler that turns loss and terms of each iteration into metrics of the epoch.

    Means over the samples of all processes, called `<prefix>loss` and `<prefix><term>` in
    `engine.state.metrics`, where MONAI's StatsHandler finds them; batches without a term do not
    count for it. `engine.state.terms` holds those of the process's last iteration. The prediction
    becomes the student's logits, of several heads the finest.

    Args:
        prefix: Before each name.
        event: After it the wrapper's output is not needed any more.
    """

    def __init__(self, prefix: str, event: IterationEvents) -> None:
        self.prefix, self.event = prefix, event
        #: Sum over samples, and their number, by name.
        self._sums: dict[str, Tensor] = {}

    def attach(self, engine: Any) -> None:
        """Add the handler to an engine.

        Args:
            engine: One of MONAI's whose network is the wrapper, perhaps within
                DistributedDataParallel. All processes run it, as sums are exchanged.
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(self.event, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:  # noqa: ARG002
        self._sums = {}

    def _add(self, engine: Any) -> None:
        out = engine.state.output[CommonKeys.PRED]
        if not isinstance(out, Output):
            return  # the student ran alone
        logits = finest(out)
        engine.state.output[CommonKeys.PRED] = logits
        engine.state.terms = values(out)
        for name, value in engine.state.terms.items():
            pair = torch.stack([value, torch.ones_like(value)]).float() * len(logits)
            self._sums[name] = self._sums.get(name, 0) + pair

    def _finish(self, engine: Any) -> None:
        # Every process sends all names, as the samples of one may miss a term that another has.
        names = ["loss", *unwrapped(engine.network).objective.named_terms]
        none = torch.zeros(2, device=engine.state.device)
        table = torch.stack([self._sums.get(name, none).to(none) for name in names])
        reduced: Any = idist.all_reduce(table)
        for name, (total, samples) in zip(names, reduced.tolist(), strict=True):
            if samples:
                engine.state.metrics[self.prefix + name] = total / samples
