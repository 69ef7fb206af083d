"""A number that is not finite is found before the optimizer uses it, and where it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor

from kdnet.data.loading import Batch
from kdnet.errors import UserError
from privdistill import DistillationWrapper, Output, PrivDistillError, PrivilegedInput

_SHOWN = 5


class NonFiniteError(UserError):
    """An image, loss or gradient is infinite or not a number; what is on disk was made before."""


class Reading(Protocol):
    """Numbers on their way from the device."""

    def read(self) -> list[float]:
        """Return them, once they have arrived."""


class Here:
    """Numbers of a device whose values can be read at once."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def read(self) -> list[float]:
        """Return the numbers."""
        return [float(value) for value in self.values]


class FromGPU:
    """Numbers that a GPU copies to the CPU when it comes to them; nobody waits before `read`."""

    def __init__(self, values: Tensor) -> None:
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.values.copy_(values, non_blocking=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.arrived.record()

    def read(self) -> list[float]:
        """Wait for this step, not for those that were queued after it, and return the numbers."""
        self.arrived.synchronize()
        return [float(value) for value in self.values]


@dataclass(frozen=True)
class Seen:
    """What is remembered of a step until its numbers have been looked at.

    Attributes:
        batch: What went in.
        target: What the loss compared with.
        out: What the wrapper returned.
        norm: Norm of the gradient, or None where it is not known.
        where: Role, epoch and step, for the message.
    """

    batch: Batch
    target: Tensor
    out: Output
    norm: Tensor | None
    where: str


class Guard:
    """Looks at image, loss and gradient of every step."""

    def __init__(
        self,
        fabric: Fabric,
        kd: DistillationWrapper,
        *,
        send: Callable[[Tensor], Reading] | None = None,
        late: bool | None = None,
    ) -> None:
        on_gpu = fabric.device.type == "cuda"
        self.fabric = fabric
        self.kd = kd
        self.send = send or (FromGPU if on_gpu else Here)
        self.late = on_gpu if late is None else late
        # Under fp16 an infinite gradient is how the loss scaler finds its scale: it skips the step.
        self.scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        self._waiting: tuple[Seen, Reading] | None = None

    def look_at_image(self, batch: Batch, where: str) -> None:
        """Look at the images before the network does, whose running statistics they would spoil."""
        if self.late or bool(torch.isfinite(batch["image"]).all()):
            return
        raise NonFiniteError(
            f"Training stopped ({where}): {_images(batch, self.kd)}. Nothing was computed with it. "
            f"{_ADVICE_IMAGE}"
        )

    def look(self, seen: Seen) -> float | None:
        """Look at a step that the optimizer has not taken yet, or at the one before it."""
        finite = torch.isfinite(seen.batch["image"]).all()
        norm = torch.zeros_like(seen.out.loss) if seen.norm is None else seen.norm
        values = (seen.out.loss.detach().float(), norm.detach().float(), finite.float())
        sent = self.send(torch.stack([value.to(finite.device) for value in values]))
        if not self.late:
            return self._judge(seen, sent, now=True)
        loss = self.settle()
        self._waiting = seen, sent
        return loss

    def settle(self) -> float | None:
        """Look at the step that is still waiting; to be called before anything is kept of it."""
        if self._waiting is None:
            return None
        (seen, sent), self._waiting = self._waiting, None
        return self._judge(seen, sent, now=False)

    def _judge(self, seen: Seen, sent: Reading, *, now: bool) -> float:
        loss, norm, finite = sent.read()
        checked = (loss, finite) if self.scaled else (loss, norm, finite)
        image_is_finite = finite == 1.0
        if image_is_finite and all(abs(value) < float("inf") for value in checked):
            return loss
        with self.fabric.autocast():
            causes = _causes(seen, self.kd, now=now, alone=self.fabric.world_size == 1)
        raise NonFiniteError(
            f"Training stopped ({seen.where}): expected finite numbers, found loss {loss:.4g} and "
            f"gradient norm {norm:.4g}.\n{' '.join(causes)}\n"
            "The weights of the last finished epoch are kept. "
            + (_ADVICE if image_is_finite else _ADVICE_IMAGE)
        )


_ADVICE = (
    "Look at these cases, lower --learning_rate, set --gradient_clip, or use --precision 32-true; "
    "then choose a new --out."
)
_ADVICE_IMAGE = (
    "Repair or remove these cases (check_data.py names every file that is not finite) and give "
    "the same command with a new --out."
)


def _causes(seen: Seen, kd: DistillationWrapper, *, now: bool, alone: bool) -> list[str]:
    """Sentences about cases, terms and parameters; what cannot be told is left out."""
    batch, terms = seen.batch, seen.out.terms
    causes = [f"Terms: {', '.join(f'{name} {float(value):.4g}' for name, value in terms.items())}."]
    spoilt = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
    if spoilt:
        causes.append(f"Not finite: {', '.join(spoilt)}.")
    if not bool(torch.isfinite(batch["image"]).all()):
        return [*causes, f"{_images(batch, kd)}."]
    guilty = _guilty(seen, kd) if alone and spoilt else []
    if guilty:
        causes.append(f"Seen one by one, it comes from {_listed(guilty)}.")
    else:
        causes.append(f"Cases: {', '.join(batch['name'])}.")
    # One step later the weights are other ones.
    return [*causes, *_gradients(seen, kd)] if now and alone else causes


def _images(batch: Batch, kd: DistillationWrapper) -> str:
    """Which images of which cases are not finite."""
    image = batch["image"]
    wrong = (~torch.isfinite(image)).flatten(2).sum(2).tolist()
    found = [
        f"{int(count)} of {image[0, 0].numel()} voxels of {_modality(channel, kd)} of {name}"
        for name, counts in zip(batch["name"], wrong, strict=True)
        for channel, count in enumerate(counts)
        if count
    ]
    return f"not finite are {_listed(found)}"


def _modality(channel: int, kd: DistillationWrapper) -> str:
    inputs = kd.inputs
    names: Sequence[str] = ()
    if isinstance(inputs, PrivilegedInput):
        names = [name for name, count in inputs.channels.items() for _ in range(count)]
    return names[channel] if channel < len(names) else f"channel {channel}"


def _again(seen: Seen, kd: DistillationWrapper, chosen: slice) -> Tensor:
    """Loss of some samples of a step; without keys, so that no cache hears of it."""
    labelled = seen.batch.get("labelled")
    labelled = None if labelled is None else labelled[chosen]
    out: Output = kd(seen.batch["image"][chosen], seen.target[chosen], labelled=labelled)
    return out.loss


def _guilty(seen: Seen, kd: DistillationWrapper) -> list[str]:
    """Cases whose loss alone is not finite; none if all are, as then the network is spoilt."""
    names, training = seen.batch["name"], kd.training
    # Batch normalisation cannot train on one sample, and its statistics are to stay.
    kd.eval()
    try:
        with torch.no_grad():
            losses = [_again(seen, kd, slice(i, i + 1)) for i in range(len(names))]
    except (PrivDistillError, RuntimeError):
        # This look is a help; what was found must be told without it.
        return []
    finally:
        kd.train(training)
    guilty = [n for n, loss in zip(names, losses, strict=True) if not bool(torch.isfinite(loss))]
    return guilty if len(guilty) < len(names) or len(names) == 1 else []


def _gradients(seen: Seen, kd: DistillationWrapper) -> list[str]:
    """Parameters whose gradient is not finite, computed again: the norm has spoilt all of them."""
    kd.zero_grad()
    try:
        _again(seen, kd, slice(None)).backward()  # type: ignore[no-untyped-call]
    except (PrivDistillError, RuntimeError):
        return []
    named = [
        name
        for name, parameter in kd.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    return [f"Gradients that are not finite: {_listed(named)}."] if named else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return f"{', '.join(names[:_SHOWN])}{more}"
