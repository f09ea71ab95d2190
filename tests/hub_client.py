"""Makes huggingface_hub, in this process, use a local server and no xet."""

from __future__ import annotations

import pathlib

import huggingface_hub
from huggingface_hub import constants
import pytest

from tests import hub_server


def use(
  monkeypatch: pytest.MonkeyPatch, hub: hub_server.Hub, cache: pathlib.Path
) -> None:
  """Sets what the environment of `environment` sets when it is imported."""
  url = hub.url
  template = url + '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(constants, 'ENDPOINT', url)
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
  # No token but that of the environment.
  monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(cache / 'no_token'))
  monkeypatch.delenv('HF_TOKEN', raising=False)


def environment(hub: hub_server.Hub, cache: pathlib.Path) -> dict[str, str]:
  """Returns variables for another process."""
  return {
    'HF_ENDPOINT': hub.url,
    'HF_HOME': str(cache.parent),
    'HF_HUB_CACHE': str(cache),
    'HF_HUB_DISABLE_XET': '1',
  }


def go_offline(monkeypatch: pytest.MonkeyPatch, offline: bool = True) -> None:
  """Sets HF_HUB_OFFLINE."""
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
  huggingface_hub.close_session()
