"""Whether distillation is going to help, and which term pulls where."""

import copy
import importlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from privdistill.exceptions import ObjectiveError
from privdistill.integrations.batch import step_arguments
from privdistill.losses import SoftTargetDiceBCE, Term
from privdistill.losses.agreement import copy_dice, decision_overlap
from privdistill.losses.functional import Activation, binarise, probabilities, resize
from privdistill.step import Output
from privdistill.taps.names import uncompiled
from privdistill.temperature import fitted, temperatures
from privdistill.text import columns

if TYPE_CHECKING:
    from privdistill.wrapper import DistillationWrapper

# Of the reliability diagram, as in Guo et al. 2017.
_BINS = 15
_AT_MOST = 5.0

_Sums = dict[str, dict[str, Tensor]]  # over batches, by kind and name


@dataclass(frozen=True)
class TermRow:
    """One term of the objective.

    Attributes:
        name: As in `Output.terms`.
        value: Unweighted, mean over batches.
        weight: What its value was multiplied with, schedules and balancing included.
        share: Norm of the gradient of weight x value with respect to the student's parameters,
            mean over batches, over the sum of all terms' norms.
        cosine: Between this gradient and that of the terms that supervise, which read the target
            and nothing of the teacher; None where there is none, or no labelled sample.
    """

    name: str
    value: float
    weight: float
    share: float
    cosine: float | None


@dataclass(frozen=True)
class ClassRow:
    """One class or region. None stands for what these batches do not tell.

    Attributes:
        index: Its channel.
        teacher: The teacher's Dice on labelled samples, pooled.
        student: The student's, in eval mode.
        calibration: Expected calibration error of the teacher on voxels that it gives this class.
        agreement: What the soft target keeps of the teacher's decision, see `target_agreement`.
    """

    index: int
    teacher: float | None = None
    student: float | None = None
    calibration: float | None = None
    agreement: float | None = None

    @property
    def lead(self) -> float | None:
        """The teacher's Dice less the student's."""
        both = self.teacher is not None and self.student is not None
        return self.teacher - self.student if both else None  # type: ignore[operator]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: `print` it, `plot()` it, or take the numbers.

    Attributes:
        terms: One row for each term that was computed; `pandas.DataFrame(diagnosis.terms)` works.
        classes: One row for each channel of the logits.
        similarity: Linear CKA of student and teacher by tap, mean over batches.
        temperature: T of the objective's `SoftTargetDiceBCE`, or None.
        fitted: What `fit_temperature` would return for these batches, or None without a teacher.
        batches: How many were read.
        advice: Sentences, each with the number that it rests on.
    """

    terms: tuple[TermRow, ...]
    classes: tuple[ClassRow, ...]
    similarity: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None
    fitted: float | None = None
    batches: int = 0
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        terms = [("term", "value", "weight", "share of gradient", "cosine with reference")]
        for t in self.terms:
            numbers = (f"{t.value:.4g}", f"{t.weight:.4g}", f"{t.share:.1%}", _text(t.cosine))
            terms.append((t.name, *numbers))
        softened = "" if self.temperature is None else f"agreement at T = {self.temperature:g}"
        classes = [("class", "teacher Dice", "student Dice", "lead", "calibration error", softened)]
        for c in self.classes:
            known = (c.teacher, c.student, c.lead, c.calibration, c.agreement)
            classes.append((str(c.index), *map(_text, known)))  # type: ignore[arg-type]
        taps = [("tap", "similarity (CKA)")] if self.similarity else []
        taps += [(name, _text(value)) for name, value in self.similarity.items()]
        lines = [f"diagnosis of {self.batches} batch{'es' * (self.batches != 1)}"]
        lines += [*columns(terms), *columns(classes), *columns(taps)]
        lines += [] if self.fitted is None else [f"  fitted temperature: {self.fitted:.2f}"]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.advice)])

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain dictionaries and lists, for JSON.

        Returns:
            One entry per attribute.
        """
        return asdict(self)

    def plot(self) -> Any:
        """Draw shares of the gradient, the classes and the taps; needs matplotlib.

        Returns:
            A `matplotlib.figure.Figure`; `figure.savefig("diagnosis.png")` keeps it.
        """
        return _plot(self)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def diagnose(
    kd: "DistillationWrapper",
    batches: Iterable[Any],
    *,
    limit: int = 4,
    names: Mapping[str, str] | None = None,
) -> Diagnosis:
    """Ask before training whether distillation is going to help, and which term pulls where.

    A few batches go through a copy of the wrapper in train mode, and each term's gradient is
    measured apart. Nothing is changed: weights, gradients, modes, buffers, counts of steps,
    averages and the random state stay; the teacher's cache is neither read nor filled.

    Args:
        kd: The wrapper itself (of DDP its `.module`), before a training or in the midst of one.
        batches: A loader, or a list, as a training has it: (image, target) pairs, images, or
            mappings with the arguments of a step. Samples without a reference are welcome.
        limit: How many batches to read, >= 1.
        names: Entry of a mapping for an argument of a step that is called otherwise.

    Returns:
        A table to print or plot.

    Raises:
        ObjectiveError: If there is no batch, or a batch has another form.

    Example:
        >>> from privdistill import DistillationWrapper, GroundTruth, HintonKL
        >>> kd = DistillationWrapper(
        ...     nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=GroundTruth() + HintonKL())
        >>> found = diagnose(kd, [(torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8)))])
        >>> [row.name for row in found.terms]
        ['ground_truth', 'hinton_kl']

    Source:
        Ours. Calibration: Guo et al. 2017, arXiv:1706.04599, section 2, with 15 bins, for each
        predicted class by itself, since a background would hide all others. Similarity: linear CKA,
        Kornblith et al. 2019, arXiv:1905.00414, with voxels as examples. Gradients are compared
        over all of the student's parameters.
    """
    kd = cast("DistillationWrapper", uncompiled(kd))
    soft = [t for _, t in kd.objective.named_terms.values() if isinstance(t, SoftTargetDiceBCE)]
    temperature = soft[0].temperature if soft else None
    sums: _Sums = defaultdict(dict)
    count = 0
    devices = {p.device.index for p in kd.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), closing(copy.deepcopy(kd)) as twin:
        twin.train()
        for batch in islice(batches, limit):
            given = _arguments(kd, batch, names or {})
            out = _add_terms(sums, twin, given)
            with torch.no_grad():
                _add_answers(sums, kd, out, given, temperature or 1.0)
            count += 1
    if not count:
        raise ObjectiveError("diagnose: there is no batch. Pass a loader, or a list of one.")
    overlap = sums["overlap"].get("teacher", torch.zeros(3, 2, 1))
    found = Diagnosis(
        terms=tuple(_term_rows(sums, kd.objective.named_terms)),
        classes=tuple(_class_rows(sums, softened=temperature is not None)),
        similarity={name: value.item() / count for name, value in sums["cka"].items()},
        temperature=temperature,
        fitted=fitted(overlap[:, :-1], _AT_MOST, 0.9) if overlap[2].any() else None,
        batches=count,
    )
    return replace(found, advice=tuple(_advice(found, kd.activation)))


