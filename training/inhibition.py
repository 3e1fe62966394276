"""Group-wise inhibition: the TENET step as pure functions, and `TenetStep` for a training loop of one's own.

images -> body -> features A -> group_channels -> group ids ------.
                      |                                           v
                      +-> head (evaluating) -> dL_d/dA -> reversed_map RM -> head(RM * A) -> loss
                      |                                           ^
                      '-------------------------------------------'

Equations are those of Liu et al., "Group-wise Inhibition based Feature Regularization for Robust
Classification", ICCV 2021. Its text and its published code differ: `variant` says which one is followed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from training import cutting, grouping
from training.recipe import Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EPSILON = 1e-8  # added to the standard deviation of a weighted map, as published
FEWEST = 2  # correctly classified images below which a step is left out: one image has no batch statistics


def reversed_map(
    features: Float[Tensor, "batch channels height width"],
    gradients: Float[Tensor, "batch channels height width"],
    group_ids: Int64[Tensor, "batch channels"],
    *,
    groups: int,
    variant: Variant,
) -> Float[Tensor, "batch channels height width"]:
    """Return the map that inhibits each group where it matters most (section 3.3, eqs. 3 to 6).

    The spatial mean of a channel's gradient weighs it (eq. 3). Weights make up the importance of a group
    (eq. 4), weighted features its map m (eq. 5): sums in "published", where m is also standardised over
    space; means in "paper". The reversed map is 1 / (1 + exp(m)) (eq. 6), or for a group of no positive
    importance 1 in "published" and 0 in "paper".

    Args:
        features: maps A of any range.
        gradients: dL_d/dA.
        group_ids: groups of the channels, in 0..groups-1; not checked, as that would wait for the device.
        groups: number of groups G.
        variant: "published" or "paper".

    Returns:
        One value in [0, 1] per feature, the same for all channels of a group, in the features' precision but
        computed in at least single; no gradient flows through it.

    Raises:
        ValueError: shapes that do not fit together, or an unknown variant.
    """
    _check(features, group_ids, groups=groups, variant=variant)
    if gradients.shape != features.shape:
        msg = f"gradients: expected the features' shape {tuple(features.shape)}, got {tuple(gradients.shape)}"
        raise ValueError(msg)
    dtype, features = features.dtype, _at_least_single(features.detach())
    weights = _at_least_single(gradients.detach()).mean((2, 3))
    members = _members(group_ids, groups=groups, like=features)
    weighted = members * weights[:, :, None]
    importance = weighted.sum(1)
    with torch.autocast(features.device.type, enabled=False):  # sums over many channels need their precision
        maps = torch.einsum("bcg,bchw->bghw", weighted, features)
    if variant == "paper":
        sizes = members.sum(1).clamp(min=1)
        importance, maps = importance / sizes, maps / sizes[:, :, None, None]
        unimportant = 0.0
    else:
        maps = maps - maps.mean((2, 3), keepdim=True)
        maps = maps - maps.mean((2, 3), keepdim=True)  # a flat map is flat, not the rounding of the first mean
        maps = maps / (maps.square().mean((2, 3), keepdim=True).sqrt() + EPSILON)
        unimportant = 1.0
    per_group = torch.sigmoid(-maps).masked_fill((importance <= 0)[:, :, None, None], unimportant)
    return per_group.gather(1, group_ids[:, :, None, None].expand_as(features)).to(dtype)


def orthogonality(
    features: Float[Tensor, "batch channels height width"],
    group_ids: Int64[Tensor, "batch channels"],
    *,
    groups: int,
) -> Float[Tensor, ""]:
    """Return how far the groups' mean maps are from orthogonal (section 3.2), 0 or more, differentiable.

    The mean over samples and pairs of groups of |<mean map_i, mean map_j>|, the inner product a sum over
    space, in at least single precision. Pairs with an empty group are not counted. As in `reversed_map`, ids
    outside 0..groups-1 are not looked for.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(features, group_ids, groups=groups)
    features = _at_least_single(features)
    members = _members(group_ids, groups=groups, like=features)
    sizes = members.sum(1)
    with torch.autocast(features.device.type, enabled=False):
        means = torch.einsum("bcg,bcn->bgn", members, features.flatten(2)) / sizes.clamp(min=1)[:, :, None]
        products = torch.einsum("bgn,bkn->bgk", means, means).abs().triu(1)
    filled = (sizes > 0).sum(1)
    pairs = (filled * (filled - 1) / 2).clamp(min=1)
    return (products.sum((1, 2)) / pairs).mean()


