"""From a plan's table to a target that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from export.repository import Repository
from service.audit import plan as plans
from service.audit.target.endpoint import EndpointTarget
from service.audit.target.engine import EngineTarget
from service.audit.target.opening import open_target

if TYPE_CHECKING:
    from pathlib import Path

    from export.engines.base import Images
    from service.server import Serving


def target_of(text: str) -> plans.Target:
    return plans.parse(f'[target]\n{text}\n[data]\ndataset = "digits"\nsamples = 20\n').target


def test_a_model_of_the_repository_is_opened_here(repository: Path, images: Images) -> None:
    table = target_of('model = "linear"\nversion = 1\ninput = "uint8"')
    with open_target(table, repository=Repository(repository), device="cpu") as target:
        assert isinstance(target, EngineTarget)
        assert (target.name, target.domain.kind) == ("linear@1", "uint8")
        assert target(images).shape == (len(images), 5)


def test_a_model_behind_an_endpoint_needs_no_repository(serving: Serving, images: Images) -> None:
    names = '["a", "b", "c", "d", "e"]'
    table = target_of(f'model = "linear"\nversion = 1\nendpoint = "{serving.address}"\nlabels = {names}')
    with open_target(table, repository=None) as target:
        assert isinstance(target, EndpointTarget)
        assert (target.name, target.class_names) == ("linear@1", tuple("abcde"))
        assert target.queries == 0
        target(images)


def test_a_mapping_of_the_plan_reaches_the_endpoint(serving: Serving, images: Images) -> None:
    text = f'model = "linear"\nversion = 1\nendpoint = "{serving.address}"\n'
    plain, doubled = target_of(text), target_of(text + "[target.mapping]\nrange = 2")
    with open_target(plain, repository=None) as once, open_target(doubled, repository=None) as twice:
        np.testing.assert_allclose(2 * once(images), twice(images), rtol=1e-4, atol=1e-4)


def test_what_is_not_there_is_one_clear_error(repository: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nobody"):
        open_target(target_of('model = "nobody"'), repository=Repository(repository))
    with pytest.raises(ConnectionError, match=r"target\.endpoint: 127\.0\.0\.1:9"):
        open_target(target_of('model = "nobody"\nendpoint = "127.0.0.1:9"'), repository=None)
    with pytest.raises(ValueError, match="target: expected an endpoint or a model repository, got neither"):
        open_target(target_of('model = "linear"'), repository=None)
