import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    PrivDistillError,
    PrivilegedInput,
    Ramp,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Tap,
)

INPUTS = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
EXAMPLE = torch.zeros(1, 4, 8, 8)
IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))


def kdnet():
    return 0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth() + 10.0 * LatentKL()


def hooks(*models):
    return sum(len(m._forward_hooks) for model in models for m in model.modules())


# --- the user code of the design -------------------------------------------------------------


def test_the_documented_loop_lowers_the_loss(build):
    kd = build()
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        out = kd(IMAGE, LABELS)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert set(out.terms) == {"soft_target_dice_bce", "ground_truth", "latent_kl"}
    assert out.student.shape == out.teacher.shape == (2, 3, 8, 8)


def test_loss_is_the_weighted_sum_of_the_terms(build):
    out = build()(IMAGE, LABELS)
    expected = (
        0.75 * out.terms["soft_target_dice_bce"]
        + 0.25 * out.terms["ground_truth"]
        + 10 * out.terms["latent_kl"]
    )
    assert out.loss.item() == pytest.approx(expected.item())


def test_step_equals_a_hand_written_loop(build, networks):
    teacher, student = copy.deepcopy(networks)
    kd = build()
    kd(IMAGE, LABELS).loss.backward()
    features = {}
    teacher.bottleneck.register_forward_hook(lambda m, i, o: features.update(t=o))
    student.bottleneck.register_forward_hook(lambda m, i, o: features.update(s=o))
    with torch.no_grad():
        t = teacher.eval()(IMAGE)
    s = student(IMAGE[:, 2:3])
    p, soft = s.softmax(1), (t / 5).softmax(1)
    hard = nn.functional.one_hot(t.argmax(1), 3).movedim(-1, 1).float()
    hot = nn.functional.one_hot(LABELS, 3).movedim(-1, 1).float()

    def dice_loss(target):
        return 1 - (2 * (p * target).sum((2, 3)) / (p + target).sum((2, 3))).mean()

    bce = nn.functional.binary_cross_entropy
    kl = nn.functional.kl_div(
        features["s"].flatten(1).log_softmax(1),
        features["t"].flatten(1).softmax(1),
        reduction="batchmean",
    )
    loss = 0.75 * (dice_loss(soft) + bce(p, hard)) + 0.25 * (dice_loss(hot) + bce(p, hot)) + 10 * kl
    loss.backward()
    for mine, theirs in zip(kd.student.parameters(), student.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


def test_three_dimensions(tiny_unet, build):
    kd = build(
        teacher=tiny_unet(4, axes=3),
        student=tiny_unet(1, axes=3),
        example=torch.zeros(1, 4, 8, 8, 8),
    )
    out = kd(torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long))
    assert torch.isfinite(out.loss)


def test_overlapping_regions(build):
    kd = build(activation="sigmoid")
    out = kd(IMAGE, (torch.rand(2, 3, 8, 8) > 0.5).float())
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_a_baseline_needs_no_teacher(build):
    kd = build(teacher=None, objective=GroundTruth())
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    assert out.teacher is None
    assert out.taps == {}


def test_printing_shows_layers_shapes_terms_and_how_they_were_found(build):
    text = str(build())
    assert "bottleneck  student  bottleneck  8 x 4 x 4  none" in text
    assert "10 * LatentKL(tap='bottleneck')" in text
    assert "teacher flair, t1, t1ce, t2 | student t1ce" in text
    assert "student bottleneck: " in text


def test_predict_takes_full_stack_own_view_or_mapping(build):
    kd = build()
    alone = IMAGE[:, 2:3]
    expected = kd.student(alone)
    for view in (IMAGE, alone, {"t1ce": alone}):
        assert torch.allclose(kd.predict(view), expected)


def test_predict_restores_flags_and_follows_grad_mode(build):
    kd = build()
    kd.student.encoder.eval()
    assert kd.predict(IMAGE).requires_grad
    with torch.no_grad():
        assert not kd.predict(IMAGE).requires_grad
    assert kd.student.training
    assert not kd.student.encoder.training


# --- promises ----------------------------------------------------------------------------------


def test_promise_1_privileged_modalities_have_zero_gradient(build):
    image = IMAGE.clone().requires_grad_()
    build()(image, LABELS).student.sum().backward()
    assert image.grad[:, 2].abs().sum() > 0
    assert image.grad[:, [0, 1, 3]].abs().sum() == 0


