#!/usr/bin/env bash
# Test the kernels on a GPU, then time them. Needs torch, triton, numpy and pytest, nothing else; run from the root of the repository.
#
#   bench/gpu_suite.sh [OUT] [--quick]      OUT: folder for test.log and gpu_kernels.csv, default bench/results
#
# The timings run even if a test failed (the log says which), and the exit status is then that of the tests.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=bench/results
if [[ $# -gt 0 && $1 != --* ]]; then
    out=$1
    shift
fi
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}

"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(0))' || exit 2
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8) # compiling is most of the time
"$python" -m pytest tests/kernels -p no:cacheprovider --maxfail=20 "${workers[@]}" 2>&1 | tee "$out/test.log"
tested=$?
"$python" bench/gpu_kernels.py --out "$out/gpu_kernels.csv" "$@"
timed=$?
[ $tested -ne 0 ] && exit $tested
exit $timed