def _arguments(kd: "DistillationWrapper", batch: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of a step, on the student's device; without a target none is asked for."""
    given = step_arguments(batch, names)
    given.pop("key", None)
    if kd.objective.needs_target and given.get("target") is None:
        image = given["image"]
        size = len(image if isinstance(image, Tensor) else next(iter(image.values())))
        given.setdefault("labelled", torch.zeros(size, dtype=torch.bool))
    device = next(kd.student.parameters()).device
    return {
        name: tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, each)
        for name, each in given.items()
    }


def _add(sums: _Sums, kind: str, name: str, value: Tensor) -> None:
    sums[kind][name] = sums[kind][name] + value if name in sums[kind] else value


def _add_terms(sums: _Sums, twin: "DistillationWrapper", given: Mapping[str, Any]) -> Output:
    """Run a step, and take each term's value, its weight in the loss and its gradient."""
    with torch.enable_grad(), _recorded(twin.objective.named_terms) as calls:
        # Not its call, which may be compiled: a hook would start another compilation.
        out = twin.forward(**given)
    parameters = [p for p in twin.student.parameters() if p.requires_grad]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    options["materialize_grads"] = True
    for name, values in calls.items():
        weights = torch.autograd.grad(out.loss, values, **options)
        slopes = torch.autograd.grad(values, parameters, weights, **options)
        weight = torch.stack(weights).sum()
        # Not every batch has a target, so that each term counts its own.
        _add(sums, "term", name, torch.stack([out.terms[name], weight, torch.ones_like(weight)]))
        _add(sums, "slope", name, torch.cat([slope.flatten().float() for slope in slopes]))
    return out


