"""The oracle against values worked out by hand: a comparison of the model with the oracle cannot show its errors."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

from flmjax.config import ModelConfig

# Two numbers wide, one layer, one head: small enough to follow with a pencil.
TINY = ModelConfig(
    num_layers=1, embed_dim=2, num_heads=1, head_dim=2, mlp_dim=2, vocab_size=3, max_length=8, position="learned"
)
SMALL = ModelConfig(
    num_layers=2, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, vocab_size=29, max_length=16
)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def zeros(config):
    """All leaves zero except the norms' scales, which are one."""
    leaves = reference.shapes(config).items()
    return reference.nest({path: np.full(shape, float(path.endswith("scale"))) for path, shape in leaves})


def random(config):
    rng = np.random.default_rng(0)
    leaves = reference.shapes(config).items()
    return reference.nest({path: rng.normal(0, 0.5, shape) + path.endswith("scale") for path, shape in leaves})


def attend(x_LD, params, config):
    places = np.arange(len(x_LD))[None]
    return reference.attention(np.array([x_LD], float), params, config, places, np.zeros_like(places))[0]


def attention_params(config):
    return {
        name: {leaf: array[0] for leaf, array in leaves.items()}
        for name, leaves in zeros(config)["layers"]["attention"].items()
    }


def rotate(x_K, position, config, sign):
    return reference.rotary(np.array(x_K, float)[None, None, None], np.array([[position]]), config, sign)[0, 0, 0]


def test_the_oracle_imports_no_jax():
    code = "import sys, reference; sys.exit(any(m.split('.')[0] in ('jax', 'flax') for m in sys.modules))"
    path = f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}"
    assert subprocess.run([sys.executable, "-c", f"import sys; {path}; {code}"], timeout=60).returncode == 0


def test_layernorm_divides_by_the_root_of_variance_and_epsilon():
    # mean 2, population variance 1 (sample variance 2), eps 3: (1 - 2) / sqrt(4) = -1/2
    params = {"scale": np.array([2.0, 6.0]), "bias": np.array([1.0, 0.0])}
    y = reference.norm(np.array([1.0, 3.0]), params, change(TINY, norm_eps=3.0))
    np.testing.assert_allclose(y, [0.0, 3.0])


def test_rmsnorm_subtracts_no_mean():
    # mean square (9 + 16) / 2 = 12.5, eps 12.5: the root is 5
    y = reference.norm(
        np.array([3.0, 4.0]), {"scale": np.array([5.0, 10.0])}, change(TINY, norm="rmsnorm", norm_eps=12.5)
    )
    np.testing.assert_allclose(y, [3.0, 8.0])


def test_rope_turns_pairs_by_position_times_frequency():
    # theta 16, K 4: frequencies 1 and 16^(-2/4) = 1/4; place 2 turns by 2 rad and 1/2 rad
    config = change(TINY, position="rope", rope_theta=16.0)
    expected = [-0.4161468365, 0.9092974268, -0.4794255386, 0.8775825619]  # cos 2, sin 2, -sin 1/2, cos 1/2
    for sign in (1, -1):
        np.testing.assert_allclose(rotate([1, 0, 0, 1], 2, config, sign), expected, atol=1e-10)


def test_xpos_scales_queries_down_and_keys_up_from_the_centre():
    # K 4: zeta = (0 + 1.6) / 5.6 = 2/7 and (2 + 1.6) / 5.6 = 9/14; place 6 is one scale_base past the middle 9 // 2
    config = change(TINY, position="xpos", max_length=9, xpos_scale_base=2.0, rope_theta=1.0)
    turned = np.array([math.cos(6), math.sin(6)])
    np.testing.assert_allclose(rotate([1, 0, 1, 0], 6, config, 1), [*turned * 2 / 7, *turned * 9 / 14])
    np.testing.assert_allclose(rotate([1, 0, 1, 0], 6, config, -1), [*turned * 7 / 2, *turned * 14 / 9])
    np.testing.assert_allclose(np.linalg.norm(rotate([1, 0], 4, config, 1)), 1.0)
    # at context 2048 and scale_base 512 the first key is (2/7)^(1024/512) = 4/49 of its length
    flm = change(TINY, position="xpos", max_length=2048)
    np.testing.assert_allclose(np.linalg.norm(rotate([1, 0], 0, flm, -1)), 4 / 49)


