"""How far a training is, and the files from which it goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from kdnet.errors import UserError
from kdnet.exhaustion import explain
from kdnet.training.checkpoint import file_digest, load_state, save_state, save_weights
from kdnet.training.sharding import load_optimizer, load_weights, whole
from kdnet.training.task import Task
from kdnet.writing import first_line
from privdistill import DistillationWrapper


@dataclass
class Means:
    """Running means over cases.

    Attributes:
        sums: Sums by name, on the device; reading them is the only synchronisation.
        cases: Number of cases by name.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    cases: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], cases: int | Tensor) -> None:
        """Add the means over some cases; their number may lie on the device."""
        for name, value in values.items():
            count = torch.as_tensor(cases, dtype=torch.float64, device=value.device)
            weighted = value.detach().double() * count
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
            self.cases[name] = self.cases[name] + count if name in self.cases else count

    def packed(self, device: torch.device) -> Tensor:
        """Return sums and numbers of cases, (2, names)."""
        counts = [self.cases.get(name, torch.zeros(())).double().to(device) for name in self.sums]
        return torch.stack([torch.stack([*self.sums.values()]).to(device), torch.stack(counts)])

    @classmethod
    def unpacked(cls, names: Sequence[str], packed: Tensor) -> "Means":
        """Return the means whose names and `packed` these are."""
        sums, cases = (dict(zip(names, row, strict=True)) for row in packed)
        return cls(sums, cases)

    def reduce(self, fabric: Fabric, prefix: str) -> dict[str, float]:
        """Return the means over the cases of all processes, names prefixed."""
        packed = self.packed(fabric.device)
        sums, cases = torch.as_tensor(fabric.all_reduce(packed, reduce_op="sum"))
        means = (sums / cases).tolist()
        return {f"{prefix}{name}": mean for name, mean in zip(self.sums, means, strict=True)}


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: Finished epochs.
        step: Steps taken in all.
        best: Lowest validation loss so far.
        batch: Steps taken in the epoch that is not finished.
        means: Losses of these steps.
        seconds: Time that they took before the training was interrupted.
        random: Random numbers with which the next step begins, if they have to be put back first.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("inf")
    batch: int = 0
    means: Means = field(default_factory=Means)
    seconds: float = 0.0
    random: "RandomState | None" = None

    def finish_epoch(self) -> None:
        """Count an epoch as finished."""
        self.epoch += 1
        self.batch, self.seconds, self.means = 0, 0.0, Means()

    def put_back_random(self) -> None:
        """Go on with the random numbers of an interrupted epoch, after its loader drew its own."""
        if self.random is not None:
            self.random.restore()
            self.random = None


@dataclass(frozen=True)
class RandomState:
    """State of PyTorch's random number generators in one process.

    Attributes:
        cpu: Of the CPU.
        gpu: Of the process's GPU; empty without one.
    """

    cpu: Tensor
    gpu: Tensor

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the present state."""
        cuda = device.type == "cuda"
        gpu = torch.cuda.get_rng_state(device) if cuda else torch.zeros(0, dtype=torch.uint8)
        return cls(torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Go on with these random numbers."""
        # Clones, because PyTorch reads them from the beginning of their memory.
        torch.set_rng_state(self.cpu.cpu().clone())
        if self.gpu.numel() and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.gpu.cpu().clone())


