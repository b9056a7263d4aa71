#!/usr/bin/env bash
# The commands behind this folder: the baseline of the recipe `report`, converted at several budgets by three weightings,
# evaluated on the text that its training held out, quantised, and healed; and a larger model, for time and memory. Two
# hours and a half on 2 cores, half of it training; $1 and $2 are the corpus and its tokenizer. They were run one by one,
# conversions after the first with its statistics.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DATA="--data $1"
context-pythia compare report $DATA --tokenizer "$2" --models Pythia-70M --set train.checkpoint_steps=94 --out report
M=report/models/pythia-70m

context-pythia convert $M --kv-reduction 0.5 --out exact-50
for w in gradients inputs none; do
    for r in 0.625 0.75 0.8125 0.875; do
        context-pythia convert $M --kv-reduction $r $DATA --weighting $w --out $w-$r
    done
done
# 2,500 samples hold out a quarter of the text that the training's 10,000 hold out.
context-pythia eval $M exact-50 gradients-* inputs-* none-* \
    $DATA --samples 2500 --cached-tokens 4096 --lang ja --out conversion
context-pythia eval $M exact-50 gradients-0.75 gradients-0.875 --cache int8 --cache int4 \
    $DATA --samples 1000 --cached-tokens 4096 --lang ja --out quantised
context-pythia eval $M exact-50 $DATA --samples 40 --sequence-length 2048 --batch-size 1 --cached-tokens 2048 \
    --out exact-2048

# Half an epoch: towards the original, or by the text alone as its control.
HEAL="$DATA --heal-steps 141 --heal-precision bfloat16 --heal-learning-rate 3e-4"
context-pythia convert $M --kv-reduction 0.875 $HEAL --out healed-0.875
for r in 0.75 0.875; do
    context-pythia convert $M --kv-reduction $r $HEAL --heal-ce-weight 1 --out text-$r
done
context-pythia convert $M --control $HEAL --heal-ce-weight 1 --out control

python "$HERE/random_model.py" pythia-410m "$2" 410m
context-pythia convert 410m --kv-reduction 0.5 --out 410m-half
context-pythia convert 410m --kv-reduction 0.75 $DATA --calibration-tokens 2048 --out 410m-quarter
# Of the healed models and those of 410M the folder keeps conversion.json.