def analysis_gradients(
    features: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, " batch"],
    *,
    head: Callable[[Tensor], Tensor],
    variant: Variant,
) -> Float[Tensor, "batch channels height width"]:
    """Return dL_d/dA through the head alone, of samples that are classified correctly.

    L_d sums over samples the label's sigmoid ("published") or its logit ("paper": the predicted class's,
    which for these samples is the label). Scores are taken in at least single precision.
    """
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        scores = _at_least_single(head(leaf).gather(1, labels[:, None]))  # near 1, a sigmoid in half has no slope
        total = scores.sum() if variant == "paper" else scores.sigmoid().sum()
    return torch.autograd.grad(total, leaf)[0]


def masked_loss(
    features: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, " batch"],
    *,
    mask: Float[Tensor, "batch channels height width"],
    group_ids: Int64[Tensor, "batch channels"],
    groups: int,
    head: Callable[[Tensor], Tensor],
    lambda_tenet: float,
    lambda_orth: float,
) -> Float[Tensor, ""]:
    """Return lambda_tenet * cross-entropy of head(mask * features) + lambda_orth * orthogonality.

    `mask` is the reversed map; features and head are differentiated, the mask and the groups are not.
    """
    cross_entropy = functional.cross_entropy(head(mask * features), labels)
    return lambda_tenet * cross_entropy + lambda_orth * orthogonality(features, group_ids, groups=groups)


