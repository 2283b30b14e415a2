#!/usr/bin/env bash
# The tests of DeepSpeedStrategy, with DeepSpeed's operators compiled beforehand; arguments go to pytest.
#
#     tests/deepspeed.sh                  # every pair of values
#     tests/deepspeed.sh -m ""            # the complete tables
#
# FABRIC_LITE_DEEPSPEED is the folder for the environment and the operators; they stay, so that the next run starts at once.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FABRIC_LITE_DEEPSPEED:-$HOME/.cache/fabric_lite_deepspeed}
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/operators" OMP_NUM_THREADS=1
[ -d "$folder/venv" ] || python3 -m venv "$folder/venv"
export PATH="$folder/venv/bin:$PATH"
pip install -q -c constraints.txt torch==2.13.0 deepspeed ninja pytest pytest-timeout pytest-xdist scikit-learn
pip install -q --no-deps -e .
python -c "
import torch
from fabric_lite.strategies.deepspeed.ops import build_ops
build_ops(True, torch.device('cpu'))
"
pytest tests/unit/test_deepspeed_settings.py tests/distributed/test_deepspeed.py "$@"
