#!/usr/bin/env bash
# The whole method on built-in data, from drawn digits to one-step pictures: about 15 minutes on two CPU cores; on a GPU, six times the steps.
# Ends with runs/sanity/report.md and runs/sanity/picture.png. A second call goes on where the first was stopped.
#   SEED=1 ./sanity/run.sh            another seed, in runs/sanity-1
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh tests/requirements.txt
SEED=${SEED:-0}
RUN=runs/sanity$([ "$SEED" = 0 ] || echo "-$SEED")
DATA=data/digits
LATENTS=$RUN/latents
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    SCALE=6 WORKERS=4
else
    SCALE=1 WORKERS=0
fi
mkdir -p "$RUN"

stage() {   # NAME COMMAND...: show the command, run it, note its seconds (of the call that did the work)
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n$ %s\n' "$name" "$*"
    "$@"
    grep -qs "^$name " "$RUN/seconds.txt" || echo "$name $((SECONDS - start))" >> "$RUN/seconds.txt"
}

COMMON="--seed $SEED --log-every 200 --save-every 1000 --keep 1"

stage digits "$PYTHON" sanity/digits.py --out $DATA
stage encoder "$PYTHON" sanity/random_encoder.py --out "$RUN/encoder"
stage encode "$PYTHON" encode_latents.py --data-path $DATA/train --out "$LATENTS" --image-size 32 --encoder-size 32 --batch-size 256 \
    --workers $WORKERS --encoder "$RUN/encoder"
stage decoder "$PYTHON" sanity/train_decoder.py --data-path $DATA/train --latents "$LATENTS" --out "$RUN/decoder" --seed "$SEED"

# Latents of 1,024 numbers need no time shift by RAE's rule. It is 2.5 here, so that a shift forgotten anywhere would show.
stage teacher "$PYTHON" train_teacher.py --latents "$LATENTS" --out "$RUN/teacher" --preset DiTDH-mini --time-shift 2.5 \
    --steps $((2600 * SCALE)) --batch-size 32 --lr 2e-3 --lr-final 5e-5 --decay-from 0.4 --ema 0.998 $COMMON
stage CMT "$PYTHON" train_cmt.py --teacher "$RUN/teacher" --out "$RUN/cmt" \
    --steps $((250 * SCALE)) --batch-size 32 --pairs 16 --lr 1e-3 --lr-final 5e-5 --ema 0.99 $COMMON
# Small networks: a mild weight (docs/METHOD.md); the published one is the default at the paper's scale. Many small operations: two
# more evaluations are cheaper than the exact derivative (docs/COST.md).
WEIGHT="--loss-form mean --loss-power 0.5 --loss-eps 0.1 --derivative fd"
stage MFD "$PYTHON" train_meanflow.py --latents "$LATENTS" --teacher "$RUN/teacher" --init "$RUN/cmt" --out "$RUN/mfd" \
    --steps $((1450 * SCALE)) --batch-size 64 --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.995 $WEIGHT $COMMON
stage MFT "$PYTHON" train_meanflow.py --latents "$LATENTS" --eta 0 --init "$RUN/mfd" --out "$RUN/mft" \
    --steps $((80 * SCALE)) --batch-size 64 --lr 3e-5 --lr-final 5e-6 --ema 0.98 $WEIGHT $COMMON

samples() {   # NAME NETWORK NFE
    stage "sample $1" "$PYTHON" sample.py "$RUN/$2" --decoder "$RUN/decoder" --nfe "$3" --num-samples 5000 --batch-size 500 \
        --seed "$SEED" --out "$RUN/samples/$2_$3.npz"
}
samples "teacher 50" teacher 50
samples "teacher 1" teacher 1
samples "CMT 1" cmt 1
samples "MFD 1" mfd 1
samples "MFD 2" mfd 2
samples "MFT 1" mft 1

printf '\n== report\n'
"$PYTHON" sanity/report.py --run "$RUN" --data $DATA --seed "$SEED"