def test_xpos_scores_depend_on_the_distance_alone_at_long_range():
    # q = k = (1, 0), K 2: the score is cos(distance) * (2/7)^(distance / 512), wherever the pair stands
    config = change(TINY, position="xpos", max_length=8192)
    for distance in (0, 3, 700):
        for key in (0, 17, 4096, 8191 - distance):
            score = rotate([1, 0], key + distance, config, 1) @ rotate([1, 0], key, config, -1)
            np.testing.assert_allclose(score, math.cos(distance) * (2 / 7) ** (distance / 512), rtol=1e-9)


def test_attention_without_queries_is_the_running_mean_of_values():
    params = attention_params(TINY)
    params["value"]["kernel"] = np.eye(2).reshape(2, 1, 2)
    params["output"]["kernel"] = np.eye(2).reshape(1, 2, 2)
    params["output"]["bias"] = np.array([0.0, 100.0])
    y = attend([[2, 0], [4, 6], [0, 3]], params, TINY)
    np.testing.assert_allclose(y, [[2, 100], [3, 103], [2, 103]])


def test_attention_scores_are_divided_by_the_root_of_head_dim():
    # K 4, query (1, 0, 0, 0), keys 0 and 2 ln 3: scores 0 and ln 3, weights 1/4 and 3/4 of the values 0 and 8
    config = change(TINY, head_dim=4)
    params = attention_params(config)
    params["query"]["bias"][0, 0] = 1.0
    params["key"]["kernel"][1, 0, 0] = 2 * math.log(3)
    params["value"]["kernel"][1, 0, 3] = 8.0
    params["output"]["kernel"][0, 3, 0] = 1.0
    np.testing.assert_allclose(attend([[5, 0], [5, 1]], params, config)[1], [6.0, 0.0])


def test_neighbouring_query_heads_share_a_kv_head():
    # kv heads hold 1 and 2, query heads write 1, 10, 100, 1000: 1 + 10 + 200 + 2000
    config = change(TINY, num_heads=4, num_kv_heads=2)
    params = attention_params(config)
    params["value"]["bias"][:, 0] = [1.0, 2.0]
    params["output"]["kernel"][:, 0, 0] = [1.0, 10.0, 100.0, 1000.0]
    np.testing.assert_allclose(attend([[0, 0]], params, config)[0, 0], 2211.0)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("gelu", 0.8413447460685429),  # the normal distribution function at 1
        ("gelu_tanh", 0.8411919906082768),  # (1 + tanh(0.7978845608 * 1.044715)) / 2
        ("swiglu", 0.8807970779778823 * 2 * 3),  # silu(2) * 3, 1 / (1 + e^-2) = 0.88079...
    ],
)
def test_activations_have_their_known_values(activation, expected):
    one = np.ones((1, 1))
    up = 3 * one if activation == "swiglu" else one
    params = {"up": {"kernel": up}, "gate": {"kernel": 2 * one}, "down": {"kernel": one, "bias": np.array([10.0])}}
    y = reference.mlp(one[None], params, change(TINY, activation=activation))
    np.testing.assert_allclose(y[0, 0], [10 + expected], rtol=1e-12)


def identity_block(attention_scale, mlp_scale):
    """Leaves of a layer that computes x + attention_norm(x), then x + mlp_norm(x), for a single token."""
    params = zeros(TINY)["layers"]
    params["attention_norm"]["scale"][0] = attention_scale
    params["mlp_norm"]["scale"][0] = mlp_scale
    params["attention"]["value"]["kernel"][0, :, 0] = params["attention"]["output"]["kernel"][0, 0] = np.eye(2)
    params["mlp"]["up"]["kernel"][0] = params["mlp"]["down"]["kernel"][0] = np.eye(2)
    params["mlp"]["up"]["bias"][0] = 100.0  # far above zero GELU is the identity
    params["mlp"]["down"]["bias"][0] = -100.0
    return reference.flatten(params)


