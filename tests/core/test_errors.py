from llm_jax.core.errors import UserError, nearest


def test_nearest_names_the_close_one():
  assert nearest('bacth', ['batch', 'length']) == "did you mean 'batch'?"


def test_nearest_lists_all_when_none_is_close():
  assert nearest('zzz', ['length', 'batch']) == 'known: batch, length'
  assert nearest('zzz', []) == 'known: none'


def test_a_user_error_is_a_value_error():
  assert issubclass(UserError, ValueError)
