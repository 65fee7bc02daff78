"""Metrics, progress bars, and the images that a run writes."""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from prefpaint_jax.data.images import save_png
from prefpaint_jax.runtime import metrics
from prefpaint_jax.runtime.metrics import MetricsWriter, progress


def read_lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
  """Yields the events of TensorBoard's files; a record is (length, checksum, Event, checksum)."""
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def scalars(events):
  return [
    (event.step, value.tag, value.simple_value)
    for event in events
    for value in event.summary.value
    if value.HasField("simple_value")
  ]


def test_write_appends_one_line_at_once_that_begins_with_the_iteration(tmp_path):
  writer = MetricsWriter(tmp_path / "run")
  writer.write(1, {"reward/mean": jnp.float32(0.5), "count": 3, "time/images_per_s": np.float64(2)})
  text = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert text == '{"iteration": 1, "reward/mean": 0.5, "count": 3, "time/images_per_s": 2.0}\n'
  writer.write(2, {"reward/mean": 0.25})
  writer.close()
  assert [line["iteration"] for line in read_lines(tmp_path / "run")] == [1, 2]
  assert scalars(read_events(tmp_path / "run")) == [
    (1, "reward/mean", 0.5),
    (1, "count", 3.0),
    (1, "time/images_per_s", 2.0),
    (2, "reward/mean", 0.25),
  ]


def test_tensorboard_has_the_fields_of_the_config_as_hyperparameters(tmp_path):
  fields = {"lr": 1e-3, "lora": {"rank": 4}, "on": True, "steps": [0, 2], "name": "a", "none": None}
  (tmp_path / "config.json").write_text(json.dumps({"command": "train"} | fields))
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"reward/mean": 0.5})
  writer.close()
  found = {}
  for event in read_events(tmp_path):
    for value in event.summary.value:
      if value.metadata.plugin_data.plugin_name == "hparams":
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        found |= {
          name: getattr(x, x.WhichOneof("kind"))
          for name, x in data.session_start_info.hparams.items()
        }
  assert found == {
    "lr": 1e-3, "lora.rank": 4, "on": True, "steps": "[0, 2]", "name": "a", "none": "null",
  }  # fmt: skip


def test_nan_and_infinities_are_null(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"a": float("nan"), "b": jnp.inf, "c": -np.inf, "d": 1.5})
  writer.close()
  assert read_lines(tmp_path) == [{"iteration": 1, "a": None, "b": None, "c": None, "d": 1.5}]
  assert scalars(read_events(tmp_path)) == [(1, "d", 1.5)]


@pytest.mark.parametrize("tail", ["", '{"iteration": 5, "a"', '{"iteration": 5, "a": 5.0}'])
def test_resumed_run_has_each_line_once(tmp_path, tail):
  writer = MetricsWriter(tmp_path)
  for iteration in range(1, 5):
    writer.write(iteration, {"a": iteration})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(tail)  # killed while writing
  writer = MetricsWriter(tmp_path)
  writer.truncate(2)
  for iteration in range(3, 7):
    writer.write(iteration, {"a": 10 * iteration})
  writer.close()
  assert [(line["iteration"], line["a"]) for line in read_lines(tmp_path)] == [
    (1, 1), (2, 2), (3, 30), (4, 40), (5, 50), (6, 60),
  ]  # fmt: skip
  # TensorBoard hides earlier events from the step of a START event on.
  starts = [
    event.step
    for event in read_events(tmp_path)
    if event.HasField("session_log") and event.session_log.status == SessionLog.START
  ]
  assert starts == [3]


