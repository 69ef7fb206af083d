"""Distillation in a loop of Hugging Face Accelerate, on random images.

python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privdistill import DistillationWrapper, PrivilegedInput, kdnet

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        f"This example needs the package accelerate, which cannot be imported ({error}). Install "
        "it: pip install './privdistill[accelerate]'."
    ) from error


def network(modalities: int) -> nn.Module:
    """Stand for a network of the user's: (B, modalities, H, W) to logits (B, 3, H, W)."""
    return nn.Sequential(
        nn.Conv2d(modalities, 8, 3, stride=2, padding=1),
        nn.LeakyReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 3, 1),
    )


def train(
    epochs: int = 3, *, mixed_precision: str = "no", accumulation: int = 1
) -> tuple[DistillationWrapper, float]:
    """Distil a network of two modalities into one of a single one; return it and its last loss."""
    # Unless it is told, Accelerate takes no notice of several processes on a CPU.
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation
    )
    accelerator.print(f"processes: {accelerator.num_processes}")
    torch.manual_seed(0)
    images, targets = torch.randn(16, 2, 16, 16), torch.randint(0, 3, (16, 16, 16))
    kd = DistillationWrapper(
        network(2),  # trained already
        network(1),
        objective=kdnet(),
        inputs=PrivilegedInput(("rgb", "depth"), student=("rgb",)),
        example=torch.zeros(1, 2, 16, 16),
    )
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
    # The wrapper goes in whole; the teacher moves with it, and lies outside of DDP's buckets.
    model, optimizer, loader = accelerator.prepare(kd, optimizer, loader)
    loss: Tensor = torch.zeros(())
    for epoch in range(epochs):
        for image, target in loader:
            with accelerator.accumulate(model):
                # Schedules and averages count steps of the optimizer, not micro-batches.
                out = model(image, target, advance=accelerator.sync_gradients)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            loss = out.loss.detach()
        terms = ", ".join(f"{name} {value:.3f}" for name, value in out.terms.items())
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}, {terms}")
    return accelerator.unwrap_model(model), float(loss)


if __name__ == "__main__":
    train()
    sys.exit(0)