class Checkpoint:
    """Files of a training after each epoch, and after an interruption in the middle of one."""

    def __init__(
        self,
        fabric: Fabric,
        kd: DistillationWrapper,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        task: Task,
        *,
        steps: int,
    ) -> None:
        self.fabric = fabric
        self.kd = kd
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.task = task
        self.steps = steps

    def resume(self) -> Position:
        """Put everything back to where the training was interrupted, or to its last epoch's end."""
        state = load_state(self.task.state_file, self.fabric.print)
        epoch = 0 if state is None else state["epoch"]
        paused = self._paused(epoch)
        if paused is not None:
            return self._go_on_inside(paused)
        if state is None:
            return Position()
        self._load(state)
        self._own(state["random"]).restore()
        self.fabric.print(f"{self.task.role}: continues after epoch {epoch}")
        return Position(epoch=epoch, step=state["step"], best=state["best"])

    def save(self, position: Position, validation_loss: float) -> None:
        """Write last weights, selected weights, and then the state that vouches for both."""
        task = self.task
        better = validation_loss < position.best
        position.best = min(position.best, validation_loss)
        network = getattr(self.kd.student, "_orig_mod", self.kd.student)
        # Gathered from all processes where the network is sharded.
        weights = whole(network.state_dict())
        state = self._state(position)
        if not self.fabric.is_global_zero:
            return
        metadata = replace(task.metadata, epoch=position.epoch)
        save_weights(task.last_file, weights, metadata)
        if better or task.settings.selection == "last" or not task.model_file.is_file():
            save_weights(task.model_file, weights, metadata)
        # The last weights are of no further use once all is finished, and may be removed.
        files = {task.model_file.name: file_digest(task.model_file)}
        save_state(task.state_file, state | {"files": files})
        task.pause_file.unlink(missing_ok=True)

    def pause(self, position: Position, random: RandomState) -> None:
        """Keep the middle of an epoch, beside the state of the last finished one."""
        means = position.means
        packed = self._gathered(means.packed(self.fabric.device))
        state = self._everything(position, random) | {
            "batch": position.batch,
            "steps": self.steps,
            "seconds": position.seconds,
            "means": {"names": list(means.sums), "packed": packed},
        }
        if self.fabric.is_global_zero:
            save_state(self.task.pause_file, state)

    def _state(self, position: Position) -> dict[str, Any]:
        if position.epoch == self.task.settings.epochs:
            return {"finished": True, "epoch": position.epoch}
        return self._everything(position, RandomState.now(self.fabric.device))

    def _everything(self, position: Position, random: RandomState) -> dict[str, Any]:
        return {
            "finished": False,
            "network": self.task.metadata.summary(),
            "epoch": position.epoch,
            "step": position.step,
            "best": position.best,
            "weights": whole(self.kd.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "random": {"cpu": self._gathered(random.cpu), "gpu": self._gathered(random.gpu)},
        }

    def _paused(self, epoch: int) -> dict[str, Any] | None:
        """The interrupted epoch, if it is the one that comes next and can be gone on with."""
        path = self.task.pause_file
        try:
            state = load_state(path, self.fabric.print)
        except UserError as error:
            raise UserError(
                f"{error}\nOr remove {path.name} alone to go on after epoch {epoch}."
            ) from error
        # One that was left behind by a kill between two files is older than the state.
        if state is None or state["epoch"] != epoch:
            return None
        processes = len(state["random"]["cpu"])
        if (processes, state["steps"]) != (self.fabric.world_size, self.steps):
            self.fabric.print(
                f"{self.task.role}: epoch {epoch + 1} begins again, as it was interrupted with "
                f"{processes} processes and {state['steps']} steps in an epoch; now they are "
                f"{self.fabric.world_size} and {self.steps}"
            )
            return None
        return state

    def _go_on_inside(self, state: dict[str, Any]) -> Position:
        self._load(state)
        packed = state["means"]["packed"][self.fabric.global_rank].to(self.fabric.device)
        self.fabric.print(
            f"{self.task.role}: continues in epoch {state['epoch'] + 1}, after step "
            f"{state['batch']} of {self.steps} ({state['step']} in all)"
        )
        return Position(
            epoch=state["epoch"],
            step=state["step"],
            best=state["best"],
            batch=state["batch"],
            means=Means.unpacked(state["means"]["names"], packed),
            seconds=state["seconds"],
            random=self._own(state["random"]),
        )

    def _load(self, state: dict[str, Any]) -> None:
        now = self.task.metadata.summary()
        # States from before networks were described are of the network that the run asks for.
        if state.get("network", now) != now:
            raise UserError(
                f"{self.task.state_file.parent} holds the state of another network.\n"
                f"Expected {now}\nFound    {state['network']}\nChoose another --out."
            )
        try:
            load_weights(self.kd, state["weights"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if explain(error) is not None:
                raise
            raise UserError(
                f"{self.task.state_file.parent}: its state does not fit this network and its "
                f"optimizer ({first_line(error)}). Restore it, or remove the folder to train this "
                "network again."
            ) from error

    def _own(self, random: Mapping[str, Any]) -> RandomState:
        """This process's random numbers; the first one's where it is new."""
        if "cuda" in random:
            # Files from before interruptions in the middle of an epoch: the first process's CPU,
            # and all GPUs that it saw.
            every = random["cuda"]
            here = self.fabric.device.index or 0
            none = torch.zeros(0, dtype=torch.uint8)
            return RandomState(random["cpu"], every[here] if here < len(every) else none)
        rank = self.fabric.global_rank
        rank = rank if rank < len(random["cpu"]) else 0
        return RandomState(random["cpu"][rank], random["gpu"][rank])

    def _gathered(self, mine: Tensor) -> Tensor:
        """One row for each process, on the CPU."""
        if not mine.numel():
            return mine.new_zeros(self.fabric.world_size, 0)
        every = torch.as_tensor(self.fabric.all_gather(mine))
        return every.reshape(self.fabric.world_size, *mine.shape).cpu()
