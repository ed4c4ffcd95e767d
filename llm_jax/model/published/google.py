"""T5 and its descendants, PaLM, LaMDA, GLaM; Gopher, Chinchilla, AlphaCode; GLM, AlexaTM, ERNIE."""

from llm_jax.model.published.row import HUGGINGFACE, Row

RMS_NORM = dict(fn='norms:RMSNorm', eps=1e-6)
UNTIED = 'heads:Untied'
SCALED = dict(fn='heads:Tied', scaled=True)  # of a table of N(0, 1)
T5 = dict(
  kind='encoder_decoder',
  norm=RMS_NORM,
  bias='positions:Buckets',
  scale=1.0,
  head=SCALED,
  init='init:t5',
  length=512,
  vocab=32_128,
)
GATED = dict(T5, gated=True, activation='ffn:gelu_tanh', head=UNTIED, head_dim=64)
PALM = dict(
  norm=dict(fn='norms:LayerNorm', bias=False),
  residual='norms:parallel',
  rotate='positions:rope',
  gated=True,
  activation='ffn:silu',
  head=SCALED,
  init='init:palm',
  groups=1,
  head_dim=256,
  vocab=256_000,
  length=2048,
)
GOPHER = dict(
  norm=RMS_NORM,
  relative='positions:TransformerXL',
  activation='ffn:gelu',
  vocab=32_000,
  length=2048,
)
POST = dict(
  norm=dict(fn='norms:LayerNorm'), residual='norms:post', final_norm=False, attention_bias=True,
  ffn_bias=True, activation='ffn:gelu',
)  # fmt: skip


def sizes(layers: int, heads: int, embed: int, hidden: int, head_dim: int | None = None) -> dict:
  """The numbers that differ along a ladder."""
  return dict(layers=layers, heads=heads, embed=embed, hidden=hidden, head_dim=head_dim)


def both(layers: int, heads: int, embed: int, hidden: int) -> dict:
  """Encoder and decoder of as many layers."""
  return dict(layers=layers, encoder_layers=layers, heads=heads, embed=embed, hidden=hidden)


_T5 = 'Raffel et al. 2020, arXiv:1910.10683, section 3.7'
_FLAN = 'Chung et al. 2022, arXiv:2210.11416 (Flan-T5)'
_MT5 = 'Xue et al. 2021, arXiv:2010.11934, table 1'
_PALM = 'Chowdhery et al. 2022, arXiv:2204.02311, table 1'
_GOPHER = 'Rae et al. 2021, arXiv:2112.11446, table 1'
_GATED_SIZES = (
  ('small', (8, 6, 512, 1024)),
  ('base', (12, 12, 768, 2048)),
  ('large', (24, 16, 1024, 2816)),
  ('xl', (24, 32, 2048, 5120)),
  ('xxl', (24, 64, 4096, 10240)),
)
_MATRICES = (
  'counted are the matrices: without norms and without the two position biases of Transformer-XL; closes '
  'only with its projection of the relative positions, though the survey says T5 biases'
)