def test_promise_2_the_teacher_stays_frozen_in_eval_mode(build, tiny_unet):
    teacher = nn.Sequential(tiny_unet(4), nn.BatchNorm2d(3))
    kd = build(teacher=teacher, objective=kdnet())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    kd.train()
    kd(IMAGE, LABELS).loss.backward()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_promise_3_the_teacher_is_in_no_parameter_list_and_no_checkpoint(build, networks):
    kd = build()
    teachers = {id(p) for p in networks[0].parameters()}
    assert not teachers & {id(p) for p in kd.parameters()}
    students = {f"student.{name}" for name in networks[1].state_dict()}
    assert set(kd.state_dict()) == students | {"steps"}
    assert networks[0] not in list(kd.modules())


def test_promise_3_the_teacher_moves_with_the_wrapper(build, networks):
    build().to(torch.float64)
    assert next(networks[0].parameters()).dtype == torch.float64


def test_promise_4_captures_belong_to_the_output(build):
    kd = build()
    out = kd(IMAGE, LABELS)
    reference = weakref.ref(out.taps["bottleneck"].student)
    del out
    gc.collect()
    assert reference() is None


def test_promise_4_an_exception_leaves_the_wrapper_usable(build):
    kd = build()
    with pytest.raises(ShapeMismatchError):
        kd(IMAGE, LABELS[:, :4])
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_promise_5_features_overwritten_in_place_are_captured_as_they_were(build, backend):
    def net(channels):
        torch.manual_seed(channels)
        down = nn.Conv2d(channels, 4, 2, stride=2)
        return nn.Sequential(down, nn.ReLU(inplace=True), nn.Upsample(8), nn.Conv2d(4, 3, 1))

    taps = {"bottleneck": Tap(teacher="0", student="0")}
    student = net(1)
    run = student if backend is None else torch.compile(student, backend=backend)
    out = build(teacher=net(4), student=run, taps=taps)(IMAGE, LABELS)
    assert out.taps["bottleneck"].student.min() < 0
    assert out.taps["bottleneck"].teacher.min() < 0


def test_promise_5_a_change_the_dry_run_did_not_show_is_an_error(build, tiny_unet):
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_unet(1)

        def forward(self, x):
            deep = self.net.bottleneck(self.net.down(self.net.encoder(x)))
            if len(x) == 2 and self.training and x.abs().sum() > 0:
                deep.mul_(2)
            return self.net.head(torch.cat((self.net.encoder(x), self.net.up(deep)), 1))

    with pytest.raises(LifecycleError, match="changed its output in place"):
        build(student=Later())(IMAGE, LABELS)


def test_promise_6_misspelt_layers_name_the_closest(build):
    with pytest.raises(LayerNotFoundError, match=r"no layer 'botleneck'.\nClosest.*'bottleneck'"):
        build(taps={"bottleneck": Tap(teacher="bottleneck", student="botleneck")})


def test_promise_6_layers_can_be_given_as_modules(build, networks):
    teacher, student = networks
    kd = build(taps={"bottleneck": Tap(teacher=teacher.down, student=student.down)})
    assert kd.taps["bottleneck"] == Tap(teacher="down", student="down")
    assert kd(IMAGE, LABELS).taps["bottleneck"].student.shape == (2, 4, 4, 4)


def test_promise_6_a_layer_that_does_not_run_is_an_error(build, networks):
    networks[1].spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(LifecycleError, match="layer 'spare' of the student did not run"):
        build(taps={"bottleneck": Tap(teacher="bottleneck", student="spare")})


def test_promise_7_mappings_and_lists_are_understood(build, tiny_unet):
    class Mapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_unet(4)

        def forward(self, x):
            return {"out": self.net(x), "aux": x}

    class Listing(Mapping):
        def __init__(self):
            super().__init__()
            self.net = tiny_unet(1)

        def forward(self, x):
            return [self.net(x), x]

    assert torch.isfinite(build(teacher=Mapping(), student=Listing())(IMAGE, LABELS).loss)


def test_promise_7_a_selector_finds_other_outputs(build, tiny_unet):
    class Last(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.net = tiny_unet(channels)

        def forward(self, x):
            return x, self.net(x)

    kd = build(teacher=Last(4), student=Last(1), select_logits=lambda output: output[1])
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)


