"""Trained networks on held-out subjects."""

from collections.abc import Callable

import torch
from torch import Tensor

from evaluation.scoring import Score, evaluate
from experiment import Experiment
from privdistill import DistillationWrapper, GroundTruth
from training.checkpoint import load_model
from training.progress import counting


def score_network(experiment: Experiment, name: str) -> list[Score]:
    """Score one network on the held-out subjects.

    Args:
        experiment: Held-out subjects and trained networks.
        name: Which network.

    Returns:
        Its scores, at the training grid and in native space.
    """
    run = experiment.run
    network, metadata = load_model(run.model(name))
    subjects = [experiment.subjects[case] for case in experiment.split.test]
    with counting(experiment.console, f"Scoring the {name}", len(subjects)) as scored:
        return evaluate(
            predictor(network, experiment.fabric.device),
            subjects,
            metadata.preprocessing(),
            experiment.description,
            activation=metadata.activation,
            role=name,
            fold=experiment.config.data.fold,
            seed=experiment.config.training.seed,
            prediction_folder=run.predictions(name) if experiment.config.run.predictions else None,
            on_case=scored,
        )


def predictor(network: torch.nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Wrap a trained network so that it maps images to logits on the CPU.

    Args:
        network: Trained.
        device: Where it runs, in float32, as predict.py does.

    Returns:
        A function from (1, M, *grid) to logits (1, C, *grid).
    """
    kd = DistillationWrapper(None, network.to(device), objective=GroundTruth())

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        return kd.predict(image.to(device)).float().cpu()

    return predict
