"""Trained networks on held-out subjects."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdnet.errors import UserError
from kdnet.evaluation.inference import volume_predictor
from kdnet.evaluation.scoring import Score, evaluate
from kdnet.runs.experiment import Experiment
from privdistill import DistillationWrapper, GroundTruth
from kdnet.training.checkpoint import load_model, read_metadata
from kdnet.training.history import counting


def score_network(
    experiment: Experiment, name: str, *, smallest_volume: float | None = None
) -> list[Score]:
    """Score one network on the held-out subjects, with all that it was trained to see."""
    seen = read_metadata(experiment.run.model(name)).modalities
    return _score(experiment, name, seen, smallest_volume, keep=True)


def score_with(
    experiment: Experiment,
    name: str,
    seen: Sequence[str],
    *,
    smallest_volume: float | None = None,
) -> list[Score]:
    """Score a network that takes any subset of its modalities with one of them."""
    modalities = read_metadata(experiment.run.model(name)).modalities
    unknown = [modality for modality in seen if modality not in modalities]
    if unknown:
        raise UserError(
            f"{name} was trained with {', '.join(modalities)} and cannot be scored with "
            f"{', '.join(unknown)}."
        )
    keep = {*seen} == {*experiment.view("student")}
    return _score(experiment, name, seen, smallest_volume, keep=keep)


def score_subsets(experiment: Experiment, name: str) -> list[Score]:
    """Score a network that takes any subset of its modalities with each of them."""
    modalities = read_metadata(experiment.run.model(name)).modalities
    return [
        score
        for size in range(1, len(modalities) + 1)
        for seen in itertools.combinations(modalities, size)
        for score in score_with(experiment, name, seen)
    ]


def _score(
    experiment: Experiment,
    name: str,
    seen: Sequence[str],
    smallest_volume: float | None,
    *,
    keep: bool,
) -> list[Score]:
    network, metadata = load_model(
        experiment.run.model(name), trusted=experiment.config.network.vouched(own=True)
    )
    subjects = [experiment.subjects[case] for case in experiment.split.test]
    view = "+".join(seen)
    predictions = experiment.run.predictions(name)
    folder = predictions if experiment.config.run.predictions and keep else None
    predict = volume_predictor(
        predictor(network, experiment.fabric.device), patch=metadata.patch, slices=metadata.slices
    )
    with counting(experiment.console, f"Scoring {name} with {view}", len(subjects)) as scored:
        scores = evaluate(
            hiding(predict, metadata.modalities, seen),
            subjects,
            metadata.preprocessing(),
            experiment.description,
            activation=metadata.activation,
            role=name,
            fold=experiment.config.data.fold,
            seed=experiment.config.training.seed,
            smallest_volume=smallest_volume,
            prediction_folder=folder,
            on_case=scored,
        )
    return [replace(score, modalities=view) for score in scores]


def hiding(
    predict: Callable[[Tensor], Tensor], modalities: Sequence[str], seen: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """Set the modalities that are not seen to zero before a network gets them."""
    kept = torch.tensor([modality in seen for modality in modalities])
    if bool(kept.all()):
        return predict

    def of_seen(image: Tensor) -> Tensor:
        mask = kept.reshape(1, -1, *[1] * (image.ndim - 2))
        return predict(torch.where(mask, image, 0.0))

    return of_seen


def predictor(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Wrap a trained network so that it maps images to logits on the CPU."""
    kd = DistillationWrapper(None, network.to(device), objective=GroundTruth())

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        return kd.predict(image.to(device)).float().cpu()

    return predict
