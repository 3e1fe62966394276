from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from training import cutting, grouping, inhibition, models
from training.recipe import ResNet

if TYPE_CHECKING:
    from training.recipe import Variant


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(ResNet(depth=8, width=4), classes=3)


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and logits that classify all but the last correctly."""
    labels = torch.arange(count) % 3
    logits = nn.functional.one_hot(labels, 3).float()
    logits[-1] = logits[-1].roll(1)
    return torch.rand(count, 3, 12, 12, generator=seeded(0)), labels, logits


def inputs(seed: int, *, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    features, gradients = torch.randn(2, 3, channels, 4, 4, generator=seeded(seed), dtype=torch.float64)
    return features, gradients, torch.randint(2, (3, channels), generator=seeded(seed))


def test_reversed_map_is_the_published_one(golden: dict[str, Tensor]) -> None:
    groups = golden["initial_indices"].shape[1]
    ours = inhibition.reversed_map(
        golden["features"], golden["grads"], golden["group_ids"], groups=groups, variant="published"
    )
    assert torch.allclose(ours, golden["reversed_map"], rtol=0, atol=1e-6)


def test_orthogonality_is_the_published_one(golden: dict[str, Tensor]) -> None:
    groups = golden["initial_indices"].shape[1]
    ours = inhibition.orthogonality(golden["features"], golden["group_ids"], groups=groups)
    assert torch.isclose(ours.double(), golden["orthogonal_loss"], rtol=1e-6)


def test_reversed_map_of_the_paper_by_hand() -> None:
    features = torch.arange(12.0).reshape(1, 3, 2, 2)
    weights = torch.tensor([0.3, 0.1, -0.2])
    gradients = weights[None, :, None, None].expand(1, 3, 2, 2)
    ids = torch.tensor([[0, 0, 1]])
    ours = inhibition.reversed_map(features, gradients, ids, groups=2, variant="paper")
    expected = 1 / (1 + torch.exp((0.3 * features[0, 0] + 0.1 * features[0, 1]) / 2))
    assert torch.allclose(ours[0, 0], expected)
    assert torch.equal(ours[0, 0], ours[0, 1])
    assert (ours[0, 2] == 0).all()
    published = inhibition.reversed_map(features, gradients, ids, groups=2, variant="published")
    assert (published[0, 2] == 1).all()


@pytest.mark.parametrize("variant", ["published", "paper"])
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_reversed_map_is_in_the_unit_range_and_of_its_group(variant: Variant, seed: int, scale: float) -> None:
    features, gradients, ids = inputs(seed)
    ours = inhibition.reversed_map(scale * features, gradients, ids, groups=2, variant=variant)
    assert ours.shape == features.shape
    assert bool(((ours >= 0) & (ours <= 1)).all())
    for sample, group in zip(ours, ids, strict=True):
        assert all(len(sample[group == index].unique(dim=0)) <= 1 for index in (0, 1))


@pytest.mark.parametrize("variant", ["published", "paper"])
@given(seed=st.integers(0, 99))
def test_permuted_channels_permute_the_map(variant: Variant, seed: int) -> None:
    features, gradients, ids = inputs(seed)
    order = torch.randperm(features.shape[1], generator=seeded(seed))
    ours = inhibition.reversed_map(features, gradients, ids, groups=2, variant=variant)
    permuted = inhibition.reversed_map(
        features[:, order], gradients[:, order], ids[:, order], groups=2, variant=variant
    )
    assert torch.allclose(permuted, ours[:, order], atol=1e-9)


@given(value=st.floats(0.1, 10))
def test_constant_maps_are_inhibited_by_half(value: float) -> None:
    features, ids = torch.full((1, 4, 3, 3), value), torch.zeros(1, 4, dtype=torch.int64)
    ours = inhibition.reversed_map(features, torch.ones(1, 4, 3, 3), ids, groups=1, variant="published")
    assert torch.allclose(ours, torch.full_like(ours, 0.5))


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_no_gradient_flows_through_the_map(variant: Variant) -> None:
    features, gradients, ids = inputs(0)
    features, gradients = features.requires_grad_(), gradients.requires_grad_()
    assert not inhibition.reversed_map(features, gradients, ids, groups=2, variant=variant).requires_grad


@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_map_in_half_precision_is_that_in_single(variant: Variant, scale: float, dtype: torch.dtype) -> None:
    features, gradients, ids = inputs(0)
    half, small = (scale * features).to(dtype), (1e-6 * gradients).to(dtype)
    ours = inhibition.reversed_map(half, small, ids, groups=2, variant=variant)
    single = inhibition.reversed_map(half.float(), small.float(), ids, groups=2, variant=variant)
    assert ours.dtype == dtype
    assert bool(ours.isfinite().all())
    assert torch.equal(ours, single.to(dtype))


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_autocast_leaves_maps_and_orthogonality_in_single_precision(variant: Variant) -> None:
    features, gradients, ids = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(0))
    expected = inhibition.reversed_map(features, gradients, ids, groups=2, variant=variant)
    orthogonal = inhibition.orthogonality(features, ids, groups=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inhibition.reversed_map(features, gradients, ids, groups=2, variant=variant), expected)
        assert torch.equal(inhibition.orthogonality(features, ids, groups=2), orthogonal)


def test_orthogonality_in_half_precision_does_not_overflow() -> None:
    features, ids = 100 * torch.rand(2, 4, 16, 16, generator=seeded(0)).half(), torch.tensor([[0, 0, 1, 1]] * 2)
    half, single = (inhibition.orthogonality(maps, ids, groups=2) for maps in (features, features.float()))
    assert half.dtype == torch.float32
    assert bool(half.isfinite())
    assert torch.equal(half, single)


def test_orthogonality_of_orthogonal_groups_is_nothing() -> None:
    features = torch.eye(4).reshape(1, 4, 2, 2)
    assert inhibition.orthogonality(features, torch.tensor([[0, 0, 1, 1]]), groups=2) == 0
    assert inhibition.orthogonality(features, torch.tensor([[0, 0, 0, 0]]), groups=2) == 0


def test_orthogonality_leaves_pairs_with_an_empty_group_out() -> None:
    features = torch.rand(2, 4, 3, 3, generator=seeded(0))
    ids = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
    two, six = (inhibition.orthogonality(features, ids, groups=groups) for groups in (2, 6))
    assert torch.isclose(two, six)


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_orthogonality(seed: int) -> None:
    features, _, ids = inputs(seed)

    def loss(features: Tensor) -> Tensor:
        return inhibition.orthogonality(features, ids, groups=2)

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(),))


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_gradients_of_the_masked_loss(variant: Variant) -> None:
    features, gradients, ids = inputs(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 3)).double()
    mask = inhibition.reversed_map(features, gradients, ids, groups=2, variant=variant)

    def loss(features: Tensor, *_: Tensor) -> Tensor:
        return inhibition.masked_loss(
            features,
            torch.tensor([0, 1, 2]),
            mask=mask,
            group_ids=ids,
            groups=2,
            head=head,
            lambda_tenet=0.7,
            lambda_orth=0.3,
        )

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), *head.parameters()))


def test_analysis_gradients_are_those_of_the_label() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 3)).double()
    features, _, _ = inputs(0)
    labels = torch.tensor([2, 0, 1])
    weights = head.get_parameter("1.weight").detach()[labels].reshape(3, 5, 4, 4)
    scores = head(features).gather(1, labels[:, None]).sigmoid()[:, :, None, None]
    paper = inhibition.analysis_gradients(features, labels, head=head, variant="paper")
    published = inhibition.analysis_gradients(features, labels, head=head, variant="published")
    assert torch.allclose(paper, weights)
    assert torch.allclose(published, weights * scores * (1 - scores))
    assert all(parameter.grad is None for parameter in head.parameters())


def test_confident_scores_have_their_gradients_under_autocast() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4, bias=False))
    nn.init.eye_(head[2].weight)  # type: ignore[arg-type]
    labels, logits = torch.arange(4), torch.tensor([7.0, 9.0, 11.0, 12.0])
    features = (functional.one_hot(labels, 4) * logits[:, None])[:, :, None, None].expand(-1, -1, 3, 3)
    single = inhibition.analysis_gradients(features, labels, head=head, variant="published")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = inhibition.analysis_gradients(features, labels, head=head, variant="published")
    assert bool((half.abs().sum((1, 2, 3)) > 0).all())
    assert torch.allclose(half, single, rtol=0.05)


def modes_of_calls(module: nn.Module) -> list[bool]:
    calls: list[bool] = []
    module.register_forward_hook(lambda module, *_: calls.append(module.training))
    return calls


@pytest.mark.parametrize(("exact", "modes"), [(False, [True]), (True, [False, True])])
def test_a_step_runs_the_body_once_or_as_published_twice(exact: bool, modes: list[bool]) -> None:  # noqa: FBT001
    model = build().train()
    tenet = inhibition.TenetStep(model, stage="layer2", groups=3, exact=exact, generator=seeded(0))
    body, head = (
        modes_of_calls(model.get_submodule("network.layer1.0.conv1")),
        modes_of_calls(model.get_submodule("network.fc")),
    )
    images, labels, logits = batch()
    assert tenet(images, labels, logits=logits) is not None
    assert body == modes
    assert head == [False, True]


@pytest.mark.parametrize("exact", [False, True])
def test_an_exact_step_groups_and_masks_by_what_an_evaluated_body_sees(
    exact: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    group, reverse = grouping.group_channels, inhibition.reversed_map

    def recorded_group(features: Tensor, groups: int, **others: Any) -> tuple[Tensor, Tensor]:
        seen.append(features)
        return group(features, groups, **others)

    def recorded_reverse(features: Tensor, *others: Any, **settings: Any) -> Tensor:
        seen.append(features)
        return reverse(features, *others, **settings)

    model = build().train()
    tenet = inhibition.TenetStep(model, stage="layer2", groups=3, exact=exact, generator=seeded(0))
    images, labels, logits = batch()
    with inhibition.evaluating(model):
        evaluated = tenet.body(images[:5])
    monkeypatch.setattr(grouping, "group_channels", recorded_group)
    monkeypatch.setattr(inhibition, "reversed_map", recorded_reverse)
    tenet(images, labels, logits=logits)
    assert [torch.equal(features, evaluated) for features in seen] == [exact, exact]


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_leaves_batch_statistics_alone_or_counts_them_as_published(exact: bool) -> None:  # noqa: FBT001
    model = build().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    tenet = inhibition.TenetStep(model, stage="layer2", groups=3, exact=exact, generator=seeded(0))
    images, labels, logits = batch()
    tenet(images, labels, logits=logits)
    counts = {name: int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {int(exact)}
    assert all(torch.equal(model.get_buffer(name), buffer) != exact for name, buffer in before.items())
    assert all(module.training for module in model.modules())


def test_a_step_normalises_by_the_statistics_of_its_batch() -> None:
    model, (images, labels, _) = build().train(), batch()
    maps: list[Tensor] = []
    model.get_submodule("network.layer2").register_forward_hook(lambda *call: maps.append(call[-1].detach()))
    inhibition.TenetStep(model, stage="layer2", groups=3).loss(images, labels)
    model(images)
    model.eval()(images)
    in_step, in_training, in_evaluation = maps
    assert torch.equal(in_step, in_training)
    assert not torch.allclose(in_step, in_evaluation, atol=1e-2)


def test_the_analysis_pass_leaves_the_head_as_it_was() -> None:
    model = build().train()
    body, head = cutting.cut(model, stage="layer2")
    images, labels, _ = batch()
    features = body(images)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    with inhibition.evaluating(head):
        inhibition.analysis_gradients(features, labels, head=head, variant="published")
    assert all(torch.equal(buffer, before[name]) for name, buffer in head.named_buffers())
    assert all(module.training for module in head.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_is_over_the_correctly_classified_images_alone() -> None:
    images, labels, logits = batch()
    losses = []
    for count in (6, 5):  # the sixth is misclassified
        tenet = inhibition.TenetStep(build().train(), stage="layer2", groups=3, generator=seeded(0))
        losses.append(tenet(images[:count], labels[:count], logits=logits[:count]))
    assert losses[0] is not None
    assert losses[0] == losses[1]


def test_nothing_to_step_on_is_none() -> None:
    images, labels, logits = batch()
    tenet = inhibition.TenetStep(build(), stage="layer2", groups=3)
    assert tenet(images, labels, logits=-logits) is None
    assert tenet(images[-2:], labels[-2:], logits=logits[-2:]) is None


def test_the_weights_of_the_loss_are_its_parts() -> None:
    images, labels, logits = batch()

    def loss(*, lambda_tenet: float, lambda_orth: float) -> Tensor:
        tenet = inhibition.TenetStep(
            build().train(),
            stage="layer2",
            groups=3,
            lambda_tenet=lambda_tenet,
            lambda_orth=lambda_orth,
            generator=seeded(0),
        )
        result = tenet(images, labels, logits=logits)
        assert result is not None
        return result

    tenet, orth = loss(lambda_tenet=1.0, lambda_orth=0.0), loss(lambda_tenet=0.0, lambda_orth=1.0)
    assert tenet > 0
    assert orth > 0
    assert torch.isclose(loss(lambda_tenet=0.1, lambda_orth=1e-3), 0.1 * tenet + 1e-3 * orth)


def test_a_loss_from_features_is_that_of_a_step_and_reaches_the_body() -> None:
    images, labels, _ = batch()
    initial = torch.tensor([[0, 1, 2]]).expand(6, -1)
    whole, fused = (inhibition.TenetStep(build().train(), stage="layer2", groups=3) for _ in range(2))
    features = fused.body(images)
    losses = whole.loss(images, labels, initial=initial), fused.fused_loss(features, labels, initial=initial)
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    pairs = list(zip(whole.body.parameters(), fused.body.parameters(), strict=True))
    assert pairs
    assert all(a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_step_teaches_body_and_head() -> None:
    model = build().train()
    images, labels, logits = batch()
    loss = inhibition.TenetStep(model, stage="layer2", groups=3, generator=seeded(0))(images, labels, logits=logits)
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_a_model_with_a_body_and_a_head_of_its_own_is_not_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) if x.sum() > 0 else -self.body(x))  # type: ignore[no-any-return]

    images, labels, logits = batch()
    tenet = inhibition.TenetStep(Branching(), stage=None, groups=2)
    assert tenet(images, labels, logits=logits) is not None
    with pytest.raises(ValueError, match="expected submodules named body and head, got ResNet"):
        inhibition.TenetStep(build(), stage=None)


def test_an_unknown_variant_lists_the_variants() -> None:
    jaxtyping.config.update("jaxtyping_disable", value=True)  # it is the library's own check that is tested
    try:
        with pytest.raises(ValueError, match="variant: expected one of published, paper, got 'other'"):
            inhibition.TenetStep(build(), stage="layer2", variant="other")  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", value=False)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="stage: expected a submodule"):
        inhibition.TenetStep(build(), stage="layer9")
    images, labels, logits = batch()
    for stage, groups, message in (
        ("layer2", 9, "groups: expected 1 to 8"),
        ("fc", 2, r"stage: expected maps \(batch, channels, height, width\), got \(\d, 3\)"),
        ("pool", 2, r"stage: expected maps .* of more than one pixel, .* got \(\d, 16, 1, 1\)"),
    ):
        tenet = inhibition.TenetStep(build(), stage=stage, groups=groups)
        with pytest.raises(ValueError, match=message):
            tenet(images, labels, logits=logits)
        with pytest.raises(ValueError, match=message):
            tenet.channels(images)


def test_channels_are_counted_and_the_model_stays_as_it_is() -> None:
    model = build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert inhibition.TenetStep(model, stage="layer2").channels(batch()[0]) == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
