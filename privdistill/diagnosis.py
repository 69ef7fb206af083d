"""Whether distillation is going to help, which term pulls where, and what temperature fits."""

import copy
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from privdistill.exceptions import ObjectiveError
from privdistill.inputs import InputViews, as_views, view_of
from privdistill.integrations.batch import step_arguments, unwrapped
from privdistill.losses.agreement import copy_dice, decision_overlap
from privdistill.losses.functional import (
    Activation,
    binarise,
    check_logits,
    mix_logits,
    probabilities,
    resize,
)
from privdistill.losses.objective import Term
from privdistill.losses.options import AT_LEAST_ONE, FRACTION, WHOLE, check
from privdistill.losses.response import SoftTargetDiceBCE
from privdistill.sides.heads import chosen_heads
from privdistill.sides.restored import modes_kept
from privdistill.sides.teachers import teacher_shares
from privdistill.sides.trial import settled
from privdistill.step import Output
from privdistill.taps.location import HeadFinder
from privdistill.text import columns
from privdistill.wrapper import DistillationWrapper

# Of the reliability diagram, as in Guo et al. 2017.
_BINS = 15
# The paper's temperature: more was never asked for.
_AT_MOST = 5.0

_Sums = defaultdict[str, dict[str, Any]]  # over batches, by kind and name


@dataclass(frozen=True)
class TermRow:
    """One term of the objective.

    Attributes:
        name: As in `Output.terms`.
        value: Unweighted, mean over batches.
        weight: What its value was multiplied with, schedules and balancing included.
        share: Norm of the gradient of weight x value with respect to the student's parameters, of
            the mean over batches, over the sum of all terms' norms.
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
        lead: The teacher's less the student's.
        calibration: Expected calibration error of the teacher on voxels that it gives this class.
        agreement: What the soft target keeps of the teacher's decision, see `target_agreement`.
    """

    index: int
    teacher: float | None = None
    student: float | None = None
    lead: float | None = None
    calibration: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: `print` it, `plot()` it, or take the numbers.

    Attributes:
        terms: One row for each term that was computed; `pandas.DataFrame(diagnosis.terms)` works.
        classes: One row for each channel of the logits.
        similarity: Linear CKA of student and teacher by tap, mean over batches.
        temperature: T of the objective's `SoftTargetDiceBCE`, or None.
        fitted: What `fit_temperature` would return for these batches, or None where none fits.
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
        softened = "" if self.temperature is None else f"agreement at T = {self.temperature:.3g}"
        terms = [("term", "value", "weight", "share of gradient", "cosine with reference")]
        for t in self.terms:
            numbers = f"{t.value:.4g}", f"{t.weight:.4g}", f"{t.share:.1%}", _text(t.cosine)
            terms.append((t.name, *numbers))
        heading = ("class", "teacher Dice", "student Dice", "lead", "calibration error", softened)
        classes = [heading, *(tuple(map(_text, asdict(row).values())) for row in self.classes)]
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
        # Without pyplot, whose state is global; by name, as the library itself needs no matplotlib.
        figure = importlib.import_module("matplotlib.figure").Figure(
            (11, 3.6), layout="constrained"
        )
        pulls, classes, taps = figure.subplots(1, 3, width_ratios=(5, 6, 3))
        pulls.barh([t.name for t in self.terms], [100 * t.share for t in self.terms], 0.6)
        pulls.set(xlim=(0, 100), title="share of the gradient (%)")
        pulls.invert_yaxis()
        for offset, name in enumerate(("teacher", "student", "agreement"), start=-1):
            known = [row for row in self.classes if getattr(row, name) is not None]
            places = [row.index + 0.27 * offset for row in known]
            classes.bar(places, [getattr(row, name) for row in known], 0.25, label=name)
        classes.set(ylim=(0, 1), xticks=range(len(self.classes)), title="Dice by class")
        classes.legend()
        taps.barh(list(self.similarity), list(self.similarity.values()), 0.4)
        taps.set(xlim=(0, 1), title="CKA of taps")
        taps.set_visible(bool(self.similarity))
        return figure


