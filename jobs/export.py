"""Write a model as ONNX or torch.export, with a description, for runtimes without btray.

python jobs/export.py --out runs/onnx                                        # the model that ships with btray
python jobs/export.py --model runs/first --out runs/program --format torch
"""

from btray.launch import run_job
from btray.model.config import ExportConfig


def main(config: ExportConfig) -> str:
    """Return the URI of the export."""
    from btray.model.export import export

    return export(config)


if __name__ == "__main__":
    run_job(ExportConfig, main)
