"""Initialization and shutdown of multi-process runs."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import logging
import os
import pathlib
import platform
import re
import sys
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dualformer_jax.errors import UserError

# JAX aborts all others if a process sends no heartbeat for so long.
_HEARTBEAT_SECONDS = 30
# When process 0 ends, JAX aborts the others. As all often fail for the same
# reason, process 0 leaves them this long to report it themselves.
_GRACE_SECONDS = 5
# A network file system may show late what another host has written.
_SHARED_SECONDS = 30


@contextlib.contextmanager
def joined(
  address: str | None, count: int | None, index: int | None
) -> Iterator[None]:
  """Joins the other processes of the run; leaves them on exit.

  The address is HOST:PORT of process 0. If all are None, JAX asks SLURM, Open
  MPI or the metadata of a TPU pod; if there are no other processes, nothing
  happens. Must be entered before JAX computes anything.

  Only process 0 logs messages below WARNING. With other processes, an error in
  the block ends this process at once, after printing the message of a UserError
  or the traceback of any other error.
  """
  if not _connect(address, count, index):
    yield
    return
  is_first = (jax.process_index() if index is None else index) == 0
  logger = logging.getLogger('dualformer_jax')
  if not is_first and logger.level == logging.INFO:
    logger.setLevel(logging.WARNING)
  try:
    yield
  except SystemExit:
    _disconnect()
    raise
  except BaseException as error:
    # Python's normal exit would wait for the others, which may wait for this
    # process in a collective operation.
    if isinstance(error, UserError):
      print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    else:
      traceback.print_exc()
    sys.stderr.flush()
    if is_first:
      time.sleep(_GRACE_SECONDS)
    os._exit(2 if isinstance(error, UserError) else 1)
  _disconnect()


def _connect(address: str | None, count: int | None, index: int | None) -> bool:
  """Connects to the other processes; returns whether there are any."""
  options = _options(address, count, index, os.environ)
  if options is None:
    return False
  try:
    jax.distributed.initialize(
      **options, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except (ValueError, RuntimeError) as error:
    if isinstance(error, ValueError) and options['coordinator_address'] is None:
      return False  # JAX has found no cluster
    raise UserError(
      f'the processes cannot connect: {error}; if the port of '
      '--coordinator_address is in use, choose another'
    ) from error
  if count is None and jax.process_count() == 1:
    _disconnect()
    return False
  return True


def _disconnect() -> None:
  """Waits for the other processes and disconnects."""
  with contextlib.suppress(RuntimeError):  # one has died, after its work
    jax.distributed.shutdown()


def _options(
  address: str | None,
  count: int | None,
  index: int | None,
  environment: Mapping[str, str],
) -> dict[str, Any] | None:
  """Returns arguments of jax.distributed.initialize; None for one process."""
  address = address or environment.get('JAX_COORDINATOR_ADDRESS')
  if address and not re.fullmatch(r'.+:\d+', address):
    raise UserError(
      f'the coordinator address is {address!r}; expected HOST:PORT'
    )
  if count == 1:
    return None
  if count is not None or index is not None:
    if address is None or count is None or index is None:
      raise UserError(
        '--coordinator_address=HOST:PORT of process 0, --num_processes and '
        '--process_id must be given together'
      )
    if not 0 <= index < count:
      raise UserError(f'--process_id is {index}; expected 0 to {count - 1}')
    return {
      'coordinator_address': address,
      'num_processes': count,
      'process_id': index,
      'cluster_detection_method': 'deactivate',
    }
  mpi_tasks = environment.get('OMPI_COMM_WORLD_SIZE')
  tasks = environment.get('SLURM_NTASKS', mpi_tasks)
  platform = environment.get('JAX_PLATFORMS', '').split(',')[0]
  may_be_pod = platform in ('', 'tpu') and importlib.util.find_spec('libtpu')
  if tasks == '1' or not (address or tasks or may_be_pod):
    return None
  options: dict[str, Any] = {'coordinator_address': address}
  # JAX gives the GPU of its local index to each process of a node. A process
  # that is alone on its node, or sees a single GPU, takes all that it sees.
  if 'JAX_LOCAL_DEVICE_IDS' not in environment and (
    (tasks is not None and tasks == environment.get('SLURM_STEP_NUM_NODES'))
    or environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
    or re.fullmatch(r'[^,]+', environment.get('CUDA_VISIBLE_DEVICES', ''))
  ):
    options['local_device_ids'] = []
  return options


def hardware() -> str:
  """Describes the devices of all processes, such as '8 x NVIDIA H200'."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return f'{jax.device_count()} x {device.device_kind}'
  name = platform.machine()
  with contextlib.suppress(OSError):  # not Linux
    text = pathlib.Path('/proc/cpuinfo').read_text()
    if found := re.search(r'^model name\s*: (.+)', text, re.MULTILINE):
      name = found[1].strip()
  hosts = f'{jax.process_count()} x ' if jax.process_count() > 1 else ''
  return f'{hosts}{os.cpu_count()} CPU cores ({name})'


def check_shared_folder(folder: pathlib.Path) -> None:
  """Creates a folder; raises UserError if it is not the same on all hosts."""
  if jax.process_count() == 1:
    return
  number = np.uint32(time.time_ns() % 2**32)
  number = int(multihost_utils.broadcast_one_to_all(number))
  marker = folder / f'.seen_by_all_hosts_{number}'
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
  multihost_utils.sync_global_devices('marked')
  deadline = time.monotonic() + _SHARED_SECONDS
  while not marker.exists():
    if time.monotonic() > deadline:
      raise UserError(
        f'{folder} is not the same folder on all hosts; expected a shared file '
        'system (NFS, Filestore, a mounted bucket): choose another --workdir'
      )
    time.sleep(1)
  multihost_utils.sync_global_devices('seen')
  if jax.process_index() == 0:
    marker.unlink()


def check_same(number: int, what: str) -> None:
  """Raises UserError unless a number is the same for all processes."""
  if jax.process_count() > 1:
    first = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if first != number:
      raise UserError(
        f'{what} is {number} for process {jax.process_index()}, but {first} for'
        ' process 0; run the same command again on all hosts'
      )