def test_promise_8_adapters_are_built_before_the_optimizer(build, tiny_unet):
    kd = build(teacher=tiny_unet(4, width=6))
    assert "nn.Conv2d(8, 12, kernel_size=1)" in str(kd)
    adapter = kd.adapters["bottleneck"]
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in kd.parameters()}
    kd(IMAGE, LABELS).loss.backward()
    assert adapter.weight.grad.abs().sum() > 0


def test_promise_8_without_adapter_different_shapes_are_an_error(build, tiny_unet):
    taps = {"bottleneck": Tap(teacher="bottleneck", student="bottleneck", adapter=None)}
    with pytest.raises(ShapeMismatchError, match=r"\(1, 8, 4, 4\).*\(1, 12, 4, 4\)"):
        build(teacher=tiny_unet(4, width=6), taps=taps)


def test_promise_8_a_given_adapter_is_used(build, tiny_unet):
    mine = nn.Conv2d(8, 12, 3, padding=1)
    taps = {"bottleneck": Tap(adapter=mine)}
    kd = build(teacher=tiny_unet(4, width=6), taps=taps)
    assert kd.adapters["bottleneck"] is mine


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_promise_9_compiled_networks_give_the_same_loss(build, networks, which):
    plain = build(validate="never")(IMAGE, LABELS).loss
    role = {"teacher": networks[0], "student": networks[1]}[which]
    compiled = torch.compile(copy.deepcopy(role), backend="aot_eager")
    kd = build(**{which: compiled})
    assert kd(IMAGE, LABELS).loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert kd(IMAGE, LABELS).loss.item() == pytest.approx(plain.item(), abs=1e-5)


def test_promise_9_a_hook_that_compile_skips_is_an_error(build, networks):
    compiled = torch.compile(networks[1], backend="aot_eager")
    compiled(IMAGE[:, [2]])
    kd = build(student=compiled)
    with pytest.raises(LifecycleError, match=r"build the wrapper before its first\s+compiled call"):
        kd(IMAGE, LABELS)
    torch._dynamo.reset()
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_promise_10_losses_are_float32_under_autocast(build, dtype):
    with torch.autocast("cpu", dtype):
        out = build()(IMAGE, LABELS)
    assert out.loss.dtype == torch.float32
    out.loss.backward()


def test_promise_11_activation_checkpointing_without_reentry_works(build, networks):
    networks[1].bottleneck = Checkpointed(networks[1].bottleneck, use_reentrant=False)
    kd = build(taps={"bottleneck": Tap(teacher="bottleneck", student="bottleneck.inner")})
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    assert out.taps["bottleneck"].student.requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_promise_11_a_tap_without_gradient_is_an_error(build, networks):
    networks[1].bottleneck = Checkpointed(networks[1].bottleneck, use_reentrant=True)
    kd = build(taps={"bottleneck": Tap(teacher="bottleneck.0", student="bottleneck.inner.0")})
    with pytest.raises(LifecycleError, match="carries no gradient in training"):
        kd(IMAGE, LABELS)


class Checkpointed(nn.Module):
    def __init__(self, inner, *, use_reentrant):
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def test_promise_13_data_parallel_is_refused(build, networks):
    for student in (nn.DataParallel(networks[1]), nn.Sequential(nn.DataParallel(networks[1]))):
        with pytest.raises(LifecycleError, match="wrapped in DataParallel"):
            build(student=student)
    with pytest.raises(LifecycleError, match="DistributedDataParallel"):
        build()._replicate_for_data_parallel()


def test_promise_14_a_copy_has_its_own_hooks_and_shares_the_teacher(build, networks):
    kd = build()
    twin = copy.deepcopy(kd)
    assert twin.teacher is kd.teacher
    assert twin.student is not kd.student
    before = kd(IMAGE, LABELS)
    assert twin(IMAGE, LABELS).loss == before.loss
    twin.close()
    assert hooks(twin.student) == 0
    assert torch.isfinite(kd(IMAGE, LABELS).loss)
    kd.close()
    assert hooks(*networks) == 0


