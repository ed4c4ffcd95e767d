"""Normalisations and residual topologies against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model import norms

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 3 + 1
SCALE = np.linspace(0.5, 2, 8).astype(np.float32)
BIAS = np.linspace(-1, 1, 8).astype(np.float32)


@pytest.mark.parametrize('bias', [True, False])
def test_layer_norm_is_the_formula(bias):
  params = dict(scale=SCALE, **(dict(bias=BIAS) if bias else {}))
  y = norms.LayerNorm(bias=bias).apply({'params': params}, X)
  want = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-5) * SCALE
  np.testing.assert_allclose(y, want + (BIAS if bias else 0), rtol=2e-6, atol=2e-6)


def test_rms_norm_is_the_formula():
  y = norms.RMSNorm().apply({'params': dict(scale=SCALE)}, X)
  want = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * SCALE
  np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('norm', [norms.LayerNorm(), norms.RMSNorm()])
def test_statistics_are_f32_under_bf16(norm):
  params = dict(scale=np.ones(8, np.float32), bias=np.zeros(8, np.float32))
  x = (X * 300).astype(jnp.bfloat16)  # squares sum beyond what bf16 keeps apart
  y = norm.apply({'params': params}, x)
  want = norm.apply({'params': params}, x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))


@pytest.mark.parametrize('norm', [norms.LayerNorm(), norms.RMSNorm()])
def test_zeros_have_a_finite_gradient(norm):
  params = dict(scale=np.ones(8, np.float32), bias=np.zeros(8, np.float32))
  g = jax.grad(lambda x: norm.apply({'params': params}, x).sum())(jnp.zeros((1, 8)))
  assert np.isfinite(g).all()


def test_topologies_are_the_formulas_of_survey_table_6():
  # Scalars stand for the stream; f and g for the sublayers; the norms multiply by distinct factors.
  f, g = lambda x: x + 1.0, lambda x: x * x
  factors = dict(f_norm=2.0, f_out_norm=3.0, g_norm=5.0, g_out_norm=7.0, norm=11.0)
  norm = lambda name: lambda x: factors[name] * x
  sub, x = [('f', f), ('g', g)], 1.5

  assert norms.plain(x, sub, norm) == g(f(x))
  h = x + f(2 * x)
  assert norms.pre(x, sub, norm) == h + g(5 * h)
  h = 2 * (x + f(x))
  assert norms.post(x, sub, norm) == 5 * (h + g(h))
  h = 2 * (4 * x + f(x))
  assert norms.deepnorm(x, sub, norm, alpha=4.0) == 5 * (4 * h + g(h))
  h = x + 3 * f(2 * x)
  assert norms.sandwich(x, sub, norm) == h + 7 * g(5 * h)
  assert norms.parallel(x, sub, norm) == x + f(11 * x) + g(11 * x)
