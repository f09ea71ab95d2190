"""One run as many processes, which start together and end together.

Each has its own devices and its own rows of a batch, and all compute each step
together, so that one that ends leaves the others waiting. What ends one must
therefore end all, soon, and each must say why: of its own errors a process
tells the others through JAX's coordination service; of one that could not tell
anything, last_word.py does.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its store of keys has no public name

from dualformer_jax import last_word
from dualformer_jax.errors import UserError

# Exit status of what the same command goes on with (EX_TEMPFAIL).
LOST = 75

# For so long, processes that do not start at once wait for one another.
_START_SECONDS = 300
# Silent for so long, a process is given up.
_HEARTBEAT_SECONDS = 30
# So often each looks whether another has told of an error.
_POLL_SECONDS = 0.5
# And answers, in less than this.
_ANSWER_SECONDS = 6.0

_END = 'dualformer/end'
_HERE = 'dualformer/here'
_HOSTS = 'dualformer/hosts'


@contextlib.contextmanager
def joined(
  address: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> Iterator[None]:
  """Within it, this process computes together with all others of the run.

  If neither the arguments nor the environment speak of others, it is alone, and
  nothing changes. To be entered before JAX computes anything. Only the first
  process logs what it does; all log warnings.

  Args:
    address: HOST:PORT of process 0; None to take it from the environment.
    count: number of processes; None likewise.
    index: which of them this is, from 0; None likewise.

  Raises:
    UserError: the arguments do not make sense.
    SystemExit: what is within has raised it, in all processes alike. Errors do
      not come out: they are told, here and by all others, and end all.
  """
  options = find_others(address, count, index, os.environ)
  if options is None:
    yield
    return
  last_words = _LastWords()
  try:
    is_joined = _connect(options)
  except BaseException:
    last_words.close()
    raise
  if not is_joined:
    last_words.close()
    yield
    return
  run = _Run(last_words)
  try:
    yield
  except SystemExit:
    run.close()
    raise
  except BaseException as error:
    run.fail(error)
  run.close()


def find_others(
  address: str | None,
  count: int | None,
  index: int | None,
  environment: Mapping[str, str],
) -> dict[str, Any] | None:
  """Returns arguments of jax.distributed.initialize; None for one process.

  What is given counts, then what SLURM or Open MPI say; JAX itself adds what it
  knows, and asks the metadata of TPUs. Each process gets its share of the GPUs
  of its host.

  Args:
    address: HOST:PORT of process 0.
    count: number of processes.
    index: which of them this is, from 0.
    environment: variables, of which JAX_COORDINATOR_ADDRESS may be the address.

  Raises:
    UserError: one of the three is missing or out of range.
  """
  address = address or environment.get('JAX_COORDINATOR_ADDRESS')
  launched = _launched(environment)
  options = {
    **(launched or {}),
    **{
      name: value
      for name, value in (
        ('coordinator_address', address),
        ('num_processes', count),
        ('process_id', index),
      )
      if value is not None
    },
  }
  if launched is None and not options:
    return {} if _may_be_a_pod(environment) else None
  if options.get('num_processes') == 1:
    return None
  missing = [
    f'--{flag}'
    for flag in ('coordinator_address', 'num_processes', 'process_id')
    if flag not in options
  ]
  # JAX has the address from SLURM, and from Open MPI before version 5.
  knows_address = 'SLURM_STEP_NODELIST' in environment or (
    'OMPI_MCA_orte_hnp_uri' in environment
  )
  if missing and not (launched and knows_address):
    raise UserError(
      f'{" and ".join(missing)} must be given as well: --coordinator_address='
      'HOST:PORT of process 0 and --num_processes, the same everywhere, and '
      '--process_id, from 0'
    )
  if not re.fullmatch(r'.+:\d+', options.get('coordinator_address', 'a:1')):
    raise UserError(
      f'the coordinator address is {options["coordinator_address"]!r}; expected'
      ' HOST:PORT'
    )
  if not 0 <= options['process_id'] < options['num_processes']:
    raise UserError(
      f'--process_id is {options["process_id"]} and --num_processes is '
      f'{options["num_processes"]}; expected 0 to one less than their number'
    )
  return options


def _launched(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns what SLURM or Open MPI say of the processes; None for one."""

  def number(name: str, default: int = 0) -> int:
    value = environment.get(name, '')
    return int(value) if value.isdigit() else default

  # In a batch script, outside of srun, there is but one process.
  if number('SLURM_NTASKS') > 1 and 'SLURM_STEP_NODELIST' in environment:
    per_node = environment.get('SLURM_STEP_TASKS_PER_NODE', '')  # '4(x2),1'
    on_nodes = [
      int(tasks)
      for tasks, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', per_node)
      for _ in range(int(times or 1))
    ]
    node = number('SLURM_NODEID')
    launched = 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID'
    here = on_nodes[node] if node < len(on_nodes) else 1
  elif number('OMPI_COMM_WORLD_SIZE') > 1:
    launched = (
      'OMPI_COMM_WORLD_SIZE',
      'OMPI_COMM_WORLD_RANK',
      'OMPI_COMM_WORLD_LOCAL_RANK',
    )
    here = number('OMPI_COMM_WORLD_LOCAL_SIZE', 1)
  else:
    return None
  count, index, local_index = map(number, launched)
  options: dict[str, Any] = {'num_processes': count, 'process_id': index}
  if 'JAX_LOCAL_DEVICE_IDS' not in environment:
    visible = environment.get('CUDA_VISIBLE_DEVICES', '').split(',')
    gpus = len(list(filter(None, visible))) or number('SLURM_GPUS_ON_NODE')
    share = gpus // here
    # None: all that it sees, be it alone or given its own by the launcher.
    sees_its_own = here == 1 or gpus < max(here, number('SLURM_GPUS_ON_NODE'))
    options['local_device_ids'] = (
      []
      if sees_its_own
      else list(range(local_index * share, (local_index + 1) * share))
    )
  return options


