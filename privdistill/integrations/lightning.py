"""A `DistillationWrapper` in Lightning's `Trainer`."""
# ruff: noqa: ARG002 - Lightning passes indices to every step.

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import DistillationWrapper, Output
from privdistill.inputs import Image
from privdistill.integrations.batch import check_names, step_arguments
from privdistill.integrations.critic import refuse_critic
from privdistill.integrations.randomness import random_state, set_random_state
from privdistill.integrations.terms import finest, to_train, values

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.lightning needs the package lightning, which cannot be imported "
        f"({error}). Install it: pip install './privdistill[lightning]'."
    ) from error

_RANDOM = "privdistill_random_state"


class DistillationModule(LightningModule):
    """Train a wrapper with Lightning; a checkpoint holds no frozen teacher.

    The loss and every term, unweighted, are logged under `train/`, `val/` and `test/`. A checkpoint
    also holds the state of torch's random numbers, so that from the end of an epoch a training goes
    on exactly, dropout and shuffling included; not from within an epoch, nor in several processes.

    Args:
        wrapper: The wrapper, or a function that builds it, called once by `configure_model`.
        optimizer: Function from the parameters to train, which a frozen teacher's are not, to one.
        scheduler: Function from the optimizer to a scheduler, or to Lightning's dictionary of one.
        names: Entry of a batch for an argument of `DistillationWrapper.forward` that is called
            otherwise there, such as `{"target": "label"}`.

    Raises:
        ObjectiveError: If `names` holds what no step takes.
        LifecycleError: If a term has a critic, or `wrapper` is another network.

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
    ) -> None:
        super().__init__()
        self.names = check_names(names)
        # A network is callable too, and one that is no wrapper must not pass for a function.
        given = isinstance(wrapper, nn.Module) or not callable(wrapper)
        self._build = None if given else wrapper
        self._optimizer, self._scheduler = optimizer, scheduler
        self._random: Mapping[str, Any] | None = None
        self._modes: dict[nn.Module, bool] = {}
        if given:
            self._take(wrapper)

    def _take(self, wrapper: Any) -> None:
        refuse_critic(wrapper, "DistillationModule")
        self.kd = wrapper

    def configure_model(self) -> None:
        """Call the function that builds the wrapper, once."""
        build, self._build = self._build, None
        if build is not None:
            self._take(build())

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its scheduler if there is one."""
        optimizer = self._optimizer(to_train(self.kd))
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def forward(self, image: Image) -> Tensor:
        """Return the student's logits, in eval mode; see `DistillationWrapper.predict`."""
        return self.kd.predict(image)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the objective of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_index: int, dataloader_idx: int = 0) -> Tensor:
        """Return the objective of a batch, in eval mode."""
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_index: int, dataloader_idx: int = 0) -> Tensor:
        """Return the objective of a batch, in eval mode."""
        return self._step(batch, "test")

    def predict_step(self, batch: Any, batch_index: int, dataloader_idx: int = 0) -> Tensor:
        """Return the student's logits for the image of a batch."""
        names = {name: self.names[name] for name in self.names if name in {"image", "present"}}
        given = step_arguments(batch, names)
        return self.kd.predict(given["image"], present=given.get("present"))

    def _step(self, batch: Any, stage: str) -> Tensor:
        out: Output = self.kd(**step_arguments(batch, self.names, self.kd.objective))
        logged = {f"{stage}/{name}": value for name, value in values(out).items()}
        training, size = stage == "train", len(finest(out))
        self.log_dict(logged, on_step=training, on_epoch=True, sync_dist=True, batch_size=size)
        return out.loss

    def on_validation_model_eval(self) -> None:
        """Go to eval mode, and remember which modules were not in train mode."""
        self._modes = {module: module.training for module in self.modules()}
        self.eval()

    def on_validation_model_train(self) -> None:
        """Go back; Lightning itself would forget a teacher that learns, which is no submodule."""
        self.train(self._modes[self])
        for module, mode in self._modes.items():
            module.training = mode

    on_test_model_eval = on_validation_model_eval
    on_test_model_train = on_validation_model_train

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of torch's random numbers, of a single process."""
        if self.trainer.world_size == 1:
            checkpoint[_RANDOM] = random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers until the training starts."""
        self._random = checkpoint.get(_RANDOM)

    def on_fit_start(self) -> None:
        """Continue the random numbers of the checkpoint, before the loader draws an order."""
        if self._random is not None and self.trainer.world_size == 1:
            set_random_state(self._random)
        self._random = None