def _text(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def diagnose(
    kd: DistillationWrapper,
    batches: Iterable[Any],
    *,
    limit: int | None = 4,
    names: Mapping[str, str] | None = None,
) -> Diagnosis:
    """Ask before training whether distillation is going to help, and which term pulls where.

    A few batches go through a copy of the wrapper in train mode, and each term's gradient is
    measured apart. Nothing is changed: weights, gradients, modes, buffers, counts of steps,
    averages and the random state stay; the teacher's cache is neither read nor filled.

    Args:
        kd: The wrapper, before a training or in the midst of one.
        batches: A loader, or a list, as a training has it: (image, target) pairs, images, or
            mappings with the arguments of a step. Samples without a reference are welcome.
        limit: How many batches to read, >= 1; None reads all.
        names: Entry of a mapping for an argument of a step that is called otherwise.

    Returns:
        A table to print or plot.

    Raises:
        ObjectiveError: If there is no batch, a batch has another form, `limit` is no number, or a
            network's logits hold NaN.

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
    if limit is not None:
        check("diagnose", WHOLE, limit=limit)
    kd = unwrapped(kd)
    terms = {name: t for name, (weight, t) in kd.objective.named_terms.items() if weight.factor}
    soft = next((term for term in terms.values() if isinstance(term, SoftTargetDiceBCE)), None)
    temperature = None if soft is None else soft.temperature
    # What is said of its targets is said of those that it makes.
    activation = (soft and soft.activation) or kd.activation
    sums: _Sums = defaultdict(lambda: defaultdict(int))
    count = 0
    # Dropout and drawn pairs advance the generators of all devices that the step runs on.
    devices = {p.device.index for p in kd.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), closing(copy.deepcopy(kd)) as twin:
        twin.train()
        for count, batch in enumerate(islice(batches, limit), start=1):  # noqa: B007
            given = _arguments(kd, batch, names or {})
            out = _add_terms(sums, twin, given)
            with torch.no_grad():
                at = temperature or 1.0
                _add_answers(sums, kd, out, given, temperature=at, activation=activation)
    if not count:
        raise ObjectiveError("diagnose: there is no batch. Pass a loader, or a list of one.")
    # The last of its temperatures is that of the objective; those before it are fitted.
    overlap = sums["overlap"].get("teacher", torch.zeros(3, 2, 1))
    found = Diagnosis(
        terms=tuple(_term_rows(sums, terms)),
        classes=tuple(_class_rows(sums, softened=temperature is not None)),
        similarity={name: value.item() / count for name, value in sums["cka"].items()},
        temperature=temperature,
        fitted=_fitted(overlap[:, :-1], _AT_MOST, 0.9, activation),
        batches=count,
    )
    return replace(found, advice=tuple(_advice(found, activation)))


def _arguments(kd: DistillationWrapper, batch: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of a step, on the student's device; without a target none is asked for."""
    given = step_arguments(batch, names)
    given.pop("key", None)
    # Said here, as a step without a target is refused unless it is meant.
    if kd.objective.needs_target and given.get("target") is None:
        size = len(next(leaf for leaf in tree_leaves(given["image"]) if isinstance(leaf, Tensor)))
        given.setdefault("labelled", torch.zeros(size, dtype=torch.bool))
    device = next(kd.student.parameters()).device
    placed: dict[str, Any] = tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, given
    )
    return placed


def _add_terms(sums: _Sums, twin: DistillationWrapper, given: Mapping[str, Any]) -> Output:
    """Run a step, and take each term's value, its weight in the loss and its gradient."""
    with torch.enable_grad(), _recorded(twin.objective.named_terms) as calls:
        # Not its call, which may be compiled: a hook would start another compilation.
        out = twin.forward(**given)
    # Over the student alone, as heads and adapters of terms are thrown away after training.
    parameters = [p for p in twin.student.parameters() if p.requires_grad]
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for name, values in calls.items():
        # What the loss multiplies a value with, schedules, balancing and heads included.
        weights = torch.autograd.grad(out.loss, values, **options)
        slopes = torch.autograd.grad(values, parameters, weights, **options)
        weight = torch.stack(weights).sum()
        # Not every batch has a target, so that each term counts its own.
        sums["term"][name] += torch.stack([out.terms[name], weight, torch.ones_like(weight)])
        sums["slope"][name] += torch.cat([slope.flatten().float() for slope in slopes])
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
    kd: DistillationWrapper,
    out: Output,
    given: Mapping[str, Any],
    *,
    temperature: float,
    activation: Activation,
) -> None:
    """Compare what both networks answer with the target, and with each other."""
    asked = {name: given[name] for name in ("image", "present") if name in given}
    logits = {"student": kd.predict(**asked)}
    if out.teacher is not None:
        logits["teacher"] = _teacher_logits(kd, out.teacher, given, activation)
        at = [*_temperatures(_AT_MOST), temperature]
        sums["overlap"]["teacher"] += decision_overlap(logits["teacher"], at, activation)
    for network, answer in logits.items():
        if answer.isnan().any():
            raise ObjectiveError(f"diagnose: the {network}'s logits hold NaN; nothing fits them.")
        sums["channels"][network] = answer.shape[1]
        compared = _labelled(answer, given)
        if compared is not None:
            sums["score"][network] += _score(*compared, activation)
    for name, (student, teacher) in out.taps.items():
        if student.shape[2:] == teacher.shape[2:]:
            sums["cka"][name] += _cka(student, teacher)


