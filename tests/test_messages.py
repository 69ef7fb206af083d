"""The exact message of every misuse: what ran, what arrived, what fits, what to do.

The messages are kept in `messages.txt`, to be read as users read them;
`PRIVDISTILL_WRITE_PAGES=1` writes the file anew.
"""

import ast
import os
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import privdistill
from privdistill import (
    CenteredKernelAlignment,
    DistillationWrapper,
    Ensemble,
    GroundTruth,
    HolisticAdversarial,
    JointTeacher,
    LatentKL,
    Layer,
    MovingAverage,
    Objective,
    PairwiseSimilarity,
    PrivDistillError,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    Step,
    Tap,
    TapPair,
    TeacherCache,
    Term,
    assert_no_leak,
    describe,
    kdnet,
    precompute,
)
from privdistill.integrations.batch import check_names, check_options, step_arguments
from privdistill.integrations.critic import check_wrapper, refuse_critic
from privdistill.losses import (
    AttentionTransfer,
    ContrastiveProjection,
    FeatureL2,
    HintonKL,
    LogitMSE,
    ReliableSoftTargetCE,
    VariationalInformation,
)

FILE = Path(__file__).with_name("messages.txt")
PACKAGE = Path(privdistill.__file__).parent
NAMES = ("t1", "t1ce")
LABELS = torch.zeros(2, 8, 8, dtype=torch.long)
HOT = nn.functional.one_hot(LABELS, 3).movedim(-1, 1).float()
IMAGE = torch.zeros(2, 2, 8, 8)


class Net(nn.Module):
    """Down once, up once; may return something else than logits."""

    def __init__(self, channels, classes=3, width=4, form=None):
        super().__init__()
        self.down = nn.Conv2d(channels, width, 2, stride=2)
        self.stage = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(width, classes, 1)
        self.spare = nn.Conv2d(1, 1, 1)
        self.form = form

    def forward(self, x):
        out = self.head(self.up(self.stage(self.down(x))))
        return self.form(out) if self.form else out


def wrap(**options):
    teacher, student = (
        options.pop("teacher", None) or Net(2),
        options.pop("student", None) or Net(1),
    )
    usual = {
        "objective": SoftTargetDiceBCE() + GroundTruth() + LatentKL(),
        "inputs": PrivilegedInput(NAMES, student=("t1ce",)),
        "example": torch.zeros(1, 2, 8, 8),
    }
    return DistillationWrapper(teacher, student, **usual | options)


def at(teacher, student, **options):
    return {"bottleneck": Tap(teacher, student, **options)}


def step(image=IMAGE, target=LABELS, present=None, **options):
    return wrap(**options)(image, target, present=present)


def closed():
    kd = wrap()
    kd.close()
    kd(IMAGE, LABELS)


def half_average():
    inputs = PrivilegedInput(NAMES, student=NAMES)
    kd = wrap(teacher=MovingAverage(), student=Net(2), inputs=inputs).bfloat16()
    kd(IMAGE.bfloat16(), LABELS)


def shared_module():
    activation = nn.ReLU()
    wrap(teacher=nn.Sequential(Net(2), activation), student=nn.Sequential(Net(1), activation))


def without_teacher():
    import pickle

    kd = wrap()
    kd.pickles_teacher = False
    pickle.loads(pickle.dumps(kd))(IMAGE, LABELS)


def other_input():
    kd = wrap(cache=TeacherCache())
    for image in (torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8)):
        kd(image, LABELS[:1], key=["case12/flip0"])


def answers_otherwise():
    kd = wrap(cache=TeacherCache())
    for teachers in (kd._run_teachers, lambda view: ([[1 + HOT]], {"bottleneck": HOT})):
        kd._run_teachers = teachers
        kd(IMAGE, LABELS, key=["a", "b"])


class Unchecked(Term):
    def forward(self, step):
        return step.student


class Later(Net):
    """Changes its features in place, but not for the example."""

    def forward(self, x):
        deep = self.stage(self.down(x))
        if len(x) > 2:
            deep += 1
        return self.head(self.up(deep))


