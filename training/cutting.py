"""A classifier is cut into body and head at a named stage, or shows the stages at which it can be.

images -> normalise -> stem -> layer1 -> layer2 -> layer3 -> pooled -> logits
          |____________ body ___________|____________ head ___________|   cut at "layer2"
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from training import models

if TYPE_CHECKING:
    from collections.abc import Iterator

LISTED = 40  # stages that an error names; a VGG has more, and a reader needs no more
DEPTH = 2  # most names in the path of a stage that is listed: a model's parts, and theirs


def cut(model: nn.Module, *, stage: str) -> tuple[nn.Module, nn.Module]:
    """Cut a classifier into its body, up to and including `stage`, and its head, the rest.

    Both share the model's parameters and buffers, and head(body(x)) is what model(x) is. `stage` is the path
    of a submodule, "layer3" or "features.7"; of what `build` returns, one inside its network, with "network."
    before it or without. torch.fx must be able to trace the model's own forward, and those of the modules that
    contain the stage: what these decide by themselves, other than by their mode, is decided now. All other
    modules stay whole. A model that cannot be traced may have a `body` and a `head` of its own: stage "body" then
    stands for these two.

    All follows train() and eval() of the model. Those of a part reach the modules that it keeps whole; what the
    traced forwards do by themselves, as a functional dropout, trains while both the part and the model do. Cut
    a model that is on its device: parameters that the traced forwards use by themselves may not move with it.

    Raises:
        ValueError: there is no such stage, or the model cannot be traced or cut there; one line that lists
            stages that can be named.
    """
    _refuse_wrapped(model)
    network = _network_of(model)
    path = _path(model, stage)
    names = path.split(".")
    owners = [network.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    try:
        cuts = []
        for training in (True, False):
            with _mode(owners, training=training):
                cuts.append(_cut(model, path))
    except _UntraceableError as error:
        if path == "body" and isinstance(getattr(network, "head", None), nn.Module):
            return own_parts(model)
        msg = f"model: expected one that torch.fx can trace, or that has a body and a head of its own, got {error}"
        raise ValueError(f"{msg}; {_listing(model)}") from error
    (body, head), (evaluating_body, evaluating_head) = cuts
    return _by_mode(body, evaluating_body, owners=owners), _by_mode(head, evaluating_head, owners=owners)


def own_parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the `body` and `head` that a model brings itself, as one that torch.fx cannot trace may.

    Of what `build` returns, those of its network; normalisation is part of the body.

    Raises:
        ValueError: it does not have both.
    """
    _refuse_wrapped(model)
    network = _network_of(model)
    body, head = (getattr(network, name, None) for name in ("body", "head"))
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
        msg = f"model: expected submodules named body and head, got {type(network).__name__}; name a stage instead"
        raise ValueError(f"{msg}; {_listing(model)}")
    return (nn.Sequential(model.normalise, body) if isinstance(model, models.Normalised) else body), head


def stages(model: nn.Module) -> list[str]:
    """List the stages that `cut` takes, in the order in which they run, up to `DEPTH` names deep.

    A model that torch.fx cannot trace has none. Whether a stage puts out maps shows when it runs.
    """
    return list(dict.fromkeys(_stages(model, "")))


def _stages(model: nn.Module, container: str) -> Iterator[str]:
    with contextlib.suppress(_UntraceableError):
        nodes = _nodes(_whole(model), container)
        for place, node in enumerate(nodes):
            inside = node.op == "call_module" and str(node.target).startswith("network." + container)
            path = str(node.target).removeprefix("network.")
            depth = path.count(".") + 1
            if inside and depth <= DEPTH and _runs(nodes, node.target) == 1 and _bypass(nodes, place) is None:
                yield path
                if depth < DEPTH:
                    yield from _stages(model, path + ".")


class _StageTracer(fx.Tracer):
    """Goes into the modules that contain one named stage, and keeps that stage and all others whole."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # torch.fx's signature
        """Say whether a module is one node."""
        return not self.stage.startswith(module_qualified_name + ".")


class _UntraceableError(Exception):
    """torch.fx cannot trace the model; the message names its class, and says why."""


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for what torch.compile or DistributedDataParallel return."""
    if isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        msg = f"model: expected the network itself, got it wrapped in {type(model).__name__}; "
        raise ValueError(msg + "cut it first, and wrap it then")


def _network_of(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, models.Normalised) else model


def _whole(model: nn.Module) -> nn.Module:
    """Return a module of the model's, its network among them as "network", whose forward takes images alone.

    It is a new one at each call, as torch.fx sets attributes of what it traces.
    """
    if isinstance(model, models.Normalised):
        return nn.Sequential(OrderedDict(normalise=model.normalise, network=model.network))
    return nn.Sequential(OrderedDict(network=model))


