"""Serves a page on which people inpaint images of their own.

  python -m prefpaint_jax.demo --model=runs/mini --reward=mini

The page shows the samples of the model beside those of its base policy, from the same seeds. On an
address that other machines reach, --token is needed; the printed link carries it.
"""

import importlib.util
import socket

from absl import flags

from prefpaint_jax.playground.app import Playground, check_access, make_app
from prefpaint_jax.playground.jobs import Queue
from prefpaint_jax.playground.painter import Painter
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.ranges import Integer
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.web import server
from prefpaint_jax.weights import adapters

_MODEL = flags.DEFINE_string(
  "model", "mini", "Folder, single file, hub name, workdir of a run, or mini."
)
_BASELINE = flags.DEFINE_string(
  "baseline", None, "Model beside which it is shown; default: the base policy of a run, else none."
)
_REWARD = flags.DEFINE_string(
  "reward", None, "Reward that scores the samples: mini, seam, a folder, FILE.py:FUNCTION, ..."
)
_LORA = flags.DEFINE_string("lora", None, "LoRA adapters of the model: FILE or FILE:SCALE.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; others need --token.")
_PORT = flags.DEFINE(within(Integer(0, 65535)), "port", 8001, "Port; 0 takes a free one.")
_TOKEN = flags.DEFINE_string(
  "token", None, "Secret that the link carries: 16 or more of A-Z a-z 0-9 - _."
)


def main() -> None:
  """Loads the models and serves the page until Ctrl-C."""
  token = _TOKEN.value
  check_access(_HOST.value, token)
  if not (importlib.util.find_spec("starlette") and importlib.util.find_spec("uvicorn")):
    raise ValueError("needs Starlette and uvicorn: pip install 'prefpaint_jax[label]'")
  if _LORA.value is not None:
    adapters.parse(_LORA.value)  # raises ValueError before the model is loaded
  with server.listening(_HOST.value, _PORT.value) as opened:
    with waiting(f"loading {_MODEL.value}"):
      painter = Painter(_MODEL.value, _BASELINE.value, _REWARD.value, _LORA.value)
      playground = Playground(painter, Queue())
    hosts = (*server.LOOPBACK, _HOST.value) if server.is_loopback(_HOST.value) else ()
    host = socket.gethostname() if _HOST.value in ("0.0.0.0", "::") else _HOST.value
    host = f"[{host}]" if ":" in host else host
    fragment = f"#{token}" if token else ""
    print(f"http://{host}:{opened.getsockname()[1]}/{fragment}", flush=True)
    server.serve(make_app(playground, token, hosts), opened)


if __name__ == "__main__":
  cli.run(main)
