#!/usr/bin/env bash
# The whole method on built-in data, from drawn digits to one-step pictures: about 15 minutes on two CPU
# cores; on a GPU, meant for three. Ends with runs/sanity/report.md and picture.png. A second call goes on.
#   SEED=1 ./sanity/run.sh            another seed, in runs/sanity-1
#   PLAN=gpu TINY=2 ./sanity/run.sh   the GPU's plan (or cpu's) in two steps a stage, in runs/sanity-tiny
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh tests/requirements.txt
SEED=${SEED:-0} RUN=runs/sanity DATA=data/digits IMAGES=20000 HELD_OUT=5000 SAMPLES=5000
[ "$SEED" = 0 ] || RUN=$RUN-$SEED
PLAN=${PLAN:-$("$PYTHON" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}

# ROWS: of decoder, teacher and CMT; WIDE: of MeanFlow. These networks keep a GPU waiting for the next
# operation: there more rows cost little, bf16 would add casts, and what is compiled would not be used long.
case $PLAN in
    cpu) ROWS=32 WIDE=64 SAMPLING=500 WORKERS=0 MICRO= ;;
    gpu) ROWS=128 WIDE=128 SAMPLING=5000 WORKERS=8 MICRO=--micro-batch ;;
    *) echo "PLAN=$PLAN: it is cpu or gpu" >&2; exit 2 ;;
esac
[ -z "${TINY:-}" ] || RUN=$RUN-tiny DATA=$DATA-tiny IMAGES=200 HELD_OUT=50 SAMPLES=20 ROWS=16 WIDE=16

run() {   # a script and its arguments, shown first
    printf '\n$ %s\n' "$*"
    "$PYTHON" "$@"
}

run sanity/digits.py --out $DATA --train $IMAGES --held-out $HELD_OUT
run sanity/random_encoder.py --out "$RUN/encoder"
run encode_latents.py --data-path $DATA/train --out "$RUN/latents" --encoder "$RUN/encoder" \
    --image-size 32 --encoder-size 32 --batch-size 256 --workers $WORKERS
run sanity/train_decoder.py --data-path $DATA/train --latents "$RUN/latents" --out "$RUN/decoder" \
    --steps "${TINY:-1300}" --batch-size $ROWS --seed "$SEED"

COMMON="--seed $SEED --precision fp32 --log-every 200 --save-every 1000 --keep 1 ${MICRO:+$MICRO $WIDE}"
# Latents of 1,024 numbers need no time shift by RAE's rule: 2.5, so that one forgotten anywhere would show.
run train_teacher.py --latents "$RUN/latents" --out "$RUN/teacher" --preset DiTDH-mini --time-shift 2.5 \
    --steps "${TINY:-2600}" --batch-size $ROWS --lr 2e-3 --lr-final 5e-5 --decay-from 0.4 --ema 0.998 $COMMON
run train_cmt.py --teacher "$RUN/teacher" --out "$RUN/cmt" \
    --steps "${TINY:-250}" --batch-size $ROWS --pairs 16 --lr 1e-3 --lr-final 5e-5 --ema 0.99 $COMMON
# Small networks: a mild weight (docs/METHOD.md); the published one is the default at the paper's scale. Many
# small operations: two more evaluations are cheaper than the exact derivative (docs/COST.md).
WEIGHT="--loss-form mean --loss-power 0.5 --loss-eps 0.1 --derivative fd"
run train_meanflow.py --latents "$RUN/latents" --teacher "$RUN/teacher" --init "$RUN/cmt" --out "$RUN/mfd" \
    --steps "${TINY:-1450}" --batch-size $WIDE --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.995 \
    $WEIGHT $COMMON
run train_meanflow.py --latents "$RUN/latents" --eta 0 --init "$RUN/mfd" --out "$RUN/mft" \
    --steps "${TINY:-80}" --batch-size $WIDE --lr 3e-5 --lr-final 5e-6 --ema 0.98 $WEIGHT $COMMON

for sample in "teacher 50" "teacher 1" "cmt 1" "mfd 1" "mfd 2" "mft 1"; do
    read -r name nfe <<< "$sample"
    run sample.py "$RUN/$name" --decoder "$RUN/decoder" --nfe "$nfe" --num-samples $SAMPLES \
        --batch-size $SAMPLING --seed "$SEED" --out "$RUN/samples/${name}_$nfe.npz"
done
run sanity/report.py --run "$RUN" --data $DATA --seed "$SEED" --classifier-steps "${TINY:-200}"