class Detached(Net):
    def forward(self, x):
        return self.head(self.up(self.stage(self.down(x)).detach()))


class Twice(Net):
    def forward(self, x):
        return self.head(self.up(self.stage(self.stage(self.down(x)))))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Net(1), Net(1)

    def forward(self, x):
        return self.one(x) + self.two(x)


def recursion():
    kd = wrap(objective=1.0 * GroundTruth())
    kd.select_logits = lambda output: kd(IMAGE, LABELS).student
    with kd._student.recorder.recording():
        kd(IMAGE, LABELS)


def alone(term, **fields):
    return term(Step(student=torch.zeros(2, 3, 8, 8), **fields))


def at_tap(term, student, teacher):
    pair = TapPair(torch.zeros(student), torch.zeros(teacher))
    return alone(term, taps={"bottleneck": pair})


def nothing(index):
    """A schedule without its return."""


def in_two_wrappers(term):
    wrap(objective=1.0 * term)
    other = {"student": Net(1, width=8, classes=2), "teacher": Net(2, classes=2)}
    wrap(objective=1.0 * term, **other)


MISUSES = {
    "the student is no network": lambda: wrap(student="net.pt"),
    "the teacher is no network": lambda: wrap(teacher="net.pt"),
    "a network in DataParallel": lambda: wrap(student=nn.DataParallel(Net(1))),
    "a wrapper in DataParallel": lambda: wrap()._replicate_for_data_parallel(),
    "a lazy network": lambda: wrap(student=nn.Sequential(nn.LazyConv2d(2, 1))),
    "one network twice": lambda: wrap(teacher=(net := Net(2)), student=net),
    "no teacher for a term": lambda: DistillationWrapper(None, Net(1), objective=1.0 * LatentKL()),
    "networks swapped": lambda: wrap(teacher=Net(1), student=Net(2)),
    "no ensemble": lambda: Ensemble([]),
    "weights of too few teachers": lambda: wrap()(
        IMAGE, LABELS, teacher_weights=torch.ones(len(IMAGE), 2)
    ),
    "sample without a teacher": lambda: wrap()(
        IMAGE, LABELS, teacher_weights=torch.zeros(len(IMAGE), 1)
    ),
    "ensemble weights": lambda: Ensemble([Net(1), Net(1)], weights=[1.0]),
    "decay": lambda: MovingAverage(decay=1.0),
    "average of a student that sees less": lambda: wrap(teacher=MovingAverage()),
    "parameters of a frozen teacher": lambda: wrap().teacher_parameters(),
    "supervision of a frozen teacher": lambda: step(objective=1.0 * GroundTruth(of="teacher")),
    "closed": closed,
    "pickled without teacher": without_teacher,
    "another device": lambda: wrap()._teachers[0].holder(IMAGE.to("meta")),
    "called from inside": recursion,
    "inputs of another kind": lambda: wrap(inputs=NAMES),
    "taps of another kind": lambda: wrap(taps={"bottleneck": "stage"}),
    "tap name": lambda: wrap(taps={"stage.0": Tap("stage", "stage")}),
    "teacher number": lambda: wrap(taps=at(Layer("stage", network=1), "stage")),
    "tap that is missing": lambda: wrap(objective=1.0 * LatentKL(tap="deep")),
    "layer of another kind": lambda: wrap(taps=at(3, "stage")),
    "layer misspelt": lambda: wrap(taps=at("stage", "stge")),
    "layer unlike any": lambda: wrap(taps=at("stage", "xyz")),
    "module of another network": lambda: wrap(taps=at("stage", nn.Conv2d(1, 1, 1))),
    "glob that fits several": lambda: wrap(taps=at("stage", "stage.*")),
    "adapter of another kind": lambda: Tap("stage", "stage", adapter="linear"),
    "place in a layer": lambda: Layer("stage", at="middle"),
    "selection": lambda: Layer("stage", select=1.5),
    "number of a network": lambda: Layer("stage", network=-1),
    "selection from a tensor": lambda: wrap(taps=at("stage", Layer("stage", select=0))),
    "layer with several outputs": lambda: wrap(
        student=nn.Sequential(Net(1, form=lambda out: (out, out)), First()), taps=at("stage", "0")
    ),
    "layer with no tensor": lambda: wrap(
        student=nn.Sequential(Net(1, form=lambda out: None), Zeros()), taps=at("stage", "0")
    ),
    "layer that does not run": lambda: wrap(taps=at("stage", "spare")),
    "layer that runs twice": lambda: wrap(student=Twice(1), taps=at("stage", "stage")),
    "features changed in place": lambda: step(
        torch.zeros(3, 2, 8, 8),
        torch.zeros(3, 8, 8).long(),
        student=Later(1),
        taps=at("stage", "stage"),
    ),
    "features without gradient": lambda: step(
        student=nn.Sequential(Detached(1).requires_grad_(False), nn.Conv2d(3, 3, 1)),
        taps=at("stage", "0.stage"),
    ),
    "features that are no map": lambda: wrap(
        taps=at("stage", Layer("stage", select=lambda x: x.flatten(1)))
    ),
    "features of different shape": lambda: wrap(
        teacher=Net(2, width=6), taps=at("stage", "stage", adapter=None)
    ),
    "features of different axes": lambda: wrap(
        teacher=Net(2), taps=at(Layer("stage", select=lambda x: x[..., None]), "stage")
    ),
    "no bottleneck": lambda: wrap(student=nn.Conv2d(1, 3, 1)),
    "two bottlenecks": lambda: wrap(student=Branches()),
    "no example to locate": lambda: wrap(example=None),
    "no example to adapt": lambda: wrap(example=None, taps=at("stage", "stage")),
    "no logits": lambda: wrap(student=Net(1, form=lambda out: {"mask": out})),
    "selector without logits": lambda: wrap(select_logits=lambda out: None),
    "different classes": lambda: wrap(student=Net(1, classes=2)),
    "head weights": lambda: wrap(student=Net(1, form=lambda o: [o, o]), head_weights=[1, 1, 1]),
    "negative head weights": lambda: wrap(
        student=Net(1, form=lambda o: [o, o]), head_weights=[-1, 1]
    ),
    "activation": lambda: wrap(activation="tanh"),
    "objective of another kind": lambda: wrap(objective="dice"),
    "empty objective": lambda: Objective([]),
    "weight": lambda: float("nan") * GroundTruth(),
    "term name": lambda: GroundTruth().named("a.b"),
    "term that returns a map": lambda: step(objective=1.0 * Unchecked()),
    "temperature": lambda: SoftTargetDiceBCE(temperature=0.0),
    "normalisation": lambda: LatentKL(normalisation="l2"),
    "no target": lambda: step(target=None, objective=1.0 * GroundTruth()),
    "class weights": lambda: GroundTruth(class_weights=(1, -1)),
    "class weights of another number": lambda: step(objective=GroundTruth(class_weights=(1, 2))),
    "sample weights": lambda: alone(
        GroundTruth(), target=LABELS, sample_weights=torch.tensor([1.0, -1.0])
    ),
    "labelled mask": lambda: alone(GroundTruth(), target=LABELS, labelled=torch.ones(3).bool()),
    "schedule": lambda: Ramp(0, 1, steps=0),
    "ends of a schedule": lambda: Ramp(0, float("inf"), steps=5),
    "balance": lambda: (1.0 * GroundTruth()).balanced(1.0),
    "balanced and not": lambda: (1.0 * GroundTruth()).balanced() + LatentKL(),
    "function that is no schedule": lambda: nothing * GroundTruth(),
    "neither number nor schedule": lambda: "2" * GroundTruth(),
    "target shape": lambda: step(target=LABELS[:, :4]),
    "label out of range": lambda: step(target=LABELS + 7),
    "target values": lambda: step(target=HOT + 1),
    "target sum": lambda: step(target=torch.ones_like(HOT)),
    "softmax of one channel": lambda: step(
        teacher=Net(2, classes=1), student=Net(1, classes=1), target=LABELS
    ),
    "step without teacher logits": lambda: alone(SoftTargetDiceBCE()),
    "step with other logits": lambda: alone(SoftTargetDiceBCE(), teacher=torch.zeros(2, 2, 8, 8)),
    "share of a preset": lambda: kdnet(imitation=2),
    "weight of a preset": lambda: kdnet(latent_weight=-1),
    "ignored value of one-hot targets": lambda: alone(GroundTruth(ignore_index=0), target=HOT),
    "logits without voxels": lambda: GroundTruth()(Step(HOT[:0], target=HOT[:0])),
    "scale of positions": lambda: PairwiseSimilarity(scale=0),
    "features on other grids": lambda: at_tap(PairwiseSimilarity(), (1, 2, 4, 4), (1, 2, 8, 8)),
    "one example to align": lambda: at_tap(
        CenteredKernelAlignment(over="samples"), (1, 2, 4, 4), (1, 2, 4, 4)
    ),
    "critic that is not built": lambda: HolisticAdversarial().critic,
    "critic without an image": lambda: alone(
        HolisticAdversarial(nn.Conv2d(4, 1, 1)), teacher=torch.zeros(2, 3, 8, 8)
    ),
    "no critic": lambda: wrap().critic_parameters(),
    "step without tap": lambda: alone(LatentKL()),
    "step without target": lambda: alone(ReliableSoftTargetCE(), teacher=torch.zeros(2, 3, 8, 8)),
    "standardised pair of channels": lambda: HintonKL(standardise=True)(
        Step(student=HOT[:, :2], teacher=HOT[:, :2])
    ),
    "centred regions": lambda: alone(
        LogitMSE(centre=True), teacher=torch.zeros(2, 3, 8, 8), activation="sigmoid"
    ),
    "features without voxels": lambda: at_tap(FeatureL2(), (2, 4), (2, 4)),
    "features of other shape": lambda: at_tap(FeatureL2(), (2, 4, 8, 8), (2, 8, 8, 8)),
    "term without its networks": lambda: at_tap(VariationalInformation(), (2, 4, 8), (2, 4, 8)),
    "contrast of one sample": lambda: at_tap(ContrastiveProjection(), (1, 4, 8), (1, 4, 8)),
    "power of attention": lambda: AttentionTransfer(power=0.5),
    "networks made for another wrapper": lambda: in_two_wrappers(VariationalInformation()),
    "critic made for another wrapper": lambda: in_two_wrappers(HolisticAdversarial()),
    "variance below its floor": lambda: VariationalInformation(min_variance=9.0),
    "width of a term's network": lambda: ContrastiveProjection(dimensions=0),
    "mapping without names": lambda: wrap(inputs=None)(dict.fromkeys(NAMES, IMAGE), LABELS),
    "input of another kind": lambda: step(image=[1, 2]),
    "modality missing": lambda: step(image={"t1": IMAGE[:, :1]}),
    "modalities of different shape": lambda: step(image=dict.fromkeys(NAMES, IMAGE)),
    "channel count": lambda: step(image=torch.zeros(2, 3, 8, 8)),
    "input without axes": lambda: step(image=torch.zeros(2, 2)),
    "empty batch": lambda: step(image=IMAGE[:0]),
    "empty axis": lambda: step(image=IMAGE[..., :0]),
    "integer image": lambda: step(image=IMAGE.long()),
    "unlike the example": lambda: step(image=torch.zeros(2, 2, 8, 8, 8)),
    "names as a string": lambda: PrivilegedInput("t1", student=("t1",)),
    "names that are none": lambda: PrivilegedInput((1, 2), student=(1,)),
    "no names": lambda: PrivilegedInput((), student=("t1",)),
    "repeated names": lambda: PrivilegedInput(("t1", "t1"), student=("t1",)),
    "unknown names": lambda: PrivilegedInput(NAMES, student=("flair",)),
    "channel counts": lambda: PrivilegedInput({"rgb": 0}, student=("rgb",)),
    "dropout": lambda: PrivilegedInput(NAMES, student=NAMES, dropout=1.0),
    "presence mask": lambda: step(present=torch.ones(2, 2)),
    "presence without names": lambda: wrap(inputs=None, student=Net(2))(
        IMAGE, LABELS, present=torch.ones(2, 2).bool()
    ),
    "leak": lambda: assert_no_leak(Net(1), Careless(), IMAGE, seen=[1]),
    "leak, view unknown": lambda: assert_no_leak(Net(1), Careless(), IMAGE),
    "leak, no logits": lambda: assert_no_leak(
        Net(1, form=lambda out: None), PrivilegedInput(NAMES, student=("t1ce",)), IMAGE
    ),
    "leak, not the full input": lambda: assert_no_leak(
        Net(1), PrivilegedInput(NAMES, student=("t1ce",)), IMAGE[:, :1]
    ),
    "description of no image": lambda: describe(Net(1), torch.zeros(8, 8)),
    "weights for heads that are not there": lambda: wrap(head_weights=[1, 1]),
    "joint teacher of several heads": lambda: step(
        teacher=JointTeacher(Net(2, form=lambda o: [o, o])),
        objective=GroundTruth() + GroundTruth(of="teacher"),
    ),
    "average in half precision": half_average,
    "a module of both": shared_module,
    "no cache": lambda: wrap(cache="runs"),
    "cache of a teacher that changes": lambda: wrap(
        teacher=JointTeacher(Net(2)), cache=TeacherCache()
    ),
    "storage of a cache": lambda: TeacherCache(storage="4bit"),
    "size of a cache": lambda: TeacherCache(max_bytes=0),
    "folder of a cache": lambda: TeacherCache("/dev/null/cache"),
    "keys": lambda: wrap(cache=TeacherCache())(IMAGE, LABELS, key="ab"),
    "key of another input": other_input,
    "key of two inputs": lambda: wrap(cache=TeacherCache())(
        torch.stack([IMAGE[0], IMAGE[0] + 1]), LABELS, key=["a", "a"]
    ),
    "teacher that answers otherwise": answers_otherwise,
    "key of another flip": lambda: wrap(cache=TeacherCache(share_flips=True))(
        IMAGE, LABELS, key=["a/flip4", "b"]
    ),
    "tokens under flips": lambda: TeacherCache(share_flips=True).fetch(
        "teacher", ["a", "b"], IMAGE, lambda: {"tap.x": torch.zeros(2, 5)}
    ),
    "nothing to fill": lambda: precompute(wrap(), []),
    "names of no argument": lambda: check_names({"label": "target"}),
    "batch of three": lambda: step_arguments((IMAGE, LABELS, 1), {}),
    "entry that is not there": lambda: step_arguments(
        {"image": IMAGE, "seg": LABELS}, {"target": "label"}
    ),
    "reference called otherwise": lambda: step_arguments(
        {"image": IMAGE, "label": LABELS}, {}, kdnet()
    ),
    "loss beside the objective": lambda: check_options({"loss_function": 1}, "DistillationTrainer"),
    "reader of batches": lambda: check_options({"prepare_batch": 1}, "DistillationTrainer"),
    "network that is no wrapper": lambda: check_wrapper(Net(1), "DistillationTrainer"),
    "critic in a loop of one optimizer": lambda: refuse_critic(
        wrap(objective=HolisticAdversarial(nn.Conv2d(4, 1, 1))), "DistillationModule"
    ),
    "decoder deeper than the encoder": lambda: wrap(student=DeeperDecoder()),
}
# Raised where this suite does not run: under two processes, or with packages that are optional.
ELSEWHERE = {
    (
        "windows.py",
        "predict_windows",
    ): "tests/integrations/test_monai.py: present and windows of several",
    ("nnunet_student.py", "refuse_processes"): "tests/integrations/test_nnunet.py",
    ("nnunet_joint.py", "refuse_reference"): "tests/integrations/test_nnunet.py",
    ("nnunet_student.py", "load_checkpoint"): "tests/integrations/test_nnunet.py",
    ("nnunet_data.py", "whole_data"): "tests/integrations/test_nnunet.py",
    ("nnunet_plans.py", "channel_indices"): "tests/integrations/test_nnunet.py",
    ("nnunet_reading.py", "load_checkpoint"): "tests/integrations/test_nnunet.py",
    ("nnunet_reading.py", "read_json"): "tests/integrations/test_nnunet.py",
    ("nnunet_folder.py", "student_folder"): "tests/integrations/test_nnunet.py",
    ("nnunet_folder.py", "_checkpoints"): "tests/integrations/test_nnunet.py",
    ("nnunet_folder.py", "_told"): "tests/integrations/test_nnunet.py",
    ("nnunet_options.py", "teacher_folder"): "tests/integrations/test_nnunet.py",
    ("nnunet_options.py", "imitation"): "tests/integrations/test_nnunet.py",
    ("nnunet_teacher.py", "_check_alike"): "tests/integrations/test_nnunet.py",
    ("nnunet_teacher.py", "_check_classes"): "tests/integrations/test_nnunet.py",
    ("checks.py", "check_networks"): "tests/test_distributed.py",
    ("checks.py", "check_synchronised"): "tests/test_distributed.py",
    ("checks.py", "check_gathered"): "tests/test_distributed.py",
    ("stores.py", "_read"): "tests/cache/test_stores.py: a damaged entry is a warning",
    ("stores.py", "_entry"): "tests/cache/test_stores.py: a damaged entry is a warning",
    ("recorder.py", "record"): "tests/test_wrapper_early_exit.py: no error, it leaves a forward",
    (
        "adapters.py",
        "build_adapter",
    ): "tests/taps/test_adapters.py: only views of a user's own lead there",
}


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]


