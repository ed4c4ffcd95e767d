"""Mamba, Mamba-2 and RWKV-4: mixers with a state, and no attention."""

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import LAYER, Family, Row, norm, rows
from llm_jax.model import block, heads, norms
from llm_jax.model.recurrent import mamba as mamba_lib
from llm_jax.model.recurrent import mamba2 as mamba2_lib
from llm_jax.model.recurrent import rwkv as rwkv_lib


def _decoder(c: Settings, norm: ConfigDict, head: ConfigDict, **mixers: ConfigDict) -> ConfigDict:
  """A causal decoder of blocks without a feed-forward."""
  layer = use(block.mixers, norm=norm, **mixers)
  return settings.decoder(c, norm=norm, head=head, block_of=lambda kind: layer)


def _mamba(c: Settings, mixer: ConfigDict, tied: bool) -> ConfigDict:
  settings.expect(c, hidden_act='silu')
  norm = use(norms.RMSNorm, eps=float(settings.get(c, 'layer_norm_epsilon', default=1e-5)))
  return _decoder(c, norm, settings.tied(c, tied), mixer=mixer)


def _shared(c: Settings) -> dict:
  """The fields that both Mambas have."""
  return dict(
    hidden=int(c.get('expand', 2) * settings.get(c, 'hidden_size')),
    state=settings.get(c, 'state_size'),
    taps=settings.get(c, 'conv_kernel', default=4),
    bias=c.get('use_bias', False),
    conv_bias=c.get('use_conv_bias', True),
  )