def _teacher_logits(
    kd: DistillationWrapper,
    of_step: Tensor | list[Tensor],
    given: Mapping[str, Any],
    activation: Activation,
) -> Tensor:
    """The finest logits, of several teachers those of their mean under a term's own activation."""
    shares: Sequence[float | Tensor] = kd._shares  # noqa: SLF001
    if len(shares) < 2 or activation == kd.activation:
        return of_step[0] if isinstance(of_step, list) else of_step
    # Those of the step are of the mean under the wrapper's.
    members = kd.teacher_outputs(given["image"], present=given.get("present")).heads
    finest = [heads[0] for heads in members]
    if given.get("teacher_weights") is not None:
        weights = torch.as_tensor(given["teacher_weights"])
        shares = teacher_shares(weights, len(shares), finest[0], check=False)
    return mix_logits(tuple(zip(finest, shares, strict=True)), activation)


def _term_rows(sums: _Sums, terms: Mapping[str, Term]) -> Iterator[TermRow]:
    slopes = sums["slope"]
    # Norms of means over batches: what pulls to and fro from batch to batch does not count.
    total = sum(slope.norm().item() for slope in slopes.values()) or 1.0
    # The terms that supervise: they read the target, and nothing of the teacher.
    supervised = [n for n in slopes if terms[n].needs_target and not terms[n].needs_teacher]
    reference = sum((slopes[n] for n in supervised if not terms[n].taps), torch.tensor(0.0))
    for name, slope in slopes.items():
        value, weight, batches = sums["term"][name].tolist()
        cosine = torch.cosine_similarity(slope, reference, 0).item() if reference.any() else None
        share = slope.norm().item() / total
        yield TermRow(name, value / batches, weight / batches, share, cosine)


def _class_rows(sums: _Sums, *, softened: bool) -> Iterator[ClassRow]:
    measured = {}
    for network, (chosen, confidence, hits, reference) in sums["score"].items():
        # Pooled over voxels: a mean over samples would have none where a class is rare.
        measured[network] = 2 * hits.sum(1) / (chosen + reference).sum(1)
        if network == "teacher":
            # Of one class by itself, since a background would hide all others.
            measured["calibration"] = (confidence - hits).abs().sum(1) / chosen.sum(1)
    if softened and sums["overlap"]:
        copied = copy_dice(sums["overlap"]["teacher"])
        measured["agreement"] = copied[-1] / copied[0]
    for index in range(sums["channels"]["student"]):
        # A teacher may have other classes than the student.
        found = {name: v[index].item() for name, v in measured.items() if index < len(v)}
        numbers = {name: value for name, value in found.items() if not math.isnan(value)}
        if {"teacher", "student"} <= {*numbers}:
            numbers["lead"] = numbers["teacher"] - numbers["student"]
        yield ClassRow(index, **numbers)


