"""RWKV-4, Mamba and Mamba-2: a state of constant size instead of keys and values."""

from llm_jax.model.published.row import HUGGINGFACE, Row

LAYER_NORM = dict(fn='norms:LayerNorm', eps=1e-5)
RWKV = dict(
  norm=LAYER_NORM,
  embedding=dict(fn='heads:Embedding', norm=LAYER_NORM),
  head='heads:Untied',
  mixer='recurrent.rwkv:TimeMix',
  channel='recurrent.rwkv:ChannelMix',
  vocab=50_277,
  length=1024,
)
NORM = dict(fn='norms:RMSNorm', eps=1e-5)
MAMBA = dict(norm=NORM, mixer='recurrent.mamba:Mamba', vocab=50_280, length=2048)
MAMBA2 = dict(norm=NORM, mixer='recurrent.mamba2:Mamba2', vocab=50_288, length=2048)

_RWKV = 'Peng et al. 2023, arXiv:2305.13048, table 2'
_MAMBA = 'Gu & Dao 2023, arXiv:2312.00752'
_MAMBA2 = 'Dao & Gu 2024, arXiv:2405.21060'
CARDS = {
  **{
    f'rwkv4_{name}': Row(
      _RWKV, printed, figure, dict(RWKV, layers=layers, embed=embed), HUGGINGFACE
    )
    for name, layers, embed, printed, figure in (
      ('169m', 12, 768, '169M', 169_342_464),
      ('430m', 24, 1024, '430M', 430_397_440),
      ('1.5b', 24, 2048, '1.5B', 1_515_106_304),
      ('3b', 32, 2560, '3B', 2_984_627_200),
      ('7b', 32, 4096, '7.4B', 7_392_649_216),
      ('14b', 40, 5120, '14B', 14_148_597_760),
    )
  },
  **{
    f'mamba_{name}': Row(
      _MAMBA, printed, figure, dict(MAMBA, layers=layers, embed=embed), HUGGINGFACE
    )
    for name, layers, embed, printed, figure in (
      ('130m', 24, 768, '130M', 129_135_360),
      ('370m', 48, 1024, '370M', 371_516_416),
      ('790m', 48, 1536, '790M', 793_204_224),
      ('1.4b', 48, 2048, '1.4B', 1_372_178_432),
      ('2.8b', 64, 2560, '2.8B', 2_768_345_600),
    )
  },
  **{
    f'mamba2_{name}': Row(
      _MAMBA2, printed, figure, dict(MAMBA2, layers=layers, embed=embed), HUGGINGFACE
    )
    for name, layers, embed, printed, figure in (
      ('130m', 24, 768, '130M', 128_989_632),
      ('370m', 48, 1024, '370M', 368_346_624),
      ('780m', 48, 1536, '780M', 780_161_280),
      ('1.3b', 48, 2048, '1.3B', 1_343_757_312),
      ('2.7b', 64, 2560, '2.7B', 2_702_599_680),
    )
  },
}  # fmt: skip
