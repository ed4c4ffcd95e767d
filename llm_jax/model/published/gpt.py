"""GPT and the decoders that follow it: LayerNorm, GELU, biases; learned positions, ALiBi or RoPE. And BERT."""

from llm_jax.model.published.row import HUGGINGFACE, Row

LAYER_NORM = dict(fn='norms:LayerNorm', eps=1e-5)
BERT_NORM = dict(fn='norms:LayerNorm', eps=1e-12)
NORMED = dict(fn='heads:Embedding', norm=LAYER_NORM)  # BLOOM's norm on the embedding
UNTIED = dict(fn='heads:Untied')

GPT = dict(
  norm=LAYER_NORM,
  positions='positions:Learned',
  activation='ffn:gelu_tanh',
  attention_bias=True,
  ffn_bias=True,
)
ALIBI = dict(GPT, positions=None, bias='positions:Alibi', embedding=NORMED)
NEOX = dict(
  GPT,
  positions=None,
  rotate=dict(fn='positions:rope', fraction=0.25),
  residual='norms:parallel_norms',
  activation='ffn:gelu',
  head=UNTIED,
)


def rotated(head_dim: int) -> dict:
  """RoPE on neighbouring pairs of the first 64 entries of a head."""
  return dict(fn='positions:rope_interleaved', fraction=64 / head_dim)


GPTJ = dict(
  GPT,
  positions=None,
  residual='norms:parallel',
  attention_bias=False,
  head=dict(fn='heads:Untied', bias=True),
)
FALCON = dict(
  GPT,
  positions=None,
  rotate='positions:rope',
  activation='ffn:gelu',
  attention_bias=False,
  ffn_bias=False,
  vocab=65_024,
  length=2048,
)


def sizes(layers: int, heads: int, embed: int) -> dict:
  """The three numbers that differ along a ladder; the feed-forward is 4 times as wide."""
  return dict(layers=layers, heads=heads, embed=embed, hidden=4 * embed)


_GPT1 = 'Radford et al. 2018, section 4.1'
_GPT2 = 'Radford et al. 2019, table 2'
_GPT3 = 'Brown et al. 2020, arXiv:2005.14165, table 2.1'
_OPT = 'Zhang et al. 2022, arXiv:2205.01068, table 1'
_BLOOM = 'Le Scao et al. 2022, arXiv:2211.05100, table 3'
_PYTHIA = 'Biderman et al. 2023, arXiv:2304.01373, table 1'
_FALCON = 'Almazrouei et al. 2023, arXiv:2311.16867'

_XL = 'the paper prints 24 heads of 128 for 2,048 channels: its own total closes with 16'
_13B = 'the paper prints 5,140 channels for 40 heads of 128: they are 5,120, which makes 12.9B of its 13.0B'
_BANDS = 'every other layer of the original attends in bands, whose width is not published; here all are dense'
_OFFSET = 'the original has two rows of positions before the first, which no token reads'

