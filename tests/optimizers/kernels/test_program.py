"""What a fused kernel is told of a rule, and which rules it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2l_scale.optimizers import (
    SGD,
    Concatenate,
    CoordinatewiseLSTM,
    Feature,
    Head,
    Identity,
    InnerStep,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
    ScaledLinear,
    TanhExp,
    UpdateRule,
)
from l2l_scale.optimizers.kernels import Program, UnsupportedRuleError, program_of
from l2l_scale.optimizers.kernels.program import FeatureCode, FeatureKind, HeadKind, flat_weights
from l2l_scale.tree import tree_leaves


class MyLSTM(CoordinatewiseLSTM):
    pass


class MyLogSign(LogSign):
    pass


class MyFeature(Identity):
    pass


class MyHead(ScaledLinear):
    pass


class MyOtherHead(Head):
    size = 1

    def __call__(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)


def every_feature() -> Feature:
    inner = Concatenate([LogSignClamp(4.0), Concatenate([RNNprop(0.9, 0.8, 1e-6, True)])])
    return Concatenate(
        [Identity(3.0), inner, LogMagnitude(8.0, 1.5), LogSign(7.0), InnerStep(9.0), RNNprop()]
    )


def test_a_program_says_everything_about_a_rule() -> None:
    rule = CoordinatewiseLSTM(hidden_size=33, layers=3, features=every_feature(), head=TanhExp(0.3, 1.5))
    assert program_of(rule) == Program(
        hidden_size=33,
        layers=3,
        features=(
            FeatureCode(FeatureKind.IDENTITY, 1, (3.0, 0.0, 0.0)),
            FeatureCode(FeatureKind.LOG_SIGN_CLAMP, 2, (4.0, 0.0, 0.0)),
            FeatureCode(FeatureKind.RNNPROP, 3, (0.9, 0.8, 1e-6), 3, True),
            FeatureCode(FeatureKind.LOG_MAGNITUDE, 1, (8.0, 1.5, 0.0)),
            FeatureCode(FeatureKind.LOG_SIGN, 2, (7.0, 0.0, 0.0)),
            FeatureCode(FeatureKind.INNER_STEP, 1, (9.0, 0.0, 0.0), 1),
            FeatureCode(FeatureKind.RNNPROP, 2, (0.95, 0.95, 1e-8), 3, False),
        ),
        head=HeadKind.TANH_EXP,
        scale=0.3,
        exp_scale=1.5,
    )


@pytest.mark.parametrize("head", [ScaledLinear(), TanhExp()])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("features", [Identity(), every_feature()])
def test_sizes_are_those_of_the_rule(features: Feature, layers: int, head: Head) -> None:
    rule = CoordinatewiseLSTM(hidden_size=4, layers=layers, features=features, head=head)
    program = program_of(rule)
    assert program.feature_size == rule.features.size
    assert program.head_size == rule.head.size
    state = rule.init_state(torch.zeros(2, 5))
    rows = [leaf.shape[2] if leaf.dim() == 3 else 1 for leaf in tree_leaves(state)]
    assert program.state_rows == sum(rows)
    assert program.feature_rows == sum(rows[: -2 * layers])


def test_flat_weights_have_the_documented_order_and_reach_every_parameter() -> None:
    rule = CoordinatewiseLSTM(hidden_size=3, layers=2, features=LogSign(), head=TanhExp())
    flat = flat_weights(rule)
    first, second = rule.network.cells
    expected = [
        *(first.weight_input, first.weight_hidden, first.bias),
        *(second.weight_input, second.weight_hidden, second.bias),
        *(rule.output.weight, rule.output.bias),
    ]
    assert torch.equal(flat, torch.cat([part.flatten() for part in expected]))
    weights = torch.arange(1.0, len(flat) + 1)
    (flat * weights).sum().backward()
    assert torch.equal(torch.cat([part.grad.flatten() for part in expected]), weights)
    assert len(flat) == sum(parameter.numel() for parameter in rule.parameters())


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (SGD(), "SGD has no fused kernel, only CoordinatewiseLSTM has"),
        (MyLSTM(), "MyLSTM has no fused kernel"),
        (CoordinatewiseLSTM(hidden_size=65), r"hidden_size \(65\) and layers \(2\) must be <= 64 and <= 3"),
        (CoordinatewiseLSTM(layers=4), r"hidden_size \(20\) and layers \(4\) must be <= 64 and <= 3"),
        (CoordinatewiseLSTM(features=MyFeature()), "the feature MyFeature is in no fused kernel"),
        (
            CoordinatewiseLSTM(features=Concatenate([LogSign(), Concatenate([MyLogSign()])])),
            "the feature MyLogSign is in no fused kernel",
        ),
        (CoordinatewiseLSTM(features=Concatenate([Identity()] * 17)), "17 features are more than the 16"),
        (CoordinatewiseLSTM(head=MyHead()), "the head MyHead is in no fused kernel"),
        (CoordinatewiseLSTM(head=MyOtherHead()), "the head MyOtherHead is in no fused kernel"),
    ],
)
def test_what_no_kernel_computes_is_refused_with_the_reason(rule: UpdateRule, reason: str) -> None:
    with pytest.raises(UnsupportedRuleError, match=reason):
        program_of(rule)


def test_the_largest_rule_is_taken() -> None:
    rule = CoordinatewiseLSTM(hidden_size=64, layers=3, features=Concatenate([Identity()] * 16))
    assert len(program_of(rule).features) == 16
