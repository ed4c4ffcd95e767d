"""The files of launch/ without a cluster: the script runs with stand-ins, the manifests have what schemas require."""

import pathlib
import shlex
import signal
import subprocess
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'launch' / 'sweep.slurm'
MANIFESTS = sorted(ROOT.glob('launch/*.yaml'))
CHIPS = {'tpu-v5-lite-podslice': {'2x4': 8}, 'tpu-v6e-slice': {'2x4': 8}}  # of one host


def program(path, body):
  path.write_text(f'#!/bin/bash\n{body}\n')
  path.chmod(0o755)
  return path


def environment(tmp_path, llm_jax):
  program(tmp_path / 'scontrol', f'echo "scontrol $*" >> {tmp_path}/said')
  return {
    'PATH': f'{tmp_path}:/usr/bin:/bin',
    'LLM_JAX': str(program(tmp_path / 'llm-jax', llm_jax)),
    'CONFIG': 'configs/scaling/isoflop.py',
    'WORKDIR': str(tmp_path / 'a folder'),
    'SLURM_ARRAY_TASK_ID': '7',
    'SLURM_JOB_ID': '4711',
  }


def test_the_script_trains_the_cell_of_its_task(tmp_path):
  subprocess.run(['bash', '-n', SCRIPT], check=True)
  env = environment(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/said; exit 3')
  done = subprocess.run(['bash', SCRIPT, '--retry'], env=env)
  assert done.returncode == 3  # what the training says
  assert (tmp_path / 'said').read_text().splitlines() == [
    'sweep',
    '--config=configs/scaling/isoflop.py',
    f'--workdir={tmp_path}/a folder',
    '--index=7',
    '--retry',
  ]
  del env['SLURM_ARRAY_TASK_ID']
  done = subprocess.run(['bash', SCRIPT], env=env, capture_output=True, text=True)
  assert done.returncode != 0 and 'start this with sbatch' in done.stderr


def test_the_script_is_queued_again_when_its_time_is_up(tmp_path):
  said = tmp_path / 'said'
  llm_jax = f'trap "echo saved >> {said}; exit 143" TERM; echo up >> {said}; while :; do read -rt 0.05; done'
  process = subprocess.Popen(
    ['bash', SCRIPT], env=environment(tmp_path, llm_jax), stdin=subprocess.DEVNULL
  )
  until = time.monotonic() + 30
  while not said.exists() and time.monotonic() < until:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 143
  assert said.read_text().splitlines() == ['up', 'saved', 'scontrol requeue 4711']


def test_the_script_asks_for_one_process_a_cell():
  asked = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in SCRIPT.read_text().splitlines()
    if line.startswith('#SBATCH')
  )
  assert (asked['nodes'], asked['ntasks']) == ('1', '1') and 'requeue' in asked
  assert asked['signal'].startswith('B:TERM@') and asked['array'] == '0-24'


@pytest.mark.parametrize('path', MANIFESTS, ids=lambda p: p.name)
def test_the_manifest_has_what_its_schema_requires(path):
  """JobSet v1alpha2 over Job batch/v1 over Pod v1: required fields, and those that have to fit one another."""
  job_set = yaml.safe_load(path.read_text())
  assert (job_set['apiVersion'], job_set['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert set(job_set) == {'apiVersion', 'kind', 'metadata', 'spec'} and job_set['metadata']['name']
  (replicated,) = job_set['spec']['replicatedJobs']
  assert replicated['name'] and replicated['replicas'] == 1
  job = replicated['template']['spec']
  assert job['completionMode'] == 'Indexed' and 1 <= job['parallelism'] <= job['completions'] == 25
  assert job['maxFailedIndexes'] <= job['completions'] and job['backoffLimitPerIndex'] > 0
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'  # what backoffLimitPerIndex demands
  chosen = pod['nodeSelector']
  chips = CHIPS[chosen['cloud.google.com/gke-tpu-accelerator']][
    chosen['cloud.google.com/gke-tpu-topology']
  ]
  (container,) = pod['containers']
  assert container['name'] and container['image']
  resources = container['resources']
  assert resources['requests'] == resources['limits'] == {'google.com/tpu': chips}
  assert {v['name'] for v in pod['volumes']} == {m['name'] for m in container['volumeMounts']}
  shell, dash, text = container['command']
  assert (shell, dash) == ('bash', '-c')
  words = shlex.split(text)
  assert words[:3] == ['exec', 'llm-jax', 'sweep'] and words[-1] == '--index=$JOB_COMPLETION_INDEX'
  (folder,) = [w.partition('=')[2] for w in words if w.startswith('--workdir')]
  assert folder.startswith(container['volumeMounts'][0]['mountPath'])


def test_there_is_a_manifest_for_each_kind():
  assert [path.name for path in MANIFESTS] == ['sweep-v5e.yaml', 'sweep-v6e.yaml']
