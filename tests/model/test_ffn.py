"""Activations and gated units against formulas; dropout's rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model import ffn
from llm_jax.model.attention import Context
from llm_jax.model.dropout import dropout, ramp
from llm_jax.model.masks import Mask

Z = np.linspace(-4, 4, 41)
ERF = np.array([math.erf(z / math.sqrt(2)) for z in Z])
SIGMOID = 1 / (1 + np.exp(-Z))
FORMULAS = dict(
  relu=np.maximum(Z, 0),
  gelu=Z / 2 * (1 + ERF),
  gelu_tanh=Z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (Z + 0.044715 * Z**3))),
  silu=Z * SIGMOID,
  sigmoid=SIGMOID,
  identity=Z,
)


@pytest.mark.parametrize('name', FORMULAS)
def test_activation(name):
  np.testing.assert_allclose(getattr(ffn, name)(jnp.float32(Z)), FORMULAS[name], atol=1e-6)


CTX = Context(Mask(), jnp.zeros((1, 1), jnp.int32))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
W = {
  n: RNG.normal(size=s).astype(np.float32)
  for n, s in dict(gate=(4, 6), up=(4, 6), down=(6, 4)).items()
}
B = {
  f'{n}_bias': RNG.normal(size=s).astype(np.float32) for n, s in dict(gate=6, up=6, down=4).items()
}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', ['silu', 'gelu', 'relu', 'sigmoid', 'identity'])
def test_gated_units(name, bias):
  act = getattr(ffn, name)
  module = ffn.Gated(hidden=6, activation=act, bias=bias)
  y, aux = module.apply({'params': {**W, **(B if bias else {})}}, X, CTX)
  b = B if bias else dict.fromkeys(B, 0.0)
  hidden = np.asarray(act(X @ W['gate'] + b['gate_bias'])) * (X @ W['up'] + b['up_bias'])
  np.testing.assert_allclose(y, hidden @ W['down'] + b['down_bias'], rtol=1e-4, atol=1e-5)
  assert aux == {}


@pytest.mark.parametrize('bias', [True, False])
def test_mlp(bias):
  module = ffn.MLP(hidden=6, activation=ffn.relu, bias=bias)
  y, _ = module.apply({'params': {**W, **(B if bias else {})}}, X, CTX)
  b = B if bias else dict.fromkeys(B, 0.0)
  want = np.maximum(X @ W['up'] + b['up_bias'], 0) @ W['down'] + b['down_bias']
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_the_hidden_sizes_of_llama():
  # 7B, 13B, 30B, 65B (Touvron et al. 2023)
  sizes = [ffn.llama_hidden(d) for d in (4096, 5120, 6656, 8192)]
  assert sizes == [11008, 13824, 17920, 22016]


def test_dropout_rate_and_scale():
  x = jnp.ones((400, 400))
  y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
  assert abs((y == 0).mean() - 0.3) < 3 * math.sqrt(0.21 / x.size)
  assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_the_ramp_of_lima():
  """Residual dropout of 0 at the bottom and 0.3 at the top (arXiv:2305.11206, section 3)."""
  np.testing.assert_allclose([ramp(i / 3) for i in range(4)], [0, 0.1, 0.2, 0.3])
  np.testing.assert_allclose(ramp(np.array([0, 0.5, 1]), bottom=0.1, top=0.2), [0.1, 0.15, 0.2])