def test_promise_14_the_students_weights_fit_a_fresh_network(build, tiny_unet):
    kd = build()
    fresh = tiny_unet(1)
    fresh.load_state_dict(pickle.loads(pickle.dumps(kd.student.state_dict())))
    assert torch.equal(fresh(IMAGE[:, 2:3]), kd.student(IMAGE[:, 2:3]))


def test_promise_15_no_gradient_reaches_the_teacher(build):
    out = build()(IMAGE, LABELS)
    assert not out.teacher.requires_grad
    assert not out.taps["bottleneck"].teacher.requires_grad


def test_promise_16_two_wrappers_do_not_meet(build, tiny_unet):
    first, second = build(), build(teacher=tiny_unet(4), student=tiny_unet(1))
    one, two = first(IMAGE, LABELS), second(IMAGE, LABELS)
    assert not torch.equal(one.taps["bottleneck"].student, two.taps["bottleneck"].student)


def test_promise_17_leaving_gives_both_networks_back(build, networks):
    teacher, student = networks
    keys = [set(vars(module)) for model in networks for module in model.modules()]
    with build() as kd:
        kd(IMAGE, LABELS)
    kd.close()
    assert hooks(*networks) == 0
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert keys == [set(vars(module)) for model in networks for module in model.modules()]
    assert kd.predict(IMAGE).shape == (2, 3, 8, 8)
    with pytest.raises(LifecycleError, match="the wrapper has been closed"):
        kd(IMAGE, LABELS)
    assert kd.student is student


def test_promise_17_a_failed_build_leaves_nothing_behind(build, networks):
    with pytest.raises(LayerNotFoundError):
        build(taps={"bottleneck": Tap(teacher="nowhere", student="bottleneck")})
    with pytest.raises(ModalityError):
        build(example=torch.zeros(1, 3, 8, 8))
    assert hooks(*networks) == 0
    assert networks[0].training


def test_promise_17_the_last_wrapper_to_close_restores_a_shared_teacher(build, networks, tiny_unet):
    first, second = build(), build(student=tiny_unet(1))
    first.close()
    assert not networks[0].training
    second.close()
    assert networks[0].training


# --- misuse ------------------------------------------------------------------------------------


def test_networks_that_share_parameters_are_refused(networks):
    with pytest.raises(LifecycleError, match=r"share parameters or layers \(Parameter, TinyUNet"):
        DistillationWrapper(networks[0], networks[0], objective=kdnet())


def test_an_objective_that_reads_the_teacher_needs_one(build):
    with pytest.raises(ObjectiveError, match="soft_target_dice_bce, latent_kl read the teacher"):
        build(teacher=None)


def test_a_bottleneck_cannot_be_located_without_an_example(build):
    with pytest.raises(LayerNotFoundError, match=r"Pass example=torch.zeros\(1, C, \*spatial\)"):
        build(example=None)


def test_adapters_cannot_be_built_without_an_example(build):
    with pytest.raises(ObjectiveError, match="whether an adapter is needed"):
        build(example=None, taps={"bottleneck": Tap("bottleneck", "bottleneck")})


def test_named_taps_without_adapter_need_no_example(build):
    tap = Tap("bottleneck", "bottleneck", adapter=None)
    kd = build(example=None, taps={"bottleneck": tap})
    assert torch.isfinite(kd(IMAGE, LABELS).loss)
    assert "not run yet" in str(kd)


def test_a_tap_a_term_reads_must_be_named(build):
    with pytest.raises(LayerNotFoundError, match="A term reads tap 'stage3'"):
        build(objective=LatentKL("stage3"))


def test_tap_names_are_plain_words(build):
    with pytest.raises(LayerNotFoundError, match="must be a plain word"):
        build(taps={"a.b": Tap("down", "down")})


def test_networks_with_different_classes_are_refused(build, tiny_unet):
    with pytest.raises(ShapeMismatchError, match=r"gives \(1, 2, 8, 8\) and the teacher \(1, 3"):
        build(student=tiny_unet(1, out_channels=2))


def test_different_classes_are_fine_where_no_term_compares_logits(build, tiny_unet):
    kd = build(student=tiny_unet(1, out_channels=2), objective=GroundTruth() + LatentKL())
    assert kd(IMAGE, LABELS.clamp(max=1)).teacher is None


@pytest.mark.parametrize("option", ["activation", "validate"])
def test_unknown_words_are_refused(build, option):
    with pytest.raises(ObjectiveError, match=f"`{option}` must be one of"):
        build(**{option: "sometimes"})


