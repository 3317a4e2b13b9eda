#!/usr/bin/env bash
# Test the kernels on a GPU, then time them alone and in a whole model, and the packers. Needs torch, triton, transformers, numpy and pytest, nothing else.
#
#   bench/gpu_suite.sh [OUT] [--quick]      OUT: folder for test.log, gpu_kernels.csv, gpu_decode.csv and
#                                       gpu_pack_speed.csv, default bench/results
#
# SUITE_SECONDS (default 570) is shared: a third at most for the tests, 110 s for the model, 40 s for the packers, the rest for the kernels; what does not fit is written
# as not reached. Timings run even if tests fail or run out of time (test.log says which). Exit status: that of the first part that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=bench/results
if [[ $# -gt 0 && $1 != --* ]]; then
    out=$1
    shift
fi
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
total=${SUITE_SECONDS:-570}
left() { echo $((total - SECONDS)); }
but() { echo $(($(left) - $1 > 20 ? $(left) - $1 : 20)); } # what is left but for so many seconds, 20 at least

"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(0))' || exit 2
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc --ignore=2)") # compiling is most of the time
timeout -s INT -k 10 $((total / 3)) "$python" -m pytest tests/kernels -p no:cacheprovider --maxfail=40 "${workers[@]}" 2>&1 | tee "$out/test.log"
tested=$?
[ $tested -eq 124 ] && echo "tests ran out of time" | tee -a "$out/test.log"
echo "tests: status $tested, $(left) s left"

# bounds from outside a little above the budgets from inside: a kernel that hangs must not cost the rows of the model
budget=$(but 165)
timeout -k 5 $((budget + 15)) "$python" bench/gpu_kernels.py --out "$out/gpu_kernels.csv" --seconds "$budget" "$@"
timed=$?
echo "kernels: status $timed, $(left) s left"

budget=$(but 55)
timeout -k 5 $((budget + 10)) "$python" bench/gpu_decode.py --out "$out/gpu_decode.csv" --seconds "$budget"
decoded=$?
echo "decode: status $decoded, $(left) s left"
timeout -k 5 "$(but 10)" "$python" bench/pack_speed.py --rows 1024 --out "$out/gpu_pack_speed.csv"
packed=$?
echo "packers: status $packed, $(left) s left"
for status in $tested $timed $decoded $packed; do
    [ "$status" -ne 0 ] && exit "$status"
done
exit 0
