"""Taps by glob, by module, of inputs, of entries; tokens; several at once."""

import itertools

import pytest
import torch
from torch import nn

from privdistill import (
    FeatureL2,
    GroundTruth,
    LatentKL,
    Layer,
    LayerNotFoundError,
    LifecycleError,
    ObjectiveError,
    ShapeMismatchError,
    Tap,
    Term,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))


@pytest.fixture
def tapped(build):
    """Student features captured at a place of the tiny network, and the wrapper."""

    def capture(of_teacher, of_student, **options):
        objective = GroundTruth() + LatentKL()
        kd = build(taps={"bottleneck": Tap(of_teacher, of_student)}, objective=objective, **options)
        return kd, kd(IMAGE, LABELS).taps["bottleneck"]

    return capture


def test_a_glob_names_the_layer_it_fits(tapped):
    kd, pair = tapped("bottle*", "*neck")
    assert kd.taps["bottleneck"] == Tap("bottleneck", "bottleneck")
    assert pair.student.shape == (2, 8, 4, 4)


def test_a_glob_that_fits_several_lists_them(build):
    with pytest.raises(LayerNotFoundError, match=r"'encoder\.\*' fits 2 layers.*'encoder.0'"):
        build(taps={"bottleneck": Tap("encoder.*", "bottleneck")})


def test_a_glob_that_fits_nothing_names_the_closest(build):
    with pytest.raises(LayerNotFoundError, match=r"no layer 'botle\*'"):
        build(taps={"bottleneck": Tap("botle*", "bottleneck")})


def test_inputs_of_a_layer_can_be_captured(tapped):
    _, into = tapped(Layer("up", at="input"), Layer("up", at="input"))
    _, out_of = tapped("bottleneck", "bottleneck")
    assert torch.equal(into.student, out_of.student)


def test_an_input_given_by_keyword_can_be_captured(tapped, tiny_unet):
    class Keywords(tiny_unet):
        def forward(self, x):
            skip = self.encoder(x)
            deep = self.up(input=self.bottleneck(self.down(skip)))
            return self.head(torch.cat((skip, deep), dim=1))

    student = Keywords(1)
    _, pair = tapped("bottleneck", Layer("up", select="input", at="input"), student=student)
    assert pair.student.shape == (2, 8, 4, 4)


def test_an_input_that_the_layer_overwrites_is_captured_as_it_was(tapped, tiny_unet):
    student = tiny_unet(1)
    student.bottleneck[1] = nn.ReLU(inplace=True)
    _, pair = tapped("bottleneck", Layer("bottleneck.1", at="input"), student=student)
    assert (pair.student < 0).any()


class Pyramid(nn.Module):
    """An encoder that returns several maps, in a list or a mapping."""

    def __init__(self, form):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 2, stride=2)
        self.form = form

    def forward(self, x):
        fine = self.first(x)
        return self.form(fine, self.second(fine))


class Net(nn.Module):
    def __init__(self, form, read):
        super().__init__()
        self.encoder, self.head, self.read = Pyramid(form), nn.Conv2d(8, 3, 1), read

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.read(self.encoder(x))), scale_factor=2)


