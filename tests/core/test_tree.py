"""Paths, first-match rules, splitting, renaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.core.weights import LowRank

PARAMS = {
  'embedding': {'table': jnp.ones((7, 4))},
  'decoder': {
    'layers': {'block_0': {'mixer': {'q': jnp.ones((2, 4, 3)), 'o': jnp.ones((2, 3, 4))}}},
    'norm': {'scale': jnp.ones(4)},
  },
}
PATHS = [
  'decoder/layers/block_0/mixer/o',
  'decoder/layers/block_0/mixer/q',
  'decoder/norm/scale',
  'embedding/table',
]


def adapted():
  """PARAMS with LoRA on q."""
  params = jax.tree.map(lambda x: x, PARAMS)
  q = params['decoder']['layers']['block_0']['mixer']['q']
  params['decoder']['layers']['block_0']['mixer']['q'] = LowRank(
    q, jnp.ones((2, 4, 1)), jnp.ones((2, 1, 3))
  )
  return params


def test_flatten_names_every_leaf_once_and_unflatten_undoes_it():
  flat = tree.flatten(PARAMS)
  assert list(flat) == PATHS
  assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(PARAMS)


def test_the_parts_of_a_leaf_type_are_leaves_below_it():
  q = 'decoder/layers/block_0/mixer/q'
  assert [p for p in tree.flatten(adapted()) if p.startswith(q)] == [f'{q}/w', f'{q}/a', f'{q}/b']


def test_sequences_are_named_by_their_index():
  assert list(tree.flatten({'a': (1, [2, 3])})) == ['a/0', 'a/1/0', 'a/1/1']


def test_match_takes_the_first_rule():
  got = tree.flatten(tree.match(PARAMS, [('mixer', 1), ('q$', 2), ('.*', 3)]))
  assert got == dict(zip(PATHS, [1, 1, 3, 3], strict=True))
  got = tree.flatten(tree.match(PARAMS, [('q$', 2), ('mixer', 1), ('.*', 3)]))
  assert got == dict(zip(PATHS, [1, 2, 3, 3], strict=True))


def test_match_names_what_no_rule_finds():
  with pytest.raises(
    UserError, match=r'no rule matches decoder/norm/scale, embedding/table.*default'
  ):
    tree.match(PARAMS, [('mixer', 1)])


def test_select_is_a_regex_and_must_find_something():
  assert tree.flatten(tree.select(PARAMS, 'norm|table')) == dict(
    zip(PATHS, [False, False, True, True], strict=True)
  )
  with pytest.raises(
    UserError, match="'embedding/tabel' matches no parameter; did you mean 'embedding/table'"
  ):
    tree.select(PARAMS, 'embedding/tabel')


@pytest.mark.parametrize('params', [PARAMS, adapted()], ids=['plain', 'lora'])
@pytest.mark.parametrize('pattern', ['mixer', r'/(a|b|table)$', '.*'])
def test_merge_undoes_split(params, pattern):
  chosen = tree.select(params, pattern)
  yes, no = tree.split(params, chosen)
  assert tree.count(yes) + tree.count(no) == tree.count(params)
  assert len(jax.tree.leaves(yes)) == sum(tree.flatten(chosen).values())
  for merged in (tree.merge(yes, no), tree.merge(no, yes)):
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(
      a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    )


def test_only_the_split_part_gets_a_gradient():
  yes, no = tree.split(PARAMS, tree.select(PARAMS, 'norm'))
  grads = jax.grad(lambda yes: sum(x.sum() ** 2 for x in jax.tree.leaves(tree.merge(yes, no))))(yes)
  assert list(tree.flatten(grads)) == ['decoder/norm/scale']


AXES = {
  'embedding': {'table': ('vocab', 'embed')},
  'decoder': {
    'layers': {
      'block_0': {'mixer': {'q': ('layers', 'embed', 'heads'), 'o': ('layers', 'heads', 'embed')}}
    },
    'norm': {'scale': ('norm',)},
  },
}


def test_names_are_tuples_of_strings_and_nothing_else():
  assert tree.is_names(()) and tree.is_names(('embed', None))
  assert not tree.is_names((1, 'embed')) and not tree.is_names(['embed'])
  assert not tree.is_names(LowRank('w', 'a', 'b'))


def test_align_gives_the_names_of_the_leaves_that_are_there():
  yes, _ = tree.split(PARAMS, tree.select(PARAMS, 'q$|norm'))
  got = tree.align(AXES, yes)
  assert got['decoder']['layers']['block_0']['mixer'] == {
    'q': ('layers', 'embed', 'heads'),
    'o': None,
  }
  assert got['decoder']['norm'] == {'scale': ('norm',)} and got['embedding'] == {'table': None}
  assert tree.align(AXES, PARAMS) == AXES


def test_align_refuses_what_has_no_names():
  with pytest.raises(
    UserError, match="parameter 'embedding/tabel' has no axis names; did you mean 'embedding/table'"
  ):
    tree.align(AXES, {'embedding': {'tabel': jnp.ones((7, 4))}})
  with pytest.raises(
    UserError, match=r"'embedding/table' of shape \(7,\) has the axis names .*: one for each axis"
  ):
    tree.align(AXES, {'embedding': {'table': jnp.ones(7)}})


def test_count_and_bytes():
  assert tree.count(PARAMS) == 28 + 24 + 24 + 4
  assert tree.nbytes(PARAMS) == 4 * 80
  assert tree.nbytes({'a': np.zeros(3, np.int8), 'b': np.zeros((), np.float64)}) == 11
  huge = jax.ShapeDtypeStruct((1 << 20, 1 << 18), jnp.bfloat16)  # 2^38 elements overflow int32
  assert tree.count({'w': huge}) == 1 << 38 and tree.nbytes({'w': huge}) == 1 << 39
  assert tree.count({}) == 0


def test_rename_applies_all_rules_in_order():
  flat = {'model/h/0/attn': 1, 'model/wte': 2}
  rules = [
    ('^model/', ''),
    (r'^h/(\d+)', r'layers/block_\1'),
    ('attn$', 'mixer'),
    ('mixer', 'mixer/q'),
  ]
  assert tree.rename(flat, rules) == {'layers/block_0/mixer/q': 1, 'wte': 2}
  assert tree.rename(flat, []) == flat


def test_rename_refuses_to_lose_a_parameter():
  with pytest.raises(
    UserError, match=r"two parameters to 'x', the second is 'b'.*narrow the regex"
  ):
    tree.rename({'a': 1, 'b': 2}, [('a|b', 'x')])


def test_map_paths_over_several_trees():
  out = tree.map_paths(
    lambda path, a, b: f'{path}:{a + b}', {'x': 1, 'y': {'z': 2}}, {'x': 10, 'y': {'z': 20}}
  )
  assert out == {'x': 'x:11', 'y': {'z': 'y/z:22'}}
