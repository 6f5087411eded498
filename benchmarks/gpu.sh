#!/usr/bin/env bash
# Everything worth doing on one GPU, in under eight minutes; results in $OUT (default: runs/gpu).
#   pip install -e '.[test,trl]' && bash benchmarks/gpu.sh
# No network, no data set and no model folder: random models, words drawn at random, the controlled task.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
export BETA_DPO_CACHE=${BETA_DPO_CACHE:-$OUT/cache}
failed=0

step() { # NAME SECONDS COMMAND…: a step that fails or takes too long does not end the others
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1
    local status=$?
    echo "$name: status $status after $((SECONDS - started)) s"
    [ $status -eq 0 ] || { failed=1; tail -n 15 "$OUT/$name.log"; }
}

python -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 1

# FlexAttention's block masks give the log-probabilities and gradients of plain rows
step parity 90 python -m pytest tests/lightning_modules/test_packed_forward.py -k cuda
# FSDP2 in bf16, a sharded checkpoint, and its export
step sft 60 beta-dpo fit --config configs/quickstart/sft.yaml --trainer.accelerator gpu --trainer.max_steps 40 \
    --trainer.logger.save_dir "$OUT"
step sft_export 60 beta-dpo export "$OUT/sft/checkpoints/last.ckpt" "$OUT/sft-model"
step fsdp 90 beta-dpo fit --config configs/quickstart.yaml --config configs/strategy/fsdp.yaml --trainer.devices 1 \
    --trainer.accelerator gpu --model.name "$OUT/sft-model" --trainer.max_steps 20 \
    --trainer.logger.save_dir "$OUT" --trainer.logger.name fsdp
step fsdp_export 60 beta-dpo export "$OUT/fsdp/checkpoints/last.ckpt" "$OUT/fsdp-model"
# a Llama of 1.4 billion parameters, 64 pairs a step, 16k tokens a micro-batch, bf16, against TRL
step throughput 300 python -m benchmarks.throughput --device cuda --hidden 2048 --layers 24 --vocabulary 32000 \
    --batch-size 64 --micro-batch-tokens 16384 --steps 4 --repeats 1 --contestants ours ours-compiled trl gemm \
    --name gpu --out "$OUT/benchmarks.json"
tail -n 12 "$OUT/throughput.log"
exit $failed
