"""Mixtures of experts: Mixtral, Qwen2-MoE, Switch Transformer.

Balance and z losses are a choice of training, not of a checkpoint: imported models have none until
`--config.model.block.ffn.balance` and `z_loss` say otherwise.
"""

import copy

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.architectures import llama, t5
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import ENCODER, LAYER, UP, Family, Row
from llm_jax.model import dispatch, ffn, routers
from llm_jax.model.moe import MoE, Weighed

DOWN, ROUTER = 'd f -> f d', 'e d -> d e'


def mixtral(c: Settings) -> ConfigDict:
  """Mixtral 8x7B and 8x22B (arXiv:2401.04088): LLaMA with a mixture in every layer."""
  model = llama.llama(c)
  model.block.ffn = use(
    MoE,
    experts=settings.get(c, 'num_local_experts'),
    expert=_gated(c, 'intermediate_size'),
    top_k=settings.get(c, 'num_experts_per_tok'),
    router=use(routers.top_k_softmax),
    jitter=float(c.get('router_jitter_noise') or 0.0),
  )
  return model


def qwen2_moe(c: Settings) -> ConfigDict:
  """Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): small experts, and a shared one weighed by a sigmoid."""
  settings.expect(c, mlp_only_layers=[])
  model = llama.qwen2(c)
  normalised = c.get('norm_topk_prob', False)
  routed = use(
    MoE,
    experts=settings.get(c, 'num_experts'),
    expert=_gated(c, 'moe_intermediate_size'),
    top_k=settings.get(c, 'num_experts_per_tok'),
    router=use(routers.top_k_softmax if normalised else routers.softmax_top_k),
    shared=use(Weighed, ffn=_gated(c, 'shared_expert_intermediate_size')),
  )
  step = c.get('decoder_sparse_step', 1)
  return _some(model, '', routed, step, step - 1)


def switch(c: Settings) -> ConfigDict:
  """Switch Transformer (arXiv:2101.03961): T5 1.0 with a mixture in some layers, tokens dropped beyond a capacity."""
  settings.expect(c, router_bias=False, router_ignore_padding_tokens=False, router_dtype='float32')
  name = settings.get(c, 'dense_act_fn')
  model = t5.t5(dict(c, feed_forward_proj=name))
  routed = use(
    MoE,
    experts=settings.get(c, 'num_experts'),
    expert=use(ffn.MLP, hidden=settings.get(c, 'd_ff'), activation=settings.activation(name)),
    top_k=1,
    router=use(routers.switch),
    dispatch=use(dispatch.limited, slots=settings.get(c, 'expert_capacity')),
    jitter=float(c.get('router_jitter_noise') or 0.0),
  )
  for side, layers in (('', model.layers), ('encoder_', model.encoder_layers)):
    sparse = c.get(f'num_sparse_{side or "decoder_"}layers', 0)
    step = layers // sparse if sparse else 0
    model = _some(model, side, routed, step, min(1, step - 1)) if sparse else model
  return model


def _gated(c: Settings, hidden: str) -> ConfigDict:
  name = settings.get(c, 'hidden_act')
  return use(ffn.Gated, hidden=settings.get(c, hidden), activation=settings.activation(name))


def _some(model: ConfigDict, side: str, routed: ConfigDict, step: int, at: int) -> ConfigDict:
  """The model with `routed` in layers `at`, `at + step`, ... of one side; what no pattern fills is a segment."""
  layers, dense = model[f'{side}layers'], model[f'{side}block']
  mixed = copy.deepcopy(dense)
  mixed.ffn = copy.deepcopy(routed)
  pattern = tuple(mixed if i == at else dense for i in range(step))
  rest = layers % step
  with model.ignore_type():
    model[f'{side}block'] = pattern if not rest else (pattern, pattern[:rest])
    model[f'{side}layers'] = layers if not rest else (layers - rest, rest)
  return model


def _experts(under: str, router: str, experts: str, names: dict[str, str]) -> tuple[Row, ...]:
  """Before the rows of dense layers, whose paths are the same: the first row that applies fills a path."""
  needs = f'{under}ffn/router'
  return (
    Row(needs, f'{router}.weight', ROUTER),
    *(
      Row(f'{under}ffn/{ours}', f'{experts}{theirs}.weight', UP if ours != 'down' else DOWN, needs=needs)
      for ours, theirs in names.items()
    ),
  )  # fmt: skip


def _switch_rows() -> tuple[Row, ...]:
  found = []
  for side, under, last in (('encoder', ENCODER, 1), ('decoder', LAYER, 2)):
    at = f'{side}.block.*.layer.{last}.mlp.'
    found += _experts(
      under, f'{at}router.classifier', f'{at}experts.expert_#.', dict(up='wi', down='wo')
    )
  dense = (r._replace(theirs=r.theirs.replace('DenseReluDense', 'mlp')) for r in t5.T5.rows)
  return (*found, *dense)


_SHARED = 'layers.*.mlp.shared_expert'
_QWEN = dict(gate='gate_proj', up='up_proj', down='down_proj')
FAMILIES = dict(
  mixtral=Family(
    mixtral,
    (
      *_experts(
        LAYER,
        'layers.*.block_sparse_moe.gate',
        'layers.*.block_sparse_moe.experts.#.',
        dict(gate='w1', up='w3', down='w2'),
      ),
      *llama.LLAMA,
    ),
    'model.',
  ),
  qwen2_moe=Family(
    qwen2_moe,
    (
      *_experts(LAYER, 'layers.*.mlp.gate', 'layers.*.mlp.experts.#.', _QWEN),
      *(
        Row(
          f'{LAYER}ffn/shared/ffn/{ours}',
          f'{_SHARED}.{theirs}.weight',
          UP if ours != 'down' else DOWN,
        )
        for ours, theirs in _QWEN.items()
      ),
      Row(f'{LAYER}ffn/shared/weigh', f'{_SHARED}_gate.weight', '() d -> d'),
      *llama.LLAMA,
    ),
    'model.',
  ),
  switch_transformers=Family(switch, _switch_rows(), '', t5.T5.ignored),
)