def _labelled(logits: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits of the labelled samples, their reference and where it is known; None without one."""
    target, labelled = given.get("target"), given.get("labelled")
    if not isinstance(target, Tensor):
        return None
    if labelled is not None:
        chosen = torch.as_tensor(labelled, device=logits.device)
        logits, target = logits[chosen], target[chosen]
    # Under deep supervision, or a coarse network, the reference is what counts.
    axes = logits.ndim - 2
    logits = resize(logits, target.shape[-axes:])
    if target.shape == logits.shape:
        return logits, target > 0.5, (target >= 0) & (target <= 1)
    # A target of another form, such as a criterion of the user's own reads.
    if target.numel() * logits.shape[1] != logits.numel():
        return None
    labels = target.reshape(len(target), 1, *target.shape[-axes:])
    classes = torch.arange(logits.shape[1], device=labels.device).reshape(1, -1, *[1] * axes)
    reference = labels == classes
    return logits, reference, reference.any(1, keepdim=True).expand_as(logits)


def _score(logits: Tensor, reference: Tensor, known: Tensor, activation: Activation) -> Tensor:
    """By class and confidence: voxels chosen, their confidence and hits, voxels of the reference.

    `(4, C, bins)`, in sums that add up over batches.
    """
    confidence, classes = probabilities(logits, activation), logits.shape[1]
    chosen = binarise(logits, "argmax" if activation == "softmax" else "positive").bool() & known
    # One count of all classes and bins: a loop over them would read the maps as often.
    channel = torch.arange(classes, device=logits.device).reshape(1, -1, *[1] * (logits.ndim - 2))
    bins = channel * _BINS + (confidence * _BINS).long().clamp(max=_BINS - 1)
    one = torch.ones_like(confidence)
    counted = [(chosen, one), (chosen, confidence)]
    counted += [(chosen & reference, one), (reference & known, one)]
    sums = [
        torch.bincount(bins[voxels], weights=values[voxels].double(), minlength=classes * _BINS)
        for voxels, values in counted
    ]
    # Of no voxel at all PyTorch counts in integers, whatever the weights are.
    return torch.stack(sums).double().reshape(4, classes, _BINS).cpu()


def _cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear CKA with voxels as examples; 0 for features that are constant."""
    x, y = (side.detach().float().movedim(1, -1).flatten(0, -2) for side in (student, teacher))
    x, y = x - x.mean(0), y - y.mean(0)
    # From C x C products: those of voxels with voxels would not fit in memory.
    sizes = (x.T @ x).norm() * (y.T @ y).norm()
    similarity: Tensor = (y.T @ x).square().sum() / sizes
    return similarity.nan_to_num()


def _advice(found: Diagnosis, activation: Activation) -> Iterator[str]:
    """What the numbers ask for."""
    for term in found.terms if len(found.terms) > 1 else ():
        yield from _advice_on_term(term)
    for row in found.classes:
        if row.agreement is not None and row.agreement < 0.5 and found.fitted is not None:
            yield (
                f"Class {row.index}: at T = {found.temperature:.3g} a perfect copy of the teacher "
                f"scores {row.agreement:.0%} of its soft Dice at T = 1; "
                f"temperature={found.fitted:.2g} keeps 90 %."
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
    # The first of exclusive classes is the background, on which every network agrees.
    background = activation == "softmax" and len(found.classes) > 1
    yield _advice_on_lead(found.classes[background:])


def _advice_on_term(row: TermRow) -> Iterator[str]:
    if row.share > 0.9:
        # The norm of its gradient is in proportion to its weight; half is that of all the others.
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
    known = [
        (row.teacher, row.lead) for row in rows if row.teacher is not None and row.lead is not None
    ]
    if not known:
        return (
            "Whether the teacher leads is not known: no labelled sample, or no term that reads its "
            "logits."
        )
    teacher, lead = (sum(numbers) / len(known) for numbers in zip(*known, strict=True))
    said = f"The teacher's mean Dice is {teacher:.2f}, {lead:+.2f} against the student's"
    if lead > 0.02:
        return (
            f"{said}: that lead, once the student is trained, is what there is to learn; less, if "
            "these batches trained the teacher."
        )
    return f"{said}: without a lead there is nothing to learn. Train the teacher longer."


def fit_temperature(
    teacher: nn.Module,
    batches: Iterable[Any],
    at_most: float = 5.0,
    agreement: float = 0.9,
    activation: Activation = "softmax",
    *,
    inputs: InputViews | None = None,
    names: Mapping[str, str] | None = None,
    select_logits: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
) -> float:
    """The largest temperature at which soft targets still say what this teacher would predict.

    How much a temperature softens depends on how saturated the teacher is. A student that copied
    its decision exactly should still score `agreement` times the soft Dice against
    `sigma(l_t / T)` that it scores at T = 1, for every class that the teacher predicts. A hard
    teacher allows much; one of moderate logits and a small class little. (One that is flat already
    is not changed by T and allows all of it: look at `diagnose`, which shows its Dice.)

    Args:
        teacher: The trained network; it runs in eval mode without gradients, and its modes are
            restored.
        batches: An iterable of images, of (image, target) pairs or of mappings with an entry
            "image", on any device; all of it is read, once. Targets are not.
        at_most: Largest temperature to return, >= 1; the paper's T = 5.
        agreement: Share of the soft Dice to be kept, in (0, 1].
        activation: "softmax" or "sigmoid".
        inputs: Takes the teacher's view from an image; unless given, the image is that view.
        names: Entry of a mapping that holds the image, as `{"image": "scan"}`.
        select_logits: As for the wrapper.

    Returns:
        A temperature from 1 to `at_most`, by linear interpolation between 17 values: the first at
        which the agreement falls below what is asked. Sums are pooled over all batches.

    Raises:
        ObjectiveError: If an option has no meaning, there is no batch, the teacher predicts no
            class at all or, of exclusive ones, a single one, or its logits hold NaN.
        ShapeMismatchError: If nothing tells which of several tensors are logits.

    Example:
        >>> teacher = nn.Conv2d(1, 2, 1).requires_grad_(False)
        >>> teacher.weight.copy_(torch.tensor([500.0, -500.0]).reshape(2, 1, 1, 1))
        Parameter containing:
        ...
        >>> fit_temperature(teacher, [torch.randn(2, 1, 16, 16)])
        5.0

    Source:
        Ours; T = 5 is section 3.2 of Hu et al. 2020, arXiv:2106.09564.
    """
    check("fit_temperature", AT_LEAST_ONE, at_most=at_most)
    check("fit_temperature", FRACTION, agreement=agreement)
    overlaps = []
    find: HeadFinder | None = partial(chosen_heads, select_logits) if select_logits else None
    for batch in batches:
        given = step_arguments(batch, names or {})
        # Whose image is the teacher's view already has nothing to fill.
        present = None if inputs is None else given.get("present")
        view = view_of(as_views(inputs), "teacher", given["image"], present)
        # Without parameters it runs where the image is.
        weight = next(teacher.parameters(), view)
        find = find or settled(teacher, view[:1], "teacher")
        with modes_kept(teacher), torch.no_grad():
            logits = find(teacher.eval()(view.to(weight.device)), view.ndim - 2)[0]
        check_logits(logits, activation, "fit_temperature")
        if logits.isnan().any():
            raise ObjectiveError("fit_temperature: the teacher's logits hold NaN; none fits them.")
        overlaps.append(decision_overlap(logits, _temperatures(at_most), activation))
    if not overlaps:
        raise ObjectiveError("fit_temperature: there is no batch. Pass a loader, or a list.")
    found = _fitted(torch.stack(overlaps).sum(0), at_most, agreement, activation)
    if found is None:
        raise ObjectiveError(
            "fit_temperature: the teacher predicts no class on these batches, or one everywhere, "
            "to which no temperature fits. Pass batches with foreground, or train it longer."
        )
    return found


def _temperatures(at_most: float) -> list[float]:
    """From 1 to the largest, in equal ratios; interpolated between, they give two digits."""
    return [math.pow(at_most, step / 16) for step in range(17)]


def _fitted(
    overlap: Tensor, at_most: float, agreement: float, activation: Activation
) -> float | None:
    """The temperature at which the worst class falls below an agreement; None if none fits.

    `overlap` are sums of `decision_overlap` at `_temperatures(at_most)`, `(3, K, C)`.
    """
    dice = copy_dice(overlap)
    occurs = ~dice[0].isnan()
    # Of exclusive classes a lone one is the background, or whatever a teacher says everywhere.
    if occurs.sum() < (2 if activation == "softmax" else 1):
        return None
    kept: list[float] = (dice[:, occurs] / dice[0, occurs]).amin(1).tolist()
    points = list(zip(_temperatures(at_most), kept, strict=True))
    for (low, before), (high, after) in pairwise(points):
        # The first crossing: behind it a class is lost, whatever happens at higher temperatures.
        if after < agreement:
            return low + (high - low) * (before - agreement) / (before - after)
    return float(at_most)
