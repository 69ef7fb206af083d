"""Trainer and evaluator on MONAI's Ignite engines, and the terms among their metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import ModalityError, Output
from privdistill.integrations.batch import check_names, step_arguments

try:
    from ignite.engine import Events
    from monai.engines import SupervisedEvaluator, SupervisedTrainer
    from monai.engines.utils import IterationEvents
    from monai.utils import CommonKeys
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.monai needs the packages monai and pytorch-ignite, one of which "
        f"cannot be imported ({error}). Install them: pip install 'privdistill[monai]'."
    ) from error


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
        """Add the handler to an engine."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(self.event, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:  # noqa: ARG002
        self._sums, self._samples = {}, 0

    def _add(self, engine: Any) -> None:
        out = engine.state.output[CommonKeys.PRED]
        if not isinstance(out, Output):
            return  # the student ran alone
        logits = out.student[0] if isinstance(out.student, list) else out.student
        engine.state.output[CommonKeys.PRED] = logits
        engine.state.terms = {"loss": out.loss.detach(), **out.terms}
        self._samples += len(logits)
        for name, value in engine.state.terms.items():
            self._sums[name] = self._sums.get(name, 0) + value * len(logits)

    def _finish(self, engine: Any) -> None:
        for name, total in self._sums.items():
            engine.state.metrics[self.prefix + name] = float(total) / self._samples


class DistillationTrainer(SupervisedTrainer):  # type: ignore[misc, unused-ignore]
    """MONAI's SupervisedTrainer for a wrapper: its objective is the loss.

    Args:
        device: Where the wrapper lies.
        max_epochs: Epochs to train.
        train_data_loader: Gives mappings, or pairs of image and target.
        network: The wrapper, or DistributedDataParallel around it.
        optimizer: Of `kd.parameters()`.
        names: Entry of a batch for an argument of the step that is called otherwise; unless given,
            the target is "label". Others ("key", "present", "labelled") are found by their names.
        train_handlers: After the `TermMetrics` that is always there, with the prefix "train_".
        options: Further ones of SupervisedTrainer, such as `amp` and `key_train_metric`.

    Raises:
        ObjectiveError: If `names` holds what no step takes.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        names: Mapping[str, str] | None = None,
        train_handlers: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        terms = TermMetrics("train_", IterationEvents.LOSS_COMPLETED)
        options |= {"prepare_batch": _reader(names), "train_handlers": [terms, *train_handlers]}
        super().__init__(
            device, max_epochs, train_data_loader, network, optimizer, _loss_of, **options
        )


class DistillationEvaluator(SupervisedEvaluator):  # type: ignore[misc, unused-ignore]
    """MONAI's SupervisedEvaluator for a wrapper: predictions are the student's logits.

    Without an inferer the step runs in eval mode, and loss and terms are metrics with the prefix
    "val_". With one, such as SlidingWindowInferer, the student runs alone, and there are none.

    Args:
        device: Like `network` and `names`, as for the trainer.
        val_data_loader: As for the trainer.
        network: The wrapper.
        names: Of entries.
        val_handlers: After the `TermMetrics` that is always there.
        inferer: How the student sees large volumes.
        options: Further ones of SupervisedEvaluator, such as `key_val_metric`.
    """

    def __init__(
        self,
        device: str | torch.device,
        val_data_loader: Iterable[Any],
        network: nn.Module,
        *,
        names: Mapping[str, str] | None = None,
        val_handlers: Sequence[Any] = (),
        inferer: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        terms = TermMetrics("val_", IterationEvents.FORWARD_COMPLETED)
        options |= {"prepare_batch": _reader(names), "val_handlers": [terms, *val_handlers]}
        options["inferer"] = None if inferer is None else partial(_infer, inferer)
        super().__init__(torch.device(device), val_data_loader, network, **options)


def _loss_of(out: Output, target: Tensor | None) -> Tensor:  # noqa: ARG001
    return out.loss


def _reader(names: Mapping[str, str] | None) -> Callable[..., Any]:
    check_names(names or {})

    def read(batch: Any, device: Any, non_blocking: bool, **options: Any) -> tuple[Any, ...]:
        usual = isinstance(batch, Mapping) and CommonKeys.LABEL in batch
        label = {"target": str(CommonKeys.LABEL)} if usual else {}
        given = step_arguments(batch, label if names is None else names)
        for name, value in given.items():
            if isinstance(value, Tensor):
                given[name] = value.to(device=device, non_blocking=non_blocking, **options)
        return given.pop("image"), given.get("target"), (), given

    return read


def _infer(inferer: Callable[..., Any], image: Tensor, network: nn.Module, **given: Any) -> Any:
    kd: Any = getattr(network, "module", network)
    present = given.get("present")
    if present is None:
        return inferer(image, kd.predict)
    if len(image) > 1:
        raise ModalityError(
            f"An inferer mixes windows of a batch, here of {len(image)} images, which `present` "
            "cannot follow. Load one image at a time, or leave the inferer out."
        )
    return inferer(image, lambda part: kd.predict(part, present=present.expand(len(part), -1)))
