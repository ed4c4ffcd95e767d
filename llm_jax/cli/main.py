"""`llm-jax COMMAND ...`: finds the command and turns a `UserError` into one line and exit code 2."""

import importlib
import os
import sys

from llm_jax.core.errors import UserError, nearest

COMMANDS = dict(
  train='train or go on training: --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]',
  generate='text from a trained model: --workdir=DIR --prompt=TEXT, or --chat',
  serve="a model behind OpenAI's API, and a page to talk to it: --workdir=DIR",
  describe='sizes, FLOPs and memory of a published model or a config: --model=NAME [--mesh=fsdp=16,tensor=4]',
  sweep='many trainings, here or on a cluster: --config=FILE.py --workdir=DIR [--workers=N] [--index=K]',
  fit='scaling laws of a sweep, and the best model for a budget: --workdir=DIR [--budget=FLOPS]',
  convert='weights from elsewhere as a run, or the reverse: --from=gguf --path=FILE --to=DIR',
)


def main(argv: list[str] | None = None) -> int:
  """Runs one command; the return value is the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print('usage: llm-jax COMMAND [--flag=value ...]\n')
    print('\n'.join(f'  {name:10}{what}' for name, what in COMMANDS.items()))
    print('\nllm-jax COMMAND --help lists the flags of a command.')
    return 0 if argv else 2
  try:
    if argv[0] not in COMMANDS:
      raise UserError(f'no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}')
    return importlib.import_module(f'llm_jax.cli.{argv[0]}').main(argv[1:]) or 0
  except UserError as e:
    print(f'llm-jax: error: {e}', file=sys.stderr)
  except BrokenPipeError:  # `| head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as e:  # a full disk, a folder that cannot be written, a path that is a file
    reason, name = (e.strerror or str(e)).lower(), e.filename or 'no file named'
    print(f'llm-jax: error: {reason} ({name}): check the path and the space left', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(main())