class Zeros(nn.Module):
    def forward(self, _):
        return torch.zeros(1, 3, 8, 8)


class Careless:
    def for_teacher(self, image):
        return image

    def for_student(self, image):
        return image[:, 1:] - image.mean()


class DeeperDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 2, stride=2)
        self.decoder = Deeper()

    def forward(self, x):
        return nn.functional.interpolate(self.decoder(self.encoder(x)), scale_factor=2)


class Deeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.fuse = nn.Conv2d(4, 4, 2, stride=2), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.fuse(x + nn.functional.interpolate(self.down(x), scale_factor=2))


def message(misuse):
    try:
        MISUSES[misuse]()
    except PrivDistillError as caught:
        error = caught
    else:
        return f"{misuse}: nothing was raised", ("", "")
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)][-1]
    text = f"{type(error).__name__}: {error}"
    return text, (Path(last.filename).name, last.name)


def stored():
    parts = FILE.read_text(encoding="utf-8").split("\n=== ")[1:]
    return {title: text.rstrip("\n") for title, text in (part.split("\n", 1) for part in parts)}


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    results = {misuse: message(misuse) for misuse in MISUSES}
    if os.environ.get("PRIVDISTILL_WRITE_PAGES"):
        lines = [f"=== {misuse}\n{text}\n" for misuse, (text, _) in results.items()]
        heading = "What each misuse says. Made by tests/test_messages.py.\n"
        FILE.write_text("\n".join([heading, *lines]), encoding="utf-8")
    return results


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_says_exactly_this(found, misuse):
    assert found[misuse][0] == stored()[misuse]


def test_no_message_is_kept_that_nothing_says(found):
    assert set(stored()) == set(MISUSES)


def test_every_place_that_raises_is_reached(found):
    reached = {place for _, place in found.values()} | set(ELSEWHERE)
    raising = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(inner, ast.Raise) and inner.exc for inner in ast.walk(node)
            ):
                raising.add((path.name, node.name))
    assert raising - reached == set()
