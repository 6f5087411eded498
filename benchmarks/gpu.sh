#!/usr/bin/env bash
# Everything worth doing on one GPU, in under eight minutes; results in $OUT (default: runs/gpu).
#   make wheels                    # where there is a network: what the GPU machine lacks, into .wheels
#   bash benchmarks/gpu.sh         # there
#   bash benchmarks/gpu.sh --cpu   # the same steps with tiny shapes, without a GPU and its limits of time
# No network, no data set and no model folder: random models, words drawn at random, the controlled task.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export BETA_DPO_CACHE=${BETA_DPO_CACHE:-$OUT/cache} PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0
gpu=1
[ "${1:-}" = --cpu ] && gpu=0
LIMIT=${LIMIT:-$((gpu ? 470 : 7200))}

step() { # NAME SECONDS COMMAND…: a step that fails or takes too long does not end the others; $LIMIT s in all
    local name=$1 started=$SECONDS left=$((LIMIT - SECONDS))
    local seconds=$((gpu ? $2 : left)) # the limits are those of a GPU
    shift 2
    [ $left -gt 5 ] || { echo "$name: no time left" | tee -a "$OUT/steps.txt"; failed=1; return; }
    # not SIGTERM: Lightning makes it an exception of the test at work, which then counts as failed while pytest goes on
    timeout -s INT -k 10 $((seconds < left ? seconds : left)) "$@" > "$OUT/$name.log" 2>&1
    local status=$?
    echo "$name: status $status after $((SECONDS - started)) s" | tee -a "$OUT/steps.txt"
    tail -n 15 "$OUT/$name.log"
    [ $status -eq 0 ] || failed=1
}

: > "$OUT/steps.txt"
if [ $gpu = 1 ]; then
    $PYTHON -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 1
    step install 60 $PYTHON -m pip install -q --no-index --no-deps .wheels/*.whl
    step install_self 60 $PYTHON -m pip install -q --no-index --no-deps --no-build-isolation -e .
    accelerator=gpu fsdp_steps=20 sft_steps=40 tests=test kernels=(ours-varlen ours-flex)
    shapes=(--device cuda --hidden 2048 --layers 24 --vocabulary 32000 --batch-size 64 --micro-batch-tokens 8192 --steps 3)
    wide=(--device cuda --hidden 4096 --layers 4 --vocabulary 128256 --batch-size 64 --micro-batch-tokens 8192 --steps 3)
else
    accelerator=cpu fsdp_steps=2 sft_steps=2 tests=stages kernels=() # `make test` runs the others on the stand-in
    shapes=(--hidden 64 --layers 2 --vocabulary 512 --batch-size 4 --steps 1)
    wide=(--hidden 128 --layers 1 --vocabulary 1024 --batch-size 4 --steps 1)
fi
fit=(-m app.main fit --config configs/quickstart.yaml --trainer.accelerator $accelerator --trainer.limit_val_batches 2
    --trainer.logger.save_dir "$OUT")

# every path of the product, and FlexAttention's log-probabilities and gradients against plain rows
step device 120 $PYTHON -m pytest -q tests/test_cuda_runs.py -k $tests
step parity 90 $PYTHON -m pytest -q tests/lightning_modules/test_packed_forward.py -k "cuda"
# FSDP2 in bf16, a sharded checkpoint, and its export
step sft 60 $PYTHON -m app.main fit --config configs/quickstart_sft.yaml --trainer.accelerator $accelerator \
    --trainer.max_steps $sft_steps --trainer.logger.save_dir "$OUT" --trainer.logger.name sft --trainer.logger.version ''
step sft_export 60 $PYTHON -m app.main export "$OUT/sft/checkpoints/last.ckpt" "$OUT/sft-model"
step fsdp 90 $PYTHON "${fit[@]}" --config configs/strategy/fsdp.yaml --trainer.devices 1 --model.name "$OUT/sft-model" \
    --trainer.max_steps $fsdp_steps --trainer.logger.name fsdp --trainer.logger.version ''
step fsdp_export 60 $PYTHON -m app.main export "$OUT/fsdp/checkpoints/last.ckpt" "$OUT/fsdp-model"
# a Llama of 1.4 billion parameters, and four layers as wide as those of 8 billion, in bf16, against a plain step and TRL
step throughput 200 $PYTHON -m benchmarks.throughput "${shapes[@]}" --repeats 1 \
    --contestants "${kernels[@]}" plain gemm ours trl --name gpu --out "$OUT/benchmarks.json"
step throughput_wide 150 $PYTHON -m benchmarks.throughput "${wide[@]}" --repeats 1 \
    --contestants "${kernels[@]}" plain gemm --name gpu-wide --out "$OUT/benchmarks.json"
cat "$OUT/steps.txt"
exit $failed