def test_promise_18_values_are_checked_in_the_first_training_step(build):
    wrong = LABELS + 5
    with pytest.raises(ObjectiveError, match="Map the labels to class indices first"):
        build()(IMAGE, wrong)
    kd = build(validate="always")
    kd(IMAGE, LABELS)
    with pytest.raises(ObjectiveError, match="Map the labels to class indices first"):
        kd(IMAGE, wrong)


def test_what_is_checked_may_be_said_anew(build):
    kd, wrong = build(validate="first"), LABELS + 5
    kd.validate = "never"
    assert not kd._unchecked
    kd.validate = "first"
    with pytest.raises(ObjectiveError, match="Map the labels to class indices first"):
        kd(IMAGE, wrong)
    with pytest.raises(ObjectiveError, match="`validate` must be one of"):
        kd.validate = "sometimes"


def test_the_objective_may_be_another_one_that_reads_no_more(build):
    kd = build(objective=SoftTargetDiceBCE() + GroundTruth())
    kd.objective = term = GroundTruth()
    out = kd(IMAGE, LABELS)
    assert set(out.terms) == {"ground_truth"}
    assert kd.objective.terms[0] is not term
    kd.objective = 2 * SoftTargetDiceBCE()
    assert torch.isfinite(kd(IMAGE, LABELS).loss)
    with pytest.raises(LifecycleError, match="bottleneck"):
        kd.objective = LatentKL()
    with pytest.raises(LifecycleError, match="logits"):
        build(objective=GroundTruth()).objective = SoftTargetDiceBCE()


def test_steps_count_training_only(build):
    kd = build()
    kd(IMAGE, LABELS)
    kd.eval()
    kd(IMAGE, LABELS)
    assert kd.steps == 1


# --- what a review and deliberate breaks asked for ---------------------------------------------


def down_up(channels):
    """A convolution whose output the next layer overwrites in place."""
    down = nn.Conv2d(channels, 4, 2, stride=2)
    return nn.Sequential(down, nn.ReLU(inplace=True), nn.Upsample(8), nn.Conv2d(4, 3, 1))


FIRST = {"bottleneck": Tap(teacher="0", student="0")}


def test_promise_5_holds_for_a_network_compiled_in_place(build):
    student = down_up(1)
    student.compile(backend="aot_eager")
    out = build(teacher=down_up(4), student=student, taps=FIRST)(IMAGE, LABELS)
    assert out.taps["bottleneck"].student.min() < 0


def test_promise_5_holds_for_a_network_with_a_compiled_part(build):
    student = nn.Sequential(torch.compile(down_up(1), backend="aot_eager"))
    taps = {"bottleneck": Tap(teacher="0", student="0.0")}
    out = build(teacher=down_up(4), student=student, taps=taps)(IMAGE, LABELS)
    assert out.taps["bottleneck"].student.min() < 0


def test_promise_5_holds_without_a_dry_run(build):
    taps = {"bottleneck": Tap("0", "0", adapter=None)}
    student = torch.compile(down_up(1), backend="aot_eager")
    out = build(teacher=down_up(4), student=student, taps=taps, example=None)(IMAGE, LABELS)
    assert out.taps["bottleneck"].student.min() < 0


def test_promise_5_train_mode_is_tried_too(build, tiny_unet):
    class InTraining(tiny_unet):
        def forward(self, x):
            skip = self.encoder(x)
            deep = self.bottleneck(self.down(skip))
            if self.training:
                deep.mul_(2)
            return self.head(torch.cat((skip, self.up(deep)), dim=1))

    kd = build(student=InTraining(1))
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


def test_promise_8_adapters_follow_the_students_dtype_and_leave_the_random_state(build, tiny_unet):
    mine = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12))
    kd = build(
        teacher=tiny_unet(4, width=6).double(),
        student=tiny_unet(1).double(),
        taps={"bottleneck": Tap(adapter=mine)},
        example=torch.zeros(1, 4, 8, 8).double(),
    )
    assert mine[0].weight.dtype == torch.float64
    assert mine[1].num_batches_tracked == 0
    assert torch.isfinite(kd(IMAGE.double(), LABELS).loss)


