"""Lists the commands: python -m dualformer_jax."""

import ast
import pathlib

from dualformer_jax import command_line

COMMANDS = (
  'main',
  'convert',
  'predict',
  'probe',
  'gradcam',
  'export',
  'demo',
  'complexity',
  'plan',
  'token_labels',
)


def main() -> None:
  """Prints each command with the first line of its docstring."""
  print('Usage: python -m dualformer_jax.COMMAND --help\n\nCommands:')
  for name in COMMANDS:
    source = pathlib.Path(__file__).with_name(f'{name}.py').read_text('utf-8')
    summary = (ast.get_docstring(ast.parse(source)) or '').splitlines()[0]
    print(f'  {name:14}{summary}')


if __name__ == '__main__':
  command_line.run(main)