def test_truncate_of_a_new_run_changes_nothing(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.truncate(0)
  writer.write(1, {"a": 1})
  writer.close()
  assert read_lines(tmp_path) == [{"iteration": 1, "a": 1}]


def test_truncate_before_iteration_0_deletes_every_line(tmp_path):
  for value in (1, 2):  # the second run starts before the first one had a checkpoint
    writer = MetricsWriter(tmp_path)
    writer.truncate(-1)
    writer.write(0, {"a": value})
    writer.close()
  assert read_lines(tmp_path) == [{"iteration": 0, "a": 2}]
  starts = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
  assert starts[-1] == 0


def test_other_processes_write_nothing(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"iteration": 9}\n')
  writer = MetricsWriter(tmp_path, is_writer=False)
  writer.truncate(0)
  writer.write(1, {"a": 1})
  writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
  writer.close()
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert read_lines(tmp_path) == [{"iteration": 9}]


def test_tensorboard_image_holds_the_pixels(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  writer = MetricsWriter(tmp_path)
  writer.image(4, "samples", image)
  writer.close()
  (event,) = [event for event in read_events(tmp_path) if event.summary.value]
  (value,) = event.summary.value
  stored = Image.open(io.BytesIO(value.image.encoded_image_string))
  assert (event.step, value.tag) == (4, "samples")
  np.testing.assert_array_equal(np.asarray(stored), image)


def test_tensorboard_histogram_counts_the_values(tmp_path):
  values = np.random.default_rng(0).normal(size=100)
  writer = MetricsWriter(tmp_path)
  writer.histogram(4, "rollout/reward", values)
  writer.histogram(4, "rollout/trust", values[:0])
  writer.close()
  (event,) = [event for event in read_events(tmp_path) if event.summary.value]
  (value,) = event.summary.value
  assert (event.step, value.tag, value.histo.num) == (4, "rollout/reward", 100)
  assert value.histo.sum == pytest.approx(values.sum())
  counts = np.array(value.histo.bucket)
  edges = np.array([-np.inf, *value.histo.bucket_limit])
  np.testing.assert_array_equal(np.histogram(values, edges)[0], counts)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def run_progress(stream, **options):
  bar = progress(20, 5, stream=stream, **options)
  for iteration in range(15):
    bar.set_postfix_str(f"reward {iteration}, 3.0 images/s")
    bar.update()
  bar.close()
  return stream.getvalue()


def test_progress_on_a_terminal_shows_iterations_and_metrics():
  shown = run_progress(Terminal())
  assert " 5/20 " in shown and "20/20" in shown and "reward 14, 3.0 images/s" in shown
  assert shown.count("\n") == 1


def test_progress_in_a_log_is_a_line_per_interval_and_one_at_the_end():
  end = "elapsed 00:00, remaining 00:00, reward 14, 3.0 images/s\n"
  assert run_progress(io.StringIO()) == f"iteration 20/20, {end}"
  assert run_progress(io.StringIO(), interval=0, unit="step").splitlines() == [
    f"step {6 + i}/20, elapsed 00:00, remaining 00:00, reward {i}, 3.0 images/s" for i in range(15)
  ]


def test_a_line_of_progress_has_the_time_that_is_left(monkeypatch):
  clock = iter([0.0, 60.0, 60.0, 60.0])
  monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
  stream = io.StringIO()
  progress(20, 5, stream=stream).update(3)  # three of fifteen in a minute
  assert stream.getvalue() == "iteration 8/20, elapsed 01:00, remaining 04:00\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_of_other_processes_is_silent(stream):
  assert run_progress(stream(), visible=False) == ""


def test_saved_png_holds_pixels_and_text(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  text = {"seed": "3", "prompt": "γ and ‖z‖"}
  save_png(tmp_path / "samples" / "1.png", image, text)
  stored = Image.open(tmp_path / "samples" / "1.png")
  np.testing.assert_array_equal(np.asarray(stored), image)
  assert stored.text == text
  assert [path.name for path in (tmp_path / "samples").iterdir()] == ["1.png"]


def test_interrupted_save_keeps_the_earlier_image(tmp_path, monkeypatch):
  image = np.zeros((2, 2, 3), np.uint8)
  save_png(tmp_path / "1.png", image)

  def interrupted(self, content):
    with self.open("wb") as file:
      file.write(content[: len(content) // 2])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Path, "write_bytes", interrupted)
    save_png(tmp_path / "1.png", image + 1)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "1.png")), image)


def test_tensorflow_and_torch_are_never_imported(tmp_path):
  # Fake packages, so that an import would succeed where the real ones are not installed.
  for name in ("tensorflow", "torch"):
    (tmp_path / "modules" / name).mkdir(parents=True)
    (tmp_path / "modules" / name / "__init__.py").write_text("")
  script = """
    import sys
    import jax.numpy as jnp, numpy as np
    from prefpaint_jax.runtime import checkpoint, metrics, sharding
    writer = metrics.MetricsWriter(sys.argv[1])
    writer.write(1, {"a": 1.0})
    writer.image(1, "b", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    checkpoints = checkpoint.Checkpoints(sys.argv[1] + "/checkpoints")
    checkpoints.save(1, {"a": jnp.zeros(3)}, None, {})
    checkpoints.close()
    assert not {"tensorflow", "torch"} & sys.modules.keys()
  """
  paths = [str(tmp_path / "modules"), *filter(None, sys.path)]
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")],
    check=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
  )
