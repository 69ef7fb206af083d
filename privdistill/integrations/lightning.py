"""A `DistillationWrapper` in Lightning's `Trainer`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import DistillationWrapper, LifecycleError, Output
from privdistill.inputs import Image
from privdistill.integrations.batch import check_names, step_arguments
from privdistill.integrations.critic import refuse_critic
from privdistill.integrations.randomness import random_state, set_random_state
from privdistill.integrations.terms import finest, values

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.lightning needs the package lightning, which cannot be imported "
        f"({error}). Install it: pip install 'privdistill[lightning]'."
    ) from error

_RANDOM = "privdistill_random_state"


class DistillationModule(LightningModule):
    """Train a wrapper with Lightning; a checkpoint holds no frozen teacher.

    The loss and every term, unweighted, are logged under `train/` and `val/`. A checkpoint also
    holds the state of torch's random numbers, so that a training goes on exactly, dropout and
    shuffling included; not in several processes, whose states differ.

    Args:
        wrapper: The wrapper, or a function that builds it, called once by `configure_model`.
        optimizer: Function from parameters to an optimizer. It is given the student, the adapters
            and the terms, and a `JointTeacher`; never a frozen teacher.
        scheduler: Function from the optimizer to a scheduler, or to Lightning's dictionary of one.
        names: Entry of a batch for an argument of the step that is called otherwise there, such as
            `{"target": "label"}`. See `DistillationWrapper.forward` for the arguments.

    Raises:
        ObjectiveError: If `names` holds what no step takes.
        LifecycleError: If a term has a critic.

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
        self.names = dict(names or {})
        check_names(self.names)
        self._build = None if isinstance(wrapper, DistillationWrapper) else wrapper
        self._optimizer, self._scheduler = optimizer, scheduler
        self._random: Mapping[str, Any] | None = None
        self._modes: dict[nn.Module, bool] = {}
        if isinstance(wrapper, DistillationWrapper):
            self._take(wrapper)

    def _take(self, wrapper: DistillationWrapper) -> None:
        refuse_critic(wrapper, "DistillationModule")
        self.kd = wrapper

    def configure_model(self) -> None:
        """Call the function that builds the wrapper, once."""
        if self._build is not None:
            build, self._build = self._build, None
            self._take(build())

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its scheduler if there is one."""
        optimizer = self._optimizer([*self.kd.parameters(), *self._of_teacher()])
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def _of_teacher(self) -> list[nn.Parameter]:
        try:
            return [weight for weight in self.kd.teacher_parameters() if weight.requires_grad]
        except LifecycleError:
            return []  # it is frozen

    def forward(self, image: Image) -> Tensor:
        """Return the student's logits, in eval mode; see `DistillationWrapper.predict`."""
        return self.kd.predict(image)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:  # noqa: ARG002
        """Return the objective of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_index: int) -> Tensor:  # noqa: ARG002
        """Return the objective of a batch, in eval mode."""
        return self._step(batch, "val")

    def predict_step(self, batch: Any, batch_index: int) -> Tensor:  # noqa: ARG002
        """Return the student's logits for the image of a batch."""
        given = step_arguments(batch, {"image": self.names.get("image", "image")})
        return self.kd.predict(given["image"], present=given.get("present"))

    def _step(self, batch: Any, stage: str) -> Tensor:
        given = step_arguments(batch, self.names)
        out: Output = self.kd(**given)
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
