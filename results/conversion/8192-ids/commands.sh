#!/usr/bin/env bash
# The commands behind this folder: a Pythia-70M body trained on the built-in corpus, converted at several budgets, by
# three weightings, healed, and evaluated on the text that its training held out. Runs in any folder; hours on 2 cores.
set -euo pipefail

M=runs/pythia-70m-8k/models/pythia-70m
context-pythia train report --model Pythia-70M --set data.vocab_size=8192 --set model_vocab_size=8192 --samples 5000 \
    --learning-rate 3e-4 --set train.checkpoint_steps=70 --out runs/pythia-70m-8k

context-pythia convert $M --kv-reduction 0.5 --out conv/exact-50
for r in 0.625 0.75 0.8125 0.875; do
    context-pythia convert $M --kv-reduction $r --samples 5000 --out conv/gradients-$r
done
for w in inputs none; do
    for r in 0.75 0.8125 0.875; do
        context-pythia convert $M --kv-reduction $r --samples 5000 --weighting $w --out conv/$w-$r
    done
done
# 2,500 samples hold out the first half of the text that 5,000 hold out.
context-pythia eval $M conv/exact-50 conv/gradients-* conv/inputs-* conv/none-* \
    --samples 2500 --cached-tokens 2048 --lang ja --out conversion

for r in 0.75 0.875; do
    context-pythia convert $M --kv-reduction $r --samples 5000 --heal-steps 60 --heal-precision bfloat16 \
        --heal-learning-rate 3e-4 --out conv/healed-$r
done

context-pythia eval $M conv/exact-50 --samples 40 --sequence-length 2048 --batch-size 1 --cached-tokens 2048 \
    --out exact-2048