CARDS = {
  'gpt1': Row(
    _GPT1,
    '117M',
    116_534_784,
    dict(
      GPT, **sizes(12, 12, 768), vocab=40_478, length=512, residual='norms:post', final_norm=False
    ),
    HUGGINGFACE,
  ),
  **{
    name: Row(
      _GPT2, printed, figure, dict(GPT, **sizes(*size), vocab=50_257, length=1024), HUGGINGFACE,
      note=note,
    )
    for name, size, printed, figure, note in (
      ('gpt2', (12, 12, 768), '124M', 124_439_808, 'the paper prints 117M, the release corrected it'),
      ('gpt2_medium', (24, 16, 1024), '355M', 354_823_168, 'the paper prints 345M, the release corrected it'),
      ('gpt2_large', (36, 20, 1280), '774M', 774_030_080, 'the paper prints 762M, the release corrected it'),
      ('gpt2_xl', (48, 25, 1600), '1558M', 1_557_611_200, 'the paper prints 1542M, the release corrected it'),
    )
  },
  **{
    f'gpt3_{name}': Row(
      _GPT3, printed, figure, dict(GPT, **sizes(*size), vocab=50_257, length=2048),
      closes=name != '13b', note='; '.join(filter(None, (note, _BANDS))),
    )
    for name, size, printed, figure, note in (
      ('small', (12, 12, 768), '125M', 125_226_240, ''),
      ('medium', (24, 16, 1024), '350M', 355_871_744, ''),
      ('large', (24, 16, 1536), '760M', 760_300_032, ''),
      ('xl', (24, 16, 2048), '1.3B', 1_315_723_264, _XL),
      ('2.7b', (32, 32, 2560), '2.7B', 2_651_553_280, ''),
      ('6.7b', (32, 32, 4096), '6.7B', 6_658_404_352, ''),
      ('13b', (40, 40, 5120), '13.0B', 12_853_386_240, _13B),
      ('175b', (96, 96, 12288), '175B', 174_604_259_328, ''),
    )
  },
  **{
    f'opt_{name}': Row(
      _OPT, printed, figure,
      dict(GPT, **sizes(*size), vocab=50_272, length=2048, activation='ffn:relu'), HUGGINGFACE,
      lacks=2 * size[2], note=_OFFSET,
    )
    for name, size, printed, figure in (
      ('125m', (12, 12, 768), '125M', 125_239_296),
      ('1.3b', (24, 32, 2048), '1.3B', 1_315_758_080),
      ('2.7b', (32, 32, 2560), '2.7B', 2_651_596_800),
      ('6.7b', (32, 32, 4096), '6.7B', 6_658_473_984),
      ('13b', (40, 40, 5120), '13B', 12_853_473_280),
      ('30b', (48, 56, 7168), '30B', 29_974_540_288),
      ('66b', (64, 72, 9216), '66B', 65_719_701_504),
      ('175b', (96, 96, 12288), '175B', 174_604_468_224),
    )
  },
  **{
    f'bloom_{name}': Row(
      _BLOOM, printed, figure, dict(ALIBI, **sizes(*size), vocab=250_880, length=2048), HUGGINGFACE
    )
    for name, size, printed, figure in (
      ('560m', (24, 16, 1024), '559M', 559_214_592),
      ('1.1b', (24, 16, 1536), '1065M', 1_065_314_304),
      ('1.7b', (24, 16, 2048), '1722M', 1_722_408_960),
      ('3b', (30, 32, 2560), '3003M', 3_002_557_440),
      ('7.1b', (30, 32, 4096), '7069M', 7_069_016_064),
      ('176b', (70, 112, 14336), '176247M', 176_247_271_424),
    )
  },
  **{
    f'pythia_{name}': Row(
      _PYTHIA, printed, figure, dict(NEOX, **sizes(*size), vocab=vocab, length=2048), HUGGINGFACE
    )
    for name, size, vocab, printed, figure in (
      ('70m', (6, 8, 512), 50_304, '70M', 70_426_624),
      ('160m', (12, 12, 768), 50_304, '160M', 162_322_944),
      ('410m', (24, 16, 1024), 50_304, '410M', 405_334_016),
      ('1b', (16, 8, 2048), 50_304, '1.0B', 1_011_781_632),
      ('1.4b', (24, 16, 2048), 50_304, '1.4B', 1_414_647_808),
      ('2.8b', (32, 32, 2560), 50_304, '2.8B', 2_775_208_960),
      ('6.9b', (32, 32, 4096), 50_432, '6.9B', 6_857_302_016),
      ('12b', (36, 40, 5120), 50_688, '12B', 11_846_072_320),
    )
  },
  'gpt_neox_20b': Row(
    'Black et al. 2022, arXiv:2204.06745, section 2',
    '20B',
    20_554_567_680,
    dict(NEOX, **sizes(44, 64, 6144), vocab=50_432, length=2048),
    HUGGINGFACE,
  ),
  'gptj_6b': Row(
    'Wang & Komatsuzaki 2021 (mesh-transformer-jax)',
    '6,050,882,784',
    6_050_882_784,
    dict(GPTJ, **sizes(28, 16, 4096), rotate=rotated(256), vocab=50_400, length=2048),
    HUGGINGFACE,
  ),
  'codegen_16b': Row(
    'Nijkamp et al. 2022, arXiv:2203.13474',
    '16.1B',
    16_032_155_648,
    dict(GPTJ, **sizes(34, 24, 6144), rotate=rotated(256), vocab=51_200, length=2048),
    HUGGINGFACE,
    note='the survey has both 11B and 16B; the released model has 16.0B',
  ),
  'starcoder': Row(
    'Li et al. 2023, arXiv:2305.06161',
    '15.5B',
    15_517_456_384,
    dict(GPT, **sizes(40, 48, 6144), groups=1, vocab=49_152, length=8192),
    HUGGINGFACE,
  ),
  **{
    f'falcon_{name}': Row(
      _FALCON, printed, figure,
      dict(FALCON, **sizes(*size), groups=groups, residual=f'norms:{residual}'), HUGGINGFACE,
      note='the head is the embedding table, counted once',
    )
    for name, size, groups, residual, printed, figure in (
      ('7b', (32, 71, 4544), 1, 'parallel', '7B', 6_921_720_704),
      ('40b', (60, 128, 8192), 8, 'parallel_norms', '40B', 41_303_293_952),
      ('180b', (80, 232, 14848), 8, 'parallel_norms', '180B', 178_557_088_768),
    )
  },
  'pangu_alpha_200b': Row(
    'Zeng et al. 2021, arXiv:2104.12369, table 1',
    '207B',
    206_844_231_680,
    dict(GPT, **sizes(64, 128, 16384), vocab=40_000, length=1024),
    note='the original puts a query layer on top, which is left out here; the survey calls it 207B and 200B',
  ),
  'mt_nlg_530b': Row(
    'Smith et al. 2022, arXiv:2201.11990, section 2',
    '530B',
    529_581_506_560,
    dict(GPT, **sizes(105, 128, 20480), vocab=50_257, length=2048),
    note='the survey leaves norm, positions, activation and biases open: those of GPT-3, on which it is based',
  ),
  'galactica_120b': Row(
    'Taylor et al. 2022, arXiv:2211.09085, table 5',
    '120.0B',
    121_330_903_040,
    dict(
      GPT,
      **sizes(96, 80, 10240),
      vocab=50_000,
      length=2048,
      norm=dict(LAYER_NORM, bias=False),
      attention_bias=False,
      ffn_bias=False,
      activation='ffn:gelu',
    ),
    closes=False,
    note='no biases, nor in the norms; the sizes in the paper give 121.3B',
  ),
  'jurassic1_178b': Row(
    'Lieber et al. 2021, table 1',
    '178B',
    177_866_855_424,
    dict(GPT, **sizes(76, 96, 13824), vocab=256_000, length=2048),
  ),
  'hyperclova_82b': Row(
    'Kim et al. 2021, arXiv:2109.04650, table 1',
    '82B',
    81_084_436_480,
    dict(GPT, **sizes(64, 80, 10240), vocab=51_200, length=2048),
    note='the vocabulary is published as about 51k: here 51,200',
  ),
  'bloomberggpt_50b': Row(
    'Wu et al. 2023, arXiv:2303.17564, table 4',
    '50,558,868,480',
    50_558_868_480,
    dict(ALIBI, **sizes(70, 40, 7680), vocab=131_072, length=2048),
    'paper',
  ),
  **{
    f'bert_{name}': Row(
      'Devlin et al. 2019, arXiv:1810.04805, section 3', printed, figure,
      dict(
        GPT, **sizes(*size), kind='encoder', vocab=30_522, length=512, residual='norms:post', norm=BERT_NORM,
        final_norm=False, positions=None, activation='ffn:gelu', classes=2,
        stem=dict(fn='heads:Stem', norm=BERT_NORM, types=2), head=dict(fn='heads:Masked', norm=BERT_NORM),
      ),
      HUGGINGFACE,
      without='^(head|classes)/',
      note='the figure is that of BertModel: without the heads of pre-training, for masked words and the next sentence',
    )
    for name, size, printed, figure in (
      ('base', (12, 12, 768), '110M', 109_482_240),
      ('large', (24, 16, 1024), '340M', 335_141_888),
    )
  },
}  # fmt: skip
