"""One process per case with a dense network: the peer of ``trimoe bench imaging``.

    python -m benchmarks.imaging_peer CASE --kind unet --weights FILE --models DIR --out DIR

A fresh interpreter loads weights, reads, resamples, infers in sliding windows over the whole
volume, measures and writes the HTML report; the last line is its stages as one JSON object.
Reading, grid and report are ours, so only network and process differ.

Untrained weights see organs everywhere, which would make measuring and reporting slow: after
the network has answered, the true labels take the place of its own.  It has no calibrated
confidence and no gate, and is spared the work for these two maps.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from apps.imaging.calibration import FILE, Calibration
from apps.imaging.finding import Findings
from apps.imaging.outputs.write import write_report
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.resample import PatientGrid
from apps.imaging.segmentation import Stopwatch, measure
from apps.imaging.training.baselines import label_volume, make_net
from apps.imaging.windows import GRID_MM
from benchmarks.imaging_cases import LABELS, SERIES
from benchmarks.imaging_rig import OUTPUTS
from cluster.errors import ConfigurationError


def run_peer(args: argparse.Namespace) -> dict[str, float]:
    """Run one case and return the seconds of its stages.

    Raises:
        ConfigurationError: There is not exactly one readable series.
    """
    watch = Stopwatch()
    net = make_net(args.kind)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    net.to(args.device).eval()
    calibration = Calibration.load(args.models / FILE)
    watch.lap("load")
    (source,) = discover(args.case / SERIES, Bounds()).sources
    case = read_case(source, Bounds())
    if case.stack is None:
        message = f"{args.case.name}: expected a series, got {case.reasons[0].code}"
        raise ConfigurationError(message)
    watch.lap("read")
    grid = PatientGrid(case.stack, GRID_MM)
    hu = grid.sample()
    watch.lap("resample")
    said = label_volume(net, hu, args.device)
    watch.lap("infer")
    true = np.load(args.case / LABELS)
    if true.shape != said.shape:
        message = f"{LABELS}: expected {list(said.shape)}, got {list(true.shape)}; write it anew"
        raise ConfigurationError(message)
    labels = grid.spread(true)
    certain = np.full_like(labels, 255)
    organs = measure(case.stack, labels, certain, calibration)
    watch.lap("measure")
    findings = Findings(
        labels=labels,
        confidence=certain,
        local_share=np.zeros_like(labels),
        organs=organs,
        unusual=0.0,
        confidence_case=1.0,
        is_referred=False,
        model_version=args.kind,
        seconds=watch.seconds,
    )
    write_report(case, findings, args.out, OUTPUTS)
    watch.lap("report")
    return watch.seconds


def main() -> int:
    """Print the stages of one case as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path, help="with series and labels, see imaging_cases")
    parser.add_argument("--kind", choices=("unet", "dynunet"), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="a state dict")
    parser.add_argument("--models", type=Path, required=True, help="folder of the calibration")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    print(json.dumps(run_peer(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
