"""Compares the event files of runs, as TensorBoard reads them, with metrics.jsonl: events.py RUN..."""

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata


def main(runs):
    for run in runs:
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        tags = events.Tags()
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        expected = {"train/loss": {}, "val/top1": {}, "val/ema/top1": {}}
        for line in lines:
            if "eval" in line:
                expected["val/top1"][line["step"]] = line["eval"]["top1"]
                if "ema" in line["eval"]:
                    expected["val/ema/top1"][line["step"]] = line["eval"]["ema"]["top1"]
            else:
                expected["train/loss"][line["step"]] = line["loss"]
        for tag, values in expected.items():
            if not values:
                continue
            found = {event.step: event.value for event in events.Scalars(tag)}
            assert found.keys() == values.keys(), f"{run}: {tag}: steps {sorted(found)}"
            for step, value in values.items():
                assert abs(found[step] - value) <= 1e-6 * max(1, abs(value)), f"{run}: {tag} at {step}"
        for tag in ("inputs", "filters"):
            image = events.Images(tag)[-1]
            assert image.encoded_image_string.startswith(b"\x89PNG"), f"{run}: {tag}"
            assert image.width > 0 and image.height > 0
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        settings = metadata.parse_session_start_info_plugin_data(content).hparams
        assert settings["optim.lr"].number_value > 0 and settings["model.pool"].string_value, settings
        print(f"events: {run}: {len(tags['scalars'])} curves, {len(tags['images'])} pictures, {len(settings)} settings")


if __name__ == "__main__":
    main(sys.argv[1:])