@contextmanager
def _recorded(named_terms: Mapping[str, tuple[Any, Term]]) -> Iterator[dict[str, list[Tensor]]]:
    """What each term returns, with its graph; once per head under deep supervision."""
    names: dict[nn.Module, str] = {}
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def record(term: nn.Module, _: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A term without a gradient still has a weight to be found.
        value = value if value.requires_grad else value.detach().requires_grad_()
        # A term under two names is two modules with the same hooks.
        if not any(value is known for known in calls[names[term]]):
            calls[names[term]].append(value)
        return value

    with ExitStack() as stack:
        for name, (_, term) in named_terms.items():
            names.setdefault(term, name)
            stack.callback(term.register_forward_hook(record).remove)
        yield calls


def _add_answers(
    sums: _Sums,
    kd: "DistillationWrapper",
    out: Output,
    given: Mapping[str, Any],
    temperature: float,
) -> None:
    """Compare what both networks answer with the target, and with each other."""
    asked = {name: given[name] for name in ("image", "present") if name in given}
    logits = {"student": kd.predict(**asked)}
    if out.teacher is not None:
        logits["teacher"] = out.teacher[0] if isinstance(out.teacher, list) else out.teacher
        at = [*temperatures(_AT_MOST), temperature]
        _add(sums, "overlap", "teacher", decision_overlap(logits["teacher"], at, kd.activation))
    for network, answer in logits.items():
        _add(sums, "channels", network, torch.ones(answer.shape[1]))
        compared = _labelled(answer, given)
        if compared is not None:
            _add(sums, "score", network, _score(*compared, kd.activation))
    for name, (student, teacher) in out.taps.items():
        if student.shape[2:] == teacher.shape[2:]:
            _add(sums, "cka", name, _cka(student, teacher))


def _term_rows(sums: _Sums, named_terms: Mapping[str, tuple[Any, Term]]) -> Iterator[TermRow]:
    slopes = sums["slope"]
    total = sum(slope.norm().item() for slope in slopes.values()) or 1.0
    supervised = [slope for name, slope in slopes.items() if _supervises(named_terms[name][1])]
    reference = torch.stack(supervised).sum(0) if supervised else torch.zeros(1)
    for name, slope in slopes.items():
        value, weight, batches = sums["term"][name].tolist()
        cosine = torch.cosine_similarity(slope, reference, 0).item() if reference.any() else None
        share = slope.norm().item() / total
        yield TermRow(name, value / batches, weight / batches, share, cosine)


def _supervises(term: Term) -> bool:
    return term.needs_target and not term.needs_teacher and not term.taps


def _class_rows(sums: _Sums, *, softened: bool) -> Iterator[ClassRow]:
    measured = {}
    for network, (chosen, confidence, hits, reference) in sums["score"].items():
        measured[network] = 2 * hits.sum(1) / (chosen + reference).sum(1)
        if network == "teacher":
            measured["calibration"] = (confidence - hits).abs().sum(1) / chosen.sum(1)
    if softened and sums["overlap"]:
        copied = copy_dice(sums["overlap"]["teacher"])
        measured["agreement"] = copied[-1] / copied[0]
    for index in range(len(sums["channels"]["student"])):
        numbers = {name: values[index].item() for name, values in measured.items()}
        yield ClassRow(index, **{n: v for n, v in numbers.items() if not math.isnan(v)})


def _labelled(logits: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits of the labelled samples, their reference and where it is known; None without one."""
    target, labelled = given.get("target"), given.get("labelled")
    if not isinstance(target, Tensor):
        return None
    if labelled is not None:
        logits, target = logits[labelled.to(logits.device)], target[labelled.to(target.device)]
    axes, target = logits.ndim - 2, target.to(logits.device)
    logits = resize(logits, target.shape[-axes:])
    if target.shape == logits.shape:
        return logits, target > 0.5, (target >= 0) & (target <= 1)
    if target.numel() * logits.shape[1] != logits.numel():
        return None
    labels = target.reshape(len(target), 1, *target.shape[-axes:])
    shape = (1, -1, *[1] * axes)
    reference = labels == torch.arange(logits.shape[1], device=labels.device).reshape(shape)
    return logits, reference, reference.any(1, keepdim=True).expand_as(logits)


def _score(logits: Tensor, reference: Tensor, known: Tensor, activation: Activation) -> Tensor:
    """By class and confidence: voxels chosen, their confidence and hits, voxels of the reference.

    `(4, C, bins)`, in sums that add up over batches.
    """
    confidence, classes = probabilities(logits, activation), logits.shape[1]
    chosen = binarise(logits, "argmax" if activation == "softmax" else "positive").bool() & known
    channel = torch.arange(classes, device=logits.device).reshape(1, -1, *[1] * (logits.ndim - 2))
    bins = channel * _BINS + (confidence * _BINS).long().clamp(max=_BINS - 1)
    one = torch.ones_like(confidence)
    counted = [(chosen, one), (chosen, confidence)]
    counted += [(chosen & reference, one), (reference & known, one)]
    sums = [
        torch.bincount(bins[voxels], weights=values[voxels].double(), minlength=classes * _BINS)
        for voxels, values in counted
    ]
    return torch.stack(sums).reshape(4, classes, _BINS).cpu()


def _cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear CKA with voxels as examples; 0 for features that are constant."""
    x, y = (side.detach().float().movedim(1, -1).flatten(0, -2) for side in (student, teacher))
    x, y = x - x.mean(0), y - y.mean(0)
    sizes = (x.T @ x).norm() * (y.T @ y).norm()
    similarity: Tensor = (y.T @ x).square().sum() / sizes
    return similarity.nan_to_num()


def _advice(found: Diagnosis, activation: Activation) -> Iterator[str]:
    """What the numbers ask for."""
    for term in found.terms if len(found.terms) > 1 else ():
        yield from _advice_on_term(term)
    for row in found.classes:
        if row.agreement is not None and row.agreement < 0.5:
            yield (
                f"Class {row.index}: at T = {found.temperature:g} a perfect copy of the teacher "
                f"scores {row.agreement:.0%} of its soft Dice at T = 1, so that the soft target "
                f"rewards something else; temperature={found.fitted:.2g} keeps 90 %."
            )
        if row.calibration is not None and row.calibration > 0.1:
            yield (
                f"Class {row.index}: the teacher's probabilities are {row.calibration:.2f} away "
                "from how often it is right; soft targets pass that on, binarised ones do not."
            )
    for tap, similarity in found.similarity.items():
        if similarity > 0.95:
            yield (
                f"Tap '{tap}': the features of both networks agree already (CKA {similarity:.2f}); "
                "a term on it has little left to teach."
            )
    background = activation == "softmax" and len(found.classes) > 1
    yield _advice_on_lead([row for row in found.classes[background:] if row.lead is not None])


def _advice_on_term(row: TermRow) -> Iterator[str]:
    if row.share > 0.9:
        even = row.weight * (1 - row.share) / row.share
        yield (
            f"{row.name} makes {row.share:.1%} of the gradient; a weight of {even:.2g} instead of "
            f"{row.weight:.2g} would make it half."
        )
    if 0 < row.share < 0.01:
        yield (
            f"{row.name} makes {row.share:.2%} of the gradient: raise its weight of "
            f"{row.weight:.2g}, or leave it out."
        )
    if row.cosine is not None and row.cosine < -0.1:
        yield (
            f"{row.name} pulls against the reference (cosine {row.cosine:.2f}): lower its weight, "
            "or look at what its target says."
        )


def _advice_on_lead(rows: Sequence[ClassRow]) -> str:
    if not rows:
        return "No labelled sample with logits of a teacher: whether it leads is not known."
    teacher, lead = (fmean(getattr(row, name) for row in rows) for name in ("teacher", "lead"))
    said = f"The teacher's mean Dice is {teacher:.2f}, {lead:+.2f} against the student's"
    if lead > 0.02:
        return f"{said}: that lead is what there is to learn."
    return f"{said}: without a lead there is nothing to learn. Train the teacher longer."


def _plot(found: Diagnosis) -> Any:
    # Without pyplot, whose state is global; by name, as the library itself needs no matplotlib.
    figure = importlib.import_module("matplotlib.figure").Figure((11, 3.6), layout="constrained")
    pulls, classes, taps = figure.subplots(1, 3, width_ratios=(5, 6, 3))
    bars = pulls.barh([t.name for t in found.terms], [100 * t.share for t in found.terms], 0.6)
    labels = ["" if t.cosine is None else f"cosine {t.cosine:.2f}" for t in found.terms]
    pulls.bar_label(bars, labels, padding=4)
    pulls.set(xlim=(0, 140), xticks=range(0, 101, 25), title="share of the gradient (%)")
    pulls.invert_yaxis()
    softened = "" if found.temperature is None else f" at T = {found.temperature:g}"
    legend = {"teacher": "teacher's Dice", "student": "student's Dice"}
    legend["agreement"] = f"agreement{softened}"
    for offset, (name, label) in enumerate(legend.items(), start=-1):
        drawn = [(c.index + 0.27 * offset, getattr(c, name)) for c in found.classes]
        known = [(place, height) for place, height in drawn if height is not None]
        classes.bar(*zip(*known, strict=True), 0.25, label=label) if known else None
    classes.set(
        ylim=(0, 1), xticks=[c.index for c in found.classes], title="Dice and agreement by class"
    )
    figure.legend(*classes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    taps.barh(list(found.similarity), list(found.similarity.values()), 0.4, color="tab:gray")
    taps.set(xlim=(0, 1), ylim=(-1, len(found.similarity)), title="CKA of taps")
    taps.set_visible(bool(found.similarity))
    return figure
