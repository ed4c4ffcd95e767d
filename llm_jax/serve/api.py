"""What clients may send: OpenAI's request bodies as pydantic models, and the errors they get back.

Beside OpenAI's fields both kinds of completion take ours, the other fields of `decode.logits.Sampling`. A field that is
not known is refused with the nearest name, as a config would be; values are not converted ("5" is no number).
"""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_jax.core.errors import UserError
from llm_jax.decode import logits
from llm_jax.serve.requests import MOST_TOP


class Limits(NamedTuple):
  """What one request may cost. body: bytes; max_tokens: of one answer, None for what the context holds; n: answers per
  prompt; prompts: per request; stop: strings; timeout: seconds for everything; embeddings: requests at a time.
  """

  body: int = 4 << 20
  max_tokens: int | None = None
  n: int = 16
  prompts: int = 128
  stop: int = 16
  timeout: float = 600.0
  embeddings: int = 8


class Refused(Exception):
  """A request that gets an error in OpenAI's shape. param: the field that is to blame."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: float | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.retry_after = retry_after

  def body(self) -> dict[str, Any]:
    """The JSON that says so."""
    return dict(
      error=dict(message=self.message, type=_type(self.status), param=self.param, code=self.code)
    )

  def headers(self) -> dict[str, str]:
    """With Retry-After in whole seconds where trying again may help."""
    if self.retry_after is None:
      return {}
    return {'retry-after': str(max(1, int(-(-self.retry_after // 1))))}


def _type(status: int) -> str:
  names = {401: 'authentication_error', 403: 'permission_error', 404: 'not_found_error'}
  names[429] = 'rate_limit_error'
  return names.get(status, 'invalid_request_error' if status < 500 else 'server_error')


class ErrorBody(BaseModel):
  """The shape of every error."""

  class Error(BaseModel):
    """What went wrong, and which field is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None

  error: Error


class _Strict(BaseModel):
  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)

  @model_validator(mode='before')
  @classmethod
  def _is_text(cls, given: Any) -> Any:
    """JSON can spell half of a surrogate pair, which no tokenizer reads and no response can hold."""
    if not isinstance(given, dict):
      return given
    try:
      json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
      raise ValueError('a string holds half of a surrogate pair (\\ud800 to \\udfff)') from e
    except RecursionError as e:
      raise ValueError('the body is nested too deeply') from e
    return given


class _Open(BaseModel):
  """Parts of a message may carry more than we read."""

  model_config = ConfigDict(strict=True, extra='ignore', allow_inf_nan=False)


# --- what both kinds of completion have in common -----------------------------------------------------

Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
Texts, Rows = Annotated[list[str], Field(min_length=1)], Annotated[list[Ids], Field(min_length=1)]
Inputs = str | Texts | Ids | Rows
Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]

# The name of a field where it is not that of `logits.Sampling`.
RENAMED = dict(presence='presence_penalty', frequency='frequency_penalty')


class StreamOptions(_Open):
  """include_usage: whether the numbers of tokens follow the last piece."""

  include_usage: bool = False


