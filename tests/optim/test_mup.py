"""muP by axis names, against the paper's tables written down by hand and against the package of its authors."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree, widths
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, heads, init, moe, norms, positions, transformer
from llm_jax.optim import adafactor, chain, mup, rules, schedules

N = 4  # the ratio of the widths
BASE = dict(embed=16, ffn=64, heads=4, groups=4, norm=16)
PACKAGE = json.loads(pathlib.Path(__file__).with_name('mup.json').read_text())

# Tensor Programs V, table 3, with fan-in and fan-out n times those of the base model and all else 1:
# initial variance, Adam's and SGD's learning rates as powers of n.
TABLE_3 = dict(input=(0, 0, 1), hidden=(-1, -1, 0), output=(-2, -1, -1))
# and table 8: initial variance, multiplier, Adam's and SGD's learning rates
TABLE_8 = dict(input=(0, 0, 0, 1), hidden=(-1, 0, -1, 0), output=(0, -1, 0, 1))
KINDS = {
  ('vocab', 'embed'): 'input',
  ('positions', 'embed'): 'input',
  ('buckets', 'heads'): 'input',
  ('layers', 'norm'): 'input',
  ('layers', 'ffn'): 'input',
  ('layers', 'heads', 'head_dim'): 'input',
  ('layers', 'embed', 'heads', 'head_dim'): 'hidden',
  ('layers', 'heads', 'head_dim', 'embed'): 'hidden',
  ('layers', 'embed', 'groups', 'head_dim'): 'hidden',
  ('layers', 'embed', 'ffn'): 'hidden',
  ('layers', 'ffn', 'embed'): 'hidden',
  ('layers', 'expert', 'embed', 'ffn'): 'hidden',
  ('embed', 'vocab'): 'output',
  ('layers', 'embed', 'expert'): 'output',
}


def shape(names, n):
  sizes = dict(BASE, vocab=40, positions=24, buckets=8, layers=2, head_dim=8, expert=3)
  return tuple(sizes[a] * (n if a in BASE else 1) for a in names)


def deviation(draw, size):
  """The standard deviation that an initialiser gives, without drawing: it is linear in what `normal` gives."""
  return float(np.abs(np.asarray(draw(jax.random.key(0), size))).max())


@pytest.fixture
def ones(monkeypatch):
  monkeypatch.setattr(jax.random, 'normal', lambda key, shape: jnp.ones(shape))


@pytest.mark.parametrize('names', KINDS, ids=' '.join)
def test_every_kind_of_weight_is_the_paper_s(names, ones):
  variance, adam, sgd = TABLE_3[KINDS[names]]
  wide = shape(names, N)
  assert mup.adam(names, wide, base=BASE) == N**adam
  assert mup.sgd(names, wide, base=BASE) == N**sgd
  if KINDS[names] != 'input' or (len(names) == 2 and 'layers' not in names):  # has a role
    std = [
      deviation(init.mup('key', s, names, s[-1], 4, base=BASE, recipe=init.gpt2), s)
      for s in (shape(names, 1), wide)
    ]
    np.testing.assert_allclose((std[1] / std[0]) ** 2, float(N) ** variance)


def test_the_tables_are_one_function_and_one_update():
  """Lemma J.1: a multiplier, the initial values over it, Adam's rate over it and SGD's over its square change nothing.
  An untied head is table 3's here, a tied one table 8's."""
  for kind, (variance, multiplier, adam, sgd) in TABLE_8.items():
    same = (variance + 2 * multiplier, adam + multiplier, sgd + 2 * multiplier)
    assert same == TABLE_3[kind]
  assert widths.head_multiplier(embed=64, base=16) == float(N) ** TABLE_8['output'][1]
  table = ('vocab', 'embed')  # as an output weight: table 8's are those of input weights
  assert mup.adam(table, shape(table, N), base=BASE) == N ** TABLE_8['output'][2]
  assert mup.sgd(table, shape(table, N), base=BASE) == N ** TABLE_8['output'][3]


@functools.cache
def decoder(n, hidden=64, head=heads.Untied, recipe=init.palm):
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=4 * n, bias=True),
    ffn=functools.partial(ffn.MLP, hidden=hidden, bias=True),
    norm=norms.LayerNorm,
  )
  return transformer.causal(
    vocab=40, embed=16 * n, layers=2, length=24, block=layer, norm=None,
    positions=positions.Learned, head=head, init=recipe,
  )  # fmt: skip


OURS = {
  'embedding.weight': 'embedding/table',
  'positions.weight': 'positions/table',
  'norm.weight': 'decoder/layers/block_0/mixer_norm/scale',
  'norm.bias': 'decoder/layers/block_0/mixer_norm/bias',
  'head.weight': 'head/w',
}
for theirs, ours in dict(
  query='mixer/query', key='mixer/key', value='mixer/value', attention_out='mixer/out',
  ffn_in='ffn/up', ffn_out='ffn/down',
).items():  # fmt: skip
  OURS[f'{theirs}.weight'] = f'decoder/layers/block_0/{ours}'
  OURS[f'{theirs}.bias'] = f'decoder/layers/block_0/{ours}_bias'


def test_a_block_is_that_of_the_authors_package(ones):
  """4 times as wide, the feed-forward twice: so many times the standard deviation, Adam's and SGD's rates."""
  recipe = functools.partial(init.mup, base=BASE, recipe=init.palm)
  wide, base = decoder(N, 128, recipe=recipe), decoder(1)
  names = tree.flatten(wide.axes, is_leaf=tree.is_names)
  first, last = (tree.flatten(m.init(jax.random.key(0))) for m in (base, wide))
  assert set(OURS) == set(PACKAGE)
  for theirs, path in OURS.items():
    told = PACKAGE[theirs]
    by = told.get('multiplier', 1.0)  # the package's head keeps table 8's, see lemma J.1
    sized = names[path], last[path].shape
    assert mup.adam(*sized, base=BASE) == told['adam'] * by, path
    assert mup.sgd(*sized, base=BASE) == told['sgd'] * by**2, path
    assert told['adam decay'] == told['sgd decay'] == 1, 'decay depends on no width'
    if 'std' in told:
      ratio = float(jnp.abs(last[path]).max() / jnp.abs(first[path]).max())
      np.testing.assert_allclose(ratio, told['std'] * by, rtol=0.01, err_msg=path)


def test_the_base_model_is_the_standard_one(ones):
  recipe = functools.partial(init.mup, base=dict(BASE, layers=2), recipe=init.gpt2)
  ours, plain = (decoder(1, recipe=r) for r in (recipe, init.gpt2))
  same = jax.tree.map(
    lambda a, b: bool(jnp.array_equal(a, b)),
    *(m.init(jax.random.key(0)) for m in (ours, plain)),
  )
  assert all(jax.tree.leaves(same))


def test_roles_may_begin_at_zero(ones):
  recipe = functools.partial(init.mup, base=BASE, zero=('query', 'head'))
  params = decoder(N, recipe=recipe).init(jax.random.key(0))
  mixer = params['decoder']['layers']['block_0']['mixer']
  assert not mixer['query'].any() and not params['head']['w'].any() and mixer['key'].all()
  with pytest.raises(UserError, match="no role 'querry' .* did you mean 'query'"):
    init.mup('key', (16, 4, 8), ('embed', 'heads', 'head_dim'), 16, 4, base=BASE, zero=('querry',))


def test_depth_follows_the_axis_of_layers(ones):
  """Depth-muP (alpha 1/2): branches and Adam's rate by 1/sqrt(L), SGD's as it was; CompleteP (alpha 1): branches by
  1/L, Adam's rate as it was. Initial values are those of the base depth."""
  base = dict(BASE, layers=2)
  inside, outside = ('layers', 'embed', 'ffn'), ('vocab', 'embed')
  deep = (2 * N, 16, 64)
  for alpha, branch, adam, sgd in ((0.5, -0.5, -0.5, 0), (1.0, -1, 0, 1)):
    told = dict(base=base, alpha=alpha)
    assert widths.residual_multiplier(layers=2 * N, base=2, alpha=alpha) == N**branch
    assert mup.adam(inside, deep, **told) == mup.adafactor(inside, deep, **told) == N**adam
    assert mup.sgd(inside, deep, **told) == N**sgd
    assert mup.adam(outside, (40, 16), **told) == 1
  shallow = (2, 16, 64)
  std = [
    deviation(init.mup('ffn_out', s, inside, 16, 2 * s[0], base=base, recipe=init.gpt2), s)
    for s in (deep, shallow)
  ]
  assert std[0] == std[1]  # gpt2 alone divides by the root of the residual additions
  both = (2 * N, 16 * N, 64 * N)
  assert mup.adam(inside, both, base=base, alpha=0.5) == 1 / N / N**0.5


