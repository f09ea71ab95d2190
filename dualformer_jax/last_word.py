"""Tells of the end of a process that could not tell of it itself.

`main` is a process of its own, which processes.py starts, and through which
another passes all that it writes to stderr. JAX ends a process that has lost
another from within C++, with pages of text, and a killed one says nothing at
all: in place of these, this one writes what happened and what to do.

It imports little, to be there at once.
"""

import re
import signal
import sys

# Lines that are for this process: who the other one is (index, count, host),
# and that it ends as it wants to.
WHO = b'\0who '
FAREWELL = b'\0farewell\n'
AGAIN = (
  'Nothing that was saved is lost: run the same command again on all hosts, '
  'and it goes on from the newest checkpoint'
)

# How a line of a log begins; what does not begin so, goes on with the last.
_LOG_LINE = re.compile(rb'([IWEF])\d{4} [\d:.]+ +\d+ ([^: ]+):\d+\] ')
# Where JAX, in C++, tells of other processes.
_ABOUT_OTHERS = (
  b'add_port.cc',
  b'client.h',
  b'coordination_service',
  b'preemption_',
)
_SILENT = re.compile(rb'stopped sending heartbeats\):\s*(\d[\d, \n]*)')


def main() -> None:
  """Copies stdin to stderr until it ends; then tells, if nothing else has."""
  # Meant for the other process, after whose end this one ends.
  for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  who = ('?', '?', '?')
  # What JAX wrote of others; errors of Python's, of which the loss of another
  # may be the cause, until something else shows that the process goes on.
  held, pending = b'', b''
  kind = ''
  is_dying = False
  for line in sys.stdin.buffer:
    if line == FAREWELL:
      _write(pending)
      return
    if line.startswith(WHO):
      index, count, host = line[len(WHO) :].decode().split()
      who = (index, count, host)
      continue
    if line.startswith(b'error: '):
      kind = 'own'
    elif is_dying:
      kind = 'of others'
    elif begin := _LOG_LINE.match(line):
      level, file = begin.groups()
      if file.startswith(_ABOUT_OTHERS):
        kind = 'of others'
        is_dying = level == b'F'
      else:
        kind = 'pending' if level in b'EF' else 'own'
    elif line.startswith(b'Traceback ') and kind != 'own':
      kind = 'pending'
    if kind == 'of others':
      held += line
    elif kind == 'pending':
      pending += line
    else:
      _write(pending + line)
      pending = b''
  if not held:
    _write(pending)
  sys.stderr.write(explain(held, *who))


def _write(text: bytes) -> None:
  sys.stderr.buffer.write(text)
  sys.stderr.buffer.flush()


def explain(held: bytes, index: str, count: str, host: str) -> str:
  """Returns a line on why a process has ended.

  Args:
    held: what JAX wrote of others at the end.
    index: of the process.
    count: of all processes.
    host: where it ran.
  """
  me = f'process {index} of {count} on {host}'
  if b'/RegisterTask' in held:
    return (
      f'error: {me} waited in vain for the others: not all have started, or '
      'they do not reach the address of process 0; run the same command on all '
      'hosts at the same time\n'
    )
  if silent := _SILENT.search(held):
    lost = ', '.join(re.findall(r'\d+', silent[1].decode()))
  elif held and index != '0':
    lost = '0'
  else:
    return (
      f'error: {me} was killed (out of memory, perhaps) or has crashed. '
      f'{AGAIN}\n'
    )
  return (
    f'error: process {lost} of {count} does not answer any more: it was killed,'
    ' has crashed or is cut off, and its own log may tell why. '
    f'Therefore {me} ends, too. {AGAIN}\n'
  )