def test_promise_8_building_under_autocast_changes_nothing(build, tiny_unet):
    with torch.autocast("cpu", torch.bfloat16):
        kd = build(teacher=tiny_unet(4, width=6))
    assert kd.adapters["bottleneck"].weight.dtype == torch.float32
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


def test_a_tap_no_term_reads_is_recorded_without_an_adapter(build, tiny_unet):
    taps = {"down": Tap(teacher="down", student="down")}
    kd = build(teacher=tiny_unet(4, width=6), objective=GroundTruth(), taps=taps)
    out = kd(IMAGE, LABELS)
    assert out.taps["down"].student.shape[1] == 4
    assert out.taps["down"].teacher.shape[1] == 6
    assert len(kd.adapters) == 0


def test_promise_9_a_compiled_wrapper_compiles_once(build):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kd = build(validate="never")
    compiled = torch.compile(kd, backend="aot_eager")
    for _ in range(4):
        out = compiled(IMAGE, LABELS)
    assert torch.isfinite(out.loss)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert kd.steps == 4


def test_promise_14_moving_a_copy_leaves_the_teacher_alone(build):
    kd = build()
    twin = copy.deepcopy(kd).double()
    assert next(twin.student.parameters()).dtype == torch.float64
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


def test_promise_14_a_pickled_wrapper_runs(build):
    kd = build()
    twin = pickle.loads(pickle.dumps(kd))
    assert twin(IMAGE, LABELS).loss == kd(IMAGE, LABELS).loss
    twin.close()
    assert hooks(twin.student, twin.teacher) == 0


def test_promise_15_the_teacher_keeps_no_graph_even_if_the_image_needs_one(build):
    out = build()(IMAGE.clone().requires_grad_(), LABELS)
    assert not out.teacher.requires_grad
    assert not out.taps["bottleneck"].teacher.requires_grad


def test_promise_17_a_forgotten_wrapper_gives_both_networks_back(build, networks):
    kd = build()
    del kd
    gc.collect()
    assert hooks(*networks) == 0
    assert networks[0].training


def test_a_closed_wrapper_does_not_move_the_teacher(build, networks):
    kd = build()
    kd.close()
    kd.double()
    assert next(networks[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("around", [lambda kd: kd, nn.Sequential])
def test_to_empty_keeps_the_teachers_weights(build, networks, around):
    before = networks[0].head.weight.clone()
    kd = build()
    around(kd).to_empty(device="meta")
    assert kd.student.head.weight.is_meta
    assert torch.equal(networks[0].head.weight, before)


def test_predict_uses_running_statistics_of_batch_norm(build):
    student = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    kd = build(student=student, objective=SoftTargetDiceBCE())
    kd.predict(IMAGE)
    assert student[1].num_batches_tracked == 0


def test_predict_pins_nothing(build):
    kd = build()
    features = []
    kd.student.bottleneck.register_forward_hook(lambda m, i, o: features.append(weakref.ref(o)))
    kd.predict(IMAGE)
    gc.collect()
    assert features[0]() is None


def test_a_teacher_that_edits_its_input_does_not_reach_the_student(build, tiny_unet):
    class Rude(tiny_unet):
        def forward(self, x):
            return super().forward(x.mul_(100))

    kd = build(teacher=Rude(4))
    expected = kd.predict(IMAGE)
    assert torch.allclose(kd(IMAGE.clone(), LABELS).student, expected)


def test_a_teacher_that_nothing_reads_does_not_run(build, networks):
    kd = build(objective=GroundTruth())
    networks[0].forward = None
    assert kd(IMAGE, LABELS).teacher is None


def test_the_teachers_output_may_be_anything_where_only_features_are_read(build, tiny_unet):
    class Odd(tiny_unet):
        def forward(self, x):
            super().forward(x)
            return {"mask": None}

    taps = {"bottleneck": Tap("bottleneck", "bottleneck")}
    kd = build(teacher=Odd(4), objective=LatentKL(), taps=taps)
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


def test_values_are_not_checked_after_the_first_step(build):
    kd = build(objective=GroundTruth(activation="sigmoid"))
    kd(IMAGE, torch.zeros(2, 3, 8, 8))
    assert torch.isfinite(kd(IMAGE, torch.full((2, 3, 8, 8), 2.0)).loss)


def test_terms_are_told_the_step(build):
    class Index(GroundTruth):
        def forward(self, step):
            return super().forward(step) * 0 + step.index

    kd = build(objective=Index())
    assert [kd(IMAGE, LABELS).loss.item() for _ in range(3)] == [0, 1, 2]


def test_metadata_tensors_are_taken_as_plain_ones(build):
    meta = pytest.importorskip("monai.data").MetaTensor
    out = build(example=meta(EXAMPLE))(meta(IMAGE), meta(LABELS))
    assert type(out.loss) is torch.Tensor


def test_a_swapped_pair_is_told_what_ran_and_what_arrived(networks):
    teacher, student = networks
    with pytest.raises(ShapeMismatchError, match=r"The student failed.*\(1, 1, 8, 8\)"):
        DistillationWrapper(student, teacher, objective=kdnet(), inputs=INPUTS, example=EXAMPLE)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((0, 4, 8, 8), torch.float32, "the batch is empty"),
        ((1, 4), torch.float32, "modalities"),
        ((1, 4, 8, 0), torch.float32, "no empty one"),
        ((1, 4, 8, 8), torch.int64, r"is torch.int64; .*image.float\(\)"),
        ((1, 3, 8, 8), torch.float32, r"\(1, 3, 8, 8\)"),
        ((1, 4, 8, 8, 8), torch.float32, "the number of axes and channels"),
    ],
)
def test_inputs_that_no_network_could_take_are_refused(build, shape, dtype, message):
    with pytest.raises(PrivDistillError, match=message):
        build()(torch.zeros(shape, dtype=dtype), LABELS[:1])