def _may_be_a_pod(environment: Mapping[str, str]) -> bool:
  """Whether there are TPUs, of which JAX can ask the metadata."""
  platforms = environment.get('JAX_PLATFORMS', '')
  return (
    importlib.util.find_spec('libtpu') is not None
    and platforms.split(',')[0] in ('', 'tpu')
    # JAX says so where it has found no chips.
    and (
      'TPU_SKIP_MDS_QUERY' not in environment
      or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')
    )
  )


def _connect(options: dict[str, Any]) -> bool:
  """Finds the other processes; returns whether there are any."""
  where = options.get('coordinator_address', 'the address of process 0')
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except ValueError as error:
    if not options:  # TPUs, but no pod
      return False
    raise UserError(f'the processes cannot be joined: {error}') from error
  except RuntimeError as error:
    raise UserError(
      f'process 0 cannot listen at {where}; choose another port ({error})'
    ) from error
  if distributed.global_state.num_processes == 1:
    jax.distributed.shutdown()
    return False
  return True


class _LastWords:
  """Passes stderr through last_word.py, which outlives this process."""

  def __init__(self):
    sys.stderr.flush()
    self._stderr = os.dup(2)
    run = f'import runpy; runpy.run_path({last_word.__file__!r})["main"]()'
    self._process = subprocess.Popen(
      [sys.executable, '-I', '-S', '-c', run],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      start_new_session=True,  # Ctrl-C is not for it
    )
    assert self._process.stdin is not None
    os.dup2(self._process.stdin.fileno(), 2)
    self._process.stdin.close()

  def introduce(self, index: int, count: int, host: str) -> None:
    """Says which process this is."""
    os.write(2, last_word.WHO + f'{index} {count} {host}\n'.encode())

  def close(self) -> None:
    """Ends it, as there is nothing to tell any more."""
    sys.stderr.flush()
    os.write(2, last_word.FAREWELL)
    os.dup2(self._stderr, 2)
    self._process.wait()