def _path(model: nn.Module, stage: str) -> str:
    paths = [name for name, _ in _network_of(model).named_modules() if name]
    inside = stage.removeprefix("network.") if isinstance(model, models.Normalised) else stage
    path = next((path for path in (stage, inside) if path in paths), None)
    if path is None:
        meant = models.close_matches(inside, paths)
        raise ValueError(f"stage: expected a submodule of the model, got {stage!r}{meant}; {_listing(model)}")
    return path


def _nodes(whole: nn.Module, path: str) -> list[fx.Node]:
    try:
        return list(_StageTracer("network." + path).trace(whole).nodes)
    except Exception as error:  # what a forward that was not made to be traced raises is anybody's guess
        msg = f"{type(whole.get_submodule('network')).__name__}: {models.first_line(error)}"
        raise _UntraceableError(msg) from error


def _cut(model: nn.Module, path: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    whole = _whole(model)
    nodes, target = _nodes(whole, path), "network." + path
    if _runs(nodes, target) != 1:
        msg = f"stage: expected one that runs once, but {path!r} runs {_runs(nodes, target)} times; name another; "
        raise ValueError(msg + _listing(model))
    place = next(place for place, node in enumerate(nodes) if node.op == "call_module" and node.target == target)
    bypass = _bypass(nodes, place)
    if bypass is not None:
        name = bypass.name.removeprefix("network_")
        msg = f"stage: expected one that all passes through, but {name!r} bypasses {path!r}; name another; "
        raise ValueError(msg + _listing(model))
    return fx.GraphModule(whole, _body_graph(nodes[: place + 1])), fx.GraphModule(
        whole, _head_graph(whole, nodes, place)
    )


def _runs(nodes: list[fx.Node], target: object) -> int:
    return sum(node.op == "call_module" and node.target == target for node in nodes)


def _bypass(nodes: list[fx.Node], place: int) -> fx.Node | None:
    """Return what is computed before the node at `place` and used after it; parameters may be."""
    before = {node for node in nodes[:place] if node.op != "get_attr"}
    used = (source for node in nodes[place + 1 :] for source in node.all_input_nodes)
    return next((source for source in used if source in before), None)


def _body_graph(nodes: list[fx.Node]) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda original: copies[original])
    graph.output(copies[nodes[-1]])
    return graph


def _head_graph(whole: nn.Module, nodes: list[fx.Node], place: int) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    features = graph.placeholder("features")
    if any(_may_overwrite(whole, user) for user in nodes[place].users):  # they are the caller's, who may need them
        features = graph.call_method("clone", (features,))
    copies[nodes[place]] = features
    parameters = [node for node in nodes[:place] if node.op == "get_attr"]  # fetched before the cut, used after it
    for node in (*parameters, *nodes[place + 1 :]):
        copies[node] = graph.node_copy(node, lambda original: copies[original])
    return graph


def _may_overwrite(whole: nn.Module, node: fx.Node) -> bool:
    """Say whether a node may compute in place, as functional.relu(maps, inplace=True) does."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in whole.get_submodule(str(node.target)).modules())
    name = getattr(node.target, "__name__", str(node.target))
    return name.endswith("_") or any(value is True for value in (*node.args[1:], node.kwargs.get("inplace")))


class _ByMode(nn.Module):
    """A part of a model whose traced forwards do one thing in training and another in evaluation."""

    def __init__(self, training: fx.GraphModule, evaluating: fx.GraphModule, *, owners: list[nn.Module]) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = training, evaluating
        self.owners = tuple(owners)  # in a tuple, not among the part's modules: their other modules are not all its own

    def forward(self, inputs: Tensor) -> Tensor:
        """Do what the model's forwards do in their mode."""
        training = self.training and all(owner.training for owner in self.owners)
        outputs: Tensor = (self.in_training if training else self.in_evaluation)(inputs)
        return outputs


def _by_mode(training: fx.GraphModule, evaluating: fx.GraphModule, *, owners: list[nn.Module]) -> nn.Module:
    if str(training.graph) == str(evaluating.graph):
        return training
    return _ByMode(training, evaluating, owners=owners)


@contextlib.contextmanager
def _mode(modules: list[nn.Module], *, training: bool) -> Iterator[None]:
    """Put modules, but none of those inside, into a mode, and back into the one that each was in."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _listing(model: nn.Module) -> str:
    names = stages(model)
    more = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return f"stages: {', '.join(names[:LISTED]) or 'none'}{more}"