class Common(_Strict):
  """The fields that completions and chat completions share; null is as good as leaving a field out."""

  model: str | None = None
  n: Annotated[int, Field(ge=1, le=1024)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
  stop: str | list[str] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  logit_bias: dict[str, Penalty] | None = Field(None, description='id as a string: what is added')
  temperature: Temperature | None = None
  top_p: Share | None = None
  presence_penalty: Penalty | None = None
  frequency_penalty: Penalty | None = None
  top_k: Count | None = Field(None, description='draw from this many; 0 from all')
  min_p: Share | None = Field(None, description='of the largest probability')
  typical: Share | None = Field(None, description='locally typical sampling')
  epsilon: Share | None = Field(None, description='the least probability')
  eta: Share | None = Field(None, description='eta sampling')
  repetition: Annotated[float, Field(ge=0.01, le=100)] | None = Field(None, description="CTRL's")
  no_repeat_ngram: Annotated[int, Field(ge=0, le=64)] | None = Field(None, description='0 is off')
  user: str | None = Field(None, description='for the record of the client; not read')
  metadata: dict[str, Any] | None = Field(None, description='not read')
  store: bool | None = Field(None, description='not read: nothing is stored')
  service_tier: str | None = Field(None, description='not read: there is one')
  safety_identifier: str | None = Field(None, description='not read')
  prompt_cache_key: str | None = Field(None, description='not read: every prefix is shared')

  def sampling(self) -> logits.Sampling:
    """The settings of the sampler; raises `Refused` for one outside its range."""
    chosen = {}
    for name in logits.Sampling._fields:
      field = RENAMED.get(name, name)
      value = getattr(self, field)
      if value is None:
        continue
      try:
        logits.check(**{name: value})
      except UserError as e:
        raise Refused(400, str(e).replace(name, field, 1), param=field) from e
      if name == 'temperature' and 0 < value < 1e-3:  # in f32 the quotients would overflow
        raise Refused(400, 'temperature must be 0 or at least 0.001', param=field)
      chosen[name] = value
    return logits.Sampling(**chosen)

  def stops(self, limits: Limits) -> list[str]:
    """The stop strings; raises `Refused` where there are too many."""
    found = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
    if len(found) > limits.stop:
      raise Refused(400, f'at most {limits.stop} stop strings, got {len(found)}', param='stop')
    return [s for s in found if s]

  def bias(self, vocab: Any) -> tuple[tuple[int, float], ...]:
    """logit_bias as (id, number) pairs; raises `Refused` for what is no id."""
    found = []
    for key, value in (self.logit_bias or {}).items():
      if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab.size):
        words = f'logit_bias: {key[:20]!r} is not the id of a token, 0 to {vocab.size - 1}'
        raise Refused(400, words, param='logit_bias')
      found.append((int(key), float(value)))
    if len(found) > 300:
      raise Refused(400, f'at most 300 biases, got {len(found)}', param='logit_bias')
    return tuple(found)


class Completion(Common):
  """POST /v1/completions. prompt: a text, several, the ids of one, or the ids of several."""

  prompt: Inputs = ''
  max_tokens: Count | None = None
  echo: bool | None = None
  best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
  logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
  suffix: str | None = None


# --- chat ---------------------------------------------------------------------------------------------


class Part(_Open):
  """A piece of a message; of the kinds that OpenAI has, the model reads text."""

  type: str
  text: str | None = None


class Function(_Open):
  """What was called: a name and its arguments as JSON text."""

  name: str
  arguments: str = '{}'


class ToolCall(_Open):
  """A call that the assistant made earlier in the conversation."""

  id: str = ''
  type: Literal['function'] = 'function'
  function: Function


class Message(_Open):
  """One message. tool_calls: of the assistant; tool_call_id: of a tool's answer."""

  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[Part] | None = None
  name: str | None = None
  tool_calls: list[ToolCall] | None = None
  tool_call_id: str | None = None


class Signature(_Open):
  """A function that the model may call; parameters: a JSON schema."""

  name: Annotated[str, Field(pattern=r'^[a-zA-Z0-9_.-]{1,64}$')]
  description: str | None = None
  parameters: dict[str, Any] | None = None
  strict: bool | None = None


class Tool(_Open):
  """Only functions are tools here."""

  type: Literal['function']
  function: Signature


class Chosen(_Open):
  """tool_choice that names the function."""

  class Name(_Open):
    """Its name."""

    name: str

  type: Literal['function']
  function: Name


class Schema(_Open):
  """A JSON schema with a name."""

  name: str = 'answer'
  description: str | None = None
  schema_: dict[str, Any] = Field(alias='schema')
  strict: bool | None = None


class ResponseFormat(_Open):
  """What the answer has to be: text, any JSON object, or JSON of a schema."""

  type: Literal['text', 'json_object', 'json_schema']
  json_schema: Schema | None = None


class Chat(Common):
  """POST /v1/chat/completions."""

  messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
  max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
  max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
  response_format: ResponseFormat | None = None
  tools: Annotated[list[Tool], Field(max_length=128)] | None = None
  tool_choice: Literal['none', 'auto', 'required'] | Chosen | None = None
  parallel_tool_calls: bool | None = None


class Embedding(_Strict):
  """POST /v1/embeddings. input: a text, several, the ids of one, or the ids of several."""

  model: str | None = None
  input: Inputs
  encoding_format: Literal['float', 'base64'] | None = None
  dimensions: Annotated[int, Field(ge=1)] | None = None
  user: str | None = None
