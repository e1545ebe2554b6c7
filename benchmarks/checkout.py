"""Importing this lets a benchmark that is run as a script use the rest of the checkout (`tools`) as well."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
