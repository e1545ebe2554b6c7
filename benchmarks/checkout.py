"""Put the checkout on sys.path when imported, so that a benchmark run as a script can import `tools`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