FORMS = {
    "tuple": (lambda a, b: (a, b), lambda out: out[1], -1),
    "list": (lambda a, b: [a, b], lambda out: out[1], 1),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda out: out["b"], "b"),
    "function": (lambda a, b: {"a": (a, b)}, lambda out: out["a"][1], lambda out: out["a"][1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_of_several_outputs_is_selected(tapped, form):
    make, read, select = FORMS[form]
    _, pair = tapped("bottleneck", Layer("encoder", select=select), student=Net(make, read))
    assert pair.student.shape == (2, 8, 4, 4)


def test_what_can_be_selected_is_listed(tapped):
    make, read, _ = FORMS["dict"]
    for place in ("encoder", Layer("encoder", select="c")):
        with pytest.raises(LifecycleError, match=r"'a': \(\d, 4, 8, 8\), 'b': \(\d, 8, 4"):
            tapped("bottleneck", place, student=Net(make, read))


def test_nothing_can_be_selected_from_a_tensor(tapped):
    with pytest.raises(LayerNotFoundError, match=r"gives one tensor, \(\d, 8, 4, 4\)"):
        tapped("bottleneck", Layer("bottleneck", select=0))


@pytest.mark.parametrize("wrong", [{"at": "middle"}, {"network": -1}])
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(ObjectiveError, match="Layer: "):
        Layer("x", **wrong)


class Transformer(nn.Module):
    """Patches of 4 x 4 voxels as tokens, with a class token, and back."""

    def __init__(self, channels, classes=3, width=8, axes=2):
        super().__init__()
        conv, back = (
            (nn.Conv2d, nn.ConvTranspose2d) if axes == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        )
        self.patches = conv(channels, width, 4, stride=4)
        self.register = nn.Parameter(torch.zeros(1, 1, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.head = back(width, classes, 4, stride=4)

    def forward(self, x):
        grid = self.patches(x)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.register.expand(len(x), -1, -1), tokens), dim=1)
        tokens = self.block(tokens)[:, 1:]
        return self.head(tokens.transpose(1, 2).reshape(grid.shape))


def test_tokens_of_a_transformer_teach_a_convolutional_student(tapped):
    kd, pair = tapped("block", "bottleneck", teacher=Transformer(4))
    assert pair.teacher.shape == pair.student.shape == (2, 8, 2, 2)
    # 4 x 4 to 2 x 2: resampled on the way
    assert "resampled" in str(kd)


def test_a_convolutional_teacher_teaches_tokens(tapped):
    _, pair = tapped("bottleneck", "block", student=Transformer(1, width=4))
    assert pair.student.shape == pair.teacher.shape == (2, 8, 4, 4)


class Halving(nn.Module):
    """Halves the image twice, rounding sizes down or up."""

    def __init__(self, channels, padding):
        super().__init__()
        self.down = nn.Conv2d(channels, 4, 2 + padding, 2, padding)
        self.deep, self.head = nn.Conv2d(4, 4, 2 + padding, 2, padding), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.deep(self.down(x))), size=x.shape[2:])


