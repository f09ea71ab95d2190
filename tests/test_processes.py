"""Several processes compute what one does, and none outlives another."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from dualformer_jax import last_word, processes
from dualformer_jax.errors import UserError
from tests import training_command

NUM_STEPS = 18
FLAGS = (
  *training_command.TINY,
  '--config.num_epochs=3',
  '--config.validation.every_epochs=1',
  '--config.checkpoint.every_steps=4',
  '--config.log_every_steps=1',
)
# Within so many seconds of the end of one, all others must have ended.
SECONDS = 60


class Launcher:
  """Starts runs of several processes, which share a workdir."""

  def __init__(self, root: pathlib.Path, cache: pathlib.Path, data: str):
    self._root, self._data = root, data
    self._environment = training_command.environment(cache, with_scalars=True)
    self._runs = 0

  def workdir(self, name: str) -> pathlib.Path:
    return self._root / name

  def start(
    self,
    count: int,
    name: str,
    *flags: str,
    of_last: tuple[str, ...] = (),
  ) -> Run:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    self._runs += 1
    logs = [self._root / f'run{self._runs}.{i}.log' for i in range(count)]
    started = []
    for index, log in enumerate(logs):
      others = (
        f'--coordinator_address=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
      )
      command = training_command.command(
        *FLAGS,
        f'--config.dataset.data_dir={self._data}',
        *flags,
        *(others if count > 1 else ()),
        *(of_last if index == count - 1 else ()),
        workdir=self.workdir(name),
      )
      with log.open('w') as stderr:
        started.append(
          subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
          )
        )
    return Run(started, logs)


class Run:
  def __init__(
    self, started: list[subprocess.Popen[bytes]], logs: list[pathlib.Path]
  ):
    self._processes, self._logs = started, logs

  def log(self, index: int) -> str:
    return self._logs[index].read_text()

  def signal_after_step(self, step: int, index: int, sent: int) -> None:
    deadline = time.monotonic() + 300
    while f' step {step}/' not in self.log(0):
      assert time.monotonic() < deadline, self.log(0)
      assert self._processes[0].poll() is None, self.log(0)
      time.sleep(0.02)
    self._processes[index].send_signal(sent)

  def wait(self, seconds: float = 600) -> list[int]:
    """Exit statuses, within so many seconds; kills what runs on."""
    deadline = time.monotonic() + seconds
    try:
      return [
        process.wait(max(0.1, deadline - time.monotonic()))
        for process in self._processes
      ]
    finally:
      for process in self._processes:
        process.kill()
      # What tells of a killed process does so after it.
      time.sleep(0.5)


@pytest.fixture(scope='module', name='launcher')
def _launcher(motion_dataset, compilation_cache, tmp_path_factory) -> Launcher:
  root = tmp_path_factory.mktemp('processes')
  return Launcher(root, compilation_cache, str(motion_dataset))


@pytest.fixture(scope='module', name='alone')
def _alone(launcher) -> pathlib.Path:
  """The workdir of one process that nothing disturbed."""
  run = launcher.start(1, 'alone')
  assert run.wait() == [0], run.log(0)
  return launcher.workdir('alone')


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """All arrays of a checkpoint, by path, and what it says of itself."""
  here = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
  metadata: Any = ocp.checkpointables_metadata(str(folder)).metadata
  tree = ocp.load_checkpointables(
    str(folder),
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
      {name: metadata[name] for name in ('params', 'batch_stats', 'opt_state')},
    ),
  )
  leaves = jax.tree.leaves_with_path(tree)
  arrays = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
  text = (folder / '_CHECKPOINT_METADATA').read_text()
  return arrays, json.loads(text)['custom_metadata']['dualformer']


def assert_same_run(workdir: pathlib.Path, alone: pathlib.Path) -> None:
  found, expected = (training_command.scalars(w)[1] for w in (workdir, alone))
  # The first step of a process is not among the lines.
  losses = [step for name, step in found if name == 'train/loss']
  assert len(losses) >= NUM_STEPS - 5
  for name, step in found:
    if (name, step) not in expected:
      assert name.startswith('train/')
    elif name in ('train/loss', 'train/gradient_norm'):
      np.testing.assert_allclose(
        found[name, step], expected[name, step], rtol=1e-5, err_msg=f'{step}'
      )
    elif name.startswith('validation/'):
      assert found[name, step] == expected[name, step]
  folder = pathlib.Path('checkpoints') / str(NUM_STEPS)
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == [folder.name]
  arrays, description = read(workdir / folder)
  others, other_description = read(alone / folder)
  assert arrays.keys() == others.keys()
  for name, array in arrays.items():
    # A hundredth of a step of Adam, which magnifies what rounding does to a
    # gradient that is almost 0.
    np.testing.assert_allclose(
      array, others[name], rtol=1e-4, atol=2e-5, err_msg=name
    )
  for same in ('step', 'data_position', 'class_names'):
    assert description[same] == other_description[same]
  reports = [
    json.loads((w / 'report.json').read_text()) for w in (workdir, alone)
  ]
  for same in ('top1', 'top5', 'num_videos', 'failed_videos', 'per_class'):
    assert reports[0].get(same) == reports[1].get(same)


def assert_told(log: str, *expected: str) -> None:
  """One line says what happened, and nothing else does."""
  (line,) = [s for s in log.splitlines() if s.startswith('error: ')]
  for text in expected:
    assert text in line
  assert 'Traceback' not in log
  assert not re.search(r'^[EF]\d{4} |^ +@ 0x', log, re.MULTILINE), log
  assert log.rstrip().endswith(line)


def test_two_processes_of_which_one_is_killed_go_on_as_if_never_disturbed(
  launcher, alone
):
  again = 'run the same command again on all hosts'
  # One of them, then the one through which they know of each other.
  for step, victim in ((5, 1), (10, 0)):
    run = launcher.start(2, 'two')
    run.signal_after_step(step, victim, signal.SIGKILL)
    statuses = run.wait(SECONDS)
    survivor = 1 - victim
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[survivor] not in (0, -signal.SIGKILL)
    gone = f'process {victim} of 2'
    assert_told(run.log(survivor), gone, 'does not answer any more', again)
    assert_told(run.log(victim), gone, 'was killed', again)
  run = launcher.start(2, 'two')
  assert run.wait() == [0, 0], run.log(0)
  assert re.search(r'resumed .*/two/checkpoints/\d+', run.log(0))
  # The first process alone logs what they do, and writes.
  assert run.log(1) == ''
  assert len(training_command.scalars(launcher.workdir('two'))[0]) == 3
  assert_same_run(launcher.workdir('two'), alone)


def test_four_processes_stop_at_one_step_and_one_goes_on(launcher, alone):
  # The two along `tensor` read the same rows.
  mesh = ('--config.mesh.fsdp=2', '--config.mesh.tensor=2')
  run = launcher.start(4, 'four', *mesh)
  run.signal_after_step(5, 2, signal.SIGTERM)
  assert run.wait() == 4 * [128 + signal.SIGTERM], run.log(0)
  stopped = re.search(r'stopped by SIGTERM; saved step (\d+)', run.log(0))
  assert stopped
  assert 5 <= int(stopped[1]) < NUM_STEPS
  (folder,) = (launcher.workdir('four') / 'checkpoints').iterdir()
  assert folder.name == stopped[1]
  assert (folder / 'SHA256SUMS').is_file()
  assert [run.log(i) for i in (1, 2, 3)] == ['', '', '']
  run = launcher.start(1, 'four')
  assert run.wait() == [0], run.log(0)
  assert f'resumed {folder}\n' in run.log(0)
  assert_same_run(launcher.workdir('four'), alone)


def test_a_mistake_on_one_host_ends_all_with_its_reason(launcher, tmp_path):
  run = launcher.start(
    2, 'mistake', of_last=(f'--config.dataset.data_dir={tmp_path}/absent',)
  )
  assert run.wait(SECONDS) == [2, 2]
  assert_told(run.log(1), f'error: {tmp_path}/absent/motion: no such dataset')
  assert_told(run.log(0), 'process 1 of 2', 'absent/motion: no such dataset')


# --- Who the others are


SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_NTASKS': '8',
  'SLURM_PROCID': '6',
  'SLURM_LOCALID': '2',
  'SLURM_NODEID': '1',
  'SLURM_STEP_NODELIST': 'gpu[1-2]',
  'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
}
OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
}


@pytest.mark.parametrize(
  ('environment', 'devices'),
  [
    # A share of the GPUs of the host.
    ({'SLURM_GPUS_ON_NODE': '4'}, [2]),
    ({'SLURM_GPUS_ON_NODE': '8'}, [4, 5]),
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, [4, 5]),
    # SLURM has given each its own.
    ({'SLURM_GPUS_ON_NODE': '4', 'CUDA_VISIBLE_DEVICES': '0'}, []),
    # One process on a node has all.
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x8)', 'SLURM_GPUS_ON_NODE': '8'}, []),
    ({'SLURM_STEP_TASKS_PER_NODE': '7,1', 'SLURM_GPUS_ON_NODE': '8'}, []),
  ],
)
def test_slurm_says_who_the_others_are(environment, devices):
  found = processes.find_others(None, None, None, SLURM | environment)
  assert found == {
    'num_processes': 8,
    'process_id': 6,
    'local_device_ids': devices,
  }


def test_open_mpi_says_who_the_others_are():
  gpus = {'CUDA_VISIBLE_DEVICES': '0,1'}
  expected = {'num_processes': 4, 'process_id': 3, 'local_device_ids': [1]}
  # Before version 5, JAX finds the address.
  uri = {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1'}
  found = processes.find_others(None, None, None, OPEN_MPI | gpus | uri)
  assert found == expected
  with pytest.raises(UserError, match='--coordinator_address must be given'):
    processes.find_others(None, None, None, OPEN_MPI | gpus)
  found = processes.find_others('a:1', None, None, OPEN_MPI | gpus)
  assert found == expected | {'coordinator_address': 'a:1'}
  # What is asked for counts.
  chosen = gpus | uri | {'JAX_LOCAL_DEVICE_IDS': '0'}
  found = processes.find_others(None, None, None, OPEN_MPI | chosen)
  assert found == {'num_processes': 4, 'process_id': 3}


def test_the_address_may_be_in_the_environment():
  environment = {'JAX_COORDINATOR_ADDRESS': 'host:1234', 'JAX_PLATFORMS': 'cpu'}
  found = processes.find_others(None, 2, 1, environment)
  assert found == {
    'coordinator_address': 'host:1234',
    'num_processes': 2,
    'process_id': 1,
  }


@pytest.mark.parametrize(
  'environment',
  [
    {},
    # A batch script, outside of srun.
    {k: v for k, v in SLURM.items() if k != 'SLURM_STEP_NODELIST'},
    SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
  ],
)
def test_without_others_a_process_is_alone(environment):
  environment = environment | {'JAX_PLATFORMS': 'cpu'}
  assert processes.find_others(None, None, None, environment) is None
  assert processes.find_others('a:1', 1, 0, environment) is None


def test_jax_is_asked_where_there_are_tpus(monkeypatch):
  monkeypatch.setattr(processes.importlib.util, 'find_spec', lambda _: object())
  assert processes.find_others(None, None, None, {}) == {}
  assert (
    processes.find_others(None, None, None, {'JAX_PLATFORMS': 'cpu'}) is None
  )
  none = {'TPU_SKIP_MDS_QUERY': '1'}
  assert processes.find_others(None, None, None, none) is None
  several = {'TPU_WORKER_HOSTNAMES': 'a,b'}
  assert processes.find_others(None, None, None, none | several) == {}


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (('host:1', None, None), '--num_processes and --process_id must be given'),
    ((None, 2, 0), '--coordinator_address must be given'),
    (('host', 2, 0), "is 'host'; expected HOST:PORT"),
    (('host:1', 2, 2), '--process_id is 2 and --num_processes is 2'),
  ],
)
def test_what_is_missing_is_told(arguments, expected):
  with pytest.raises(UserError, match=re.escape(expected)):
    address, count, index = arguments
    processes.find_others(address, count, index, {'JAX_PLATFORMS': 'cpu'})


# --- The last word


def say(*lines: str) -> str:
  """What last_word makes of lines after which a process ends."""
  run = f'import runpy; runpy.run_path({last_word.__file__!r})["main"]()'
  done = subprocess.run(
    [sys.executable, '-I', '-S', '-c', run],
    input=''.join(f'{line}\n' for line in ('\0who 1 4 node7', *lines)),
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert done.stdout == ''
  return done.stderr


LOG = 'I1124 14:00:00.000000 139986 loop.py:33] step 1/9'
# As JAX 0.10.2 writes it.
SILENT = (
  'E1124 14:01:21.441694   14969 coordination_service.cc:1549] [1676] Use error'
  ' polling to propagate the following error to all tasks: UNAVAILABLE: The '
  'following tasks are unhealthy (stopped sending heartbeats):',
  '2',
  'The tasks have crashed. Check the task logs for an earlier error.',
  'E1124 14:01:21.442113   14981 coordination_service_agent.cc:289] Polled an '
  'error from coordination service (this can be an error from this or another '
  'task).',
  'F1124 14:01:21.442113   14981 client.h:80] Terminating process because',
  '*** Check failure stack trace: ***',
  '    @     0x7f366f740634  absl::lts_20260107::log_internal::LogMessage::',
)
CUT_OFF = (
  'W1124 14:01:26.017430   15216 preemption_sync_manager.cc:147] Failed to '
  'retrieve preemption notice: UNAVAILABLE: Socket closed',
  *SILENT[-3:],
)
# Of Orbax, where the other one is lost while it waits for it.
FAILED = (
  'E1125 15:28:43.496289 140495 checkpoint_manager.py:2107] [step=8] failed.',
  'Traceback (most recent call last):',
  '  File "checkpoint_manager.py", line 2096, in wait_until_finished',
  'jax.errors.JaxRuntimeError: UNAVAILABLE: Failed to send RPC',
)


def test_what_a_process_writes_passes_by():
  text = ('not of a log', LOG, 'Traceback (most recent call last):', '  of it')
  assert say(*text, '\0farewell') == ''.join(f'{line}\n' for line in text)


@pytest.mark.parametrize(
  ('lines', 'expected'),
  [
    (SILENT, 'process 2 of 4 does not answer any more'),
    (CUT_OFF, 'process 0 of 4 does not answer any more'),
    # Of two threads, one may write between the lines of the other.
    ((*FAILED, *CUT_OFF), 'process 0 of 4 does not answer any more'),
    (
      (*CUT_OFF[:2], *FAILED, *CUT_OFF[2:]),
      'process 0 of 4 does not answer any more',
    ),
    ((), 'process 1 of 4 on node7 was killed'),
  ],
)
def test_pages_of_another_end_become_a_line(lines, expected):
  told = say(LOG, *lines)
  first, last = told.splitlines()
  assert first == LOG
  assert last.startswith(f'error: {expected}')
  assert last.endswith('goes on from the newest checkpoint')


def test_an_error_of_the_process_itself_is_not_lost():
  told = say(*SILENT[:4], 'error: mine', '\0farewell')
  assert told == 'error: mine\n'


@pytest.mark.parametrize('end', ['\0farewell', LOG, 'error: mine'])
def test_a_traceback_of_the_process_itself_is_not_lost(end):
  told = say(*FAILED, end)
  assert told.startswith(''.join(f'{line}\n' for line in FAILED))


def test_a_traceback_before_a_crash_is_not_lost():
  told = say(*FAILED)
  *lines, last = told.splitlines()
  assert tuple(lines) == FAILED
  assert last.startswith('error: process 1 of 4 on node7 was killed')


def test_waiting_in_vain_is_told():
  told = say(
    SILENT[4], '', 'RPC: /xla.coordination.CoordinationService/RegisterTask'
  )
  assert told.startswith('error: process 1 of 4 on node7 waited in vain')