def test_the_scale_of_attention():
  assert widths.attention_scale(head_dim=64, base=64) == 64**-0.5
  assert widths.attention_scale(head_dim=64 * N, base=64) == 64**-0.5 / N


def step(tx, params):
  """The first update, for gradients of 1."""
  run = lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)[0]
  return jax.jit(run)(params)


def test_the_step_is_scaled_and_the_decay_is_not():
  """One step by hand: Adam's first is the sign of the gradient."""
  names = dict(w=('embed', 'ffn'), table=('vocab', 'embed'))
  params = dict(w=jnp.full((64, 256), 2.0), table=jnp.full((40, 64), 2.0))
  tx = chain.make(
    names,
    rule=functools.partial(rules.adamw, eps=0.0),
    schedule=functools.partial(schedules.constant, peak=0.1),
    clip=None,
    weight_decay=0.5,
    decayed=chain.everything,
    multipliers=(('table', 3.0),),
    scaling=functools.partial(mup.adam, base=BASE),
  )
  updates = step(tx, params)
  np.testing.assert_allclose(updates['w'], -0.1 / N - 0.1 * 0.5 * 2, rtol=1e-6)
  np.testing.assert_allclose(updates['table'], -0.3 - 0.3 * 0.5 * 2, rtol=1e-6)


