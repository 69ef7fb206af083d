"""Trainer and evaluator on MONAI's Ignite engines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import Output
from privdistill.integrations import batch as batches

try:
    import ignite.distributed as idist
    from ignite.engine import Events
    from monai.engines.evaluator import SupervisedEvaluator
    from monai.engines.trainer import SupervisedTrainer
    from monai.engines.utils import IterationEvents
    from monai.utils.enums import CommonKeys
except ImportError as error:
    raise ImportError(batches.needs("monai", error)) from error


class DistillationTrainer(SupervisedTrainer):  # type: ignore[misc, unused-ignore]
    """MONAI's SupervisedTrainer for a wrapper: its objective is the loss.

    Means of loss and terms over the samples of all processes are metrics of the epoch, `train_loss`
    and `train_<term>`; `engine.state.terms` holds those of the last iteration. Schedules and
    averages count steps of the optimizer, whatever `accumulation_steps` is.

    Args:
        device: Where the wrapper lies.
        max_epochs: Epochs to train.
        train_data_loader: Gives mappings, or pairs of image and target.
        network: The wrapper, or DistributedDataParallel around it.
        optimizer: Of `kd.parameters()`.
        names: Entry of a batch for an argument of the step that is called otherwise, and of
            `engine.state.output` too; unless named, the target is "label". Others ("key",
            "present", "labelled") are found by their names.
        train_handlers: As ever.
        options: Further ones of SupervisedTrainer, such as `amp` and `key_train_metric`; not
            `loss_function` and `prepare_batch`, which objective and names stand in for.

    Raises:
        ObjectiveError: If `names` holds what no step takes.
        LifecycleError: If `network` is no wrapper.

    Example:
        >>> from privdistill import DistillationWrapper, GroundTruth
        >>> kd = DistillationWrapper(None, nn.Conv2d(1, 2, 1), objective=GroundTruth())
        >>> batches = [{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 4, 4).long()}]
        >>> optimizer = torch.optim.Adam(kd.parameters())
        >>> trainer = DistillationTrainer("cpu", 2, batches, kd, optimizer)
        >>> trainer.run()
        >>> sorted(trainer.state.metrics)
        ['train_ground_truth', 'train_loss']
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
        steps = _Steps(network, names, "train_", IterationEvents.LOSS_COMPLETED)
        super().__init__(
            *(device, max_epochs, train_data_loader, network, optimizer, lambda out, _: out.loss),
            prepare_batch=steps.read,
            train_handlers=[steps, *train_handlers],
            **options,
        )


class DistillationEvaluator(SupervisedEvaluator):  # type: ignore[misc, unused-ignore]
    """MONAI's SupervisedEvaluator for a wrapper: predictions are the student's logits.

    Without an inferer the step runs in eval mode, and loss and terms are metrics with the prefix
    `val_`. With one, such as SlidingWindowInferer, the student runs alone, and there are none.

    Args:
        device: Like `network` and `names`, as for the trainer.
        val_data_loader: As for the trainer.
        network: The wrapper.
        names: Of entries.
        val_handlers: As ever.
        inferer: How the student sees large volumes.
        options: Further ones of SupervisedEvaluator, such as `key_val_metric`; not
            `prepare_batch`, which names stand in for.

    Raises:
        ObjectiveError: If `names` holds what no step takes.
        LifecycleError: If `network` is no wrapper.

    Example:
        >>> from privdistill import DistillationWrapper, GroundTruth
        >>> kd = DistillationWrapper(None, nn.Conv2d(1, 2, 1), objective=GroundTruth())
        >>> batches = [{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 4, 4).long()}]
        >>> evaluator = DistillationEvaluator("cpu", batches, kd, decollate=False)
        >>> evaluator.run()
        >>> sorted(evaluator.state.metrics)
        ['val_ground_truth', 'val_loss']
        >>> evaluator.state.output["pred"].shape
        torch.Size([1, 2, 4, 4])
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
        steps = _Steps(network, names, "val_", IterationEvents.FORWARD_COMPLETED)
        # An inferer calls a function of windows, which has no step.
        windows: Any = partial(_student_alone, inferer) if inferer else None
        super().__init__(
            *(torch.device(device), val_data_loader, network),
            prepare_batch=steps.read,
            val_handlers=[steps, *val_handlers],
            inferer=windows,
            **options,
        )


class _Steps:
    """Handler of both engines: reads batches, and gives logits, metrics and terms of each step."""

    def __init__(self, network: nn.Module, names: Any, prefix: str, event: IterationEvents) -> None:
        self.kd = batches.unwrapped(network)
        self.names, self.prefix, self.event = batches.check_names(names), prefix, event
        pairs = {"image": CommonKeys.IMAGE, "target": CommonKeys.LABEL}
        self.entries = {usual: self.names.get(name, usual) for name, usual in pairs.items()}
        #: Sum over samples, and their number, by name.
        self.sums: dict[str, Tensor] = {}

    def attach(self, engine: Any) -> None:
        self.engine = engine
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.sums.clear())
        engine.add_event_handler(self.event, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def read(self, batch: Any, device: Any, non_blocking: bool, **to: Any) -> tuple[Any, ...]:
        """Find a step's arguments and move them: image, target, nothing, the others by name."""
        usual = isinstance(batch, Mapping) and CommonKeys.LABEL in batch
        label = {"target": str(CommonKeys.LABEL)} if usual else {}
        given = batches.step_arguments(batch, label | self.names)
        for name, value in given.items():
            if isinstance(value, Tensor):
                given[name] = value.to(device=device, non_blocking=non_blocking, **to)
        given["advance"] = self._optimizer_steps()
        return given.pop("image"), given.get("target"), (), given

    def _optimizer_steps(self) -> bool:
        """Whether the optimizer steps after this iteration, the last of a window or an epoch."""
        state, window = self.engine.state, getattr(self.engine, "accumulation_steps", 1)
        done = (state.iteration - 1) % (state.epoch_length or state.iteration) + 1
        return bool(done % window == 0 or done == state.epoch_length)

    def _add(self) -> None:
        state = self.engine.state
        state.output = {self.entries.get(key, key): value for key, value in state.output.items()}
        out = state.output[CommonKeys.PRED]
        if not isinstance(out, Output):
            return  # the student ran alone
        state.output[CommonKeys.PRED] = logits = batches.finest(out)
        state.terms = out.scalars()
        for name, value in state.terms.items():
            pair = torch.stack([value, torch.ones_like(value)]).float() * len(logits)
            self.sums[name] = self.sums.get(name, 0) + pair

    def _finish(self) -> None:
        # Every process sends all names, as the samples of one may miss a term that another has.
        names = ["loss", *self.kd.objective.named_terms]
        none = torch.zeros(2, device=self.engine.state.device)
        table = torch.stack([self.sums.get(name, none).to(none) for name in names])
        reduced: Any = idist.all_reduce(table)
        for name, (total, samples) in zip(names, reduced.tolist(), strict=True):
            if samples:
                self.engine.state.metrics[self.prefix + name] = total / samples


def _student_alone(
    inferer: Callable[..., Any], image: Tensor, network: Any, present: Any = None, **_step: Any
) -> Any:
    """Let an inferer call the student with windows of an image."""
    kd = batches.unwrapped(network)
    if present is None:
        return inferer(image, kd.predict)

    # One by one: an inferer mixes windows of a batch, which `present` could not follow.
    def alone(one: Tensor, own: Tensor) -> Any:
        return inferer(one, lambda part: kd.predict(part, present=own.expand(len(part), -1)))

    return torch.cat(list(map(alone, image.split(1), present.split(1))))
