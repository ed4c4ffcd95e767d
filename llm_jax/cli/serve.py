r"""A model behind OpenAI's API, and a page to talk to it, until SIGTERM or Ctrl-C.

  llm-jax serve --workdir=runs/smollm2
  llm-jax serve --workdir=DIR --host=0.0.0.0 --port=80 --api_key=...
  llm-jax serve --workdir=DIR --mesh=tensor=4

Causal and prefix decoders are served, and encoder-decoders such as T5, whose encoder reads the prompt.
`/v1/chat/completions` (for models with a chat template), `/v1/completions`, `/v1/embeddings` (of decoders) and
`/v1/models`; the page is at `/`; `/health`, `/ready` and `/metrics` are for whoever looks after it. Only this machine
is served unless --host and --api_key say otherwise; the key may stand in the variable LLM_JAX_API_KEY instead, where
other users do not see it.
--mesh=tensor=4 splits weights, keys and values over 4 devices of this machine (llm_jax/serve/placement.py).
"""

import contextlib
import os
import sys
from typing import Any

import jax
from absl import flags

from llm_jax.cli.flags import mesh_sizes, parse
from llm_jax.cli.generate import load
from llm_jax.cli.main import main as command
from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import prompts
from llm_jax.model import stack
from llm_jax.serve.api import Limits


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = _flags()
  if parse(argv, given, __doc__):
    raise UserError(
      'serve reads the config of the run: leave out --config and name the run with --workdir=DIR'
    )
  key = given.api_key or os.environ.get('LLM_JAX_API_KEY') or None
  from llm_jax.serve import server

  try:
    with server.listen(given.host, given.port, key) as sock:  # before the weights are read
      made = _app(given, key)
      host, port = sock.getsockname()[:2]
      where = f'http://{f"[{host}]" if ":" in host else host}:{port}'
      name = made.state.service.name
      print(f'llm-jax: {name} answers at {where} (API under /v1, Ctrl-C ends it)', flush=True)
      server.run(made, sock, drain=given.drain)
  except KeyboardInterrupt:  # before it answers; afterwards it drains
    return 130
  return 0


def _app(given: flags.FlagValues, key: str | None) -> Any:
  """The application over the model of the run."""
  from llm_jax.serve import server

  sizes = {n: given[n].value for n in ('rows', 'length', 'pages', 'memory', 'kv', 'queue')}
  with _devices(given.mesh):
    model, params, words = load(given.workdir, given.step, _laid)
    from llm_jax.serve import engine as engine_lib

    print('llm-jax: compiling', file=sys.stderr, flush=True)
    params, allowed = stack.apart(params, free=True), prompts.drawable(model, words)
    engine = engine_lib.Engine(model, params, allowed=allowed, **sizes)
  name = given.name or os.path.basename(os.path.abspath(os.path.expanduser(given.workdir)))
  limits = Limits(max_tokens=given.max_tokens, body=given.max_body, timeout=given.timeout)
  return server.app(engine, words, name, api_key=key, limits=limits)


def _devices(sizes: str | None) -> Any:
  """What puts the mesh of `--mesh` in force; without one there is one device."""
  if sizes is None:
    return contextlib.nullcontext()
  return jax.set_mesh(mesh.make(**dict(data=1) | mesh_sizes(sizes)))


def _laid(model: Any, shapes: Any) -> Any:
  """The shapes of the parameters with the devices they are for, where the engine takes the model at all."""
  from llm_jax.serve import placement, reading

  reading.kind(model)
  return placement.find(model).laid(model, shapes)


def _flags() -> flags.FlagValues:
  values, limits = flags.FlagValues(), Limits()
  at = dict(flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder of the run, as given to llm-jax train', **at)
  flags.DEFINE_integer('step', None, 'step of the checkpoint; default the newest', **at)
  flags.DEFINE_string(
    'name', None, 'of the model, for clients; default the name of the folder', **at
  )
  flags.DEFINE_string('host', '127.0.0.1', 'address to listen at; another needs --api_key', **at)
  flags.DEFINE_integer(
    'port', 8000, 'port; 0 takes a free one', lower_bound=0, upper_bound=65535, **at
  )
  flags.DEFINE_string('api_key', None, 'what clients have to show; default $LLM_JAX_API_KEY', **at)
  devices = 'devices that split the model among them, such as tensor=4; default one'
  flags.DEFINE_string('mesh', None, devices, **at)
  flags.DEFINE_integer('rows', 32, 'requests answered at once', lower_bound=1, **at)
  flags.DEFINE_integer('queue', 256, 'requests that may wait', lower_bound=1, **at)
  flags.DEFINE_integer('length', None, "prompt and answer; default the model's context", **at)
  flags.DEFINE_integer('pages', None, 'of the cache of keys and values; default enough', **at)
  flags.DEFINE_float('memory', 1.0, 'GiB of a device for keys and values, without --pages', **at)
  flags.DEFINE_enum('kv', None, ['int8'], 'keys and values in a byte a number', **at)
  flags.DEFINE_integer('max_tokens', None, 'of one answer; default what the context holds', **at)
  flags.DEFINE_integer('max_body', limits.body, 'bytes of a request', lower_bound=1024, **at)
  flags.DEFINE_float('timeout', limits.timeout, 'seconds for a request', lower_bound=0.1, **at)
  flags.DEFINE_float('drain', 30.0, 'seconds to finish after SIGTERM', lower_bound=0.0, **at)
  return values


if __name__ == '__main__':  # python -m llm_jax.cli.serve
  sys.exit(command(['serve', *sys.argv[1:]]))