def test_adafactor_moves_what_adam_moves():
  """Its step is the root mean square of the weight times a direction of size 1: with the weights that muP draws, that
  and its factor shrink together as Adam's factor does."""
  for names, std in ((('embed', 'ffn'), N**-0.5), (('embed', 'vocab'), 1 / N)):
    steps = []
    for n, scale in ((1, 1.0), (N, std)):
      size = shape(names, n)
      drawn = np.random.default_rng(0).normal(size=size, scale=0.2 * scale)
      params = dict(w=jnp.asarray(drawn, jnp.float32))
      tx = chain.make(
        dict(w=names),
        rule=adafactor.adafactor,
        schedule=functools.partial(schedules.constant, peak=0.1),
        clip=None,
        scaling=functools.partial(mup.adafactor, base=BASE),
      )
      steps.append(float(np.abs(np.asarray(step(tx, params)['w'])).mean()))
    np.testing.assert_allclose(
      steps[1] / steps[0], mup.adam(names, shape(names, N), base=BASE), rtol=0.05
    )


def test_a_tied_head_is_multiplied():
  tied = functools.partial(heads.Tied, multiplier=0.25)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 16)), jnp.float32)
  plain, ours = (decoder(1, head=h, recipe=init.gpt2) for h in (heads.Tied, tied))
  params = dict(embedding=dict(table=jnp.asarray(np.random.default_rng(1).normal(size=(40, 16)))))
  np.testing.assert_allclose(ours.logits(params, x), 0.25 * plain.logits(params, x), rtol=1e-5)


def test_what_is_refused():
  with pytest.raises(UserError, match="base names the axis 'embbed'; did you mean 'embed'"):
    mup.adam(('embed', 'ffn'), (16, 64), base=dict(embbed=16))
  with pytest.raises(UserError, match='base embed=0: give the size'):
    mup.adam(('embed', 'ffn'), (16, 64), base=dict(embed=0))
  with pytest.raises(UserError, match="'state' belongs to a recurrent mixer"):
    mup.adam(('ffn', 'state'), (16, 4), base=BASE)
  with pytest.raises(UserError, match=r"add base\['norm'\]"):
    mup.sgd(('norm',), (16,), base=dict(embed=16))


def test_experts_and_routers_declare_these_axes():
  """The kinds above are what the model declares, experts and routers too."""
  feed = functools.partial(moe.MoE, experts=3, expert=functools.partial(ffn.Gated, hidden=64))
  layer = functools.partial(
    block.decoder, mixer=functools.partial(attention.SelfAttention, heads=4, bias=True), ffn=feed
  )
  model = transformer.causal(vocab=40, embed=16, layers=2, block=layer, head=heads.Untied)
  found = set(tree.flatten(model.axes, is_leaf=tree.is_names).values())
  plain = set(tree.flatten(decoder(1).axes, is_leaf=tree.is_names).values())
  assert (found | plain) - {('norm',), ('layers', 'embed'), ('layers', 'groups', 'head_dim'),
                            ('layers', 'expert', 'ffn', 'embed')} <= set(KINDS)  # fmt: skip