class _Run:
  """This process among the others, and how it ends."""

  def __init__(self, last_words: _LastWords):
    state = distributed.global_state
    self.index, self.count = state.process_id, state.num_processes
    self._store: Any = state.client
    self._last_words = last_words
    self._is_ending = threading.RLock()
    self._is_done = threading.Event()
    host = socket.gethostname()
    last_words.introduce(self.index, self.count, host)
    self._store.key_value_set(f'{_HOSTS}/{self.index}', host)
    logger = logging.getLogger('dualformer_jax')
    if self.index and logger.level == logging.INFO:
      logger.setLevel(logging.WARNING)
    self._listener = threading.Thread(target=self._listen, daemon=True)
    self._listener.start()

  def close(self) -> None:
    """Leaves the others, who are done as well."""
    self._is_done.set()
    self._listener.join()
    # Waits for them. If one is lost now, the work is done nevertheless.
    with contextlib.suppress(RuntimeError):
      jax.distributed.shutdown()
    self._last_words.close()

  def fail(self, error: BaseException) -> NoReturn:
    """Tells the others of an error, and ends the process as they end theirs."""
    is_told = isinstance(error, UserError | KeyboardInterrupt)
    message = str(error) if isinstance(error, UserError) else 'was interrupted'
    cause = {
      'process': self.index,
      'message': ' '.join(message.split()) if is_told else None,
      'error': ' '.join(f'{type(error).__name__}: {error}'.split())[:300],
      'status': 2 if isinstance(error, UserError) else 130 if is_told else 1,
    }
    with self._is_ending:
      if isinstance(error, UserError):
        print(f'error: {cause["message"]}', file=sys.stderr)
      # Fails where another has told of its error first.
      with contextlib.suppress(RuntimeError, ValueError):
        self._store.key_value_set(f'{_END}/cause', json.dumps(cause))
      self._end(error)

  def _listen(self) -> None:
    while not self._is_done.wait(_POLL_SECONDS):
      # Fails where process 0 is gone; JAX then ends this process.
      with contextlib.suppress(RuntimeError, ValueError):
        if self._store.key_value_dir_get(_END):
          self._end()

  def _end(self, own: BaseException | None = None) -> NoReturn:
    """Says why, in a line, and ends the process, whatever it is doing."""
    with self._is_ending:
      try:
        text, status = self._reason(own)
      except (RuntimeError, ValueError):
        # Process 0 is gone. JAX is about to end this process for that.
        time.sleep(2 * _HEARTBEAT_SECONDS)
        text, status = f'process 0 of {self.count} is gone', LOST
      if isinstance(own, UserError):  # it is told already
        status = 2
      else:
        print(f'error: {text}', file=sys.stderr)
      self._last_words.close()
      if self.index == 0:
        time.sleep(_ANSWER_SECONDS)  # With it goes what the others ask.
      os._exit(status)

  def _reason(self, own: BaseException | None) -> tuple[str, int]:
    """Returns what has ended the run, and the exit status."""
    ((_, text),) = self._store.key_value_dir_get(_END)
    cause = json.loads(text)
    hosts = dict(self._store.key_value_dir_get(_HOSTS))
    names = [
      f'process {i} of {self.count} on {hosts.get(f"{_HOSTS}/{i}", "?")}'
      for i in range(self.count)
    ]
    if cause['message'] is not None:
      return f'{names[cause["process"]]}: {cause["message"]}', cause['status']
    self._store.key_value_set(f'{_HERE}/{self.index}', '')
    time.sleep(_ANSWER_SECONDS)
    here = {key for key, _ in self._store.key_value_dir_get(_HERE)}
    lost = [name for i, name in enumerate(names) if f'{_HERE}/{i}' not in here]
    if lost:
      return (
        f'{" and ".join(lost)} does not answer any more: it was killed, has '
        'crashed or is cut off, and its own log may tell why. Therefore '
        f'{names[self.index]} ends, too. {last_word.AGAIN}'
      ), LOST
    if own is not None:
      traceback.print_exception(own)
    return (
      f'{names[cause["process"]]} failed, its log has more: {cause["error"]}'
    ), cause['status']