@pytest.mark.parametrize(
    ("attention_scale", "expected"),
    [
        # the norm of two numbers is (-1, 1) or (1, -1), by their order
        ([-5, -6], [9, 17]),  # (1, 3) + (5, -6) = (6, -3); (6, -3) + (3, 20): the sum's order is not that of the input
        ([-2, 1], [0, -16]),  # (1, 3) + (2, 1) = (3, 4); (3, 4) + (-3, -20): nor that of what attention adds
    ],
)
def test_block_adds_attention_and_then_mlp_of_the_normalised_sum(attention_scale, expected):
    leaves = identity_block(attention_scale, [3, -20]).items()
    layer = reference.nest({path: leaf[0] for path, leaf in leaves})
    place = np.zeros((1, 1), int)
    y = reference.block(np.array([[[1.0, 3.0]]]), layer, change(TINY, norm_eps=0.0), place, place)
    np.testing.assert_allclose(y[0, 0], expected)


def test_layers_run_from_first_to_last():
    # (0, 1) -> first (0, 1 - 4) -> second (0, -3 - 10): norm (1, -1). The other way round: (0, 11), (0, 7): (-1, 1)
    config = change(TINY, num_layers=2, norm_eps=0.0)
    params = zeros(config)
    first, second = identity_block([0, -4], [0, 0]), identity_block([0, 10], [0, 0])
    params["layers"] = reference.nest({path: np.concatenate([first[path], second[path]]) for path in first})
    params["embedding"][1] = [0.0, 1.0]
    np.testing.assert_allclose(reference.logits(params, config, np.array([[1]]))[0, 0, 1], -1.0)


def test_multipliers_scale_the_embedding_and_the_logits():
    """Learned positions are not scaled."""
    # 2 * (1, 3) + (4, 1) = (6, 7), norm with eps 2: -+0.5 / sqrt(0.25 + 2) = -+1/3; dot (1, 3) = 2/3; times 3 / 2 = 1
    config = change(TINY, embedding_multiplier=2.0, output_multiplier=3.0, softmax_temperature=2.0, norm_eps=2.0)
    params = zeros(config)
    params["embedding"][2] = [1.0, 3.0]
    params["positions"][1] = [4.0, 1.0]
    z = reference.logits(params, config, np.array([[0, 2]]))
    np.testing.assert_allclose(z[0, 1], [0, 0, 1, 0, 0, 0, 0, 0], atol=1e-15)
    # token 2 first in its row, with position 1, gives the same logits
    np.testing.assert_allclose(reference.logits(params, config, np.array([[2]]), positions=np.array([[1]])), z[:, 1:])


def test_loss_is_a_weighted_sum_over_the_true_vocabulary():
    # logits 0, ln 3 and ln 4 give 1/8, 3/8, 4/8; the padded ids' 9s are not counted, nor the target of weight 0
    config = change(TINY, tied_embedding=False)
    params = zeros(config)
    params["final_norm"]["bias"][0] = 1.0
    params["head"][0] = [0, math.log(3), math.log(4), 9, 9, 9, 9, 9]
    batch = {
        "tokens": np.array([[0, 1, 2]]),
        "targets": np.array([[1, 2, 0]]),
        "weights": np.array([[1.0, 0.5, 0.0]], np.float32),
    }
    total, weight = reference.loss(params, config, batch)
    np.testing.assert_allclose(total, math.log(8 / 3) + 0.5 * math.log(2))
    assert weight == 1.5


@pytest.mark.parametrize("position", ["xpos", "rope"])
def test_rotary_attention_sees_distances_only(position):
    config = change(SMALL, position=position, xpos_scale_base=4.0)
    params, tokens, places = random(config), np.array([[3, 1, 4, 1, 5, 9, 2]]), np.arange(7)[None]
    z = reference.logits(params, config, tokens)
    np.testing.assert_allclose(reference.logits(params, config, tokens, positions=places + 5), z, atol=1e-10)
    assert np.abs(reference.logits(params, config, tokens, positions=places * 2) - z).max() > 1e-3


