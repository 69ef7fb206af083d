"""The terms of a step among the metrics of MONAI's engines."""

from typing import Any

from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from privdistill.integrations.terms import finest, values
from privdistill.output import Output


class TermMetrics:
    """Handler that turns loss and terms of each iteration into metrics of the epoch.

    Means over samples, called `<prefix>loss` and `<prefix><term>` in `engine.state.metrics`, where
    MONAI's StatsHandler finds them; `engine.state.terms` holds those of the last iteration. The
    prediction becomes the student's logits, of several heads the finest.

    Args:
        prefix: Before each name.
        event: After it the wrapper's output is not needed any more.
    """

    def __init__(self, prefix: str, event: IterationEvents) -> None:
        self.prefix, self.event = prefix, event
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def attach(self, engine: Any) -> None:
        """Add the handler to an engine.

        Args:
            engine: Its predictions are outputs of the wrapper, or the student's logits.
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(self.event, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:  # noqa: ARG002
        self._sums, self._samples = {}, 0

    def _add(self, engine: Any) -> None:
        out = engine.state.output[CommonKeys.PRED]
        if not isinstance(out, Output):
            return  # the student ran alone
        logits = finest(out)
        engine.state.output[CommonKeys.PRED] = logits
        engine.state.terms = values(out)
        self._samples += len(logits)
        for name, value in engine.state.terms.items():
            self._sums[name] = self._sums.get(name, 0) + value * len(logits)

    def _finish(self, engine: Any) -> None:
        for name, total in self._sums.items():
            engine.state.metrics[self.prefix + name] = float(total) / self._samples
