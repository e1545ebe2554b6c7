"""Send what a model says of studies into the PACS that holds their images, as structured reports.

python jobs/report.py --studies runs/results-studies --to dicomweb://pacs.example.org/dicom-web --heat-maps 3
ray job submit --working-dir . -- python jobs/report.py --model s3://bucket/model \
    --studies s3://bucket/results-studies --to dicomweb://pacs.example.org/dicom-web
"""

from btray.launch import run_job
from btray.pacs.report.config import ReportConfig


def main(config: ReportConfig) -> str:
    """Return the address of the PACS."""
    from btray.pacs.report.job import report

    return report(config)


if __name__ == "__main__":
    run_job(ReportConfig, main)