@pytest.mark.parametrize("size", [8, 10, 13])
def test_promise_8_features_are_resampled_to_the_teachers_size_in_the_step(build, size):
    """In the example of 8 x 8 both have 2 x 2."""
    kd = build(teacher=Halving(4, 0), student=Halving(1, 1))
    out = kd(torch.randn(2, 4, size, size), torch.randint(0, 3, (2, size, size)))
    student, teacher = out.taps["bottleneck"]
    assert student.shape == teacher.shape == (2, 4, size // 4, size // 4)
    out.loss.backward()
    assert kd.student.deep.weight.grad.abs().sum() > 0


def test_token_positions_are_kept(tapped):
    teacher = Transformer(4)
    _, pair = tapped("block", "bottleneck", teacher=teacher)
    _, grid = tapped("patches", "bottleneck", teacher=teacher)
    teacher.block = nn.Identity()
    _, same = tapped("block", "bottleneck", teacher=teacher)
    assert torch.allclose(same.teacher, grid.teacher)
    assert not torch.allclose(same.teacher, pair.teacher)


class Registered(nn.Module):
    """Nine tokens for an image of 8 x 8 voxels: 3 x 3 patches, or 2 x 2 behind five others."""

    def __init__(self, side):
        super().__init__()
        step, padding = (3, 1) if side == 3 else (4, 0)
        self.patches = nn.Conv2d(4, 8, step, step, padding)
        self.registers = nn.Parameter(torch.zeros(1, 9 - side**2, 8))
        self.block, self.head = nn.Linear(8, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        grid = self.patches(x)
        registers = self.registers.expand(len(x), -1, -1)
        tokens = self.block(torch.cat((registers, grid.flatten(2).transpose(1, 2)), dim=1))
        tokens = tokens[:, registers.shape[1] :].transpose(1, 2).reshape(grid.shape)
        return nn.functional.interpolate(self.head(tokens), size=x.shape[2:])


@pytest.mark.parametrize("place", ["block", None])
def test_tokens_named_or_located_lie_on_the_grid_that_they_come_from(tapped, place):
    _, pair = tapped(place, "bottleneck", teacher=Registered(2))
    assert pair.teacher.shape == (2, 8, 2, 2)
    with pytest.raises(ShapeMismatchError, match=r"'block'.* 3 x 3"):
        tapped(place, "bottleneck", teacher=Registered(3))
    laid_out = Layer("block", select=lambda tokens: tokens.transpose(1, 2).unflatten(2, (3, 3)))
    _, pair = tapped(laid_out, "bottleneck", teacher=Registered(3))
    assert pair.teacher.shape == (2, 8, 3, 3)


def test_features_that_are_no_map_are_refused(tapped):
    flat = Layer("bottleneck", select=lambda value: value.flatten(1))
    with pytest.raises(ShapeMismatchError, match=r"gives \(\d, 128\) for an image"):
        tapped("bottleneck", flat)


def test_one_tap_serves_several_terms_and_several_taps_one_step(build):
    taps = {"bottleneck": Tap(), "early": Tap("encoder", "encoder")}
    wide = LatentKL(normalisation="l1").named("wide")
    objective = GroundTruth() + LatentKL() + wide + LatentKL(tap="early").named("early")
    out = build(taps=taps, objective=objective)(IMAGE, LABELS)
    assert set(out.terms) == {"ground_truth", "latent_kl", "wide", "early"}
    assert set(out.taps) == {"bottleneck", "early"}


class Energy(Term):
    """Compares maps of mean squares, whatever the number of channels."""

    taps = ("bottleneck",)
    equal_channels = False

    def forward(self, step):
        mine, theirs = (side.square().mean(1) for side in step.taps["bottleneck"])
        return (mine - theirs).square().mean()


def test_a_term_that_needs_no_equal_channels_gets_no_convolution(build, tiny_unet):
    teacher = tiny_unet(4, width=6)
    kd = build(teacher=teacher, objective=1.0 * Energy())
    pair = kd(IMAGE, LABELS).taps["bottleneck"]
    assert (pair.student.shape[1], pair.teacher.shape[1]) == (8, 12)
    assert len(kd.adapters) == 0
    taps = {"bottleneck": Tap("bottleneck", "encoder")}
    kd = build(teacher=teacher, objective=1.0 * Energy(), taps=taps)
    pair = kd(IMAGE, LABELS).taps["bottleneck"]
    assert (pair.student.shape, pair.teacher.shape) == ((2, 4, 4, 4), (2, 12, 4, 4))


def test_one_term_that_needs_equal_channels_is_enough_for_a_convolution(build, tiny_unet):
    kd = build(teacher=tiny_unet(4, width=6), objective=Energy() + LatentKL())
    assert isinstance(kd.adapters["bottleneck"], nn.Conv2d)


class Regressor(Energy):
    """Predicts teacher features from those of the student by a network that it builds."""

    needs_teacher = True

    def build(self, step):
        self.built = step
        student, teacher = step.taps["bottleneck"]
        self.predict = nn.Conv2d(student.shape[1], teacher.shape[1], 1)

    def forward(self, step):
        self.seen = step.image
        student, teacher = step.taps["bottleneck"]
        return (self.predict(student) - teacher).square().mean()


def test_terms_build_their_own_networks_from_the_dry_run(build, tiny_unet):
    kd = build(teacher=tiny_unet(4, width=6), objective=GroundTruth() + 2.0 * Regressor())
    term = kd.objective.terms[1]
    assert term.built.student.shape == term.built.teacher.shape == (1, 3, 8, 8)
    assert term.built.image.shape == (1, 1, 8, 8)
    assert {id(p) for p in term.parameters()} <= {id(p) for p in kd.parameters()}
    kd(IMAGE, LABELS).loss.backward()
    assert term.predict.weight.grad.abs().sum() > 0


def test_what_terms_build_follows_the_students_device(build, tiny_unet):
    networks = {"student": tiny_unet(1).to("meta"), "teacher": tiny_unet(4).to("meta")}
    kd = build(**networks, objective=1.0 * Regressor())
    assert kd.objective.terms[0].predict.weight.is_meta


def test_a_term_of_two_names_is_built_once(build):
    class Counted(Regressor):
        calls = 0

        def build(self, step):
            super().build(step)
            Counted.calls += 1

    term = Counted()
    build(objective=0.5 * term + 0.5 * term)
    assert Counted.calls == 1


def test_terms_see_the_students_view(build):
    kd = build(objective=1.0 * Regressor())
    kd(IMAGE, LABELS)
    assert torch.equal(kd.objective.terms[0].seen, IMAGE[:, 2:3])


def test_a_bottleneck_found_in_an_entry_is_captured_there(build):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return len(x), x + self.mlp(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(1, 8, 2, stride=2), Block()
            self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1))

        def forward(self, x):
            return self.decoder(self.block(self.stem(x))[1])

    kd = build(student=Net())
    assert kd.taps["bottleneck"].student == Layer("block", select=1)
    assert kd(IMAGE, LABELS).taps["bottleneck"].student.shape == (2, 8, 4, 4)


class Levels(nn.Module):
    """An encoder of several levels of equal size, listed in order, and a decoder."""

    def __init__(self, channels, levels, width=4):
        super().__init__()
        widths = [channels, *[width] * levels]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2 if i == 0 else 1, 1), nn.LeakyReLU())
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 1))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def test_pairs_of_two_globs_are_levels_in_order(build):
    taps = Tap.pairs(teacher="stages.*", student="stages.*")
    terms = sum(0.1 * FeatureL2(f"level{i}").named(f"level{i}") for i in range(1, 13))
    kd = build(
        teacher=Levels(4, 12), student=Levels(1, 12), taps=taps, objective=GroundTruth() + terms
    )
    names = [f"stages.{i}" for i in range(12)]
    assert [(name, tap.teacher, tap.student) for name, tap in kd.taps.items()] == [
        (f"level{i + 1}", name, name) for i, name in enumerate(names)
    ]
    assert set(kd(IMAGE, LABELS).terms) == {"ground_truth", *kd.taps}