CARDS = {
  **{
    f't5_{name}': Row(
      _T5, printed, figure, dict(T5, **size, activation='ffn:relu'), HUGGINGFACE,
      closes=name != 'large',
      note='the paper prints 770M, the released checkpoint has 738M' if name == 'large' else '',
    )
    for name, size, printed, figure in (
      ('small', dict(both(6, 8, 512, 2048), head_dim=64), '60M', 60_506_624),
      ('base', dict(both(12, 12, 768, 3072), head_dim=64), '220M', 222_903_552),
      ('large', dict(both(24, 16, 1024, 4096), head_dim=64), '770M', 737_668_096),
      ('3b', dict(both(24, 32, 1024, 16384), head_dim=128), '3B', 2_851_598_336),
      ('11b', dict(both(24, 128, 1024, 65536), head_dim=128), '11B', 11_307_321_344),
    )
  },
  **{
    f't5_v1.1_{name}': Row(
      _FLAN, printed, figure, dict(GATED, **both(*size)), 'checkpoint',
      note='transformers 5 ties the head of the class whatever the config says; the checkpoint has its own',
    )
    for (name, size), printed, figure in zip(
      _GATED_SIZES,
      ('80M', '250M', '780M', '3B', '11B'),
      (76_961_152, 247_577_856, 783_150_080, 2_849_757_184, 11_135_332_352),
      strict=True,
    )
  },
  **{
    f'mt5_{name}': Row(
      _MT5, printed, figure, dict(GATED, **both(*size), vocab=250_112, length=1024), 'checkpoint'
    )
    for (name, size), printed, figure in zip(
      _GATED_SIZES,
      ('300M', '580M', '1.2B', '3.7B', '13B'),
      (300_176_768, 582_401_280, 1_229_581_312, 3_742_619_648, 12_921_057_280),
      strict=True,
    )
  },
  'ul2_20b': Row(
    'Tay et al. 2022, arXiv:2205.05131',
    '20B',
    19_459_613_696,
    dict(
      T5, **both(32, 16, 4096, 16384), head_dim=256, gated=True, activation='ffn:silu'
    ),
    HUGGINGFACE,
    note='with a tied head; an untied one has 131,596,288 more',
  ),
  **{
    f'palm_{name}': Row(
      _PALM, printed, figure, dict(PALM, **sizes(layers, heads, embed, 4 * embed, 256)),
      note='the paper seems to leave out the scales of the norms: without them 540.354B and 62.495B' * (name != '8b'),
    )
    for name, layers, heads, embed, printed, figure in (
      ('8b', 32, 16, 4096, '8.63B', 8_632_012_800),
      ('62b', 64, 32, 8192, '62.50B', 62_495_662_080),
      ('540b', 118, 48, 18432, '540.35B', 540_356_474_880),
    )
  },
  'lamda_137b': Row(
    'Thoppilan et al. 2022, arXiv:2201.08239, section 3',
    '137B',
    137_438_953_472,
    dict(
      sizes(64, 128, 8192, 65536, 128),
      norm=dict(fn='norms:LayerNorm', bias=False),
      bias='positions:Buckets',
      gated=True,
      activation='ffn:gelu',
      vocab=32_000,
      length=1024,
    ),
    without='^embedding|norm|^decoder/bias',
    note='137B are the matrices of the layers; the paper does not name the norm, nor the context: here 1,024',
  ),
  'glam_64b_64e': Row(
    'Du et al. 2022, arXiv:2112.06905, table 4',
    '1.2T',
    1_161_738_321_920,
    dict(
      sizes(64, 128, 8192, 32768, 128),
      norm=RMS_NORM,
      bias='positions:Buckets',
      activation='ffn:gelu',
      experts=64,
      top_k=2,
      every=2,
      dense=dict(gated=True),
      vocab=256_000,
      length=1024,
    ),
    active='96.6B',
    active_figure=96_586_432_512,
    without='norm|router|^decoder/bias',
    note=(
      'counted are embedding, attention and feed-forwards: without norms, routers and position biases; closes with '
      'gated dense layers and experts without a gate'
    ),
  ),
  **{
    f'gopher_{name}': Row(
      _GOPHER, printed, figure, dict(GOPHER, **sizes(layers, heads, embed, 4 * embed, head_dim)),
      without='norm|(content|position)_bias', note=_MATRICES,
    )
    for name, layers, heads, embed, head_dim, printed, figure in (
      ('44m', 8, 16, 512, 32, '44M', 43_646_976),
      ('117m', 12, 12, 768, 64, '117M', 116_588_544),
      ('417m', 12, 12, 1536, 128, '417M', 417_202_176),
      ('1.4b', 24, 16, 2048, 128, '1.4B', 1_374_158_848),
      ('7.1b', 32, 32, 4096, 128, '7.1B', 7_110_393_856),
      ('280b', 80, 128, 16384, 128, '280B', 279_697_162_240),
    )
  },
  'chinchilla_70b': Row(
    'Hoffmann et al. 2022, arXiv:2203.15556, table 4',
    '70B',
    70_055_362_560,
    dict(GOPHER, **sizes(80, 64, 8192, 32768, 128)),
    without='norm|(content|position)_bias',
    note=_MATRICES,
  ),
  'alphacode_41b': Row(
    'Li et al. 2022, arXiv:2203.07814, table 3',
    '41.1B',
    41_119_776_768,
    dict(
      sizes(56, 48, 6144, 24576, 128),
      kind='encoder_decoder',
      encoder_layers=8,
      groups=16,
      norm=RMS_NORM,
      bias='positions:Buckets',
      gated=True,
      activation='ffn:gelu',
      vocab=8000,
      length=1536,
    ),
    without='norm|/bias/',
    note='the paper names neither norm, positions nor activation: 41.1B closes with a gated feed-forward of 4 d',
  ),
  'glm_130b': Row(
    'Zeng et al. 2022, arXiv:2210.02414',
    '130B',
    128_697_769_984,
    dict(
      sizes(70, 96, 12288, 32768, 128),
      kind='prefix',
      norm=dict(fn='norms:LayerNorm'),
      residual=dict(fn='norms:deepnorm', alpha=(2 * 70) ** 0.5),
      final_norm=False,
      init=dict(fn='init:deepnorm', beta=(2 * 70) ** -0.5),
      rotate='positions:rope_interleaved',
      gated=True,
      activation='ffn:gelu',
      attention_bias=True,
      ffn_bias=True,
      embedding=dict(fn='heads:Embedding', gradient=0.1),
      vocab=150_528,
      length=2048,
    ),
    note='with a tied head; an untied one makes 130.5B. The vocabulary of 150,000 is padded to 150,528',
  ),
  'alexatm_20b': Row(
    'Soltan et al. 2022, arXiv:2208.01448',
    '19.75B',
    18_474_508_288,
    dict(
      sizes(32, 32, 4096, 16384),
      kind='encoder_decoder',
      encoder_layers=46,
      norm=dict(fn='norms:LayerNorm'),
      positions='positions:Learned',
      activation='ffn:gelu',
      attention_bias=True,
      ffn_bias=True,
      vocab=150_000,
      length=1024,
    ),
    closes=False,
    note=(
      'does not close: the published sizes give 18.5B, 19.1B with an untied head; the vocabulary is published as 150k '
      'and the feed-forward is not published, here 4 d'
    ),
  ),
  'ernie3_titan_260b': Row(
    'Wang et al. 2021, arXiv:2112.12731',
    '260B',
    261_431_820_288,
    dict(
      POST, **sizes(48, 192, 12288, 196_608), kind='prefix', positions='positions:Learned',
      vocab=40_000, length=512,
    ),
    note=(
      'the shared part; the 12 layers of 768 channels for each kind of task are left out. Neither the feed-forward nor '
      'the vocabulary is in the survey: 260B closes with 16 d, not with 4 d (87B)'
    ),
  ),
}  # fmt: skip
