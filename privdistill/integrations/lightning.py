"""A `DistillationWrapper` in Lightning's `Trainer`."""
# ruff: noqa: ARG002 - Lightning passes indices to every step.

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import DistillationWrapper, Output, Term
from privdistill.exceptions import ObjectiveError
from privdistill.inputs import Image
from privdistill.integrations import batch as batches
from privdistill.losses.schedules import Weight

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(batches.needs("lightning", error)) from error

_RANDOM = "privdistill_random_state"


class DistillationModule(LightningModule):
    """Train a wrapper with Lightning; a checkpoint holds no frozen teacher.

    The loss and every term, unweighted, are logged under `train/`, `val/` and `test/`, metrics
    under the last two. Objective, inputs, and each term's weight and options are hyper-parameters.
    Schedules and averages count steps of the optimizer, whatever `accumulate_grad_batches` is. A
    checkpoint also holds the state of torch's random numbers, so that from the end of an epoch a
    training goes on exactly, dropout and shuffling included; not from within an epoch, nor in
    several processes.

    Args:
        wrapper: The wrapper, or a function that builds it, called once by `configure_model`.
        optimizer: Function from the parameters to train, which a frozen teacher's are not, to one.
        scheduler: Function from the optimizer to a scheduler, or to Lightning's dictionary of one.
        names: Entry of a batch for an argument of `DistillationWrapper.forward` that is called
            otherwise there, such as `{"target": "label"}`.
        metrics: What to make of validation and test beside the loss: a metric, a collection of
            torchmetrics, or metrics by name. Each is called with the student's logits
            `(B, C, *spatial)`, those of the loss, and the target, of samples that have one. What
            has `update`, `compute` and `reset` is computed at the end, over all loaders; of a plain
            function's numbers the mean is logged.

    Attributes:
        output: `Output` of the last step of a validation or test, for callbacks.

    Raises:
        ObjectiveError: If `names` holds what no step takes, or `optimizer`, `scheduler` or a metric
            cannot be called.
        LifecycleError: If `wrapper` is another network.

    Example:
        >>> import torch
        >>> from privdistill import GroundTruth
        >>> kd = DistillationWrapper(None, nn.Conv2d(1, 2, 1), objective=GroundTruth())
        >>> module = DistillationModule(kd, lambda parameters: torch.optim.Adam(parameters, 1e-4))
        >>> sorted(module.state_dict())
        ['kd.steps', 'kd.student.bias', 'kd.student.weight']
    """

    kd: DistillationWrapper

    def __init__(
        self,
        wrapper: DistillationWrapper | Callable[[], DistillationWrapper],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        *,
        names: Mapping[str, str] | None = None,
        metrics: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.names = batches.check_names(names)
        # Rebound: Lightning finds the argument that hyper-parameters came from with ==, to which a
        # metric of torchmetrics answers with another metric; a checkpoint would confuse the two.
        self._metrics = metrics = _by_name(metrics)
        for name, call in {"optimizer": optimizer, "scheduler": scheduler, **metrics}.items():
            _check_callable(name, call)
        # Modules of their own, so that Lightning moves them.
        self._moved = nn.ModuleList(m for m in self._metrics.values() if isinstance(m, nn.Module))
        self._optimizer, self._scheduler = optimizer, scheduler
        self._random: list[Tensor] = []
        self.output: Output | None = None
        # A network is callable too, and one that is no wrapper must not pass for a function.
        given = isinstance(wrapper, nn.Module) or not callable(wrapper)
        self._build = None if given else wrapper
        if given:
            self._take(wrapper)

    def _take(self, wrapper: Any) -> None:
        kd = batches.unwrapped(wrapper)
        self.kd = wrapper
        terms = {name: _described(*pair) for name, pair in kd.objective.named_terms.items()}
        whole = {"objective": str(kd.objective), "inputs": str(kd.inputs)}
        self.save_hyperparameters(whole | {"terms": terms})

    def configure_model(self) -> None:
        """Call the function that builds the wrapper, once."""
        build, self._build = self._build, None
        if build is not None:
            self._take(build())

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its scheduler if there is one."""
        optimizer = self._optimizer([p for p in self.kd.parameters() if p.requires_grad])
        scheduler = {"lr_scheduler": self._scheduler(optimizer)} if self._scheduler else {}
        return {"optimizer": optimizer, **scheduler}

    def forward(self, image: Image) -> Tensor:
        """Return the student's logits, in eval mode; see `DistillationWrapper.predict`."""
        return self.kd.predict(image)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the objective of a batch."""
        # Lightning steps at the end of each window of batches, and of the epoch.
        window = (batch_index + 1) % self.trainer.accumulate_grad_batches == 0
        given = batches.step_arguments(batch, self.names)
        out = self.kd(**given, advance=window or self.trainer.is_last_batch)
        self._log(out.scalars(), len(batches.finest(out)))
        return out.loss

    def validation_step(self, batch: Any, batch_index: int, dataloader_idx: int = 0) -> Tensor:
        """Return the objective of a batch, in eval mode."""
        given = batches.step_arguments(batch, self.names)
        self.output = self.kd(**given)
        logits, target = batches.finest(self.output), given.get("target")
        self._log(self.output.scalars(), len(logits))
        if target is not None:
            # Unlabelled samples have a target that means nothing.
            labelled = torch.as_tensor(given.get("labelled", [True] * len(target))).bool()
            self._measure(logits[labelled], target[labelled])
        return self.output.loss

    test_step = validation_step

    def predict_step(self, batch: Any, batch_index: int, dataloader_idx: int = 0) -> Tensor:
        """Return the student's logits for the image of a batch."""
        # A batch to predict need not hold a target.
        names = {name: self.names[name] for name in self.names if name in {"image", "present"}}
        given = batches.step_arguments(batch, names)
        return self.kd.predict(given["image"], present=given.get("present"))

    def _measure(self, logits: Tensor, target: Tensor) -> None:
        """Show the metrics a batch, unless none of it is labelled."""
        for name, metric in self._metrics.items() if len(target) else ():
            if hasattr(metric, "compute"):
                metric.update(logits, target)
            else:
                self._log(_by_name(metric(logits, target), name), len(target))

    def _log(self, values: Mapping[str, Any], size: int = 1) -> None:
        training = self.trainer.training
        stage = "train" if training else "test" if self.trainer.testing else "val"
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, on_step=training, on_epoch=True, sync_dist=True, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        """Log what metrics have gathered, and empty them."""
        for name, metric in self._metrics.items():
            if hasattr(metric, "compute"):
                self._log(_by_name(metric.compute(), name))
                metric.reset()

    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of torch's random numbers, of a single process."""
        if self.trainer.world_size == 1:
            used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            devices = torch.cuda.get_rng_state_all() if used else []
            checkpoint[_RANDOM] = [torch.get_rng_state(), *devices]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers until the training starts."""
        self._random = checkpoint.get(_RANDOM, [])

    def on_fit_start(self) -> None:
        """Continue the random numbers of the checkpoint, before the loader draws an order."""
        if self._random and self.trainer.world_size == 1:
            cpu, *devices = (state.cpu() for state in self._random)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])
        self._random = []


def _check_callable(name: str, given: Any) -> None:
    if not (callable(given) or (name == "scheduler" and given is None)):
        raise ObjectiveError(
            f"DistillationModule: `{name}` is a {type(given).__name__}; expected a function, as in "
            "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4), "
            "scheduler=lambda optimizer: StepLR(optimizer, 10), metrics={'dice': metric}."
        )


def _described(weight: Weight, term: Term) -> dict[str, Any]:
    """A term's weight and those of its options that a logger can sort runs by."""
    options = {name: vars(term).get(name) for name in signature(type(term)).parameters}
    plain = {name: value for name, value in options.items() if isinstance(value, int | float | str)}
    return {"weight": str(weight) if weight.schedules else weight.factor, **plain}


def _by_name(given: Any, name: str = "") -> dict[str, Any]:
    """Metrics or their values by name; what has none is called after itself."""
    if isinstance(given, Mapping):
        return dict(given)
    own = name or getattr(given, "__name__", type(given).__name__)
    return {} if given is None else {own: given}