def test_pairs_stand_beside_other_taps_under_a_name_of_their_own(build):
    pairs = Tap.pairs(teacher="stages.*", student=Layer("stages.*", at="input"), adapter=None)
    taps = {"bottleneck": Tap(), "stage": pairs}
    kd = build(
        teacher=Levels(4, 2), student=Levels(1, 2), taps=taps, objective=GroundTruth() + LatentKL()
    )
    assert list(kd.taps) == ["bottleneck", "stage1", "stage2"]
    assert kd.taps["stage2"] == Tap("stages.1", Layer("stages.1", at="input"), adapter=None)


def test_pairs_of_different_counts_list_both(build):
    taps = Tap.pairs(teacher="stages.*", student="stages.*")
    with pytest.raises(LayerNotFoundError, match=r"'stages.2'.*'stages.1'"):
        build(teacher=Levels(4, 3), student=Levels(1, 2), taps=taps)


def test_pairs_of_a_teacher_that_there_is_not_say_how_many_there_are(build):
    taps = Tap.pairs(teacher=Layer("stages.*", network=1), student="stages.*")
    with pytest.raises(LayerNotFoundError, match="teacher 1, but there are 1"):
        build(teacher=Levels(4, 2), student=Levels(1, 2), taps=taps)


def test_pairs_that_fit_nothing_name_the_closest(build):
    taps = Tap.pairs(teacher="stages.*", student="stagess.*")
    with pytest.raises(LayerNotFoundError, match=r"student has no layer 'stagess\.\*'"):
        build(teacher=Levels(4, 3), student=Levels(1, 2), taps=taps)


@pytest.mark.parametrize("form", ["name", "module", "layer"])
def test_a_finder_is_asked_with_network_and_example(tapped, networks, form):
    asked = []

    def find(model, example):
        asked.append((model, tuple(example.shape)))
        # It may run the network as it likes.
        model.train()(example)
        forms = {"name": "bottleneck", "module": model.bottleneck, "layer": Layer("bottleneck")}
        return forms[form]

    kd, pair = tapped(find, "bottleneck")
    assert asked == [(networks[0], (1, 4, 8, 8))]
    assert kd.taps["bottleneck"] == Tap("bottleneck", "bottleneck")
    assert not networks[0].training
    assert pair.teacher.shape == (2, 8, 4, 4)


def test_a_finder_that_finds_nothing_is_told_so(build):
    with pytest.raises(LayerNotFoundError, match="teacher is given None"):
        build(taps={"bottleneck": Tap(lambda model, example: None, "bottleneck")})


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_finder_that_fails_is_named_with_its_tap_and_network(build, role):
    def find(model, example):
        return model.decoder

    taps = {"bottleneck": Tap(**{"teacher": "bottleneck", "student": "bottleneck", role: find})}
    with pytest.raises(LayerNotFoundError, match=rf"(?s)'bottleneck'.*{role}.*decoder") as caught:
        build(taps=taps)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_finder_that_takes_one_argument_is_told_to_take_two(build):
    with pytest.raises(ObjectiveError, match="network, example"):
        build(taps={"bottleneck": Tap(lambda model: "bottleneck", "bottleneck")})