class TenetStep:
    """The loss of one TENET step, for a loop of one's own.

    Example:
        tenet = TenetStep(model, stage="layer3")
        ...                                        # the ordinary step, which leaves `logits`
        loss = tenet(images, labels, logits=logits)
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Running statistics of batch normalisation are left alone: the ordinary pass has counted these images, and masked
    maps are not what a deployed head sees. Both passes normalise by their batch's own statistics, and the analysis in
    between evaluates the head. With `exact` the body is evaluated a first time, for the analysis, and the passes
    count, masked maps too, as in the published code.

    Args:
        model: a classifier; it keeps the modes that it is in.
        stage: path of the submodule whose output is inhibited, in a model that torch.fx can trace; None where
            the model has a `body` and a `head` of its own.
        groups: number of groups of channels.
        variant: "published" or "paper".
        lambda_tenet: weight of the cross-entropy of the masked pass.
        lambda_orth: weight of the orthogonality of the groups.
        exact: take features and gradient from a second, evaluating pass of the body, in the published order, and
            count batch statistics as published.
        generator: what the first centres are drawn from; a CPU generator serves any device.

    Raises:
        ValueError: the model cannot be cut there, or an unknown variant.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: str | None,
        groups: int = 6,
        variant: Variant = "published",
        lambda_tenet: float = 0.1,
        lambda_orth: float = 1e-3,
        exact: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_variant(variant)
        self.body, self.head = cutting.own_parts(model) if stage is None else cutting.cut(model, stage=stage)
        self.groups, self.variant, self.exact = groups, variant, exact
        self.lambda_tenet, self.lambda_orth = lambda_tenet, lambda_orth
        self.generator = generator

    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        labels: Int64[Tensor, " batch"],
        *,
        logits: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""] | None:
        """Return the loss over the images that `logits`, of the ordinary pass, classify correctly.

        None where fewer than two are: then there is nothing to step on.

        Raises:
            ValueError: the stage does not put out maps, or fewer of them than there are groups.
        """
        chosen = self.correct(logits, labels)
        if len(chosen) < FEWEST:
            return None
        return self.loss(images[chosen], labels[chosen])

    def correct(
        self, logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
    ) -> Int64[Tensor, " chosen"]:
        """Return which images are classified correctly; waits for the device."""
        return (logits.argmax(1) == labels).nonzero().squeeze(1)

    def loss(
        self,
        images: Float[Tensor, "batch 3 height width"],
        labels: Int64[Tensor, " batch"],
        *,
        initial: Int64[Tensor, "batch groups"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss over all of these images, which the model classifies correctly.

        `initial` are the channels that the centres start from, drawn from the generator where they are left out.

        Raises:
            ValueError: the stage does not put out maps, or fewer of them than there are groups.
        """
        if not self.exact:
            with uncounted(self.body):
                features = self.body(images)
            return self._inhibited(features, labels, analysed=features, initial=initial)
        with evaluating(self.body), torch.no_grad():
            analysed = self.body(images)
        return self._inhibited(self.body(images), labels, analysed=analysed, initial=initial)

    def fused_loss(
        self,
        features: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        *,
        initial: Int64[Tensor, "batch groups"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss from features that the body put out in the ordinary pass, of the images of `correct`.

        Added to the ordinary loss, one backward pass serves both, and the body runs once in all. Both losses are
        then of the weights before the step, where a step of its own takes those after the ordinary one.

        Raises:
            ValueError: the features are no maps, or fewer than there are groups.
        """
        return self._inhibited(features, labels, analysed=features, initial=initial)

    def channels(self, images: Float[Tensor, "batch 3 height width"]) -> int:
        """Return how many maps the stage puts out, so that one that cannot be inhibited is noticed before training.

        Raises:
            ValueError: the stage does not put out maps, or fewer of them than there are groups.
        """
        with evaluating(self.body), torch.no_grad():
            features = self.body(images)
        self._check_features(features)
        return int(features.shape[1])

    def _inhibited(self, features: Tensor, labels: Tensor, *, analysed: Tensor, initial: Tensor | None) -> Tensor:
        """Return the loss of `features` under the map that is made from `analysed`, which stays a constant."""
        self._check_features(features)
        analysed = analysed.detach()
        with evaluating(self.head):
            gradients = analysis_gradients(analysed, labels, head=self.head, variant=self.variant)
        ids, _ = grouping.group_channels(analysed, self.groups, initial=initial, generator=self.generator)
        with contextlib.nullcontext() if self.exact else uncounted(self.head):
            return masked_loss(
                features,
                labels,
                mask=reversed_map(analysed, gradients, ids, groups=self.groups, variant=self.variant),
                group_ids=ids,
                groups=self.groups,
                head=self.head,
                lambda_tenet=self.lambda_tenet,
                lambda_orth=self.lambda_orth,
            )

    def _check_features(self, features: object) -> None:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 4:
            msg = f"stage: expected maps (batch, channels, height, width), got {shape}; name an earlier stage"
            raise ValueError(msg)
        if features.shape[2:].numel() == 1:
            msg = "stage: expected maps (batch, channels, height, width) of more than one pixel, as inhibition is a "
            msg += f"matter of place, got {shape}; name an earlier stage, or take larger images"
            raise ValueError(msg)
        grouping.check_groups(self.groups, channels=features.shape[1])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Let batch normalisation in training mode use its batch's statistics and leave the running ones alone."""
    tracking = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    try:
        for part in tracking:
            part.track_running_stats = False
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


def _at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own precision if that is higher: small gradients vanish in half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _members(group_ids: Tensor, *, groups: int, like: Tensor) -> Float[Tensor, "batch channels groups"]:
    return functional.one_hot(group_ids, groups).to(like.dtype)


def _check(features: Tensor, group_ids: Tensor, *, groups: int, variant: str = "published") -> None:
    _check_variant(variant)
    if group_ids.shape != features.shape[:2]:
        msg = f"group_ids: expected shape {tuple(features.shape[:2])}, got {tuple(group_ids.shape)}"
        raise ValueError(msg)
    if groups < 1:
        msg = f"groups: expected at least 1, got {groups}"
        raise ValueError(msg)


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        msg = f"variant: expected one of {', '.join(get_args(Variant))}, got {variant!r}"
        raise ValueError(msg)