def test_other_batches_and_sizes_than_the_examples_pass(build):
    kd = build()
    assert torch.isfinite(kd(torch.rand(3, 4, 16, 12), torch.zeros(3, 16, 12).long()).loss)


def test_lazy_networks_are_refused(build):
    with pytest.raises(LifecycleError, match="lazy layers"):
        build(student=nn.LazyConv2d(3, 1))


def test_inputs_and_taps_of_the_wrong_kind_are_refused(build):
    with pytest.raises(ModalityError, match="`inputs` is"):
        build(inputs=("t1",))
    with pytest.raises(LayerNotFoundError, match="expected Tap"):
        build(taps={"bottleneck": ("a", "b")})
    with pytest.raises(LayerNotFoundError, match="expected a dotted name or a module"):
        build(taps={"bottleneck": Tap(3, "down")})
    with pytest.raises(ModalityError, match="expected a tensor"):
        build()([1, 2], LABELS)


def test_promise_1_absent_modalities_reach_neither_network(build):
    kd = build()
    present = torch.tensor([[True, True, True, False]] * 2)
    holed = IMAGE.clone()
    holed[:, 3] = float("nan")
    filled = IMAGE.clone()
    filled[:, 3] = 0
    assert torch.equal(kd(holed, LABELS, present=present).loss, kd(filled, LABELS).loss)
    assert torch.equal(kd.predict(holed, present=present), kd.predict(IMAGE))


def test_a_presence_mask_needs_names(build, tiny_unet):
    kd = build(student=tiny_unet(4), inputs=None)
    with pytest.raises(ModalityError, match="the wrapper knows none"):
        kd(IMAGE, LABELS, present=torch.ones(2, 4, dtype=torch.bool))


def test_modality_dropout_acts_in_training_alone(build, tiny_unet):
    names = ("flair", "t1", "t1ce", "t2")
    inputs = PrivilegedInput(names, student=names, dropout=0.5)
    kd = build(student=tiny_unet(4), inputs=inputs)
    assert len({kd(IMAGE, LABELS).loss.item() for _ in range(8)}) > 1
    kd.eval()
    assert len({kd(IMAGE, LABELS).loss.item() for _ in range(8)}) == 1


def test_promise_5_a_network_that_edits_its_input_spoils_it_for_nobody(build, tiny_unet):
    class Editing(tiny_unet):
        def forward(self, x):
            return super().forward(x.relu_())

    student = tiny_unet(4)
    image = IMAGE.clone()
    for example in (EXAMPLE, None):
        taps = {"bottleneck": Tap("bottleneck", "bottleneck", adapter=None)}
        teachers = [Editing(4), Editing(4)]
        kd = build(teacher=teachers, student=student, inputs=None, taps=taps, example=example)
        assert torch.equal(kd(image, LABELS).student, student(IMAGE))
        assert torch.equal(image, IMAGE)