@pytest.mark.parametrize("position", ["xpos", "rope", "learned"])
def test_packed_documents_give_the_logits_that_each_gives_alone(position):
    config = change(SMALL, position=position)
    params, tokens = random(config), np.array([[3, 1, 4, 1, 5, 9, 2]])
    packed = reference.logits(
        params, config, tokens, np.array([[7, 7, 7, 2, 2, 2, 2]]), np.array([[0, 1, 2, 0, 1, 2, 3]])
    )
    alone = [reference.logits(params, config, tokens[:, :3]), reference.logits(params, config, tokens[:, 3:])]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), rtol=1e-10, atol=1e-10)
    assert np.abs(packed - reference.logits(params, config, tokens))[0, 3:].max() > 1e-3  # unpacked they do see


def test_loss_hands_segments_and_positions_to_the_model():
    params, tokens = random(SMALL), np.array([[3, 1, 4, 1, 5, 9, 2]])
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1), "weights": np.ones((1, 7))}
    plain, _ = reference.loss(params, SMALL, batch)
    segments, _ = reference.loss(params, SMALL, batch | {"segment_ids": np.array([[0, 0, 0, 1, 1, 1, 1]])})
    stretched, _ = reference.loss(params, SMALL, batch | {"positions": 2 * np.arange(7)[None]})
    assert len({round(value, 6) for value in (plain, segments, stretched)}) == 3


def test_a_later_token_changes_no_earlier_logit():
    params, tokens = random(SMALL), np.array([[3, 1, 4, 1, 5, 9, 2]])
    changed = np.where(np.arange(7) == 4, 11, tokens)
    difference = reference.logits(params, SMALL, changed) - reference.logits(params, SMALL, tokens)
    assert np.abs(difference[0, :4]).max() == 0.0
    assert (np.abs(difference[0, 4:]).max(-1) > 1e-3).all()


def test_leaves_follow_the_settings():
    config = change(SMALL, position="learned", activation="swiglu", norm="rmsnorm", bias=False, tied_embedding=False)
    assert reference.shapes(config) == {
        "embedding": (32, 12),  # 29 padded to a multiple of 8
        "positions": (16, 12),
        "layers.attention_norm.scale": (2, 12),
        "layers.attention.query.kernel": (2, 12, 4, 6),
        "layers.attention.key.kernel": (2, 12, 2, 6),
        "layers.attention.value.kernel": (2, 12, 2, 6),
        "layers.attention.output.kernel": (2, 4, 6, 12),
        "layers.mlp_norm.scale": (2, 12),
        "layers.mlp.up.kernel": (2, 12, 20),
        "layers.mlp.gate.kernel": (2, 12, 20),
        "layers.mlp.down.kernel": (2, 20, 12),
        "final_norm.scale": (12,),
        "head": (12, 32),
    }
    extra = reference.shapes(change(config, bias=True)).keys() - reference.shapes(config).keys()
    names = [
        "attention.key",
        "attention.output",
        "attention.query",
        "attention.value",
        "mlp.down",
        "mlp.gate",
        "mlp.up",
    ]
    assert sorted(extra) == [f"layers.{name}.bias" for name in names]  # rmsnorm has none
    extra = reference.shapes(change(config, norm="layernorm", bias=True)).keys() - extra
    assert {path for path in extra if "bias" in path} == {
        "layers.attention_norm.bias",
        "layers.mlp_norm.bias",
        "final_norm.bias",
    }


def test_a_tree_of_another_model_is_refused():
    params, tokens = zeros(TINY), np.array([[1]])
    with pytest.raises(ValueError, match=r"head: None, expected \(2, 8\)"):
        reference.logits(params, change(TINY, tied_embedding=False), tokens)
    with pytest.raises(ValueError, match=r"final_norm.bias: \(2,\), expected None"):
        reference.logits(params, change(TINY, bias=False), tokens)
