#!/usr/bin/env bash
# Everything that a CUDA GPU has to show, in under ten minutes. See benchmarks/gpu.py for the parts and options.
#
#   bash benchmarks/gpu.sh                            all parts, on the GPU
#   bash benchmarks/gpu.sh --parts device,tests       some of them
#   bash benchmarks/gpu.sh --data cifar10.npz         with CIFAR-10, packed by python -m benchmarks.packed_images
#   bash benchmarks/gpu.sh --dry                      the same way on the CPU, with tiny sizes
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 WANDB_MODE=disabled
python=${PYTHON:-$(command -v python || command -v python3)}
exec "$python" -m benchmarks.gpu "$@"