@pytest.mark.parametrize("closed", [False, True])
def test_promise_5_predict_leaves_the_callers_tensor_alone(build, tiny_unet, closed):
    class Editing(tiny_unet):
        def forward(self, x):
            return super().forward(x.relu_())

    kd = build(student=Editing(4), inputs=None)
    if closed:
        kd.close()
    image = IMAGE.clone()
    kd.predict(image)
    assert torch.equal(image, IMAGE)


def test_networks_that_share_a_dropout_are_refused(build, networks):
    shared = nn.Dropout()
    teacher, student = (nn.Sequential(net, shared) for net in networks)
    with pytest.raises(LifecycleError, match=r"share parameters or layers \(Dropout\)"):
        build(teacher=teacher, student=student)


def test_promise_17_teachers_that_share_a_layer_are_given_back(build, tiny_unet):
    one, other = tiny_unet(4), tiny_unet(4)
    other.encoder = one.encoder
    build(teacher=[one, other]).close()
    assert one.encoder.training
    assert one.encoder[0].weight.requires_grad


def test_steps_without_gradients_are_not_counted(build):
    kd = build()
    with torch.no_grad():
        kd(IMAGE, LABELS)
    assert kd.steps == 0


def test_promise_14_a_copy_of_a_closed_wrapper_holds_nothing(build, networks):
    kd = build()
    kd.close()
    twin = copy.deepcopy(kd).double()
    assert networks[0].training
    assert hooks(*networks) == 0
    assert networks[0].head.weight.dtype == torch.float32
    with pytest.raises(LifecycleError, match="the wrapper has been closed"):
        twin(IMAGE, LABELS)


# --- samples without a reference ---------------------------------------------------------------


def test_a_batch_without_references_still_teaches(build):
    kd = build()
    out = kd(IMAGE, labelled=torch.zeros(2, dtype=torch.bool))
    out.loss.backward()
    assert sorted(out.terms) == ["latent_kl", "soft_target_dice_bce"]
    assert kd.student.head.weight.grad.any()


def test_unlabelled_samples_learn_from_the_teacher_alone(build):
    kd = build()
    target = LABELS.clone()
    target[1] = 77
    out = kd(IMAGE, target, labelled=torch.tensor([True, False]))
    both, first = kd(IMAGE, LABELS), kd(IMAGE[:1], LABELS[:1])
    assert out.terms["ground_truth"].item() == pytest.approx(first.terms["ground_truth"].item())
    for taught in ("latent_kl", "soft_target_dice_bce"):
        assert out.terms[taught].item() == pytest.approx(both.terms[taught].item())


def test_weights_of_samples_reach_the_reference_terms(build):
    kd = build()
    out = kd(IMAGE, LABELS, sample_weights=torch.tensor([0.0, 2.0]))
    second = kd(IMAGE[1:], LABELS[1:])
    assert out.terms["ground_truth"].item() == pytest.approx(second.terms["ground_truth"].item())


def test_the_step_counter_moves_schedules(build):
    kd = build(objective=GroundTruth() + Ramp(0, 1, steps=2) * LatentKL())
    for share in (0, 0.5, 1, 1):
        out = kd(IMAGE, LABELS)
        wanted = out.terms["ground_truth"] + share * out.terms["latent_kl"]
        assert out.loss.item() == pytest.approx(wanted.item())


def test_masks_and_weights_of_samples_may_be_lists(build, tiny_unet):
    kd = build(teacher=[tiny_unet(4), tiny_unet(4)]).eval()
    masks = {
        "present": [[True, False, True, True], [True] * 4],
        "labelled": [True, False],
        "sample_weights": [2.0, 1.0],
        "teacher_weights": [[1.0, 0.0], [0.5, 0.5]],
    }
    tensors = {name: torch.tensor(value) for name, value in masks.items()}
    assert torch.equal(kd(IMAGE, LABELS, **masks).loss, kd(IMAGE, LABELS, **tensors).loss)
    present = masks["present"]
    assert torch.equal(
        kd.predict(IMAGE, present=present), kd.predict(IMAGE, present=tensors["present"])
    )
    kd(IMAGE, labelled=[False, False])