def mamba(c: Settings) -> ConfigDict:
  """Mamba (arXiv:2312.00752)."""
  rank = settings.get(c, 'time_step_rank', default='auto')
  rank = -(-settings.get(c, 'hidden_size') // 16) if rank == 'auto' else rank
  return _mamba(c, use(mamba_lib.Mamba, rank=rank, **_shared(c)), True)


def mamba2(c: Settings) -> ConfigDict:
  """Mamba-2 (arXiv:2405.21060)."""
  limit = settings.get(c, 'time_step_limit', default=(0.0, float('inf')))
  # transformers 5 writes an infinity, which JSON does not have, as {'__float__': 'Infinity'}
  low, high = (float(x['__float__'] if isinstance(x, dict) else x) for x in limit)
  mixer = use(
    mamba2_lib.Mamba2,
    head_dim=settings.get(c, 'head_dim'),
    groups=settings.get(c, 'n_groups', default=8),
    limit=(low, high),
    eps=float(settings.get(c, 'layer_norm_epsilon', default=1e-5)),
    **_shared(c),
  )
  return _mamba(c, mixer, False)


def rwkv(c: Settings) -> ConfigDict:
  """RWKV-4 (arXiv:2305.13048). `rescale_every` halves numbers for float16 and changes no logits."""
  norm = settings.layer_norm(c, 'layer_norm_epsilon')
  model = _decoder(
    c,
    norm,
    settings.tied(c, False),
    mixer=use(rwkv_lib.TimeMix, hidden=c.get('attention_hidden_size')),
    channel=use(rwkv_lib.ChannelMix, hidden=c.get('intermediate_size')),
  )
  model.embedding = use(heads.Embedding, norm=norm)
  return model


IN, TAPS = 'f d -> d f', 'f 1 c -> c f'
_ENDS = (
  Row('embedding/table', 'embeddings.weight', 'v d -> v d'),
  *norm('decoder/norm', 'norm_f'),
  Row('head/w', 'lm_head.weight', 'v d -> d v'),
  *norm(f'{LAYER}mixer_norm', 'layers.*.norm'),
)
_SPREAD = ' '.join(f'mixer/{name}' for name in ('gate', 'x', 'b', 'c', 'dt'))
_CONVS = ' '.join(f'mixer/{name}_conv' for name in 'xbc')


def _biases(names: str) -> str:
  return ' '.join(f'{name}_bias' for name in names.split())


MIXER = 'layers.*.mixer.'
MAMBA = (
  *_ENDS,
  *rows(
    LAYER,
    {
      'mixer/x mixer/gate': f'{MIXER}in_proj.weight | n d -> d n',
      'mixer/x_bias mixer/gate_bias': f'{MIXER}in_proj.bias | n -> n',
      'mixer/conv': f'{MIXER}conv1d.weight | {TAPS}',
      'mixer/conv_bias': f'{MIXER}conv1d.bias',
      'mixer/rank mixer/b mixer/c': f'{MIXER}x_proj.weight | n f -> f n',
      'mixer/step': f'{MIXER}dt_proj.weight | f r -> r f',
      'mixer/step_bias': f'{MIXER}dt_proj.bias',
      'mixer/log_rate': f'{MIXER}A_log | f s -> f s',
      'mixer/skip': f'{MIXER}D',
      'mixer/out': f'{MIXER}out_proj.weight | d f -> f d',
      'mixer/out_bias': f'{MIXER}out_proj.bias',
    },
  ),
)
MAMBA2 = (
  *_ENDS,
  *rows(
    LAYER,
    {
      _SPREAD: f'{MIXER}in_proj.weight | n d -> d n',
      _biases(_SPREAD): f'{MIXER}in_proj.bias | n -> n',
      _CONVS: f'{MIXER}conv1d.weight | n 1 c -> c n',
      _biases(_CONVS): f'{MIXER}conv1d.bias | n -> n',
      'mixer/step_bias': f'{MIXER}dt_bias',
      'mixer/log_rate': f'{MIXER}A_log',
      'mixer/skip': f'{MIXER}D',
      'mixer/norm_scale': f'{MIXER}norm.weight',
      'mixer/out': f'{MIXER}out_proj.weight | d f -> f d',
      'mixer/out_bias': f'{MIXER}out_proj.bias',
    },
  ),
)
TIME, CHANNEL, MIX = 'blocks.*.attention.', 'blocks.*.feed_forward.', '1 1 d -> d'
RWKV = (
  Row('embedding/table', 'embeddings.weight', 'v d -> v d'),
  *norm('embedding/norm', 'blocks.0.pre_ln'),
  *norm('decoder/norm', 'ln_out'),
  Row('head/w', 'head.weight', 'v d -> d v'),
  *norm(f'{LAYER}mixer_norm', 'blocks.*.ln1'),
  *norm(f'{LAYER}channel_norm', 'blocks.*.ln2'),
  *rows(
    f'{LAYER}mixer/',
    {
      'key_mix': f'{TIME}time_mix_key | {MIX}',
      'value_mix': f'{TIME}time_mix_value | {MIX}',
      'receptance_mix': f'{TIME}time_mix_receptance | {MIX}',
      'log_decay': f'{TIME}time_decay',
      'bonus': f'{TIME}time_first',
      'key': f'{TIME}key.weight | {IN}',
      'value': f'{TIME}value.weight | {IN}',
      'receptance': f'{TIME}receptance.weight | {IN}',
      'out': f'{TIME}output.weight | d f -> f d',
    },
  ),
  *rows(
    f'{LAYER}channel/',
    {
      'key_mix': f'{CHANNEL}time_mix_key | {MIX}',
      'receptance_mix': f'{CHANNEL}time_mix_receptance | {MIX}',
      'key': f'{CHANNEL}key.weight | {IN}',
      'receptance': f'{CHANNEL}receptance.weight | {IN}',
      'value': f'{CHANNEL}value.weight | d f -> f d',
    },
  ),
)
FAMILIES = dict(
  mamba=Family(mamba, MAMBA, 'backbone.'),
  mamba2=Family(mamba2, MAMBA2, 'backbone.'),
  rwkv=Family(rwkv, RWKV, 'rwkv.', ignored=('head.weight',)),
)
