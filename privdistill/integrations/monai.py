"""Trainer and evaluator on MONAI's Ignite engines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import Objective, Output
from privdistill.integrations.batch import check_names, check_options, step_arguments
from privdistill.integrations.critic import check_wrapper, refuse_critic
from privdistill.integrations.windows import predict_windows, unwrapped

try:
    from monai.engines.evaluator import SupervisedEvaluator
    from monai.engines.trainer import SupervisedTrainer
    from monai.engines.utils import IterationEvents
    from monai.utils.enums import CommonKeys

    from privdistill.integrations.monai_terms import TermMetrics
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.monai needs the packages monai and pytorch-ignite, one of which "
        f"cannot be imported ({error}). Install them: pip install './privdistill[monai]'."
    ) from error


class DistillationTrainer(SupervisedTrainer):  # type: ignore[misc, unused-ignore]
    """MONAI's SupervisedTrainer for a wrapper: its objective is the loss.

    Args:
        device: Where the wrapper lies.
        max_epochs: Epochs to train.
        train_data_loader: Gives mappings, or pairs of image and target.
        network: The wrapper, or DistributedDataParallel around it.
        optimizer: Of `kd.parameters()`.
        names: Entry of a batch for an argument of the step that is called otherwise; unless named,
            the target is "label". Others ("key", "present", "labelled") are found by their names.
        train_handlers: After the `TermMetrics` that is always there; their prefix is `train_`.
        options: Further ones of SupervisedTrainer, such as `amp` and `key_train_metric`.

    Raises:
        ObjectiveError: If `names` holds what no step takes, or an option has no place here.
        LifecycleError: If a term has a critic, or `network` is no wrapper.

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
        kd = unwrapped(network)
        refuse_critic(kd, "DistillationTrainer")
        check_options(options, "DistillationTrainer")
        terms = TermMetrics("train_", IterationEvents.LOSS_COMPLETED)
        reader = _reader(names, kd.objective)
        options |= {"prepare_batch": reader, "train_handlers": [terms, *train_handlers]}
        super().__init__(
            device, max_epochs, train_data_loader, network, optimizer, _loss_of, **options
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
        val_handlers: After the `TermMetrics` that is there without an inferer.
        inferer: How the student sees large volumes.
        options: Further ones of SupervisedEvaluator, such as `key_val_metric`.

    Raises:
        ObjectiveError: If `names` holds what no step takes, or an option has no place here.
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
        kd, alone = unwrapped(network), inferer is not None
        check_wrapper(kd, "DistillationEvaluator")
        check_options(options, "DistillationEvaluator")
        terms = [] if alone else [TermMetrics("val_", IterationEvents.FORWARD_COMPLETED)]
        options["prepare_batch"] = _reader(names, None if alone else kd.objective)
        options["val_handlers"] = [*terms, *val_handlers]
        options["inferer"] = None if inferer is None else partial(predict_windows, inferer)
        super().__init__(torch.device(device), val_data_loader, network, **options)


def _loss_of(out: Output, target: Tensor | None) -> Tensor:  # noqa: ARG001
    return out.loss


def _reader(names: Mapping[str, str] | None, objective: Objective | None) -> Callable[..., Any]:
    own = check_names(names)

    def read(batch: Any, device: Any, non_blocking: bool, **options: Any) -> tuple[Any, ...]:
        usual = isinstance(batch, Mapping) and CommonKeys.LABEL in batch
        label = {"target": str(CommonKeys.LABEL)} if usual else {}
        given = step_arguments(batch, label | own, objective)
        for name, value in given.items():
            if isinstance(value, Tensor):
                given[name] = value.to(device=device, non_blocking=non_blocking, **options)
        return given.pop("image"), given.get("target"), (), given

    return read
