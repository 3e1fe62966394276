from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from export.graph import preparation
from tests.export import networks

if TYPE_CHECKING:
    from pathlib import Path


def test_a_product_and_its_bias_are_one_layer_by_the_product_s_name(tmp_path: Path) -> None:
    net = networks.Network()
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.convolution("images", 3, 8)))
    hidden = net.node("MatMul", flat, net.constant(net.weights(8, 8)), name="product")
    hidden = net.node("Relu", net.node("Add", hidden, net.constant(np.ones(8, np.float32)), name="bias"))
    source = networks.saved(
        net.model(net.node("MatMul", hidden, net.constant(net.weights(8, 10)), name="last")), tmp_path
    )
    homes = preparation.prepare(source).homes
    assert homes["product"] == homes["bias"] == "product"


def test_names_are_each_node_s_own_and_the_same_every_time(tmp_path: Path) -> None:
    model = networks.residual()
    model.graph.node[3].name = model.graph.node[5].name = "twice"
    source = networks.saved(model, tmp_path)
    one, other = (preparation.prepare(source) for _ in range(2))
    names = [node.name for node in one.model.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    assert "twice" in names
    assert names == [node.name for node in other.model.graph.node]


def test_operator_sets_that_no_node_uses_are_left_out(tmp_path: Path) -> None:
    prepared = preparation.prepare(networks.saved(networks.attention(), tmp_path))
    assert [entry.domain for entry in prepared.model.opset_import] == [""]


def test_an_old_opset_is_brought_to_one_that_can_be_quantised(tmp_path: Path) -> None:
    net = networks.Network()
    model = net.model(net.head(net.node("Relu", net.convolution("images", 3, 8)), 8))
    model.opset_import[0].CopyFrom(helper.make_opsetid("", 11))
    onnx.checker.check_model(model)
    prepared = preparation.prepare(networks.saved(model, tmp_path))
    assert prepared.model.opset_import[0].version == 13
    assert [node.op_type for node in prepared.layers] == ["Conv", "Gemm"]
